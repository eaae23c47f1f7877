"""One convolution and its gradients on random graphs, by a backend's operators and by the reference.

The functions below hold whatever the backend; test_triton.py and test_cuda_conv.py call them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import srcgcnn_fast as sf
from srcgcnn_fast import capture
from srcgcnn_fast.ops import fused, reference, registry, triton
from srcgcnn_fast.ops.cpu import Graph, Layer, Moments
from srcgcnn_fast.ops.reference import BatchNorm, Edges

TRAINING = [(True, True), (False, False), (False, True)]
MODES = ["train", "eval", "frozen bn1"]
NAMES = ("h", "weight", "bias", "gamma1", "beta1", "gamma2", "beta2")


def kinds_and_modes(kinds: list[str]) -> pytest.MarkDecorator:
    """Of graphs and statistics; batch norm cannot train on one row or without edges, as test_functional says."""
    cases = [
        pytest.param(kind, training, id=f"{kind}-{mode}")
        for kind, (training, mode) in itertools.product(kinds, zip(TRAINING, MODES, strict=True))
        if kind not in ("one atom", "no edges") or not any(training)
    ]
    return pytest.mark.parametrize(("kind", "training"), cases)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    assert torch.isfinite(a).all()
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


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
            "many rows": np.arange(66_000) % 2,
            "popular": np.full(130, 7),
            "nothing": np.zeros(0, int),
        }[kind]
        n, e, c = len(degrees), int(degrees.sum()), 2 * width
        rand = lambda *s: torch.from_numpy(rng.random(s))  # noqa: E731
        index = lambda x: torch.from_numpy(np.asarray(x, dtype=np.int32))  # noqa: E731
        self.width, self.n_features = width, n_features
        self.row_weight = (
            index(rng.integers(1, 7, n)).double()
            if kind in ("weighted", "ragged", "popular")
            else torch.ones(n).double()
        )
        given = rand(e, n_features) if features else None
        distance = (0.5 + 8.5 * rand(e)).float().double()
        row_ptr = index(np.concatenate([[0], np.cumsum(degrees)]))
        sender = rng.integers(0, max(n, 1), e)
        if kind == "popular":  # as where rows stand for others: most edges come from few rows, from most rows none
            sender = np.where(sender < 90, 5, np.where(sender < 115, 60 + sender % 9, sender // 9 * 9))
        self.edges = Edges(distance, given, index(sender), row_ptr, index([0, n]))
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

    @staticmethod
    def linear(h: torch.Tensor, layer: Layer, edges: Any) -> Any:
        """The launch that makes the rows' products."""
        return triton._Linear(h, layer, edges, triton._storage())

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


def arguments(problem: Problem) -> tuple[torch.Tensor, Layer, Graph, Moments]:
    """Of a call with fixed statistics."""
    graph = problem.graph()
    h = problem.parameters[0].float().to(problem.device)
    return h, problem.layer((False, False)), graph, problem.moments(graph, False)


def backward_under_autocast(problem: Problem) -> None:
    """The bits of the gradients are those of a backward pass outside of it."""
    h, layer, graph, moments = arguments(problem)
    m = problem.backend.conv(h, layer, graph, moments)[1]
    found = []
    for enabled in (False, True):
        with torch.autocast(h.device.type, torch.bfloat16, enabled=enabled):
            upstream = problem.upstream.float().to(h.device)
            found.append(problem.backend.conv_backward(upstream, h, m, layer, graph, moments, True))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def moments_of_the_edges(problem: Problem) -> None:
    in_degree, by_receiver, by_sender, total, gram = problem.moments(problem.graph(), True)[1:]
    expected = reference.edge_moments(problem.row_weight, problem.edges, problem.n_features, torch.float64)
    for ours, truth in zip((by_receiver, by_sender, gram), expected, strict=True):
        assert relative(ours, truth) < 2e-6
    assert relative(total, problem.row_weight @ expected[0]) < 2e-6
    weight, zero = problem.row_weight[reference.receivers(problem.edges)], torch.zeros_like(problem.row_weight)
    assert relative(in_degree, zero.index_add(0, problem.edges.sender.long(), weight)) < 1e-7


