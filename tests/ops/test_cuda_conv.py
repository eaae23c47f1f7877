"""The CUDA kernels for training against the reference in float64, without a GPU: their source, compiled for the CPU.

cuda/emulation.h supplies CUDA's execution model; what it shows, and what not, is said there and in test_cuda.py.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import types

import convolution
import pytest
import torch
from convolution import NAMES, TRAINING, arguments, compare, relative
from cuda_problem import sparse
from torch._subclasses.fake_tensor import FakeTensorMode

import srcgcnn_fast as sf
from srcgcnn_fast.ops import cuda_conv as backend
from srcgcnn_fast.ops import fused, reference, registry, synchronized, triton
from srcgcnn_fast.ops import library as library_of_operators
from srcgcnn_fast.ops.cpu import Graph, Layer, Moments
from srcgcnn_fast.ops.reference import BatchNorm, Edges

pytestmark = pytest.mark.usefixtures("training_on_the_emulation")


class Problem(convolution.Problem):
    backend, kernels = backend, backend.Kernels


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


def test_bits_do_not_depend_on_the_gpu(training_library):
    """Nor on the order of its warps and blocks: the order would show a missing barrier."""
    for features, training in itertools.product((False, True), TRAINING[:2]):
        problem = Problem("weighted", 40, 41, features=features)
        training_library.gpu(132, 228 << 10)
        first = problem.found(training)
        training_library.gpu(3, 228 << 10, True)
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
    linear = backend.Kernels.linear(h, layer, edges[0])
    alone, together = torch.empty_like(h), h.new_empty(len(h) + more, 16)
    backend.Kernels.gate_sum(alone, None, h, linear, layer, edges[0])
    linear.pq = torch.cat([torch.ones(more, 128), linear.pq])
    backend.Kernels.gate_sum(together, None, h, linear, layer, edges[1])
    assert torch.equal(together[more:], alone)


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("n_features", [41, 110])
def test_moments_of_the_edges(features, n_features):
    convolution.moments_of_the_edges(Problem("ragged", 8, n_features, features=features))


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
    convolution.gate_at_both_ends(Problem)


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
    convolution.rows_by_species(Problem)


def test_a_batch_without_rows():
    convolution.no_rows(Problem)


@pytest.mark.parametrize(("array", "value"), [*convolution.BAD_INDICES, ("distance", math.nan)])
def test_what_is_wrong_gives_nan_in_its_row_alone(array, value):
    convolution.bad_indices(Problem, array, value)


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
    linear = backend.Kernels.linear(h, layer, edges)
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
        try:
            training_library.only(last_blocks=1)
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
            training_library.only()
        results.append([m[at:], d_pq[at:], *(x[-1] for x in sums)])
    assert all(x.abs().max() > 0.1 for x in results[0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][:2], results[1][:2], strict=True))
    assert all(relative(a, b) < 1e-6 for a, b in zip(results[1][2:], results[0][2:], strict=True))  # other tasks


def test_offsets_beyond_two_to_the_31_of_rows(training_library):
    """What the other kernels read and write of the last four rows, of 256 numbers and more, against these alone."""
    width, k = 256, 41
    rand = lambda *s: torch.rand(*s, generator=torch.Generator().manual_seed(sum(s)))  # noqa: E731
    vectors = {name: rand(width) + 0.5 for name in ("gamma2", "beta2", "mean2", "var2")}
    vectors |= {"c1": rand(2 * width), "c2": rand(2 * width) + 1, "a": rand(2 * width)}
    totals = {"totals": rand(4, width).double() + 1, "more_totals": rand(4, width).double() + 2}
    found = []
    for rows in (4, 2**23 + 32768):  # which the last block of gram_rows has some of
        sizes = {**backend._rows(rows, width), "programs": rows // 4, "n_features": k, "n_edges": 8, "eps": 1e-5}

        def last(*shape: int, rows: int = rows) -> torch.Tensor:
            x = far(rows, *shape)
            x[-4:] = rand(4, *shape)
            return x

        ptr, other = sparse(rows + 1, torch.int32), torch.arange(rows - 4, rows, dtype=torch.int32).repeat(2)
        ptr[-5:] = torch.arange(0, 10, 2, dtype=torch.int32)
        given = {name: last(width) for name in ("h", "m", "grad")}
        weights = {"row_weight": last(), "degree": last()}
        sums, du, dm, out, rows_of_gram, centred = (
            far(*shape)
            for shape in ((rows // 4, 4, width), *[(rows, width)] * 3, (rows, 3 * width + 2 * k + 2), (rows, width))
        )
        d_pq, x, unused = last(4 * width), last(2 * width), far(2 * rows // 4, width)
        of = lambda *names: {name: vectors[name] for name in names}  # noqa: E731
        try:
            training_library.only(last_blocks=16)  # all channels of the last rows
            backend._call("column_sums", sizes, out=sums, x=given["m"], **weights)
            norm = of("gamma2", "beta2", "mean2", "var2")
            backend._call("finish_backward", sizes, out=du, out_m=dm, out_x=unused, **given, **norm)
            more = {**totals, **of("gamma2", "beta2"), "out_m": far(width), "out_x": far(width)}
            backend._call("finish", sizes, out=out, h=given["h"], m=given["m"], **more)
            strided = {**sizes, "stride": 4 * width, "columns": 2 * width}
            backend._call("correct", strided, out=d_pq, grad=d_pq, x=x, **weights, **of("a", "c1", "c2"))
            training_library.only(last_blocks=1)
            backend._call(
                "gram_rows", sizes, out=rows_of_gram, out_x=centred, h=given["h"], by_receiver=last(k), ptr=ptr,
                other=other, by_sender=last(k), totals=totals["totals"], e_sum=rand(k).double(), **weights,
            )  # fmt: skip
        finally:
            training_library.only()
        found.append([sums[-1], *(y[-4:] for y in (du, dm, out, d_pq, rows_of_gram, centred))])
    for alone, at_the_end in zip(*found, strict=True):
        assert alone.abs().max() > 0.1 and torch.equal(alone, at_the_end)


def test_every_launch_goes_to_the_stream_of_its_tensors(training_library, monkeypatch):
    on: list[torch.device] = []
    monkeypatch.setattr(triton, "launching", lambda device: on.append(device) or contextlib.nullcontext(0xABC1))
    training_library.on_stream(0xABC1)
    before = training_library.launches()
    Problem("weighted", 16, 41).found((True, True))
    assert training_library.on_stream(0) == training_library.launches() - before == len(on) > 15
    assert set(on) == {torch.device("cpu")}


@pytest.mark.skipif(not hasattr(registry.core, "cuda_conv"), reason="the CUDA kernels were not built")
def test_the_compiled_module_has_the_same_fields_and_raises_errors_of_cuda():
    """Of no rows, which no GPU launches either."""
    pointers, sizes, numbers = [0] * len(backend.FIELDS), [0] * len(backend.SIZES), (0.0, 0.0, 0.0)
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
    monkeypatch.setattr(backend, "_call", lambda *_a, **_k: None)
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
    monkeypatch.setattr(registry, "cuda_problem", lambda: None)
    assert registry.trains_compiled(like())
    assert not registry.trains_compiled(like(torch.float64))
    for name, expected in (("cuda", backend), ("triton", triton), ("reference", triton)):
        monkeypatch.setenv("SRCGCNN_FAST_BACKEND", name)
        assert library_of_operators._gpu_kernels(like()) is expected
