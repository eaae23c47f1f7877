"""What the tests of the CUDA kernels share: emulated GPUs, and convolutions with fixed statistics."""

from __future__ import annotations

import math
import mmap

import pytest
import torch
from convolution import relative

from srcgcnn_fast.ops import cuda as backend
from srcgcnn_fast.ops import reference
from srcgcnn_fast.ops.cpu import Graph, Layer
from srcgcnn_fast.ops.reference import BatchNorm, Edges

H100, A100, MIDDLE, TINY = (132, 228 << 10), (108, 164 << 10), (3, 50 << 10), (2, 30 << 10)
"""Multiprocessors, and shared memory of each. At width 32, small blocks take 64, 32, 16, 16 rows, large ones up to 128,
128, 48 and 16; the last have no room for all distances."""


KINDS_OF_WEIGHTS = pytest.mark.parametrize("shared", [True, False], ids=["recurrent", "stacked"])


def sparse(size, dtype: torch.dtype) -> torch.Tensor:
    """Zeros of which only pages that are touched take memory, however many there are."""
    count = math.prod(size) if isinstance(size, tuple) else size
    unreserved = 0x4000  # MAP_NORESERVE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | unreserved
    memory = mmap.mmap(-1, max(count, 1) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype, count=max(count, 1))[:count].view(size)


class Problem:
    """Convolutions with fixed statistics on a batch of graphs, in float64."""

    def __init__(self, batch, width: int, n_features: int, n_steps: int, shared: bool, features: bool = False) -> None:
        g = torch.Generator().manual_seed(width + n_steps)
        rand = lambda *s: torch.rand(*s, generator=g, dtype=torch.float64)  # noqa: E731
        c, batch = 2 * width, batch.to(dtype=torch.float64)
        given = rand(batch.num_edges, n_features) if features else None
        self.edges = Edges(batch.distance, given, batch.sender, batch.row_ptr, batch.crystal_ptr)
        self.h, self.weight = rand(batch.num_rows, width) * 2, batch.weight
        weights = [((rand(c, c + n_features) - 0.5) / 3, rand(c) - 0.5) for _ in range(1 if shared else n_steps)]
        self.shared = shared
        self.layers = [
            [
                *weights[0 if shared else t], rand(c) + 0.5, rand(c) - 0.5, rand(width) + 0.5, rand(width) - 0.5,
                rand(c) - 0.5, rand(c) + 0.5, rand(width) + 4, rand(width) * 20 + 5,
            ]
            for t in range(n_steps)
        ]  # fmt: skip

    def expected(self, dtype: torch.dtype) -> torch.Tensor:
        h, edges = self.h.to(dtype), self.edges._replace(distance=self.edges.distance.to(dtype))
        for layer in self.layers:
            w, b, g1, b1, g2, b2, m1, v1, m2, v2 = (x.to(dtype) for x in layer)
            h = reference.gated_conv(h, edges, self.weight, w, b, BatchNorm(g1, b1, m1, v1), BatchNorm(g2, b2, m2, v2))
        return h

    def graph(self) -> Graph:
        features = None if self.edges.features is None else self.edges.features.float()
        return Graph(self.edges.distance.float(), features, *self.edges[2:5], None, None, None, 0.0, 0.2)

    def float_layers(self) -> list[Layer]:
        layers = [Layer(*(x.float() for x in layer), 1e-5, 1e-5, False, False) for layer in self.layers]
        one = layers[0]
        return [layer._replace(weight=one.weight, bias=one.bias) if self.shared else layer for layer in layers]

    def found(self, graph: Graph | None = None) -> torch.Tensor:
        return backend.stack(self.h.float(), self.float_layers(), graph or self.graph())

    def check(self) -> torch.Tensor:
        truth, ours = self.expected(torch.float64), self.found()
        limit = 2 * relative(self.expected(torch.float32), truth) + 3e-7
        assert relative(ours, truth) < limit
        return ours