def term_of_an_edge(run: Callable[[torch.Tensor, Layer, Graph], torch.Tensor]) -> None:
    """At distances within, between and beyond the Gaussians, where nothing else hides its error."""
    n, width, k = 16, 32, 41
    g = torch.Generator().manual_seed(0)
    distance = torch.cat([torch.rand(12 * n - 4, generator=g) * 9, torch.tensor([0.0, 8.0, 8.1, 12.0])])
    index = lambda *x: torch.tensor(x, dtype=torch.int32)  # noqa: E731
    sender, row_ptr = torch.zeros(12 * n, dtype=torch.int32), torch.arange(0, 12 * n + 1, 12, dtype=torch.int32)
    weight = torch.zeros(2 * width, 2 * width + k)
    weight[:, 2 * width :] = 4 * torch.rand(2 * width, k, generator=g) - 2
    zero, one, h = torch.zeros(2 * width), torch.ones(2 * width), torch.zeros(n, width)
    vectors = (one, zero, one[:width], zero[:width], zero, one, zero[:width], one[:width])
    graph = Graph(distance, None, sender, row_ptr, index(0, n), None, None, None, 0.0, 0.2)
    ours = run(h, Layer(weight, None, *vectors, 0.0, 0.0, False, False), graph)
    g1, b1, g2, b2, m1, v1, m2, v2 = (x.double() for x in vectors)
    norms = BatchNorm(g1, b1, m1, v1, eps=1e-30), BatchNorm(g2, b2, m2, v2, eps=1e-30)  # PyTorch 2.11 takes no 0
    edges = Edges(distance.double(), None, *graph[2:5])
    truth = reference.gated_conv(h.double(), edges, torch.ones(n).double(), weight.double(), None, *norms)
    assert relative(ours, truth) < 3e-7


def gate_at_both_ends(make: type[Problem]) -> None:
    """c for large c, exp(c) for very negative c, no overflow, no NaN; the gradient too."""
    ends = torch.tensor([-700.0, -80, -30, -10, -1, -1e-6, 0, 1e-6, 1, 10, 19.9, 30, 90, 700], dtype=torch.float64)
    f, c = (x.reshape(-1) for x in torch.meshgrid(ends, ends, indexing="ij"))
    problem = make("one atom", len(f), 1)
    layer, device = problem.layer((False, False)), problem.device
    layer = layer._replace(gamma1=torch.zeros_like(layer.gamma1), beta1=torch.cat([f, c]).float().to(device))
    layer = layer._replace(gamma2=torch.ones_like(layer.gamma2), beta2=torch.zeros_like(layer.beta2))
    layer = layer._replace(mean2=torch.zeros_like(layer.mean2), var2=torch.ones_like(layer.var2), eps2=0.0)
    index = lambda *x: torch.tensor(x, dtype=torch.int32, device=device)  # noqa: E731
    one = torch.ones(1, device=device)
    graph = Graph(one, None, index(0), index(0, 1), index(0, 1), None, None, None, 0.0, 0.2)
    h, moments = torch.zeros(1, len(f), device=device), Moments(one, *[None] * 5)
    _out, m, *_ = make.backend.conv(h, layer, graph, moments)
    f, c = f.float().double(), c.float().double()
    expected = torch.sigmoid(f) * torch.where(c > 40, c, torch.log1p(torch.exp(c.clamp_max(40))))
    gradients = make.backend.conv_backward(torch.ones_like(h), h, m, layer, graph, moments, False)
    du, limit = torch.sigmoid(expected), torch.finfo(torch.float32).eps * (8 + f.abs() + c.abs())
    slopes = (du * expected * torch.sigmoid(-f), du * torch.sigmoid(f) * torch.sigmoid(c))
    found = (m[0].cpu(), *gradients[4].cpu().chunk(2))
    for ours, truth, most in zip(found, (expected, *slopes), (limit, 2 * limit, 2 * limit), strict=True):
        normal = truth > 1e-32
        assert torch.isfinite(ours).all()
        assert (((ours - truth).abs() / truth) < most)[normal].all()
        assert (ours - truth).abs()[~normal].max() < 1e-32


def rows_by_species(make: type[Problem]) -> None:
    """Features as a table, and the row of it that each row of the graph takes."""
    problem, species = make("weighted", 12, 41, seed=3), torch.arange(60, dtype=torch.int32) % 7
    table = problem.parameters[0][:7]
    results = []
    for dtype in (torch.float64, torch.float32):
        problem.parameters[0] = table[species.long()]
        results.append(problem.expected(dtype, (True, True)))
    sums = [torch.zeros_like(table).index_add(0, species.long(), x["grad h"].double()) for x in results]
    graph, layer = problem.graph(), problem.layer((True, True))
    h, species = table.float().to(problem.device), species.to(problem.device)
    moments, upstream = problem.moments(graph, True), problem.upstream.float().to(problem.device)
    out, m, *used = make.backend.conv(h, layer, graph, moments, species)
    layer = layer._replace(mean1=used[0], var1=used[1], mean2=used[2], var2=used[3])
    dh = make.backend.conv_backward(upstream, h, m, layer, graph, moments, False, species)[0]
    assert relative(out, results[0]["out"]) <= 2 * relative(results[1]["out"], results[0]["out"]) + 3e-7
    assert relative(dh, sums[0]) <= 2 * relative(sums[1], sums[0]) + 3e-7


