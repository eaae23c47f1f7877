"""The CUDA kernels for training against the reference in float64, without a GPU: their source, compiled for the CPU.

cuda/emulation.h supplies CUDA's execution model; what it shows, and what not, is said there and in test_cuda.py.
"""

from __future__ import annotations

import importlib.util
import itertools
import types
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import srcgcnn_fast as sf
from srcgcnn_fast.ops import cuda_conv as backend
from srcgcnn_fast.ops import fused, reference, registry, synchronized, triton
from srcgcnn_fast.ops import library as library_of_operators
from srcgcnn_fast.ops.cpu import Graph, Layer, Moments
from srcgcnn_fast.ops.reference import BatchNorm, Edges


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(__file__).parent / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


emulated, convolution = load("cuda/emulated.py"), load("convolution.py")
compare, relative, NAMES, TRAINING = convolution.compare, convolution.relative, convolution.NAMES, convolution.TRAINING
pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="the emulation needs g++")


class Problem(convolution.Problem):
    backend = backend


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory):
    return emulated.Emulated(emulated.build(tmp_path_factory.mktemp("emulated"), "conv"))


@pytest.fixture(autouse=True)
def on_the_emulation(library, fenced, monkeypatch: pytest.MonkeyPatch):
    """The kernels for training on tensors of the CPU."""
    monkeypatch.setattr(backend, "native", lambda: library)
    library.gpu(3, 228 << 10)


@pytest.mark.parametrize("training", TRAINING, ids=["train", "eval", "frozen bn1"])
@pytest.mark.parametrize("kind", ["twelve", "weighted", "ragged", "isolated", "one atom", "no edges"])
def test_convolution(kind, training):
    if kind in ("one atom", "no edges") and any(training):
        pytest.skip("batch norm cannot train on it; test_functional says so")
    seeds = range(20 if kind in ("isolated", "one atom") else 3)  # few numbers say little about roundings
    compare([Problem(kind, 16, 41, seed=seed) for seed in seeds], training)


@pytest.mark.parametrize(("width", "n_features"), [(64, 41), (7, 41), (1, 3), (33, 5), (48, 9), (128, 60), (20, 130)])
def test_any_width_and_number_of_gaussians(width, n_features):
    kind, seeds = ("weighted", range(30 if width == 1 else 4)) if width < 8 else ("isolated", range(8))
    compare([Problem(kind, width, n_features, seed=seed) for seed in seeds], (True, True))


@pytest.mark.parametrize("training", TRAINING[:2], ids=["train", "eval"])
@pytest.mark.parametrize(("width", "n_features"), [(16, 23), (40, 60)])
def test_generic_edge_features(width, n_features, training):
    compare([Problem("weighted", width, n_features, features=True, seed=6)], training)


@pytest.mark.parametrize("training", TRAINING[:2], ids=["train", "eval"])
def test_more_rows_than_all_programs_take_at_once(monkeypatch, training):
    """Each of two programs has several tasks, and the last task is not whole."""
    monkeypatch.setattr(backend, "PROGRAMS", 2)
    problem = Problem("long", 32, 41)
    assert len(problem.row_weight) > 2 * 2 * backend._ROWS
    compare([problem], training)


def test_six_thousand_edges():
    compare([Problem("large", 64, 41)], (True, True))


def test_bits_do_not_depend_on_the_gpu(library):
    """Nor on the order of its warps and blocks: the order would show a missing barrier."""
    for features, training in itertools.product((False, True), TRAINING[:2]):
        problem = Problem("weighted", 40, 41, features=features)
        library.gpu(132, 228 << 10)
        first = problem.found(training)
        library.gpu(3, 228 << 10, True)
        assert all(torch.equal(first[name], x) for name, x in problem.found(training).items())


