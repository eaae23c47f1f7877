"""Compiles every launch of the Triton backend for GPUs that need not be there, and prints the compiler's report.

A script for a process of its own, because Triton's interpreter and compiler exclude each other. Usage: python
triton_ahead_of_time.py [--training-and-inference] [--dot] [--bfloat16] ARCHITECTURE...; a JSON line for each launch and
architecture. The first flag leaves out edge features, gradients of edges, and evaluation with gradients; the others
form the filter by tl.dot and store rows and filters in bfloat16.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from srcgcnn_fast.ops import precision
from srcgcnn_fast.ops import triton as backend
from srcgcnn_fast.ops.cpu import STILL, Graph, Layer, Moments, Running

_TYPES = {torch.float32: "*fp32", torch.int32: "*i32", torch.float64: "*fp64", torch.bfloat16: "*bf16"}
DOT = {
    "gate_sum": backend.Tile(8, 4, 32, 4, by_dot=True),
    "backward_rows": backend.Tile(4, 4, 32, 4, by_dot=True),
    "backward_senders": backend.Tile(4, 4, 32, 4, by_dot=True),
}
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Recorder:
    """Stands where the kernels stand, and writes down what they were launched with."""

    def __init__(self, module: Any) -> None:
        self.module, self.launches = module, {}

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self.module, name)

        class Launcher:
            def __getitem__(_self, grid: Any) -> Any:
                return lambda *args, **options: self.record(kernel, args, options)

        return Launcher()

    def record(self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False))
        launch = {k: v for k, v in options.items() if k not in kernel.arg_names}
        given |= {k: v for k, v in options.items() if k in kernel.arg_names}
        signature, constants, attributes = {}, {}, {}
        for place, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
            value = given[name]
            if parameter.is_constexpr or value is None:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name], attributes[(place,)] = _TYPES[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
        key = (kernel.__name__, json.dumps([signature, constants, launch], sort_keys=True))
        self.launches[key] = (kernel, signature, constants, attributes, launch)


def launches(width: int, n_features: int, few: bool = False) -> dict[Any, Any]:
    """Everything that training, evaluation, gradients of edges and inference launch, with and without edge features;
    ``few``: training and inference from distances."""
    recorder = Recorder(backend.kernels())
    backend.kernels = lambda: recorder  # type: ignore[assignment]
    n, e, c = 1001, 12003, 2 * width
    i = lambda size: torch.zeros(size, dtype=torch.int32)  # noqa: E731
    zeros = torch.zeros
    vectors = [zeros(c), zeros(c), zeros(c), zeros(width), zeros(width), zeros(c), zeros(c), zeros(width), zeros(width)]
    h = zeros(n, width)
    for features, training in itertools.product((None,) if few else (None, zeros(e, n_features)), (True, False)):
        graph = Graph(zeros(e), features, i(e), i(n + 1), i(2), None, None, None, 0.0, 0.2)
        layer = Layer(zeros(c, c + n_features), *vectors, 1e-5, 1e-5, training, training)
        if few and not training:
            backend.stack(h, [layer], graph)
            break
        moments = Moments(zeros(n), *backend.edge_moments(zeros(n), graph, n_features))
        running = Running(*vectors[5:], 0.1, 0.1) if training else STILL
        _, statistics, kept = backend.convs(h, [layer], graph, moments, None, [running])
        backend.convs_backward(h, h, statistics, kept, [layer], graph, moments, not training)
        if not few:
            backend.conv(h, layer, graph, moments)
            backend.conv_backward(h, h, h, layer, graph, moments, False)
        if not training:
            backend.stack(h, [layer], graph)
    return recorder.launches


def report(cubin: bytes) -> dict[str, int]:
    """Registers, bytes of stack, and how many instructions spill and load, from the machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        dump = [str(_BIN / "cuobjdump"), "-res-usage", "-sass", str(path)]
        said = subprocess.run(dump, capture_output=True, text=True, check=True)
    text = said.stdout + said.stderr
    usage = {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK")}
    count = lambda pattern: len(re.findall(pattern, text))  # noqa: E731
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "spills": count(r"\b(?:LDL|STL)\b"),
        "loads": count(r"\bLDG\b"),
        "wide_loads": count(r"\bLDG\S*\.128"),
    }


if __name__ == "__main__":
    flags = {x for x in sys.argv[1:] if x.startswith("--")}
    architectures = [int(x) for x in sys.argv[1:] if x not in flags]
    if "--dot" in flags:
        backend.TILES.update(DOT)
    with precision.use_precision("bfloat16" if "--bfloat16" in flags else "float32"):
        found = launches(64, 41, "--training-and-inference" in flags)
    for (name, _), (kernel, signature, constants, attributes, options) in found.items():
        for arch in architectures:
            source = ASTSource(kernel, signature, constants, attributes)
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            without = [k for k, v in constants.items() if v is None]
            line = {"kernel": name, "arch": arch, "without": without, "shared": compiled.metadata.shared}
            print(json.dumps(line | report(compiled.asm["cubin"])), flush=True)
