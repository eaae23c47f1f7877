"""The CUDA kernels for training against the reference in float64, without a GPU: their source, compiled for the CPU.

cuda/emulation.h supplies CUDA's execution model; what it shows, and what not, is said there and in test_cuda.py.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import math
import types

import convolution
import pytest
import torch
from convolution import MODES, NAMES, TRAINING, arguments, compare, kinds_and_modes, relative
from cuda_problem import sparse
from torch._subclasses.fake_tensor import FakeTensorMode

import srcgcnn_fast as sf
from srcgcnn_fast import capture, functional
from srcgcnn_fast.ops import cuda_conv as backend
from srcgcnn_fast.ops import fused, reference, registry, synchronized, triton
from srcgcnn_fast.ops import library as library_of_operators
from srcgcnn_fast.ops.cpu import Moments
from srcgcnn_fast.ops.reference import BatchNorm, Edges

pytestmark = pytest.mark.usefixtures("training_on_the_emulation")
NEW_EMPTY, EMPTY_LIKE = torch.Tensor.new_empty, torch.empty_like


class Kernels:
    """Single launches."""

    @staticmethod
    def edges(edges, by_sender=False):
        graph, found = edges.graph, {"distance": edges.distance, "features": edges.graph.features}
        if by_sender:
            return {**found, **dict(zip(("other", "number", "ptr"), backend.transposed(graph), strict=True))}
        return {**found, "ptr": graph.row_ptr, "other": graph.sender}

    @staticmethod
    def sizes(edges, width, linear, **more):
        basis = dict(zip(backend.NUMBERS, edges.basis, strict=False))
        found = {"n_edges": edges.n_edges, "n_features": edges.n_features}
        found |= {"relaxed": backend._precision() != "tf32x3", "half": linear.pq.dtype == torch.bfloat16}
        return {**backend._rows(edges.n_rows, width), **found, **basis, **more}

    @staticmethod
    def layer(linear, layer):
        given = {"pq": linear.pq, "filter": linear.filter, "term": linear.table}
        return {**given, "gamma1": layer.gamma1, "beta1": layer.beta1}

    @classmethod
    def linear(cls, h, layer, edges, pq=None):
        (n, width), k, storage = h.shape, edges.n_features, backend._storage()
        wide = backend._rows(n, width)["width"]
        pq = h.new_empty(n, 4 * wide, dtype=storage) if pq is None else pq
        found = types.SimpleNamespace(pq=pq, table=None)
        found.filter, found.of_edges = h.new_empty(wide // 32, -(-k // 8), 4, 2, 32, 4), h.new_empty(k, 2 * width)
        if edges.distance is None:
            found.table = h.new_empty(edges.n_edges, 2 * wide, dtype=storage)
        vectors = {name: getattr(layer, name) for name in ("weight", "bias", "mean1", "var1")}
        given = {"h": h, **vectors, **cls.edges(edges)}
        to = {"out": found.pq, "out_x": found.table, "out_filter": found.filter, "out_edge": found.of_edges}
        sizes = cls.sizes(edges, width, found, eps1=layer.eps1, train1=layer.train1)
        names = [sizes.get(name, 0) for name in backend.SIZES]
        space = backend.native().cuda_space(backend._put([0] * len(backend.FIELDS), **given, **to), names, 3)
        backend._call("linear", sizes, space=h.new_empty(space // 4), **given, **to)
        return found

    @classmethod
    def gate_sum(cls, m, h, linear, layer, edges):
        backend._call(
            "gate_sum", cls.sizes(edges, h.shape[1], linear), out_m=m, h=h, **cls.layer(linear, layer),
            **cls.edges(edges),
        )  # fmt: skip


class Problem(convolution.Problem):
    backend, linear = backend, Kernels.linear


@kinds_and_modes(["twelve", "weighted", "ragged", "popular", "isolated", "one atom", "no edges"])
def test_convolution(kind, training):
    seeds = range(20 if kind in ("isolated", "one atom") else 3)  # few numbers say little about roundings
    compare([Problem(kind, 16, 41, seed=seed) for seed in seeds], training)


def test_backward_under_autocast():
    convolution.backward_under_autocast(Problem("isolated", 16, 41))


@pytest.mark.parametrize("training", TRAINING[:2], ids=["train", "eval"])
def test_on_the_tensor_cores_of_ampere(training_library, training):
    training_library.tensor_cores("Ampere")
    compare([Problem("weighted", 64, 41), Problem("ragged", 64, 41)], training)


@pytest.mark.parametrize(("width", "n_features"), [(64, 41), (7, 41), (1, 3), (33, 5), (48, 9), (128, 60), (20, 130)])
def test_any_width_and_number_of_gaussians(width, n_features):
    if width < 8:
        kind, seeds = "weighted", range(30 if width == 1 else 4)
    else:
        kind, seeds = "isolated", range(8 if width < 64 else 2)
    compare([Problem(kind, width, n_features, seed=seed) for seed in seeds], (True, True))


@pytest.mark.parametrize("width", [7, 33, 64, 128])
def test_products_of_rows_and_channels_of_any_size(width):
    """A part of a row, and the weights of a channel, are two numbers of 16 bits in a unit of their own."""
    problem = Problem("weighted", width, 41)
    h, layer, graph, _ = arguments(problem)
    h = h * 10.0 ** torch.randint(-18, 19, (len(h), 1))
    layer = layer._replace(weight=layer.weight * 10.0 ** torch.randint(-18, 19, (2 * width, 1)))
    found = Kernels.linear(h, layer, backend._Edges(graph, 41, h.dtype, h.device)).pq
    found = found.unflatten(1, (4, -1))[:, 2:, :width]
    weight = layer.weight.double()[:, width : 2 * width] / torch.sqrt(layer.var1.double() + layer.eps1)[:, None]
    of_rows = lambda h, weight: (h.double() @ weight.T).unflatten(1, (2, -1))  # noqa: E731
    assert ((found - of_rows(h, weight)).abs() <= 4e-7 * of_rows(h.abs(), weight.abs())).all()


@pytest.mark.parametrize("training", TRAINING, ids=MODES)
def test_channels_whose_weights_differ_in_scale(training):
    """Which batch norm takes out again: no channel's gradient is lost beside another's."""
    problem, scale = Problem("weighted", 20, 41), 10.0 ** torch.linspace(-6, 6, 40, dtype=torch.float64)
    problem.parameters[1] = problem.parameters[1] * scale[torch.arange(40) * 7 % 40, None]
    if not training[0]:
        problem.state[0] = problem.state[0] * scale[torch.arange(40) * 7 % 40]
        problem.state[1] = problem.state[1] * scale[torch.arange(40) * 7 % 40] ** 2
    compare([problem], training)


@pytest.mark.parametrize("size", [1e-25, 1e20])
def test_gradients_of_any_size(size):
    problem = Problem("weighted", 33, 41)
    problem.upstream = problem.upstream * size
    compare([problem], (True, True))


@pytest.mark.parametrize("training", TRAINING[:2], ids=["train", "eval"])
@pytest.mark.parametrize(("width", "n_features"), [(16, 23), (40, 60)])
def test_generic_edge_features(width, n_features, training):
    compare([Problem("weighted", width, n_features, features=True, seed=6)], training)


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("training", TRAINING, ids=MODES)
def test_what_is_given_may_begin_anywhere(training, features):
    """At any number, though rows of 32 are read four at a time where they can be."""
    problem = Problem("weighted", 32, 40, features)

    def moved(x: torch.Tensor) -> torch.Tensor:
        found = torch.empty(x.numel() + 1)[1:].view(x.shape)
        assert found.data_ptr() % 16 == 4
        return found.copy_(x)

    problem.parameters, problem.state = ([moved(x) for x in given] for given in (problem.parameters, problem.state))
    problem.upstream, (distance, given, *others) = moved(problem.upstream), problem.edges
    problem.edges = Edges(moved(distance), None if given is None else moved(given), *others)
    compare([problem], training)


@pytest.mark.parametrize("training", TRAINING, ids=MODES)
@pytest.mark.parametrize(("width", "features"), [(33, False), (96, False), (72, True)])
def test_channels_one_chunk_after_the_other(training_library, monkeypatch, width, features, training):
    """As backward in large batches; the last chunk of 33 channels has one."""
    problem, launches = Problem("weighted", width, 41, features=features), []
    for at_once in (backend.AT_ONCE, 1):
        monkeypatch.setattr(backend, "AT_ONCE", at_once)
        before = training_library.launches()
        compare([problem], training)
        launches.append(training_library.launches() - before)
    assert launches[1] + 1 >= launches[0] + 9 * (-(-width // 32) - 1)  # one is for the graph alone


@pytest.mark.parametrize("training", TRAINING[:2], ids=["train", "eval"])
def test_more_rows_than_all_programs_take_at_once(monkeypatch, training):
    """Each of two programs has several tasks, and the last task is not whole."""
    monkeypatch.setattr(backend, "PROGRAMS", 2)
    problem = Problem("long", 32, 41)
    assert len(problem.row_weight) > 2 * 2 * backend._ROWS
    compare([problem], training)


def test_six_thousand_edges():
    compare([Problem("large", 64, 41)], (True, True))


def test_bits_do_not_depend_on_the_gpu(training_library):
    """Nor on the order of its warps and blocks: the order would show a missing barrier."""
    for kind, features, training in (
        ("weighted", False, TRAINING[0]),
        ("weighted", True, TRAINING[1]),
        ("popular", False, TRAINING[0]),
    ):
        problem = Problem(kind, 40, 41, features=features)
        training_library.gpu(132, 228 << 10)
        first = problem.found(training)
        for shared in (228, 164, 100):  # kB: room for all, some and none of the weights of rows' products
            training_library.gpu(3, shared << 10, True)
            assert all(torch.equal(first[name], x) for name, x in problem.found(training).items())


def test_bits_do_not_depend_on_what_else_is_in_the_batch():
    """With fixed statistics: a row's tiles begin elsewhere, and meet other distances."""
    problem = Problem("weighted", 16, 41)
    h, layer, graph, _ = arguments(problem)
    more = 3  # rows before, with 2 edges each
    both = graph._replace(
        distance=torch.cat([torch.full((2 * more,), 7.3), graph.distance]),
        sender=torch.cat([torch.zeros(2 * more, dtype=torch.int32), graph.sender + more]),
        row_ptr=torch.cat([torch.arange(0, 2 * more, 2, dtype=torch.int32), graph.row_ptr + 2 * more]),
    )
    edges = backend._Edges(graph, 41, h.dtype, h.device), backend._Edges(both, 41, h.dtype, h.device)
    linear = Kernels.linear(h, layer, edges[0])
    alone, together = torch.empty_like(h), h.new_empty(len(h) + more, 16)
    Kernels.gate_sum(alone, h, linear, layer, edges[0])
    linear.pq = torch.cat([torch.ones(more, 128), linear.pq])
    Kernels.gate_sum(together, h, linear, layer, edges[1])
    assert torch.equal(together[more:], alone)


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("n_features", [41, 110])
def test_moments_of_the_edges(features, n_features):
    convolution.moments_of_the_edges(Problem("ragged", 8, n_features, features=features))