def arguments(problem: Problem) -> tuple[torch.Tensor, Layer, Graph, Moments]:
    graph = problem.graph()
    return problem.parameters[0].float(), problem.layer((False, False)), graph, problem.moments(graph, False)


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
    linear = backend.Kernels.linear(h, layer, edges[0])
    alone, together = torch.empty_like(h), h.new_empty(len(h) + more, 16)
    backend.Kernels.gate_sum(alone, None, h, linear, layer, edges[0])
    linear.pq = torch.cat([torch.ones(more, 128), linear.pq])
    backend.Kernels.gate_sum(together, None, h, linear, layer, edges[1])
    assert torch.equal(together[more:], alone)


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("n_features", [41, 110])
def test_moments_of_the_edges(features, n_features):
    problem = Problem("ragged", 8, n_features, features=features)
    in_degree, by_receiver, by_sender, total, gram = problem.moments(problem.graph(), True)[1:]
    expected = reference.edge_moments(problem.row_weight, problem.edges, n_features, torch.float64)
    for ours, truth in zip((by_receiver, by_sender, gram), expected, strict=True):
        assert relative(ours, truth) < 2e-6
    assert relative(total, problem.row_weight @ expected[0]) < 2e-6
    weight = problem.row_weight[reference.receivers(problem.edges)]
    assert relative(in_degree, torch.zeros(35).double().index_add(0, problem.edges.sender.long(), weight)) < 1e-7


def test_the_term_of_an_edge():
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
    layer = Layer(weight, None, *vectors, 0.0, 0.0, False, False)
    ours = backend.conv(h, layer, graph, Moments(one[:n], *[None] * 5))[0]
    g1, b1, g2, b2, m1, v1, m2, v2 = (x.double() for x in vectors)
    norms = BatchNorm(g1, b1, m1, v1, eps=0.0), BatchNorm(g2, b2, m2, v2, eps=0.0)
    edges = Edges(distance.double(), None, *graph[2:5])
    truth = reference.gated_conv(h.double(), edges, torch.ones(n).double(), weight.double(), None, *norms)
    assert relative(ours, truth) < 3e-7


def test_the_gate_is_right_at_both_ends():
    """c for large c, exp(c) for very negative c, no overflow, no NaN; the gradient too."""
    ends = torch.tensor([-700.0, -80, -30, -10, -1, -1e-6, 0, 1e-6, 1, 10, 19.9, 30, 90, 700], dtype=torch.float64)
    f, c = (x.reshape(-1) for x in torch.meshgrid(ends, ends, indexing="ij"))
    layer = Problem("one atom", len(f), 1).layer((False, False))
    layer = layer._replace(gamma1=torch.zeros_like(layer.gamma1), beta1=torch.cat([f, c]).float())
    layer = layer._replace(gamma2=torch.ones_like(layer.gamma2), beta2=torch.zeros_like(layer.beta2))
    layer = layer._replace(mean2=torch.zeros_like(layer.mean2), var2=torch.ones_like(layer.var2), eps2=0.0)
    index, one = lambda *x: torch.tensor(x, dtype=torch.int32), torch.ones(1)
    graph = Graph(one, None, index(0), index(0, 1), index(0, 1), None, None, None, 0.0, 0.2)
    h, moments = torch.zeros(1, len(f)), Moments(one, *[None] * 5)
    _out, m, *_ = backend.conv(h, layer, graph, moments)
    f, c = f.float().double(), c.float().double()
    expected = torch.sigmoid(f) * torch.where(c > 40, c, torch.log1p(torch.exp(c.clamp_max(40))))
    limit = torch.finfo(torch.float32).eps * (8 + f.abs() + c.abs())
    normal = expected > 1e-32
    assert torch.isfinite(m).all()
    assert (((m[0] - expected).abs() / expected) < limit)[normal].all()
    assert (m[0] - expected).abs()[~normal].max() < 1e-32
    gradients = backend.conv_backward(torch.ones_like(h), h, m, layer, graph, moments, False)
    du = torch.sigmoid(expected)
    slopes = (du * expected * torch.sigmoid(-f), du * torch.sigmoid(f) * torch.sigmoid(c))
    for ours, truth in zip(gradients[4].chunk(2), slopes, strict=True):
        assert torch.isfinite(ours).all()
        normal = truth > 1e-32
        assert (((ours - truth).abs() / truth) < 2 * limit)[normal].all()
        assert (ours - truth).abs()[~normal].max() < 1e-32


