"""What the kernels of csrc/cuda ask of shared memory and of the caches, counted without a GPU.

    SRCGCNN_TEST_DATA=... python benchmarks/gpu/traffic.py training
    SRCGCNN_TEST_DATA=... python benchmarks/gpu/traffic.py inference

nvcc compiles them to PTX, which runs in the emulation of CUDA that their tests use (tests/ops/cuda/traffic.cpp says how
accesses of a warp are put together). For each kernel: accesses of warps; wavefronts of shared memory, and how many of
them are conflicts of banks; sectors of 32 bytes of other memory, and how many would do. Then the lines of the source
that ask for more than they need. Numbers are those of a row of the batch, over all steps. What a launch does once,
whatever the batch, weighs more here than in the large batches of a GPU. It measures nothing. Some minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import crystals  # noqa: E402

import srcgcnn_fast as sf  # noqa: E402
from srcgcnn_fast.ops import cpu, cuda, cuda_conv, fused, registry  # noqa: E402

SHARE = 0.05
"""Of what a kernel asks for: lines that waste less are left out."""


def counted(
    work: str, batch: sf.GraphBatch, precision: str, architecture: str
) -> list[tuple[str, str, dict[str, int]]]:
    """Of an SR-CGCNN as published, F = 64."""
    path = HERE.parents[1] / "tests" / "ops" / "cuda" / "emulated.py"
    spec = importlib.util.spec_from_file_location("emulated", path)
    assert spec is not None and spec.loader is not None
    emulated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulated)
    torch.manual_seed(0)
    model = sf.SRCGCNN()
    with torch.no_grad(), sf.use_backend("reference"):
        model.train()(crystals.batches(64, "cpu", seed=1)[0])  # running statistics that are those of crystals
    with tempfile.TemporaryDirectory() as folder:
        source = emulated.KERNELS / ("conv.cu" if work == "training" else "stack.cu")
        build = emulated.build(Path(folder), source, widths=(64,), architecture=architecture, traffic=True)
        library = emulated.Emulated(build)
        # An H200's; in inference fewer, so that each takes as many crystals as it has room for.
        library.gpu(132 if work == "training" else 3, 228 << 10)
        cuda.native = cuda_conv.native = lambda: library
        if work == "training":  # calls on tensors of the CPU go where those on a GPU's go
            registry.select, registry.trains_compiled = lambda *_, **__: "cuda", lambda _: True
            fused.is_eager, fused.missing_channels = lambda _, device="cpu": device == "cuda", lambda _: 0
            fused.shells = lambda _: (None, None, None)
        else:
            cpu.NetworkParameters = cuda.NetworkParameters
        with sf.use_precision(precision), torch.set_grad_enabled(work == "training"):
            out = model.train(work == "training")(batch)
            if work == "training":
                out.square().mean().backward()
        if not library.launches():
            raise RuntimeError("No kernel ran.")
        return library.traffic()


def table(found: list[tuple[str, str, dict[str, int]]], rows: int) -> str:
    names = sorted({kernel for kernel, _, _ in found})
    demangled = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    short = {name: re.sub(r"^void |srcgcnn::|\(.*", "", text) for name, text in zip(names, demangled, strict=True)}
    kernels: dict[str, Counter[str]] = defaultdict(Counter)
    lines: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for kernel, place, numbers in found:
        space = "shared" if numbers["shared"] else "memory"
        wasted = numbers["conflicts"] + numbers["sectors"] - numbers["least_sectors"]
        numbers = numbers | {f"{space} accesses": numbers["accesses"], "wasted": wasted}
        kernels[kernel].update(numbers)
        lines[kernel][f"{place}, {space}"].update(numbers)
    asked = lambda x: x["wavefronts"] + x["sectors"] / 4  # noqa: E731
    columns = ("shared accesses", "wavefronts", "conflicts", "memory accesses", "sectors", "least_sectors")
    text = [f"| of a row | {' | '.join(columns).replace('_', ' ')} |", "| --- " * (len(columns) + 1) + "|"]
    order = sorted(kernels, key=lambda kernel: -asked(kernels[kernel]))
    for kernel in order:
        text.append(f"| {short[kernel]} | {' | '.join(f'{kernels[kernel][x] / rows:.1f}' for x in columns)} |")
    text += ["", "Lines that ask for more than they need:", ""]
    for kernel in order:
        for place, x in sorted(lines[kernel].items(), key=lambda line: -line[1]["wasted"]):
            if x["wasted"] > SHARE * (kernels[kernel]["wavefronts"] + kernels[kernel]["sectors"]):
                what = "conflicts" if place.endswith("shared") else "sectors"
                more = f"{x['wasted'] / rows:.1f} {what} too many for {x['accesses'] / rows:.1f} accesses"
                text.append(f"* {short[kernel]}, {place}: {more} of {x['lanes'] / x['accesses']:.0f} lanes")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", choices=["training", "inference"])
    parser.add_argument("--crystals", type=int, default=100)
    parser.add_argument("--native", action="store_true", help="quotients, not the same graph")
    parser.add_argument("--precision", default="float32", choices=["float32", "tf32", "bfloat16"])
    parser.add_argument("--architecture", default="90")
    options = parser.parse_args()
    native, same = crystals.forms(options.crystals, "cpu")
    batch = native if options.native else same
    found = counted(options.work, batch, options.precision, options.architecture)
    rows = len(batch.numbers)
    print(f"{options.work}, {options.precision}, {options.crystals} crystals ({crystals.source()}), {rows} rows\n")
    print(table(found, rows))


if __name__ == "__main__":
    main()
