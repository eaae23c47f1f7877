"""One convolution and its gradients on random graphs, by a backend's operators and by the reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from srcgcnn_fast.ops import reference
from srcgcnn_fast.ops.cpu import Graph, Layer, Moments
from srcgcnn_fast.ops.reference import BatchNorm, Edges

TRAINING = [(True, True), (False, False), (False, True)]
NAMES = ("h", "weight", "bias", "gamma1", "beta1", "gamma2", "beta2")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    assert torch.isfinite(a).all()
    return float((a.double().cpu() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


class Problem:
    """A layer on a graph, in float64; ``kind`` says what is odd about the graph. A subclass says whose operators."""

    backend: Any
    device = "cpu"

    def __init__(self, kind: str, width: int, n_features: int, features: bool = False, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        degrees = {
            "twelve": np.full(20, 12),
            "weighted": rng.integers(0, 16, 60),
            "ragged": rng.integers(0, 45, 35),
            "one atom": np.full(1, 12),
            "isolated": np.array([0, 3, 0, 0, 5, 0]),
            "no edges": np.zeros(3, int),
            "long": np.arange(300) % 9,
            "large": np.full(500, 12),
            "nothing": np.zeros(0, int),
        }[kind]
        n, e, c = len(degrees), int(degrees.sum()), 2 * width
        rand = lambda *s: torch.from_numpy(rng.random(s))  # noqa: E731
        index = lambda x: torch.from_numpy(np.asarray(x, dtype=np.int32))  # noqa: E731
        self.width, self.n_features = width, n_features
        self.row_weight = (
            index(rng.integers(1, 7, n)).double() if kind in ("weighted", "ragged") else torch.ones(n).double()
        )
        given = rand(e, n_features) if features else None
        distance = (0.5 + 8.5 * rand(e)).float().double()
        row_ptr = index(np.concatenate([[0], np.cumsum(degrees)]))
        self.edges = Edges(distance, given, index(rng.integers(0, max(n, 1), e)), row_ptr, index([0, n]))
        self.parameters = [
            rand(n, width) * 2 + 0.3, (rand(c, c + n_features) - 0.5) / 3, rand(c) - 0.5, rand(c) + 0.5, rand(c) - 0.5,
            rand(width) + 0.5, rand(width) - 0.5,
        ]  # fmt: skip
        self.state = [rand(c) - 0.5, rand(c) + 0.5, rand(width) - 0.5, rand(width) + 0.5]
        self.upstream = (rand(n, width) - 0.5) * self.row_weight[:, None]

    def expected(self, dtype: torch.dtype, training: tuple[bool, bool]) -> dict[str, torch.Tensor]:
        leaves = [x.to(dtype).clone().requires_grad_() for x in self.parameters]
        features = self.edges.features
        edge = (self.edges.distance if features is None else features).to(dtype).clone()
        edges = self.edges._replace(**{"distance" if features is None else "features": edge})
        wanted = list(leaves)
        if not training[0]:
            wanted.append(edge.requires_grad_())
        state = [x.to(dtype).clone() for x in self.state]
        norms = [
            BatchNorm(leaves[3], leaves[4], *state[:2], training[0], 1.0),
            BatchNorm(leaves[5], leaves[6], *state[2:], training[1], 1.0),
        ]
        out = reference.gated_conv(leaves[0], edges, self.row_weight.to(dtype), leaves[1], leaves[2], *norms)
        gradients = torch.autograd.grad((out * self.upstream.to(dtype)).sum(), wanted)
        names = [f"grad {name}" for name in (*NAMES, "edge")]
        return {"out": out.detach(), **dict(zip(names, gradients, strict=False)), **self.statistics(state, training)}

    def statistics(self, state: list[torch.Tensor], training: tuple[bool, bool]) -> dict[str, torch.Tensor]:
        """Mean and biased variance of the batch from the running ones, which moved all the way to them."""
        degree = self.edges.row_ptr.diff().double()
        counts = (float(self.row_weight @ degree), float(self.row_weight.sum()))
        found = {}
        for k in (k for k in (0, 1) if training[k]):
            found[f"mean{k + 1}"] = state[2 * k].detach()
            found[f"var{k + 1}"] = state[2 * k + 1].detach() * ((counts[k] - 1) / counts[k])
        return found

    def graph(self) -> Graph:
        features = self.edges.features
        moved = [x.to(self.device) for x in self.edges[2:5]]
        distance = self.edges.distance.float().to(self.device)
        return Graph(
            distance, None if features is None else features.float().to(self.device), *moved, None, None, None, 0.0, 0.2
        )

    def layer(self, training: tuple[bool, bool]) -> Layer:
        tensors = [x.float().to(self.device) for x in (*self.parameters[1:], *self.state)]
        return Layer(*tensors, 1e-5, 1e-5, *training)

    def moments(self, graph: Graph, needed: bool) -> Moments:
        weight = self.row_weight.float().to(self.device)
        return Moments(weight, *(self.backend.edge_moments(weight, graph, self.n_features) if needed else [None] * 5))

    def found(self, training: tuple[bool, bool]) -> dict[str, torch.Tensor]:
        graph, layer, h = self.graph(), self.layer(training), self.parameters[0].float().to(self.device)
        moments = self.moments(graph, training[0])
        out, m, *used = self.backend.conv(h, layer, graph, moments)
        layer = layer._replace(mean1=used[0], var1=used[1], mean2=used[2], var2=used[3])
        upstream = self.upstream.float().to(self.device)
        gradients = self.backend.conv_backward(upstream, h, m, layer, graph, moments, not training[0])
        results = {"out": out, **{f"grad {k}": g for k, g in zip((*NAMES, "edge"), gradients, strict=True)}}
        if training[0]:
            results |= {"mean1": used[0] + layer.bias, "var1": used[1]}
        return results | ({"mean2": used[2], "var2": used[3]} if training[1] else {})


def compare(problems: list[Problem], training: tuple[bool, bool]) -> None:
    """At most twice as far from float64 as the published formula in float32.

    Relative L2 errors of each tensor, all problems together: a gradient that is one number may vanish.
    """
    squares: dict[str, np.ndarray] = {}
    for problem in problems:
        truth, plain = (problem.expected(dtype, training) for dtype in (torch.float64, torch.float32))
        found = {name: x.double().cpu() for name, x in problem.found(training).items()}
        assert set(found) - set(truth) <= {"grad edge"}
        for name, expected in truth.items():
            assert found[name].shape == expected.shape
            assert torch.isfinite(found[name]).all()
            if name == "grad bias" and training[0]:  # zero in exact arithmetic
                assert found[name].abs().max() <= 1e-6 * max(1.0, float(truth["grad weight"].norm()))
                continue
            parts = (found[name] - expected, plain[name] - expected, expected)
            squares[name] = squares.get(name, 0) + np.array([float(x.detach().square().sum()) for x in parts])
    for name, (of_ours, of_plain, size) in squares.items():
        ours, theirs = (math.sqrt(x / max(size, 1e-60)) for x in (of_ours, of_plain))
        assert ours <= 2 * theirs + 3e-7, f"{name}: relative L2 error {ours:.1e}, {theirs:.1e} of the formula"