def test_statistics_of_several_processes(monkeypatch):
    """Synchronised batch norm calls the operators with statistics that it forms itself; here with one process."""
    split = library_of_operators._split
    operators = types.SimpleNamespace(
        gated_conv=lambda h, *a: backend.conv(h, *split(a)),
        gated_conv_backward=lambda d, h, m, *a: backend.conv_backward(d, h, m, *split(a), a[-1]),
    )
    monkeypatch.setattr(synchronized, "_ops", operators)
    monkeypatch.setattr(fused, "_eager", lambda _h: False)
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
    """Features as a table, and the row of it that each row of the graph takes."""
    problem, species = Problem("weighted", 12, 41, seed=3), torch.arange(60, dtype=torch.int32) % 7
    table = problem.parameters[0][:7]
    results = []
    for dtype in (torch.float64, torch.float32):
        problem.parameters[0] = table[species.long()]
        results.append(problem.expected(dtype, (True, True)))
    sums = [torch.zeros_like(table).index_add(0, species.long(), x["grad h"].double()) for x in results]
    graph, layer = problem.graph(), problem.layer((True, True))
    moments, h = problem.moments(graph, True), table.float()
    out, m, *used = backend.conv(h, layer, graph, moments, species)
    layer = layer._replace(mean1=used[0], var1=used[1], mean2=used[2], var2=used[3])
    dh = backend.conv_backward(problem.upstream.float(), h, m, layer, graph, moments, False, species)[0]
    assert relative(out, results[0]["out"]) <= 2 * relative(results[1]["out"], results[0]["out"]) + 3e-7
    assert relative(dh, sums[0]) <= 2 * relative(sums[1], sums[0]) + 3e-7


def test_a_batch_without_rows():
    results = Problem("nothing", 16, 41).found((False, False))
    assert results["out"].shape == (0, 16)
    assert all(not results[f"grad {name}"].any() for name in NAMES)


@pytest.mark.parametrize("value", [-1, 60, 10**6])
def test_a_sender_outside_the_graph_gives_nan_in_its_row_alone(value):
    problem = Problem("weighted", 16, 41)
    row = int((problem.edges.row_ptr.diff() > 2).nonzero()[3])
    sound = backend.conv(*arguments(problem))[0]
    problem.edges.sender[problem.edges.row_ptr[row]] = value
    h, layer, graph, moments = arguments(problem)
    out, m, *_ = backend.conv(h, layer, graph, moments)
    others = torch.arange(60) != row
    assert out[row].isnan().all() and torch.equal(out[others], sound[others])
    gradients = backend.conv_backward(torch.ones_like(h), h, m.nan_to_num(), layer, graph, moments, False)
    assert all(gradients[k].isnan().any() for k in (0, 1, 3, 4))  # not in numbers that look like others


def test_a_distance_that_is_not_a_number_gives_nan_in_its_row_alone():
    problem = Problem("weighted", 16, 41)
    row = int((problem.edges.row_ptr.diff() > 2).nonzero()[3])
    sound = backend.conv(*arguments(problem))[0]
    problem.edges.distance[problem.edges.row_ptr[row]] = float("nan")
    out = backend.conv(*arguments(problem))[0]
    others = torch.arange(60) != row
    assert out[row].isnan().all() and torch.equal(out[others], sound[others])


def test_a_bad_row_ptr_gives_nan():
    problem = Problem("weighted", 16, 41)
    sound = backend.conv(*arguments(problem))[0]
    problem.edges.row_ptr[30] = 10**6
    out = backend.conv(*arguments(problem))[0]
    assert out[29:31].isnan().all()
    assert torch.equal(out[:29], sound[:29]) and torch.equal(out[31:], sound[31:])


def test_tf32_is_used_where_it_is_allowed(monkeypatch):
    problem = Problem("twelve", 32, 41)
    exact = problem.expected(torch.float64, (True, True))
    for how, least, most in (("tf32x3", 0.0, 1e-6), ("tf32", 1e-6, 1e-3)):
        monkeypatch.setattr(backend, "_precision", lambda how=how: how)
        found = problem.found((True, True))
        assert all(least < relative(found[name], exact[name]) < most for name in ("out", "grad weight"))


def test_an_error_of_cuda_is_raised(library):
    problem = Problem("isolated", 16, 41)
    library.fail_once()
    with pytest.raises(RuntimeError, match="CUDA: invalid value"):
        problem.found((False, False))


def far(*shape: int) -> torch.Tensor:
    """Zeros of which only pages that are touched take memory."""
    return torch.from_numpy(np.zeros(shape, np.float32))


