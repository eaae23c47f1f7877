"""Two builds of the CPU kernels side by side, in one process: what a change to ``csrc/cpu`` costs.

    python benchmarks/builds.py BEFORE/_core.cpython-….so [--crystals 64]

Milliseconds of whole models on 256 crystals, drawn four times of those of ``workload.py``, as symmetry quotients, new
in every round; medians of 20 rounds, alternating. The predictions of both must agree.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from typing import Any

import numpy as np
import torch
import workload

import srcgcnn_fast as sf
from srcgcnn_fast.ops import cpu

ROUNDS, DRAWS = 20, 4


def loaded(path: str) -> Any:
    loader = ExtensionFileLoader("_core", path)
    spec = spec_from_loader("_core", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="the compiled module of the other build")
    parser.add_argument("--crystals", type=int, default=256, help="in a batch")
    arguments = parser.parse_args()
    now, before = cpu.core, loaded(arguments.before)
    drawn = [sf.build_graphs(workload.draw(arguments.crystals, seed), isolated="keep") for seed in range(DRAWS)]
    users = [x for x in list(sys.modules.values()) if x is not None and getattr(x, "core", None) is now]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for kind in (sf.SRCGCNN, sf.CGCNN):
            for dtype in (torch.float32, torch.float64):
                torch.manual_seed(0)
                model = kind(3).to(dtype)
                for trains in (False, True):
                    outs, took = {}, {"before": [], "now": []}
                    for turn in range(2 * ROUNDS + 2):
                        name = "now" if turn % 4 in (1, 2) else "before"
                        for user in users:
                            user.core = {"now": now, "before": before}[name]  # type: ignore[attr-defined]
                        batch = sf.collate(drawn[turn // 2 % DRAWS], distance_dtype=dtype)
                        model.train(trains)
                        start = time.perf_counter()
                        with torch.set_grad_enabled(trains):
                            out = model(batch)
                            if trains:
                                out.square().mean().backward()
                        took[name].append(time.perf_counter() - start)
                        outs[name] = out.detach()
                    if not trains:
                        torch.testing.assert_close(outs["now"], outs["before"], rtol=1e-5, atol=1e-5)
                    old, new = (1e3 * float(np.median(took[x][1:])) for x in ("before", "now"))
                    work = f"{kind.__name__}, {str(dtype)[6:]}, {'training step' if trains else 'inference'}"
                    print(f"{threads} threads, {work}: {old:.2f} ms before, {new:.2f} now, {new / old:.3f} times")


if __name__ == "__main__":
    main()
