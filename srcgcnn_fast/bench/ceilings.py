"""What this machine can do at best, and what a convolution must at least do: together its floor in time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..graph.batch import GraphBatch

_GATE_FMAS = 18
"""Multiplications and multiply-adds of one sigmoid(f) softplus(c) in float32 from powers of two: two products of three,
a logarithm of degree 9 and its correction, a reciprocal refined once, a product."""


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of this machine with some number of threads."""

    flops: float
    """Multiplications and additions per second, of float32 products of matrices and convolutions of images."""
    bandwidth: float
    """Bytes read and written per second, of a copy that no cache holds."""
    exponentials: float
    """``torch.exp`` per second, of an array in the cache."""


@dataclass(frozen=True)
class Floor:
    """Least nanoseconds per edge and step."""

    nodes: float
    """The rows' products with the weights."""
    gates: float
    """The arithmetic of sigmoid and softplus."""
    memory: float
    """Reading the graph, reading and writing the rows; goes on beside the arithmetic."""

    @property
    def total(self) -> float:
        return max(self.nodes + self.gates, self.memory)


def _best_seconds(run: Callable[[], object], rounds: int = 12) -> float:
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def measure_ceilings() -> Ceilings:
    """About a second, with the present number of threads."""
    with torch.no_grad():
        a, product = torch.randn(768, 768), torch.empty(768, 768)
        image, kernel = torch.randn(1, 128, 56, 56), torch.randn(128, 128, 3, 3)
        flops = max(
            2 * 768**3 / _best_seconds(lambda: torch.mm(a, a, out=product)),
            2 * 128 * 128 * 9 * 54 * 54 / _best_seconds(lambda: torch.conv2d(image, kernel)),
        )
        source, target = torch.randn(1 << 25), torch.empty(1 << 25)
        bandwidth = 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), rounds=4)
        # Below the grain at which PyTorch shares out work, one thread does it: the rate of a core, times the threads.
        x, y = torch.randn(8192), torch.empty(8192)
        repeats = 50
        seconds = _best_seconds(lambda: [torch.exp(x, out=y) for _ in range(repeats)])
    return Ceilings(flops, bandwidth, repeats * len(x) * torch.get_num_threads() / seconds)


def floor(batch: GraphBatch, width: int, training: bool, ceilings: Ceilings, steps: int = 1) -> Floor:
    """Of one of ``steps`` convolutions with F = ``width``, from counts; the first of several forms products by element.

    Per row a product with (F, 4F), and two more backward; per edge F gates, and F again backward. In training every
    pass reads sender and shell of an edge and, per row, features, sums and gradients; in inference a crystal stays in
    the cache, and only its graph is read.
    """
    edges = max(batch.num_edges, 1)
    passes = 2 if training else 1
    rows = batch.num_rows / edges
    node_flops = (3 if training else 1) * 2 * width * 4 * width * rows * (max(steps - 1, 1) / steps)
    gate_flops = passes * width * 2 * _GATE_FMAS
    row_bytes = 6 * 4 * width if training else 0
    memory = passes * 8 + row_bytes * rows
    return Floor(
        1e9 * node_flops / ceilings.flops, 1e9 * gate_flops / ceilings.flops, 1e9 * memory / ceilings.bandwidth
    )