@pytest.mark.parametrize("given", [False, True], ids=["distance", "edge features"])
def test_offsets_beyond_two_to_the_31(library, given):
    """The last rows of 2^24 and some, gathered, written, and their partial sums, against the same rows alone."""
    width, k, tail = 32, 41, 20
    small = Problem("twelve", width, k, features=given)
    assert len(small.row_weight) == tail
    h, layer, graph, _ = arguments(small)
    edges = backend._Edges(graph, k, h.dtype, h.device)
    linear = backend.Kernels.linear(h, layer, edges)
    n, n_edges = 2**24 + 64, 2**24 + 240 if not given else 2**25 + 240
    before, first = n - tail, n_edges - 240
    zeros = lambda size: torch.from_numpy(np.zeros(size, np.int32))  # noqa: E731

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
        try:
            library.only(last_blocks=1)
            backend.Kernels.gate_sum(m, None, m, moved, layer, where)
            sizes = backend.Kernels._sizes(where, width, programs=blocks)
            sums = far(blocks, k, 2 * width), far(blocks, 2, 2 * width)
            backend._call(
                "backward_receivers", sizes, out=d_pq, out_filter=sums[0], out_gamma=sums[1],
                d_m=upstream, **backend.Kernels._layer(moved, layer), **backend.Kernels._edges(where),
            )  # fmt: skip
            backend._call(
                "backward_senders", sizes, out=d_pq, d_m=upstream, a=layer.gamma1,
                **backend.Kernels._layer(moved, layer), **{**backend.Kernels._edges(where), **by_sender},
            )  # fmt: skip
        finally:
            library.only()
        results.append([m[at:], d_pq[at:], *(x[-1] for x in sums)])
    assert all(x.abs().max() > 0.1 for x in results[0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][:2], results[1][:2], strict=True))
    assert all(relative(a, b) < 1e-6 for a, b in zip(results[1][2:], results[0][2:], strict=True))  # other tasks


def test_nothing_waits_for_the_gpu(monkeypatch):
    """On tensors without values, so that whatever read one back would raise; the kernels are not launched."""
    monkeypatch.undo()
    monkeypatch.setattr(backend, "_call", lambda *_a, **_k: None)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        for features, training in itertools.product((False, True), (True, False)):
            problem = Problem("weighted", 20, 41, features=features)
            fake = lambda x: None if x is None else mode.from_tensor(x) if isinstance(x, torch.Tensor) else x  # noqa: E731
            graph, layer = Graph(*map(fake, problem.graph())), Layer(*map(fake, problem.layer((training, training))))
            h, weight = fake(problem.parameters[0].float()), fake(problem.row_weight.float())
            moments = Moments(weight, *backend.edge_moments(weight, graph, 41))
            out, m, *_ = backend.conv(h, layer, graph, moments)
            backend.conv_backward(out, h, m, layer, graph, moments, not training)


def test_bad_shapes_and_types_are_refused():
    h, layer, graph, moments = arguments(Problem("weighted", 16, 41))
    with pytest.raises(sf.InputError, match=r"float32, not torch\.float64"):
        backend.conv(h.double(), layer, graph, moments)
    with pytest.raises(sf.InputError, match="sender must be a contiguous"):
        backend.conv(h, layer, graph._replace(sender=graph.sender.long()), moments)
    with pytest.raises(sf.InputError, match="fixed statistics only"):
        backend.conv_backward(h, h, h, layer._replace(train1=True), graph, moments, True)


def test_who_trains(monkeypatch):
    """The compiled kernels where they can, unless another backend is forced; Triton's otherwise."""
    like = lambda dtype=torch.float32, width=200: types.SimpleNamespace(  # noqa: E731
        device=torch.device("cuda"), dtype=dtype, shape=(5, width)
    )
    assert not registry.trains_compiled(like()) or torch.cuda.is_available()
    monkeypatch.setattr(registry, "cuda_problem", lambda: None)
    assert registry.trains_compiled(like())
    assert not registry.trains_compiled(like(torch.float64))
    for name, expected in (("cuda", backend), ("triton", triton), ("reference", triton)):
        monkeypatch.setenv("SRCGCNN_FAST_BACKEND", name)
        assert library_of_operators._gpu_kernels(like()) is expected
