"""What training by ``fit`` on a GPU asks of the CPU, without a GPU: kernels that do nothing, on tensors of the CPU.

    OMP_NUM_THREADS=1 python benchmarks/fit_host.py STORE [--batch-size 256] [--steps 64] [--epochs 11] [--ema 0.99]

Batches come as they do for a GPU. Numbers of the outputs mean nothing. Prints ms a step: of ``fit`` (medians over
epochs, with the part of it that waits for data), and of forward, loss, backward and optimiser alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

import srcgcnn_fast as sf
from srcgcnn_fast.graph import GraphStore, open_store
from srcgcnn_fast.ops import cuda_conv, fused, registry, triton
from srcgcnn_fast.training import GraphDataModule, Recipe, Split, fit, module, prefetch

WIDTH = 16
"""Features of an atom: few, because what PyTorch computes here a GPU would compute beside the CPU."""


class Nothing:
    """The compiled module, whose kernels end at once."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: 1024 if name == "cuda_space" else None


def pretend() -> None:
    """Tensors of the CPU go the way of a GPU's; sorting and sums by species, which a GPU does, take no time either."""
    nothing = Nothing()
    fused.is_eager = lambda _h, device="cpu": device == "cuda"  # type: ignore[assignment]
    fused.shells = lambda _edges: (None, None, None)  # type: ignore[assignment]
    fused.missing_channels = lambda _h: 0  # type: ignore[assignment]
    registry.trains_compiled = lambda _h: True  # type: ignore[assignment]
    cuda_conv.native = lambda: nothing
    triton.sum_by_species = lambda grad, _species, count: grad.new_zeros(count, grad.shape[1])
    torch.sort = lambda x, stable=True: (x, x)  # type: ignore[assignment]
    module.math = type("math", (), {"isfinite": lambda _x: True, "nan": 0.0})  # type: ignore[attr-defined, assignment]
    prefetch.Batches.__iter__ = lambda self: self._timed(self._on_device())  # type: ignore[method-assign]


def of_fit(store: GraphStore, size: int, steps: int, recipe: Recipe) -> tuple[float, float]:
    """Milliseconds a step, and those of it without data."""
    order = np.random.default_rng(0).permutation(len(store))
    n = min(size * steps, len(store) - 128)
    data = GraphDataModule(
        store, next(iter(store.targets)), batch_size=size, split=Split(order[:n], order[n : n + 128], order[:0])
    )
    with tempfile.TemporaryDirectory() as folder:
        history = fit(sf.SRCGCNN(3, WIDTH, WIDTH), data, folder, recipe, accelerator="cpu").history
    rows = history[1:] or history  # the first one warms up
    taken = [1e3 * row["seconds"] / -(-n // size) for row in rows]
    return statistics.median(taken), statistics.median(t * row["data_wait"] for t, row in zip(taken, rows, strict=True))


def of_a_loop(store: GraphStore, size: int, rounds: int = 10) -> float:
    """Milliseconds of a step whose batch is there."""
    rng, target = np.random.default_rng(0), torch.zeros(size, 1)
    batches = [store.batch(rng.choice(len(store), size)) for _ in range(max(2, 8192 // size))]
    model = sf.SRCGCNN(3, WIDTH, WIDTH).train()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    taken = []
    for _ in range(rounds):
        for batch in batches:
            batch.cache.clear()
            start = time.perf_counter()
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(batch), target).backward()
            optimizer.step()
            taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken[len(batches) :])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", help="directory of prepared graphs, with a target")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=64, help="of an epoch")
    parser.add_argument("--epochs", type=int, default=11)
    parser.add_argument("--ema", type=float, help="decay of a moving average of the weights")
    given = parser.parse_args()
    torch.set_num_threads(1)
    prepared = open_store(given.store)
    pretend()
    alone = of_a_loop(prepared, given.batch_size)
    step, waiting = of_fit(prepared, given.batch_size, given.steps, Recipe(epochs=given.epochs, ema=given.ema))
    print(
        f"batches of {given.batch_size}: fit {step:.2f} ms a step, {waiting:.2f} without data; a bare step {alone:.2f}"
    )
