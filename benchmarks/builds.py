"""Two versions of the package side by side, in one process, on the CPU: what a change costs.

    git worktree add ../before COMMIT && python -m pip install --no-deps --target ../build ../before
    python benchmarks/builds.py ../build [--crystals 64]

Milliseconds of whole models on batches of 256 crystals, drawn four times of those of ``workload.py``, as symmetry
quotients, new in every round; medians of 20 rounds, alternating. The predictions of both must agree. The other version
is loaded from a copy that has another name.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workload

import srcgcnn_fast as sf

ROUNDS, DRAWS = 20, 4
GIVEN = 7  # fields of a batch up to atom_class
NAME = sf.__name__
RENAMED = f"{NAME}_before"


def loaded(build: Path, folder: Path) -> Any:
    """The package that was installed in ``build``; its modules, operators and messages get the other name."""
    shutil.copytree(build / NAME, folder / RENAMED)
    for source in (folder / RENAMED).rglob("*.py"):
        source.write_text(source.read_text().replace(NAME, RENAMED))
    sys.path.insert(0, str(folder))
    return importlib.import_module(RENAMED)


def seconds(package: Any, model: Any, given: Any, trains: bool) -> tuple[float, torch.Tensor]:
    """Of one call on a batch that is new to the package, and the outputs."""
    batch = package.GraphBatch(*(getattr(given, field.name) for field in dataclasses.fields(given)[:GIVEN]))
    model.train(trains).zero_grad()
    start = time.perf_counter()
    with torch.set_grad_enabled(trains):
        out = model(batch)
        if trains:
            out.square().mean().backward()
    return time.perf_counter() - start, out.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path, help="where the other version is installed")
    parser.add_argument("--crystals", type=int, default=256, help="in a batch")
    arguments = parser.parse_args()
    drawn = [sf.build_graphs(workload.draw(arguments.crystals, seed), isolated="keep") for seed in range(DRAWS)]
    with tempfile.TemporaryDirectory() as folder:
        packages = {"before": loaded(arguments.build, Path(folder)), "now": sf}
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for kind in ("SRCGCNN", "CGCNN"):
                for dtype in (torch.float32, torch.float64):
                    compare(packages, kind, dtype, drawn, threads)


def compare(packages: dict[str, Any], kind: str, dtype: torch.dtype, drawn: list[Any], threads: int) -> None:
    models = {}
    for name, package in packages.items():
        torch.manual_seed(0)
        models[name] = getattr(package, kind)(3).to(dtype)
    for trains in (False, True):
        outs, took = {}, {name: [] for name in packages}
        for turn in range(2 * ROUNDS + 2):
            name = "now" if turn % 4 in (1, 2) else "before"
            batch = sf.collate(drawn[turn // 2 % DRAWS], distance_dtype=dtype)
            spent, outs[name] = seconds(packages[name], models[name], batch, trains)
            took[name].append(spent)
        torch.testing.assert_close(outs["now"], outs["before"], rtol=1e-4, atol=1e-4)
        old, new = (1e3 * float(np.median(took[name][1:])) for name in ("before", "now"))
        work = f"{kind}, {str(dtype)[6:]}, {'training step' if trains else 'inference'}"
        print(f"{threads} threads, {work}: {old:.2f} ms before, {new:.2f} now, {new / old:.3f} times", flush=True)


if __name__ == "__main__":
    main()