def test_sums_over_more_rows_than_warps_of_a_launch():
    convolution.moments_of_the_edges(Problem("many rows", 1, 3))


@pytest.mark.parametrize("width", [7, 20, 64, 100])
def test_sums_of_neighbors(width):
    """About a mean of some rows; NaN for a row with an index outside, and for the edges of bad pointers."""
    problem = Problem("long", width, 3)
    h, _, graph, _ = arguments(problem)
    n, degree = len(h), graph.row_ptr.diff()
    assert int(degree.max()) > 4 and n > 2 * 64
    h += 5
    weight, sender, ptr = torch.rand(n) + 0.5, graph.sender.clone(), graph.row_ptr.clone()
    around, centre, counts = torch.empty_like(h), h.new_empty(width), h.new_empty(-(-n // 32))
    given = {"h": h, "ptr": ptr, "other": sender, "row_weight": weight, "out": around, "out_x": centre, "out_m": counts}
    sizes = {**backend._rows(n, width), "n_edges": len(sender)}
    backend._call("neighbors", sizes, **given)
    begin = torch.arange(65) * n // 64
    rows = begin[:-1] + (torch.arange(64) * 0x9E3779B1 % 2**32 * begin.diff() >> 32)
    share = (weight * degree)[rows].double()
    assert relative(centre, share @ h[rows].double() / share.sum()) < 1e-6
    assert relative(counts.sum(), (weight * degree).double().sum()) < 1e-6
    receiver = torch.repeat_interleave(torch.arange(n), degree)
    truth = torch.zeros(n, width).double().index_add_(0, receiver, (h[sender.long()] - centre).double())
    assert relative(around, truth) < 3e-7
    sender[ptr[5]], sender[ptr[9] - 1] = -1, n
    backend._call("neighbors", sizes, **given)
    bad = torch.zeros(n, dtype=torch.bool)
    bad[[5, 8]] = True
    assert torch.equal(around.isnan(), bad[:, None].expand(-1, width)) and not centre.isnan().any()
    ptr[-1] = len(sender) + 1
    backend._call("neighbors", sizes, **given)
    bad[-1] = True
    assert torch.equal(around.isnan(), bad[:, None].expand(-1, width)) and counts.isnan().tolist()[-2:] == [False, True]


def test_the_term_of_an_edge():
    convolution.term_of_an_edge(
        lambda h, layer, graph: backend.conv(h, layer, graph, Moments(torch.ones(len(h)), *[None] * 5))[0]
    )


def test_the_gate_is_right_at_both_ends():
    convolution.gate_at_both_ends(Problem)


@pytest.fixture
def pretend_gpu(monkeypatch):
    convolution.pretend_gpu(monkeypatch, compiled=True)


def layers_of(dtype: torch.dtype, width: int, training: tuple[bool, bool], n_features: int = 41):
    """Two layers, of which the second norm moves by 0.3, and their leaves."""
    g, layers, leaves = torch.Generator().manual_seed(5), [], []
    rand = lambda *s: torch.rand(*s, generator=g, dtype=torch.float64)  # noqa: E731
    for _ in range(2):
        shapes = [(2 * width, 2 * width + n_features), *[(2 * width,)] * 3, *[(width,)] * 2]
        own = [((rand(*s) - 0.5) / 3 + (k in (2, 4))).to(dtype).requires_grad_() for k, s in enumerate(shapes)]
        norms = [
            BatchNorm(own[k], own[k + 1], *(rand(c).to(dtype) + 0.5 for _ in range(2)), train, momentum)
            for k, c, train, momentum in ((2, 2 * width, training[0], 0.1), (4, width, training[1], 0.7))
        ]
        layers.append(functional.ConvParameters(*own[:2], *norms))
        leaves += own
    return layers, leaves


@pytest.mark.parametrize("training", TRAINING, ids=MODES)
def test_layers_in_one_node_of_the_graph(pretend_gpu, monkeypatch, training):
    """As models call them outside of compilation: outputs, gradients, running statistics."""
    problem, results = Problem("weighted", 20, 41), []
    for name, dtype in (("reference", torch.float64), ("reference", torch.float32), ("cuda", torch.float32)):
        monkeypatch.setattr(registry, "select", lambda *_a, name=name, **_k: name)
        layers, leaves = layers_of(dtype, 20, training)
        h = problem.parameters[0].to(dtype).requires_grad_()
        numbers = torch.zeros(len(h), dtype=torch.int32)
        batch = sf.GraphBatch(
            numbers, problem.row_weight.float(), problem.edges.sender, problem.edges.distance.to(dtype),
            problem.edges.row_ptr, problem.edges.crystal_ptr, numbers,
        )  # fmt: skip
        wanted = [h, *leaves]
        if not training[0]:
            wanted.append(batch.distance.requires_grad_())
        out, _ = functional.stacked_gated_conv(h, batch, layers)
        versions = [x._version for layer in layers for norm in layer[2:] for x in norm[2:4]]
        assert versions == [int(train) for _ in layers for train in training for _ in range(2)]
        loss = (out * problem.upstream.to(dtype)).sum()
        gradients = torch.autograd.grad(loss, wanted)
        state = [x for layer in layers for norm in layer[2:] for x in norm[2:4]]
        results.append([out.detach(), *gradients, *state])
    for k, (exact, plain, ours) in enumerate(zip(*results, strict=True)):
        if training[0] and k in (3, 9):  # the bias: zero in exact arithmetic
            assert ours.abs().max() <= 1e-6 * max(1.0, float(exact.norm()), float(results[0][2].norm()))
        else:
            assert relative(ours, exact) <= 2 * relative(plain, exact) + 3e-7, k


def batch_of(problem: Problem, dtype: torch.dtype = torch.float32) -> sf.GraphBatch:
    """Of three crystals."""
    rows = (0, 7, 8, n := len(problem.row_weight))
    index = lambda *x: torch.tensor(x, dtype=torch.int32)  # noqa: E731
    numbers = torch.randint(1, 95, (n,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    crystal = torch.repeat_interleave(torch.arange(len(rows) - 1), index(*rows).diff()).int()
    return sf.GraphBatch(
        numbers, problem.row_weight.float(), problem.edges.sender, problem.edges.distance.to(dtype),
        problem.edges.row_ptr, index(*rows), crystal,
    )  # fmt: skip


@pytest.mark.parametrize("table", [True, False], ids=["table", "rows"])
@pytest.mark.parametrize("kind", [sf.SRCGCNN, sf.CGCNN])
def test_whole_networks(pretend_gpu, training_library, monkeypatch, kind, table):
    """From elements to the loss: rows looked up in a table, their features formed again backward, means of crystals."""
    problem, results = Problem("weighted", 40, 41), []
    monkeypatch.setattr(backend, "AT_ONCE", 1)
    for name, dtype in (("reference", torch.float64), ("reference", torch.float32), ("cuda", torch.float32)):
        monkeypatch.setattr(registry, "select", lambda *_a, name=name, **_k: name)
        monkeypatch.setattr(registry, "trains_compiled", lambda _h, name=name: name == "cuda")
        model, batch = convolution.small_model(dtype, kind), batch_of(problem, dtype)
        if table:  # as in a batch of many more rows than elements
            model.element_table, batch.numbers = model.element_table[:15].clone(), batch.numbers % 15
        else:
            batch.atom_features = model.element_table[batch.numbers.long()] + batch.numbers[:, None] / 100
        before = training_library.launches()
        out = model(batch)
        (out * torch.tensor([[1.0], [-2.0], [3.0]], dtype=dtype)).sum().backward()
        assert (training_library.launches() > before) == (name == "cuda")
        found = {key: x.grad for key, x in model.named_parameters()}
        state = {key: x for key, x in model.named_buffers() if "running" in key}
        results.append({"out": out.detach(), **found, **state})
    for key, exact in results[0].items():
        plain, ours = results[1][key], results[2][key]
        if key.endswith("fc_full.bias"):  # zero in exact arithmetic
            assert ours.abs().max() <= 1e-5
        else:
            assert relative(ours, exact) <= 2 * relative(plain, exact) + 5e-7, key


@pytest.mark.parametrize("pooled", [False, True])
def test_gradients_that_are_asked_for_twice(pretend_gpu, monkeypatch, pooled):
    """Nothing that is kept, and no gradient that is given, is written to."""
    monkeypatch.setattr(registry, "select", lambda *_a, **_k: "cuda")
    problem, (layers, leaves) = Problem("weighted", 40, 41), layers_of(torch.float32, 40, (True, True))
    batch, h = batch_of(problem), problem.parameters[0].float().requires_grad_()
    pool = (lambda h: functional.crystal_mean(h, batch)) if pooled else None
    graph = problem.graph()._replace(crystal_ptr=batch.crystal_ptr)
    moments = problem.moments(graph, True)
    given = h.detach().clone()
    out = fused.gated_convs(h, graph, moments, layers, None, pool)
    upstream = torch.rand(out.shape, generator=torch.Generator().manual_seed(0))
    kept = upstream.clone()
    first, again = (torch.autograd.grad(out, [h, *leaves], upstream, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(upstream, kept) and torch.equal(h, given)


@pytest.mark.parametrize("features", [False, True])
def test_captured_training_gives_the_steps_of_the_model(pretend_gpu, replayed, monkeypatch, make_batch, features):
    monkeypatch.setattr(registry, "select", lambda *_a, **_k: "cuda")
    convolution.captured_steps(make_batch, 20, [("weighted", 1), ("isolated", 1), ("weighted", 2)], features)
    assert replayed == [2]


def test_captured_training_keeps_more_graphs_of_small_batches(pretend_gpu, replayed, monkeypatch, make_batch):
    monkeypatch.setattr(registry, "select", lambda *_a, **_k: "cuda")
    call, kept = capture.CapturedTraining(convolution.small_model(torch.float32, sf.CGCNN, 20)), []
    static = lambda batch: types.SimpleNamespace(batch=batch, fill=lambda *_: None)  # noqa: E731
    monkeypatch.setattr(call, "_capture", lambda batch, _: types.SimpleNamespace(static=static(batch)))
    monkeypatch.setattr(capture._Replayed, "apply", lambda *_: None)
    monkeypatch.setattr(capture, "_FEWER_STEPS", 2)
    monkeypatch.setattr(capture, "_MOST_STEPS", 3)
    for kind in ("isolated", "weighted", "ragged", "plain", "large"):
        call(make_batch(kind))
        kept.append(len(call._graphs))
    assert kept == [1, 2, 3, 3, 3]
    monkeypatch.setattr(capture, "_MANY_ROWS", 8000)
    call(make_batch("one crystal"))
    assert len(call._graphs) == 2 and list(call._graphs.values())[-1].static.batch.num_rows == 150


def test_captured_training_refuses_what_would_be_wrong(pretend_gpu, replayed, monkeypatch, make_batch):
    monkeypatch.setattr(registry, "select", lambda *_a, **_k: "cuda")
    model, batch = convolution.small_model(torch.float32, sf.CGCNN, 20), make_batch("isolated")
    call = capture.CapturedTraining(model)
    first = call(batch)
    call(batch).sum().backward()
    with pytest.raises(sf.InputError, match="call backward once, before the next batch"):
        first.sum().backward()
    loss = call(batch).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(sf.InputError, match="call backward once, before the next batch"):
        loss.backward()
    with pytest.raises(sf.InputError, match="cannot train on a single atom"):
        call(make_batch("one atom"))
    with pytest.raises(sf.InputError, match=r"call model\.train\(\) first"):
        capture.CapturedTraining(model.eval())(batch)
    model.convs[0].bn1.momentum = None
    with pytest.raises(sf.InputError, match="norms with a momentum"):
        capture.CapturedTraining(model)
    monkeypatch.setattr(registry, "select", lambda *_a, **_k: "reference")
    with pytest.raises(sf.InputError, match="needs float32 and the kernels for GPUs"):
        capture.CapturedTraining(model)
    monkeypatch.setattr(capture, "_DEVICE", "cuda")
    with pytest.raises(sf.InputError, match="needs a model on a CUDA device, not on cpu"):
        capture.CapturedTraining(model)


def test_a_capture_reaches_for_no_node_of_an_earlier_step(pretend_gpu, replayed, monkeypatch, make_batch):
    """A parameter's node belongs to the stream of the step that made it, which is held as long as its loss is."""
    monkeypatch.setattr(registry, "select", lambda *_a, **_k: "cuda")
    model, recorded, seen = convolution.small_model(torch.float32, sf.CGCNN, 20), capture._recorded_training, []
    nodes = {x.expand_as(x).grad_fn.next_functions[0][0] for x in model.parameters()}  # alive

    def reached(node):
        return set() if node is None else {node}.union(*(reached(x) for x, _ in node.next_functions))

    def watched(run):
        out, leaves = run()
        seen.append(reached(out.grad_fn))
        assert [x.data_ptr() for x in leaves] == [x.data_ptr() for x in model.parameters()]
        return recorded(run)

    monkeypatch.setattr(capture, "_recorded_training", watched)
    loss = capture.CapturedTraining(model)(make_batch("isolated")).sum()
    assert len(seen[0]) > len(nodes) and not seen[0] & nodes
    assert nodes <= reached(loss.grad_fn)
    assert all(isinstance(x, torch.nn.Parameter) for x in model.parameters())


def test_the_index_of_a_warm_up_is_not_kept(pretend_gpu, replayed, monkeypatch, make_batch):
    """It has two numbers an edge, and every replay makes its own."""
    monkeypatch.setattr(registry, "select", lambda *_a, **_k: "cuda")
    model, recorded = convolution.small_model(torch.float32, sf.CGCNN, 20), capture._recorded_training
    gc.collect()  # else what earlier tests left might go meanwhile
    before = len(triton._transposed)

    def watched(run):
        found = recorded(run)
        assert len(triton._transposed) == before + 1
        return found

    monkeypatch.setattr(capture, "_recorded_training", watched)
    step = capture.CapturedTraining(model)._capture(make_batch("isolated"), list(model.parameters()))
    assert len(triton._transposed) == before and step.static.batch.num_edges


def test_a_capture_that_fails_leaves_the_model_as_it_was(pretend_gpu, replayed, monkeypatch, make_batch):
    monkeypatch.setattr(registry, "select", lambda *_a, **_k: "cuda")
    model = convolution.small_model(torch.float32, sf.CGCNN, 20)
    before = copy.deepcopy(model.state_dict())

    def without_memory(run):
        run()
        raise torch.OutOfMemoryError

    monkeypatch.setattr(capture, "_recorded_training", without_memory)
    with pytest.raises(torch.OutOfMemoryError):
        capture.CapturedTraining(model)(make_batch("weighted"))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_captured_training_follows_what_is_frozen_or_replaced(pretend_gpu, replayed, monkeypatch, make_batch):
    """Norms that stop, weights that stop, a parameter at another address, other settings: each has its own graph."""
    monkeypatch.setattr(registry, "select", lambda *_a, **_k: "cuda")
    model, batch = convolution.small_model(torch.float32, sf.SRCGCNN, 20), make_batch("isolated")
    call = capture.CapturedTraining(model)
    for change in (
        lambda: None,
        lambda: model.recurrent_bn1s[0].eval(),
        lambda: model.embedding.requires_grad_(False),
        lambda: setattr(model.fc_out, "weight", torch.nn.Parameter(2 * model.fc_out.weight.detach())),
        lambda: setattr(model.embedding.weight, "data", 2 * model.embedding.weight.detach()),  # which is frozen
        lambda: setattr(model.recurrent_bn2s[0], "momentum", 0.5),
    ):
        change()
        batch.cache.clear()
        found = []
        for given in (model, call):
            model.zero_grad()
            with torch.no_grad():  # the running statistics that one norm computes with
                model.recurrent_bn1s[0].running_mean.fill_(0.1)
            out = given(batch)
            out.sum().backward()
            found.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        for expected, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, expected, rtol=2e-4, atol=2e-5)
    assert replayed == [6]
    model.requires_grad_(False)
    batch.cache.clear()
    assert torch.equal(call(batch), model(batch)) and replayed == [6]


def test_features_that_are_formed_again_have_the_bits_of_those_that_left():
    problem, stream = Problem("weighted", 40, 41), 0
    h, layer, graph, _ = arguments(problem)
    moments = problem.moments(graph, True)
    for training in TRAINING:
        of_layer = layer._replace(train1=training[0], train2=training[1])
        run = backend.Call(graph, moments, h, 41)
        messages, x = backend.Messages(h.new_empty(3, len(h), 40), h.new_empty(3, 2, 40)), h
        for t in range(3):
            out = torch.empty_like(x) if x is h else x
            run.forward(x, of_layer, stream, (out, messages.sums[t], messages.norms[t]))
            x = out
            assert torch.equal(backend.features(h, None, messages, t + 1), x)
    species = torch.tensor([3, 0, 59, 60, -1], dtype=torch.int32)
    few = backend.Messages(messages.sums[:, :5].contiguous(), messages.norms)
    found = backend.features(h, species, few, 0)
    assert torch.equal(found[:3], h[[3, 0, 59]]) and found[3:].isnan().all()
    assert backend.features(h, species, few, 3).isnan().any(1).tolist() == [False] * 3 + [True] * 2


def test_memory_of_a_training_step(pretend_gpu, training_library, monkeypatch):
    """Rows of F numbers at its peak: 3 of messages, the gradient, features, 5 in a layer, 2/5 of the edges' index."""
    monkeypatch.setattr(registry, "select", lambda *_a, **_k: "cuda")
    monkeypatch.setattr(torch.Tensor, "new_empty", NEW_EMPTY)  # the fences would stay
    monkeypatch.setattr(torch, "empty_like", EMPTY_LIKE)
    monkeypatch.setattr(training_library, "cuda_conv", lambda *_: None)  # what is computed takes no memory
    monkeypatch.setattr(functional, "_MANY_ROWS", 1)
    monkeypatch.setattr(backend, "PROGRAMS", 1)
    monkeypatch.setattr(backend, "AT_ONCE", 1)
    width, rows, peaks = 64, (200, 400), []
    model = convolution.small_model(torch.float32, sf.SRCGCNN, width)
    for n in rows:
        g, index = torch.Generator().manual_seed(0), lambda x: torch.tensor(x, dtype=torch.int32)
        draw = lambda top, k: torch.randint(1, top, (k,), generator=g, dtype=torch.int32)  # noqa: B023, E731
        numbers, sender = draw(90, n), draw(n, 12 * n)
        batch = sf.GraphBatch(
            numbers, torch.ones(n), sender, torch.rand(12 * n, generator=g) + 2, index(range(0, 12 * n + 1, 12)),
            index([0, n]), torch.zeros_like(numbers),
        )  # fmt: skip
        kinds = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=kinds, profile_memory=True) as profile:
            model(batch).sum().backward()
        model.zero_grad()
        events = [x for x in profile.profiler.kineto_results.events() if x.name() == "[memory]"]
        sizes = [x.nbytes() for x in sorted(events, key=lambda x: x.start_ns())]
        peaks.append(max(itertools.accumulate(sizes)))
    a_row = (peaks[1] - peaks[0]) / (rows[1] - rows[0]) / (4 * width)
    assert 9 < a_row < 10.6


@pytest.mark.parametrize("pooled", [False, True])
def test_second_derivatives_of_layers(pretend_gpu, monkeypatch, pooled):
    """They go through operators that can be differentiated again, here the reference in their place."""

    def gated_conv(h, *arguments):
        layer, graph, moments = library_of_operators._split(arguments)
        norms = [
            BatchNorm(layer[k], layer[k + 1], *layer[m : m + 2], training=train)
            for k, m, train in ((2, 6, layer.train1), (4, 8, layer.train2))
        ]
        edges = Edges(*graph[:5], graph.dmin, graph.step)
        return (reference.gated_conv(h, edges, moments.row_weight, *layer[:2], *norms),)

    monkeypatch.setattr(fused, "_ops", types.SimpleNamespace(gated_conv=gated_conv))
    problem, results = Problem("weighted", 20, 41), []
    for name in ("reference", "cuda"):
        monkeypatch.setattr(registry, "select", lambda *_a, name=name, **_k: name)
        layers, leaves = layers_of(torch.float32, 20, (False, False))
        h, numbers = problem.parameters[0].float().requires_grad_(), torch.zeros(60, dtype=torch.int32)
        distance = problem.edges.distance.float().requires_grad_()
        batch = sf.GraphBatch(
            numbers, problem.row_weight.float(), problem.edges.sender, distance, problem.edges.row_ptr,
            problem.edges.crystal_ptr, numbers,
        )  # fmt: skip
        out, _ = functional._stack(h, batch, layers, None, 0.0, 0.2, False, None, pooled)
        first = torch.autograd.grad(out.square().sum(), [h, distance, *leaves], create_graph=True)
        loss = sum(x.square().sum() for x in first)
        results.append([x.detach() for x in (*first, *torch.autograd.grad(loss, [h, distance, *leaves]))])
    assert all(relative(a, b) < 1e-5 for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("width", [20, 64])
def test_means_of_crystals(pretend_gpu, width):
    """And their gradient, and its gradient; a crystal without rows has 0, one with bad pointers NaN."""
    rows = [0, 1, 8, 8, 60, 61]
    g, index = torch.Generator().manual_seed(0), lambda x: torch.tensor(x, dtype=torch.int32)
    weight, upstream = torch.randint(1, 5, (61,), generator=g).float(), torch.rand(5, width, generator=g)
    h = torch.rand(61, width, generator=g).requires_grad_()
    batch = sf.GraphBatch(index([1] * 61), weight, index([]), weight[:0], index([0] * 62), index(rows), index([0] * 61))
    mean = functional.crystal_mean(h, batch)
    (gradient,) = torch.autograd.grad((mean * upstream.requires_grad_()).sum(), h, create_graph=True)
    (again,) = torch.autograd.grad((gradient * h.detach()).sum(), upstream)
    share = torch.zeros(5, 61).double()
    for k, (a, b) in enumerate(itertools.pairwise(rows)):
        share[k, a:b] = weight[a:b].double() / weight[a:b].double().sum()
    expected = share @ h.detach().double()
    for ours, truth in ((mean, expected), (gradient, share.T @ upstream.double()), (again, expected)):
        assert relative(ours.detach(), truth.detach()) < 3e-7
    assert not mean[2].any()
    batch.crystal_ptr = index([0, 1, 90, 8, 60, 61])
    assert functional.crystal_mean(h, batch).isnan().any(1).tolist() == [False, True, True, False, False]
    n = 40_000  # whose plain sums in float32 drift by 7e-5
    none = index([0] * n)
    batch = sf.GraphBatch(none, torch.ones(n), none[:0], weight[:0], index([0] * (n + 1)), index([0, n]), none)
    assert relative(functional.crystal_mean(h[:1].expand(n, width), batch).detach(), h[:1].detach()) < 3e-7


@pytest.mark.parametrize(("count", "width"), [(1, 20), (5, 20), (119, 64), (300, 33)])
def test_rows_of_a_table(training_library, pretend_gpu, monkeypatch, count, width):
    """And their gradient, in bits that repeat, and its own; a number beyond the table gives NaN, and is in no sum."""
    g, n = torch.Generator().manual_seed(0), 700
    species = torch.randint(count, (n,), generator=g, dtype=torch.int32)
    species[100:400] = species[100:400].sort()[0]  # as in crystals, where atoms of one kind often come together
    table, upstream = torch.rand(count, width, generator=g).requires_grad_(), torch.rand(n, width, generator=g)
    rows = fused.lookup(table, species)
    assert torch.equal(rows, table[species.long()])
    (gradient,) = torch.autograd.grad(rows, table, upstream.requires_grad_(), create_graph=True)
    (again,) = torch.autograd.grad(gradient, upstream, table.detach())
    assert torch.equal(again, rows)
    monkeypatch.setattr(triton, "sum_by_species", None)
    first = []
    for gpu in ((132, 228 << 10), (3, 100 << 10, True)):
        training_library.gpu(*gpu)
        first.append(torch.autograd.grad(fused.lookup(table, species), table, upstream.detach())[0])
    truth = torch.zeros(count, width).double().index_add_(0, species.long(), upstream.detach().double())
    assert torch.equal(*first) and relative(first[0], truth) < 1e-7
    bad = torch.tensor([3, 50, n - 1])
    species[bad] = torch.tensor([-1, count, 2**31 - 1], dtype=torch.int32)
    rows = fused.lookup(table, species)
    assert rows.isnan().any(1).nonzero().flatten().tolist() == bad.tolist()
    upstream = upstream.detach().clone()
    upstream[bad] = math.nan
    found = torch.autograd.grad(rows, table, upstream)[0]
    good = torch.ones(n, dtype=torch.bool)
    good[bad] = False
    truth = torch.zeros(count, width).double().index_add_(0, species[good].long(), upstream[good].double())
    assert relative(found, truth) < 1e-7


@pytest.mark.parametrize(
    ("rows", "wrong"), [([2, 5, 5, 9], [0, 1, 9, 10]), ([0, 4, 99, 9], [*range(4, 11)]), ([-3, 4, 7, 11], [*range(4)])]
)
def test_rows_that_no_crystal_covers_have_nan_as_gradient(rows, wrong):
    """And those of crystals whose pointers are bad; all others what they have by their crystal."""
    out, grad = torch.zeros(11, 20), torch.ones(3, 20)
    ptr, given = torch.tensor(rows, dtype=torch.int32), {"row_weight": torch.ones(11), "grad": grad}
    backend._call("mean_backward", {"n_rows": 3, "n_edges": 11, "F": 20}, out=out, ptr=ptr, **given)
    assert [row for row in range(11) if out[row].isnan().all()] == wrong
    good = [row for row in range(11) if row not in wrong]
    assert torch.isfinite(out[good]).all() and (out[good] > 0).all()


def test_rows_without_any_crystal_have_nan_as_gradient(fenced):
    """Not what memory had before, here zeros."""
    fenced.value = 0.0
    none = torch.zeros(1, dtype=torch.int32)
    assert backend.crystal_mean_backward(torch.ones(0, 20), torch.ones(11), none).isnan().all()


@pytest.mark.compiled
def test_statistics_of_several_processes(monkeypatch):
    """Synchronised batch norm calls the operators with statistics that it forms itself; here with one process."""
    split = library_of_operators._split
    operators = types.SimpleNamespace(
        gated_conv=lambda h, *a: backend.conv(h, *split(a)),
        gated_conv_backward=lambda d, h, m, *a: backend.conv_backward(d, h, m, *split(a), a[-1]),
    )
    monkeypatch.setattr(synchronized, "_ops", operators)
    monkeypatch.setattr(fused, "is_eager", lambda _h, _device="cpu": False)
    problem, training = Problem("weighted", 32, 41), (True, True)
    truth, plain = (problem.expected(dtype, training) for dtype in (torch.float64, torch.float32))
    graph, leaves = problem.graph(), [x.float().clone().requires_grad_() for x in problem.parameters]
    moments = problem.moments(graph, True)
    state = [x.float() for x in problem.state]
    h, weight, bias, g1, b1, g2, b2 = leaves
    norms = BatchNorm(g1, b1, *state[:2], True), BatchNorm(g2, b2, *state[2:], True)
    around = synchronized.neighbors(moments, graph)
    out = synchronized.gated_convs(h, graph, moments, around, [(weight, bias, *norms)])
    found = torch.autograd.grad((out * problem.upstream.float()).sum(), leaves)
    for name, x in zip(("out", *(f"grad {name}" for name in NAMES)), (out.detach(), *found), strict=True):
        if name != "grad bias":  # zero in exact arithmetic
            assert relative(x, truth[name]) <= 2 * relative(plain[name], truth[name]) + 3e-7, name


def test_rows_by_species():
    convolution.rows_by_species(Problem)


def test_a_batch_without_rows():
    convolution.no_rows(Problem)


@pytest.mark.parametrize(("array", "value"), [*convolution.BAD_INDICES, ("distance", math.nan)])
def test_what_is_wrong_gives_nan_in_its_row_alone(array, value):
    convolution.bad_indices(Problem, array, value)


def test_what_is_wrong_in_a_parameter_gives_nan():
    convolution.bad_parameters(Problem)


def test_tf32_is_used_where_it_is_allowed(monkeypatch):
    problem = Problem("twelve", 32, 41)
    exact = problem.expected(torch.float64, (True, True))
    for how, least, most in (("tf32x3", 0.0, 1e-6), ("tf32", 1e-6, 1e-3)):
        monkeypatch.setattr(backend, "_precision", lambda how=how: how)
        found = problem.found((True, True))
        assert all(least < relative(found[name], exact[name]) < most for name in ("out", "grad weight"))


@pytest.mark.parametrize(("width", "features"), [(16, False), (16, True), (40, False)])
def test_bfloat16_storage(width, features):
    convolution.bfloat16_storage(Problem("weighted", width, 23 if features else 41, features=features, seed=6))


def test_bfloat16_rows_are_what_is_rounded(monkeypatch):
    """And the products with the filter, which three TF32 products spare here."""
    monkeypatch.setattr(backend, "_precision", lambda: "tf32x3")
    with sf.use_precision("bfloat16"):
        linear = convolution.rounded_rows(Problem("weighted", 16, 41, seed=6))
    assert linear.pq.dtype == torch.bfloat16 and linear.of_edges.dtype == linear.filter.dtype == torch.float32


def test_an_error_of_cuda_is_raised(training_library):
    problem = Problem("isolated", 16, 41)
    training_library.fail_once()
    with pytest.raises(RuntimeError, match="CUDA: invalid value"):
        problem.found((False, False))


def far(*shape: int) -> torch.Tensor:
    return sparse(shape, torch.float32)


@pytest.mark.parametrize("given", [False, True], ids=["distance", "edge features"])
def test_offsets_beyond_two_to_the_31(training_library, given):
    """The last rows of 2^24 and some, gathered, written, and their partial sums, against the same rows alone."""
    width, k, tail = 32, 41, 20
    small = Problem("twelve", width, k, features=given)
    assert len(small.row_weight) == tail
    h, layer, graph, _ = arguments(small)
    edges = backend._Edges(graph, k, h.dtype, h.device)
    linear = Kernels.linear(h, layer, edges)
    n, n_edges = 2**24 + 64, 2**24 + 240 if not given else 2**25 + 240
    before, first = n - tail, n_edges - 240
    zeros = lambda size: sparse(size, torch.int32)  # noqa: E731

    def moved_pointers(ptr: torch.Tensor) -> torch.Tensor:
        found = zeros(n + 1)
        found[n - backend._ROWS : before] = first  # the last block has rows without edges too
        found[before:] = ptr + first
        return found

    def moved_edges(x: torch.Tensor, by: int) -> torch.Tensor:
        found = zeros(n_edges) if x.dtype == torch.int32 else far(n_edges, *x.shape[1:])
        found[first:] = x + by
        return found

    big = graph._replace(
        distance=moved_edges(graph.distance, 0),
        sender=moved_edges(graph.sender, before),
        row_ptr=moved_pointers(graph.row_ptr),
        features=moved_edges(graph.features, 0) if given else None,
    )
    large = backend._Edges(big, k, h.dtype, h.device)
    receiver, number, col_ptr = backend.transposed(graph)
    senders = {"ptr": col_ptr, "other": receiver, "number": number}
    far_senders = {
        "ptr": moved_pointers(col_ptr), "other": moved_edges(receiver, before), "number": moved_edges(number, first)
    }  # fmt: skip
    dm, results = torch.rand(tail, width, generator=torch.Generator().manual_seed(0)), []
    for where, rows, at, by_sender in ((edges, tail, 0, senders), (large, n, before, far_senders)):
        moved = types.SimpleNamespace(pq=far(rows, 4 * width), filter=linear.filter, table=None)
        moved.pq[at:] = linear.pq
        if given:
            moved.table = linear.table if where is edges else moved_edges(linear.table, 0)
        m, upstream, d_pq = far(rows, width), far(rows, width), far(rows, 4 * width)
        upstream[at:] = dm
        blocks = -(-rows // backend._ROWS)
        training_library.gpu(rows // 128, 228 << 10)  # blocks of gate_sum with 36 rows at most
        try:
            training_library.only(last_blocks=1)
            Kernels.gate_sum(m, m, moved, layer, where)
            sizes = Kernels.sizes(where, width, moved, programs=blocks)
            sums = far(blocks, k, 2 * width), far(blocks, 2, 2 * width)
            backend._call(
                "backward_receivers", sizes, out=d_pq, out_filter=sums[0], out_gamma=sums[1],
                d_m=upstream, **Kernels.layer(moved, layer), **Kernels.edges(where),
            )  # fmt: skip
            backend._call(
                "backward_senders", sizes, out=d_pq, d_m=upstream, a=layer.gamma1,
                **Kernels.layer(moved, layer), **{**Kernels.edges(where), **by_sender},
            )  # fmt: skip
        finally:
            training_library.only()
        results.append([m[at:], d_pq[at:], *(x[-1] for x in sums)])
    assert all(x.abs().max() > 0.1 for x in results[0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][:2], results[1][:2], strict=True))
    assert all(relative(a, b) < 1e-6 for a, b in zip(results[1][2:], results[0][2:], strict=True))  # other tasks


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_products_of_rows_beyond_two_to_the_31(training_library, half):
    """The last rows of 2^24 and some, whose products with the weights are beyond 2^31 numbers."""
    width, k, tail = 32, 41, 20
    small = Problem("twelve", width, k)
    h, layer, graph, _ = arguments(small)
    found = []
    with sf.use_precision("bfloat16" if half else "float32"):
        storage = backend._storage()
        for rows in (tail, 2**24 + 64):
            edges = types.SimpleNamespace(
                graph=graph, distance=graph.distance, n_rows=rows, n_edges=240, n_features=k, basis=(0.0, 5.0)
            )
            x, pq = far(rows, width), sparse((rows, 4 * width), storage)
            x[-tail:] = h
            training_library.gpu(rows // 64, 228 << 10)  # blocks with few rows each
            training_library.only(last_blocks=128)  # all of those that order the weights
            try:
                found.append(Kernels.linear(x, layer, edges, pq).pq[-tail:])
            finally:
                training_library.only()
    assert found[0].abs().max() > 0.1 and torch.equal(*found)


def test_offsets_beyond_two_to_the_31_of_rows(training_library):
    """What the other kernels read and write of the last four rows, of 256 numbers and more, against these alone."""
    width, k = 256, 41
    rand = lambda *s: torch.rand(*s, generator=torch.Generator().manual_seed(sum(s)))  # noqa: E731
    vectors = {name: rand(width) + 0.5 for name in ("gamma2", "beta2", "mean2", "var2")}
    vectors |= {"c1": rand(2 * width), "c2": rand(2 * width) + 1, "a": rand(2 * width)}
    totals = {"totals": rand(3, width).double() + 1}
    found = []
    for rows in (4, 2**23 + 32768):
        sizes = {**backend._rows(rows, width), "programs": -(-rows // 16), "n_features": k, "n_edges": 8, "eps": 1e-5}

        def last(*shape: int, rows: int = rows) -> torch.Tensor:
            x = far(rows, *shape)
            x[-4:] = rand(4, *shape)
            return x

        ptr, other = sparse(rows + 1, torch.int32), torch.arange(rows - 4, rows, dtype=torch.int32).repeat(2)
        ptr[-5:] = torch.arange(0, 10, 2, dtype=torch.int32)
        given = {name: last(width) for name in ("h", "m", "grad")}
        weights = {"row_weight": last(), "degree": last()}
        sums, du, dm, out = (far(*shape) for shape in ((-(-rows // 16), 3, width), *[(rows, width)] * 3))
        h, around, centre, counts = last(width), far(rows, width), far(width), far(min(1056, -(-rows // 32)))
        h[-4] = 0  # as the rows before, of which the mean is: the last of 64 is not among the last four of many
        d_pq, unused = last(4 * width), far(-(-rows // 16), 4, width)
        of = lambda *names: {name: vectors[name] for name in names}  # noqa: E731
        try:
            training_library.only(last_blocks=16)  # all channels of the last rows
            backend._call("column_sums", sizes, out=sums, x=given["m"], **weights)
            norm = of("gamma2", "beta2", "mean2", "var2")
            backend._call("finish_backward", sizes, out=du, out_m=dm, out_x=unused, ptr=ptr, **given, **norm, **weights)
            more = {**totals, **of("gamma2", "beta2"), "x": vectors["c1"], "out_m": far(width), "out_x": far(width)}
            backend._call("finish", sizes, out=out, h=given["h"], m=given["m"], **more)
            strided = {**sizes, "stride": 4 * width, "columns": 2 * width}
            x = d_pq[:, 2 * width :]
            backend._call("correct", strided, out=d_pq, grad=d_pq, x=x, **weights, **of("a", "c1", "c2"))
            training_library.only(last_blocks=1)
            backend._call(
                "neighbors", sizes, out=around, out_x=centre, out_m=counts, h=h, ptr=ptr, other=other,
                row_weight=far(rows),
            )  # fmt: skip
        finally:
            training_library.only()
        found.append([sums[-1], *(y[-4:] for y in (du, dm, out, d_pq, around))])
    for alone, at_the_end in zip(*found, strict=True):
        assert alone.abs().max() > 0.1 and torch.equal(alone, at_the_end)


def test_every_launch_goes_to_the_stream_of_its_tensors(training_library, monkeypatch):
    on: list[torch.device] = []
    monkeypatch.setattr(triton, "launching", lambda device: on.append(device) or contextlib.nullcontext(0xABC1))
    training_library.on_stream(0xABC1)
    before = training_library.launches()
    Problem("weighted", 16, 41).found((True, True))
    assert training_library.on_stream(0) == training_library.launches() - before > 30 > len(on) > 3
    assert set(on) == {torch.device("cpu")}


@pytest.mark.skipif(not hasattr(registry.core, "cuda_conv"), reason="the CUDA kernels were not built")
def test_the_compiled_module_has_the_same_fields_and_raises_errors_of_cuda():
    """Of no rows, which no GPU launches either."""
    pointers, sizes, numbers = ([0] * len(x) for x in (backend.FIELDS, backend.SIZES, backend.NUMBERS))
    for name in ("gate_sum", "backward_senders"):
        with pytest.raises(RuntimeError, match=r"^CUDA: \w+"):
            registry.core.cuda_conv(name, pointers, sizes, numbers, 0)
    for given in (([*pointers, 0], sizes), (pointers, sizes[1:])):
        with pytest.raises(RuntimeError, match="not the fields of DeviceConv"):
            registry.core.cuda_conv("gate_sum", *given, numbers, 0)
    with pytest.raises(RuntimeError, match="no CUDA kernel of this name: gate"):
        registry.core.cuda_conv("gate", pointers, sizes, numbers, 0)


def test_nothing_waits_for_the_gpu(monkeypatch):
    """The kernels are not launched."""
    monkeypatch.undo()
    nothing = types.SimpleNamespace(cuda_conv=lambda *_: None, cuda_space=lambda *_: 4)
    monkeypatch.setattr(backend, "native", lambda: nothing)
    monkeypatch.setattr(backend, "_put", lambda pointers, **_: pointers)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda _: 0)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        convolution.waits(mode, Problem)


def test_bad_shapes_and_types_are_refused():
    convolution.bad_input(Problem)


def test_who_trains(monkeypatch):
    """The compiled kernels where they can, unless another backend is forced; Triton's otherwise."""
    like = lambda dtype=torch.float32, width=200: types.SimpleNamespace(  # noqa: E731
        device=torch.device("cuda"), dtype=dtype, shape=(5, width)
    )
    assert not registry.trains_compiled(like()) or torch.cuda.is_available()
    monkeypatch.setattr(registry, "cuda_problem", lambda *_: None)
    assert registry.trains_compiled(like())
    assert not registry.trains_compiled(like(torch.float64))
    for name, expected in (("cuda", backend), ("triton", triton), ("reference", triton)):
        monkeypatch.setenv("SRCGCNN_FAST_BACKEND", name)
        assert library_of_operators._gpu_kernels(like()) is expected
