"""Microseconds that Python takes of a small batch on a GPU, without one: kernels, graphs and copies that do nothing.

    python benchmarks/host_time.py

One crystal of 24 atoms on one thread: ``predict`` with the CUDA backend's functions, a call of ``CapturedModel`` with
the batch on the device or on the CPU, and, on the CPU with its own kernels, ``predict``. Milliseconds for 40 000
crystals of a store, of which packing takes a part, with a model that gives zeros; and, where Triton is installed, for a
training step of 64 rows on it, without its launches.
"""

from __future__ import annotations

import time
import types
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

import srcgcnn_fast as sf
from srcgcnn_fast import capture, prediction
from srcgcnn_fast.graph import CrystalGraph, GraphStore
from srcgcnn_fast.ops import cpu, cuda, fused, library, registry, triton


def graph(n: int, rng: np.random.Generator) -> CrystalGraph:
    edges = rng.integers(0, n, 12 * n), np.sort(rng.uniform(2, 8, (n, 12)), axis=1).ravel()
    arrays = (rng.integers(1, 84, n), np.ones(n), *edges, np.arange(0, 12 * n + 1, 12), np.arange(n))
    types_ = np.int32, np.float32, np.int32, np.float32, np.int32, np.int32
    return CrystalGraph(*(x.astype(kind) for x, kind in zip(arrays, types_, strict=True)))


def median(call: Callable[[], object], calls: int, rounds: int = 15) -> float:
    """Seconds a call."""
    took = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        took.append((time.perf_counter() - start) / calls)
    return float(np.median(took[1:]))


def nothing(*_: object) -> int:
    return 0


def small(report: Callable[[str, float], None]) -> None:
    batch = sf.collate([graph(24, np.random.default_rng(0))])
    own = cpu.NetworkParameters
    for kind in (sf.SRCGCNN, sf.CGCNN):
        name = kind.__name__
        with torch.inference_mode():
            predict = partial(kind().eval().predict, batch)
            report(f"{name}, predict on the CPU, its kernels included", median(predict, 500))
            cpu.NetworkParameters = cuda.NetworkParameters  # type: ignore[misc, assignment]
            predict = partial(kind().eval().predict, batch)
            report(f"{name}, predict by the functions of CUDA", median(predict, 2000))
            cpu.NetworkParameters = own  # type: ignore[misc]
    capture._DEVICE = "cpu"
    capture._recorded = lambda run: (nothing, torch.zeros(2, 1))  # type: ignore[assignment, return-value]
    capture._kernels = lambda device: cuda.native()
    captured = sf.CapturedModel(sf.SRCGCNN().eval())
    report("captured, from the CPU", median(lambda: captured(batch), 2000))
    torch.Tensor.get_device = lambda x: 0  # type: ignore[method-assign]
    report("captured, resident", median(lambda: captured(batch), 2000))


def of_a_store(report: Callable[[str, float], None], n: int = 40_000) -> None:
    rng = np.random.default_rng(0)
    store = GraphStore.from_graphs([graph(k, rng) for k in rng.integers(1, 17, n)], [f"mp-{i}" for i in range(n)])
    cuts = list(prediction._cuts(store.row_counts, 20_000))
    model = sf.SRCGCNN().eval()
    model.predict = lambda batch: torch.zeros(batch.num_crystals, 1)  # type: ignore[assignment]
    report(f"packing {n} crystals", median(lambda: [store.batch(np.arange(*cut)) for cut in cuts], 1))
    report(f"predict of a store of {n}, packing included", median(lambda: sf.predict(model, store), 1))


def of_triton(report: Callable[[str, float], None]) -> None:
    triton._Launch.__call__ = lambda *_a, **_k: None  # type: ignore[method-assign]
    library.cpu = triton  # the operators', where calls go through those
    fused.is_eager = lambda h, device="cpu": device == "cuda"
    fused.shells = lambda edges: (None, None, None)
    fused.missing_channels = lambda h: 0
    registry.trains_compiled = lambda h: False
    registry.select = lambda *_a, **_k: "triton"
    batch = sf.collate([graph(64, np.random.default_rng(0))])
    for kind in (sf.SRCGCNN, sf.CGCNN):
        model = kind().train()

        def step(model: Callable[..., torch.Tensor] = model) -> None:
            model(batch).sum().backward()

        report(f"{kind.__name__}, a training step on Triton", median(step, 20))


if __name__ == "__main__":
    torch.set_num_threads(1)
    functions = ("cuda_prepared_size", "cuda_prepare", "cuda_scratch_size", "cuda_stack", "cuda_pad", "cuda_send")
    cuda.native = lambda: types.SimpleNamespace(**dict.fromkeys(functions, nothing))
    of_a_store(lambda name, seconds: print(f"{name}: {1e3 * seconds:.1f} ms", flush=True))
    small(lambda name, seconds: print(f"{name}: {1e6 * seconds:.1f} µs", flush=True))
    if triton.problem() is None:
        of_triton(lambda name, seconds: print(f"{name}: {1e3 * seconds:.2f} ms", flush=True))