def no_rows(make: type[Problem]) -> None:
    results = make("nothing", 16, 41).found((False, False))
    assert results["out"].shape == (0, 16)
    assert all(not results[f"grad {name}"].any() for name in NAMES)


def bad_indices(make: type[Problem], array: str, value: int) -> None:
    """A wrong sender, distance or pointer makes its row NaN (a pointer the one before, too), and no other."""
    problem = make("weighted", 16, 41)
    row = int((problem.edges.row_ptr.diff() > 2).nonzero()[3])
    sound = make.backend.conv(*arguments(problem))[0]
    getattr(problem.edges, array)[row if array == "row_ptr" else problem.edges.row_ptr[row]] = value
    h, layer, graph, moments = arguments(problem)
    out, m, *_ = make.backend.conv(h, layer, graph, moments)
    bad = torch.zeros(60, dtype=torch.bool)
    bad[row - (array == "row_ptr") : row + 1] = True
    assert out[bad].isnan().all() and torch.equal(out[~bad], sound[~bad])
    if array == "sender":
        gradients = make.backend.conv_backward(torch.ones_like(h), h, m.nan_to_num(), layer, graph, moments, False)
        assert all(gradients[k].isnan().any() for k in (0, 1, 3, 4))  # not in numbers that look like others


def bad_parameters(make: type[Problem]) -> None:
    """A NaN in either half of what the gate is of, or a variance below zero, reaches every row that has edges."""
    problem = make("isolated", 16, 41)
    h, layer, graph, moments = arguments(problem)
    some = graph.row_ptr.diff() > 0
    for name, channel in itertools.product(("weight", "bias", "gamma1", "beta1", "mean1", "var1"), (3, 19)):
        damaged = getattr(layer, name).clone()
        damaged[channel] = -1 if name == "var1" else torch.nan
        bad = layer._replace(**{name: damaged})
        out, m, *_ = make.backend.conv(h, bad, graph, moments)
        assert torch.equal(out.isnan().any(1), some), (name, channel)
        gradients = make.backend.conv_backward(torch.ones_like(h), h, m.nan_to_num(), bad, graph, moments, False)
        assert gradients[1].isnan().any(), (name, channel)


BAD_INDICES = [("sender", -1), ("sender", 60), ("sender", 10**6), ("row_ptr", 10**6)]


def waits(mode: FakeTensorMode, make: type[Problem], also: Callable[..., None] = lambda *_: None) -> None:
    """Training and evaluation on tensors without values, so that whatever reads one back raises."""
    for features, training in itertools.product((False, True), (True, False)):
        problem = make("weighted", 20, 41, features=features)
        fake = lambda x: None if x is None else mode.from_tensor(x) if isinstance(x, torch.Tensor) else x  # noqa: E731
        graph, layer = Graph(*map(fake, problem.graph())), Layer(*map(fake, problem.layer((training, training))))
        device = problem.graph().sender.device
        h, weight = (fake(x.float().to(device)) for x in (problem.parameters[0], problem.row_weight))
        moments = Moments(weight, *make.backend.edge_moments(weight, graph, 41))
        out, m, *_ = make.backend.conv(h, layer, graph, moments)
        make.backend.conv_backward(out, h, m, layer, graph, moments, not training)
        also(h, layer, graph)


def bad_input(make: type[Problem]) -> None:
    h, layer, graph, moments = arguments(make("weighted", 16, 41))
    with pytest.raises(sf.InputError, match=r"float32, not torch\.float64"):
        make.backend.conv(h.double(), layer, graph, moments)
    with pytest.raises(sf.InputError, match="sender must be a contiguous"):
        make.backend.conv(h, layer, graph._replace(sender=graph.sender.long()), moments)
    with pytest.raises(sf.InputError, match="row_weight must be a contiguous"):
        make.backend.conv(h, layer, graph, Moments(torch.ones(len(h), 2)[:, 0], *moments[1:]))
    with pytest.raises(sf.InputError, match="gamma2 must be"):
        make.backend.conv(h, layer._replace(gamma2=layer.gamma1), graph, moments)
    with pytest.raises(sf.InputError, match="fixed statistics only"):
        make.backend.conv_backward(h, h, h, layer._replace(train1=True), graph, moments, True)


