"""What TF32 and bfloat16 storage do to predictions, against float64.

    SRCGCNN_TEST_DATA=... python benchmarks/gpu/precision.py

With ``SRCGCNN_TEST_DATA``: both published checkpoints on crystals of the Materials Project's test part, and the change
of their mean absolute errors. Without, or where that cannot be read: models with random weights on made-up crystals.
Without a GPU the kernels of csrc/cuda run in the emulation of CUDA that their tests use, or, with ``--triton``, those
of Triton in its interpreter with the operands of products of rows rounded as TF32 rounds them; the output says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from crystals import batches  # noqa: E402

import srcgcnn_fast as sf  # noqa: E402
from srcgcnn_fast.ops import cpu, cuda, fused, precision  # noqa: E402
from srcgcnn_fast.ops import triton as backend  # noqa: E402

Case = tuple[str, Any, Any, torch.Tensor | None]
"""Name, model, batch on the CPU, targets (B,) or None."""


def cases(n_crystals: int) -> list[Case]:
    folder = os.environ.get("SRCGCNN_TEST_DATA", "")
    if folder and Path(folder, "upstream").is_dir():
        try:
            return published(Path(folder), n_crystals)
        except (sf.InputError, ImportError) as error:
            print(f"made-up crystals in place of the published checkpoints: {error}", file=sys.stderr)
    batch, found = batches(n_crystals, "cpu")[0], []
    for model_type in (sf.CGCNN, sf.SRCGCNN):
        torch.manual_seed(0)
        model = model_type()
        with torch.no_grad(), sf.use_backend("reference"):
            model.train()(batches(64, "cpu", seed=1)[0])  # running statistics that are those of crystals
        found.append((f"{model_type.__name__}, random weights, made-up crystals", model, batch, None))
    return found


def published(folder: Path, n_crystals: int) -> list[Case]:
    found = []
    for name in ("formation-energy-per-atom", "band-gap"):
        model, target = sf.load_model(folder / "upstream" / f"{name}.pth.tar"), name.replace("-", "_")
        records = list(islice(sf.graph.read_inputs(folder / "mp" / "test.parquet", targets=(target,)), n_crystals))
        p = model.metadata.graph
        graphs = sf.build_graphs(
            [r.crystal for r in records], p.radius, p.max_neighbors, p.symmetry_tolerance, padded=p.padded,
            isolated="keep",
        )  # fmt: skip
        values = torch.tensor([r.targets[target] for r in records], dtype=torch.float64)
        found.append((f"CGCNN published for {target}, Materials Project", model, sf.collate(graphs), values))
    return found


@contextmanager
def emulated_cuda() -> Iterator[None]:
    """The CUDA backend for CPU tensors: the kernels' source, compiled for the CPU."""
    path = HERE.parents[1] / "tests" / "ops" / "cuda" / "emulated.py"
    spec = importlib.util.spec_from_file_location("emulated", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with tempfile.TemporaryDirectory() as folder:
        library = module.Emulated(module.build(Path(folder), module.KERNELS / "stack.cu"))
        before = cuda.native, cpu.NetworkParameters
        library.gpu(132, 228 << 10)
        cuda.native, cpu.NetworkParameters = lambda: library, cuda.NetworkParameters
        try:
            yield
        finally:
            cuda.native, cpu.NetworkParameters = before


@contextmanager
def emulated() -> Iterator[None]:
    """The Triton backend for CPU tensors: kernels in the interpreter, TF32 by rounding what is multiplied."""
    before = cpu.stack, torch.addmm, torch.nn.functional.linear, dict(backend.TILES)
    takes = fused.takes_readout, fused.takes_network
    round_ = lambda x: tf32(x) if precision.tf32_is_allowed() and x.dtype == torch.float32 else x  # noqa: E731
    cpu.stack = backend.stack
    fused.takes_readout = fused.takes_network = lambda *_: False  # their maps are torch's
    torch.addmm = lambda bias, a, b, **more: before[1](bias, round_(a), round_(b), **more)
    torch.nn.functional.linear = lambda x, weight, bias=None: before[2](round_(x), round_(weight), bias)
    backend.TILES["gate_sum"] = backend.Tile(64, 16, 64, 4)  # a step of a program takes the interpreter milliseconds
    try:
        yield
    finally:
        cpu.stack, torch.addmm, torch.nn.functional.linear = before[:3]
        backend.TILES.update(before[3])
        fused.takes_readout, fused.takes_network = takes


def tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to 10 bits of mantissa, halves away from zero."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@torch.no_grad()
def effects(device: str, n_crystals: int) -> list[dict[str, Any]]:
    """For each model and precision: relative L2 error and mean and largest change of the predictions, change of MAE."""
    found = []
    for name, model, batch, target in cases(n_crystals):
        with sf.use_backend("reference"):
            exact = model.double().eval().predict(batch.to(dtype=torch.float64))
        model.float().to(device)
        for how in precision.NAMES:
            batch.cache.clear()
            with sf.use_precision(how):
                out = model.predict(batch.to(device)).double().cpu()
            change = (out - exact).abs()
            line: dict[str, Any] = {
                "model": name, "crystals": len(exact), "precision": how,
                "relative L2": float((out - exact).norm() / exact.norm()),
                "mean change": float(change.mean()), "largest change": float(change.max()),
            }  # fmt: skip
            if target is not None:
                mae, before = ((x[:, 0] - target).abs().mean() for x in (out, exact))
                line |= {"MAE": float(mae), "change of MAE": float(mae - before)}
            found.append(line)
    return found


def table(lines: list[dict[str, Any]]) -> str:
    text = ["| model | crystals | precision | relative L2 | mean, largest change | MAE, change |", "| --- " * 6 + "|"]
    for x in lines:
        mae = f"{x['MAE']:.5f}, {x['change of MAE']:+.1e}" if "MAE" in x else "–"
        changes = f"{x['mean change']:.1e}, {x['largest change']:.1e}"
        numbers = (x["model"], x["crystals"], x["precision"], f"{x['relative L2']:.1e}", changes, mae)
        text.append("| " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crystals", type=int, default=300)
    parser.add_argument("--triton", action="store_true", help="on a GPU too")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    options = parser.parse_args()
    if torch.cuda.is_available():
        with sf.use_backend("triton") if options.triton else nullcontext():
            lines = effects("cuda", options.crystals)
    else:
        with emulated() if options.triton else emulated_cuda():
            lines = effects("cpu", options.crystals)
    print(json.dumps(lines) if options.json else table(lines))
    if not torch.cuda.is_available():
        how = "Triton's kernels in its interpreter" if options.triton else "those of csrc/cuda in an emulation of CUDA"
        print(f"\nEmulated on the CPU: {how}.")