def bfloat16_storage(problem: Problem) -> None:
    """Rounds what it stores, and nothing else: far from float32, no farther than the roundings of a sum of three."""
    for training in TRAINING[:2]:
        truth = problem.expected(torch.float64, training)
        with sf.use_precision("bfloat16"):
            found = problem.found(training)
        errors = {name: relative(found[name], x) for name, x in truth.items() if name != "grad bias" or not training[0]}
        assert all(found[name].dtype == torch.float32 for name in truth)
        assert 1e-4 < errors["out"] < 3e-3
        assert 5e-4 < errors["grad weight"] < 2e-2


def rounded_rows(problem: Problem) -> Any:
    """The rows' products, and the output that follows from them and the filter in exact arithmetic."""
    h, layer, graph, moments = arguments(problem)
    edges = triton._Edges(graph, problem.n_features, torch.float32, h.device)
    linear = problem.linear(h, layer, edges)
    out = problem.backend.conv(h, layer, graph, moments)[0]
    p, q = (x.double().unflatten(1, (2, -1))[..., : problem.width].flatten(1) for x in linear.pq.chunk(2, dim=1))
    k = torch.arange(problem.n_features, dtype=torch.float64, device=h.device)
    e = torch.exp(-((graph.distance.double()[:, None] / 0.2 - k) ** 2))
    receiver = reference.receivers(problem.edges).to(h.device)
    x = p[receiver] + q[graph.sender.long()] + e @ linear.of_edges.double()
    f, c = (x * layer.gamma1.double() + layer.beta1.double()).chunk(2, dim=1)
    m = torch.zeros_like(h, dtype=torch.float64).index_add(0, receiver, f.sigmoid() * torch.nn.functional.softplus(c))
    m = (m - layer.mean2.double()) / (layer.var2.double() + 1e-5).sqrt() * layer.gamma2.double() + layer.beta2.double()
    assert relative(out, torch.nn.functional.softplus(h.double() + m).cpu()) < 1e-6
    return linear


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """Calls on tensors of the CPU go where those on a GPU's go, with the compiled kernels or without."""
    monkeypatch.setattr(fused, "is_eager", lambda _h, device="cpu": device == "cuda")
    monkeypatch.setattr(fused, "shells", lambda _edges: (None, None, None))
    monkeypatch.setattr(fused, "missing_channels", lambda _h: 0)
    monkeypatch.setattr(registry, "trains_compiled", lambda _h: compiled)


def small_model(dtype: torch.dtype, kind: type, width: int = 40) -> sf.SRCGCNN:
    torch.manual_seed(3)
    model = kind(3, width, 48).to(dtype).train()
    for module in model.modules():  # norms that do something
        if isinstance(module, torch.nn.BatchNorm1d) and module.affine:
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def captured_steps(
    make_batch: Callable[..., sf.GraphBatch], width: int, kinds: list[tuple[str, int]], features: bool = False
) -> None:
    """Outputs, weights and running statistics over batches of other sizes, padded with rows that have no weight, are
    those of the model's own steps; ``kinds`` are the batches' kinds and seeds, three. ``features``: they bring them."""
    models, batches = [], [make_batch(kind, seed) for kind, seed in kinds]
    for batch in batches if features else ():
        batch.atom_features = torch.rand(batch.num_rows, 92)
        batch.edge_features = torch.rand(batch.num_edges, 41)
    for captured in (False, True):
        model = small_model(torch.float32, sf.SRCGCNN, width)
        call = capture.CapturedTraining(model) if captured else model
        optimizer, outs = torch.optim.SGD(model.parameters(), 1e-2), []
        for k in (0, 1, 2, 1):
            batches[k].cache.clear()
            out = call(batches[k])
            outs.append(out)
            out.square().mean().backward()
            if k:  # else two gradients add up
                optimizer.step()
                optimizer.zero_grad()
        models.append({**model.state_dict(), **{f"out{k}": out.detach() for k, out in enumerate(outs)}})
    for name, expected in models[0].items():
        if not name.endswith("fc_full.bias"):  # whose gradient is zero in exact arithmetic
            torch.testing.assert_close(
                models[1][name], expected, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
