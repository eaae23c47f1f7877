"""The Triton kernels against the reference in float64: in Triton's interpreter, or on the GPU where there is one.

The interpreter, which tests/conftest.py chooses, takes milliseconds for each step of each program, so graphs have at
most 1 000 edges and most tests large tiles. What it cannot show (registers, speed, races) is in
test_triton_ahead_of_time.py and tests/gpu.
"""

from __future__ import annotations

import gc
import itertools
import os
import sys
import types

import convolution
import numpy as np
import pytest
import torch
from convolution import TRAINING, arguments, compare, kinds_and_modes, relative
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

import srcgcnn_fast as sf
from srcgcnn_fast.ops import precision, reference, registry
from srcgcnn_fast.ops import triton as backend
from srcgcnn_fast.ops.cpu import Graph, Layer
from srcgcnn_fast.ops.reference import BatchNorm, Edges

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def obstacle() -> str | None:
    if (reason := backend.problem()) is not None:
        return reason
    if DEVICE == "cpu" and os.environ["TRITON_INTERPRET"] != "1":
        return "there is no GPU, and TRITON_INTERPRET turns Triton's interpreter off"
    return None


def numpy_is_too_new() -> bool:
    """Triton before 3.7 turns arrays of one number into indices, which NumPy 2.4 refuses."""
    from importlib.metadata import version

    numbers = lambda package: tuple(int(x) for x in version(package).split(".")[:2])  # noqa: E731
    return DEVICE == "cpu" and numbers("triton") < (3, 7) and numbers("numpy") >= (2, 4)


needs_triton = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))
runs = pytest.mark.skipif(
    obstacle() is not None or numpy_is_too_new(),
    reason=str(obstacle() or "the interpreter of this Triton does not work with NumPy 2.4"),
)


@pytest.fixture(autouse=True)
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """In the interpreter, large tiles and few programs that share out the rows; "twelve" keeps those in use."""
    if DEVICE == "cpu" and "twelve" not in request.node.name:
        rows = lambda name: 128 if name in ("edge_statistics", "filter_gradient") else 16  # noqa: E731
        large = {k: t._replace(rows=rows(k), degree=t.degree and 8) for k, t in backend.TILES.items()}
        monkeypatch.setattr(backend, "TILES", large)
        monkeypatch.setattr(backend, "_PROGRAMS", 2)


class Problem(convolution.Problem):
    backend, device = backend, DEVICE


@runs
@kinds_and_modes(["twelve", "weighted", "ragged", "isolated", "one atom", "no edges"])
def test_convolution(kind, training):
    # Few edges say little about roundings; those of p are the same for all edges of a row, and two rows have some.
    seeds = range({"weighted": 2, "ragged": 1, "isolated": 12}.get(kind, 5))
    compare([Problem(kind, 16, 41, seed=seed) for seed in seeds], training)


@runs
def test_sums_of_more_programs_than_are_added_up_at_a_time(monkeypatch):
    tiles = {k: t._replace(rows=2) if t.rows < 128 else t for k, t in backend.TILES.items()}
    monkeypatch.setattr(backend, "TILES", tiles)
    monkeypatch.setattr(backend, "_PROGRAMS", 3)
    compare([Problem("weighted", 16, 41)], (True, True))


@runs
@pytest.mark.parametrize(("width", "n_features"), [(64, 41), (7, 41), (1, 3), (33, 5), (20, 70), (70, 5)])
def test_any_width_and_number_of_gaussians(width, n_features):
    kind, seeds = ("weighted", {1: 20, 7: 2}.get(width, 1)) if width < 64 else ("twelve", 2)
    compare([Problem(kind, width, n_features, seed=seed) for seed in range(seeds)], (True, True))


@runs
@pytest.mark.parametrize("training", TRAINING[:2], ids=["train", "eval"])
def test_generic_edge_features(training):
    compare([Problem("weighted", 16, 23, features=True, seed=6)], training)


def by_dot(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let these kernels form r from all Gaussians at once."""
    for name in names:
        monkeypatch.setitem(backend.TILES, name, backend.TILES[name]._replace(by_dot=True))


@runs
@pytest.mark.parametrize(("width", "n_features"), [(16, 41), (7, 5), (33, 70)])
def test_the_filter_from_all_gaussians(monkeypatch, width, n_features):
    """As exact as the window, which leaves out what is below 2e-9."""
    by_dot(monkeypatch, "gate_sum", "backward_rows", "backward_senders")
    problems = [Problem("weighted" if width == 16 else "isolated", width, n_features, seed=seed) for seed in range(8)]
    compare(problems, (False, False))
    if width == 16:
        compare(problems, (True, True))


@runs
@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("features", [False, True])
def test_bfloat16_storage(monkeypatch, features, dot):
    if dot:
        by_dot(monkeypatch, "gate_sum", "backward_rows", "backward_senders")
    convolution.bfloat16_storage(Problem("weighted", 16, 23 if features else 41, features=features, seed=6))


@runs
def test_backward_under_autocast():
    convolution.backward_under_autocast(Problem("isolated", 16, 41))


@runs
def test_bfloat16_rows_and_filter_are_what_is_rounded():
    with sf.use_precision("bfloat16"):
        linear = convolution.rounded_rows(Problem("weighted", 16, 41, seed=6))
    assert linear.pq.dtype == linear.of_edges.dtype == torch.bfloat16


def test_use_precision_sets_and_restores_what_pytorch_reads():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    given = torch.get_float32_matmul_precision()
    for name in ("high", "medium", "highest"):  # Lightning asks within fit, and PyTorch refuses what does not agree
        torch.set_float32_matmul_precision(name)
        for ours, expected in (("float32", "highest"), ("tf32", "high")):
            with sf.use_precision(ours):
                assert torch.get_float32_matmul_precision() == expected
            assert torch.get_float32_matmul_precision() == name
    torch.set_float32_matmul_precision(given)
    if hasattr(matmul, "fp32_precision"):
        try:
            matmul.fp32_precision = "tf32"
            for name in ("float32", "tf32"):
                with sf.use_precision(name):
                    assert precision.tf32_is_allowed() == (name == "tf32")
                assert matmul.fp32_precision == "tf32"
        finally:
            matmul.fp32_precision = "none"
    with sf.use_precision("bfloat16"):
        assert matmul.allow_tf32 and precision.bfloat16_is_allowed() and backend._precision() == "tf32"
        with sf.use_precision("float32"):
            assert not matmul.allow_tf32 and backend._precision() == "tf32x3" and backend._storage() == torch.float32
        assert matmul.allow_tf32 and backend._storage() == torch.bfloat16
    assert matmul.allow_tf32 == before and backend._storage() == torch.float32
    with (
        pytest.raises(sf.InputError, match="no precision 'half'; choose one of float32, tf32, bfloat16"),
        sf.use_precision("half"),
    ):
        pass


@runs
@pytest.mark.parametrize("shared", [True, False])
def test_whole_stack(shared):
    problem = Problem("weighted", 20, 41, seed=7)
    others = [problem, *(Problem("weighted", 20, 41, seed=s) for s in (8, 9))]
    layers = [p.layer((False, False)) for p in others]
    if shared:
        layers = [layer._replace(weight=layers[0].weight) for layer in layers]
    results = {}
    for dtype in (torch.float64, torch.float32):
        h, edges = problem.parameters[0].to(dtype), problem.edges._replace(distance=problem.edges.distance.to(dtype))
        for layer in layers:
            x = [None if t is None else t.cpu().to(dtype) for t in layer[:10]]
            norms = BatchNorm(x[2], x[3], x[6], x[7]), BatchNorm(x[4], x[5], x[8], x[9])
            h = reference.gated_conv(h, edges, problem.row_weight.to(dtype), x[0], x[1], *norms)
        results[dtype] = h
    h = problem.parameters[0].float().to(DEVICE)
    kept = h.clone()
    ours = relative(backend.stack(h, layers, problem.graph()), results[torch.float64])
    assert ours <= 2 * relative(results[torch.float32], results[torch.float64]) + 3e-7
    assert torch.equal(h, kept)


@pytest.fixture
def pretend_gpu(monkeypatch):
    convolution.pretend_gpu(monkeypatch, compiled=False)
    monkeypatch.setattr(registry, "select", lambda *_a, **_k: "triton")


@runs
@pytest.mark.skipif(DEVICE == "cuda", reason="tests/gpu has whole models")
@pytest.mark.parametrize("momentum", [0.1, 0.7])
@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
def test_a_training_step_of_a_model_in_one_node(pretend_gpu, monkeypatch, make_batch, model_type, momentum):
    """As models call it outside of compilation: outputs, gradients, running statistics."""
    batch, results, launched = make_batch("isolated"), [], []
    convs = backend.convs
    monkeypatch.setattr(backend, "convs", lambda *given: launched.append(given) or convs(*given))
    for name, dtype in (("reference", torch.float64), ("reference", torch.float32), ("triton", torch.float32)):
        monkeypatch.setattr(registry, "select", lambda *_a, name=name, **_k: name)
        model = convolution.small_model(dtype, model_type, 12)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.momentum = momentum
        model.convs[0].bn2.eval() if model_type is sf.CGCNN else model.recurrent_bn1s[1].eval()
        batch.cache.clear()
        batch.distance, batch.weight = batch.distance.to(dtype), batch.weight.to(dtype)
        out = model(batch)
        out.square().sum().backward()
        of_parameters = {f"grad {n}": p.grad for n, p in model.named_parameters()}
        results.append({"out": out.detach(), **of_parameters, **dict(model.named_buffers())})
        assert bool(launched) == (name == "triton")
    exact, plain, ours = results
    for name, expected in exact.items():
        if not name.endswith("fc_full.bias") and expected.is_floating_point():
            assert relative(ours[name], expected) <= 2 * relative(plain[name], expected) + 5e-7, name
        elif not expected.is_floating_point():
            assert torch.equal(ours[name], expected), name


@runs
@pytest.mark.skipif(DEVICE == "cuda", reason="tests/gpu has whole models")
@pytest.mark.parametrize("features", [False, True])
def test_gradients_of_edges_through_several_layers(pretend_gpu, monkeypatch, make_batch, features):
    batch, results = make_batch("isolated"), []
    given = torch.rand(batch.num_edges, 41, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name, dtype in (("reference", torch.float64), ("reference", torch.float32), ("triton", torch.float32)):
        monkeypatch.setattr(registry, "select", lambda *_a, name=name, **_k: name)
        model = convolution.small_model(dtype, sf.SRCGCNN, 12).eval()
        batch.cache.clear()
        batch.distance, batch.weight = batch.distance.detach().to(dtype), batch.weight.to(dtype)
        batch.edge_features = given.to(dtype).requires_grad_() if features else None
        edges = batch.edge_features if features else batch.distance.requires_grad_()
        results.append(torch.autograd.grad(model(batch).sum(), edges)[0])
    exact, plain, ours = results
    assert relative(ours, exact) <= 2 * relative(plain, exact) + 5e-7


@runs
@pytest.mark.skipif(DEVICE == "cuda", reason="tests/gpu captures graphs")
def test_captured_training_gives_the_steps_of_the_model(pretend_gpu, replayed, make_batch):
    convolution.captured_steps(make_batch, 8, [("isolated", 1), ("one crystal", 1), ("isolated", 2)])
    assert replayed == [2]


@runs
@pytest.mark.parametrize("features", [False, True])
def test_moments_of_the_edges(features):
    convolution.moments_of_the_edges(Problem("ragged", 8, 41, features=features))


def test_shells_are_the_distinct_distances():
    rng = np.random.default_rng(1)
    degrees, row_ends = [12, 0, 7, 12, 3, 0, 9, 0], [2, 2, 5, 8]
    row_ptr = torch.tensor([0, *np.cumsum(degrees)], dtype=torch.int32)
    crystal_ptr = torch.tensor([0, *row_ends], dtype=torch.int32)
    distance = torch.from_numpy(np.round(rng.uniform(1, 4, int(row_ptr[-1])) * 3) / 3).float()
    shells = backend.edge_shells(distance, torch.zeros(len(distance), dtype=torch.int32), row_ptr, crystal_ptr)
    shell_of, table, count = shells
    assert {x.dtype for x in (shell_of, count)} == {torch.int32}
    for c, (begin, end) in enumerate(itertools.pairwise(row_ptr[crystal_ptr.long()].tolist())):
        assert int(count[c]) == len(distance[begin:end].unique())
        assert torch.equal(table[begin : begin + int(count[c])][shell_of[begin:end].long()], distance[begin:end])


@runs
def test_the_gate_is_right_at_both_ends():
    convolution.gate_at_both_ends(Problem)


@runs
def test_rows_by_species():
    convolution.rows_by_species(Problem)


@runs
def test_a_batch_without_rows():
    convolution.no_rows(Problem)


@runs
@pytest.mark.parametrize(("array", "value"), convolution.BAD_INDICES)
def test_what_is_wrong_gives_nan_in_its_row_alone(array, value):
    convolution.bad_indices(Problem, array, value)


@runs
def test_what_is_wrong_in_a_parameter_gives_nan():
    convolution.bad_parameters(Problem)


@runs
def test_a_network_has_the_mean_of_equal_rows_and_of_none():
    n = 4000  # whose sums in float32 drift by 3e-5
    ends, none = torch.tensor([0, 1, 1, n + 1]), torch.zeros(n + 2)
    graph = Graph(none[:0], None, *(x.int() for x in (none[:0], none, ends)), None, None, None, 0.0, 0.2)
    graph = Graph(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in graph))
    h, layer = torch.rand(1, 16, device=DEVICE).repeat(n + 1, 1), Problem("weighted", 16, 41).layer((False, False))
    one, empty, many = backend.network(h, None, None, [layer], graph, torch.ones(n + 1, device=DEVICE), [])
    assert relative(many, one) < 1e-7 and not empty.any()


@runs
def test_bits_repeat_and_do_not_depend_on_what_else_is_in_the_batch():
    problem = Problem("weighted", 16, 41)
    first, again = (problem.found((True, True)) for _ in range(2))
    assert all(torch.equal(first[name], x) for name, x in again.items())
    h, layer, graph, _ = arguments(problem)
    both = Graph(
        *[torch.cat([x, x]) if x is not None else None for x in graph[:2]],
        torch.cat([graph.sender, graph.sender + len(h)]),
        torch.cat([graph.row_ptr, graph.row_ptr[1:] + graph.row_ptr[-1]]),
        graph.crystal_ptr, None, None, None, 0.0, 0.2,
    )  # fmt: skip
    alone, together = backend.stack(h, [layer], graph), backend.stack(torch.cat([h, h]), [layer], both)
    assert torch.equal(together[: len(h)], together[len(h) :])
    torch.testing.assert_close(together[: len(h)], alone, rtol=1e-6, atol=0)  # torch.mm may round as its size suggests


@runs
@pytest.mark.skipif(DEVICE == "cuda", reason="tests/gpu has the whole layer at that size")
@pytest.mark.parametrize("given", [False, True])
def test_offsets_beyond_two_to_the_31(monkeypatch, given):
    """Rows of pq, or of given edge terms, that begin past 2^31 numbers; only pages that are touched take memory."""
    width, far = 64, 2**23 + 5
    n_rows, n_edges, near = far + 16, 2 * far if given else 12, 16
    sparse = lambda *shape: torch.from_numpy(np.zeros(shape, np.uint16).view(np.int16)).view(torch.bfloat16)  # noqa: E731
    index = lambda size: torch.from_numpy(np.zeros(size, np.int32))  # noqa: E731
    rand = lambda *shape: torch.rand(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()  # noqa: E731
    pq, table = sparse(n_rows, 4 * width), sparse(n_edges, 2 * width) if given else None
    sender, row_ptr, first_edge = index(n_edges), index(n_rows + 1), n_edges - 12
    values, edge_values = rand(12, 4 * width), rand(12, 2 * width)
    if given:
        table[first_edge:] = edge_values
        sender[first_edge:] = torch.arange(12, dtype=torch.int32)
        pq[:12] = values
    else:
        sender[:] = torch.arange(far, far + 12, dtype=torch.int32)
        pq[far : far + 12] = values
    row_ptr[0], row_ptr[1 : near + 1] = first_edge, n_edges  # one row with edges in the only program
    one, zero, m = torch.ones(2 * width), torch.zeros(2 * width), torch.full((near, width), float("nan"))
    monkeypatch.setattr(torch.UntypedStorage, "copy_", lambda self, *_: self)  # the interpreter's copy back, to itself
    backend.kernels().gate_sum[(1, 1)](
        m, None, pq, None, torch.zeros(41, 2 * width), table, one, zero, None, None,
        None if given else torch.ones(12), sender, row_ptr, n_rows, n_edges, 0.0, 5.0,
        F=width, K=41, WINDOW=9, ROWS=near, DEG=4, BF=64, PRECISION="tf32x3",
    )  # fmt: skip
    x = values[:, 2 * width :].float() + (edge_values.float() if given else 0.0)
    if given:
        x += values[0, : 2 * width].float()  # p of row 0, which is one of the senders
    f, c = x.double().chunk(2, dim=1)
    expected = (f.sigmoid() * torch.nn.functional.softplus(c)).sum(0)
    assert relative(m[0], expected) < 1e-6
    assert (m[1:] == 0).all()


def test_export_records_the_operators_for_cuda_tensors(make_batch, monkeypatch):
    """On CUDA tensors without values, which need no GPU; tests/gpu has whole models and runs what is exported."""
    monkeypatch.undo()
    monkeypatch.setattr(registry, "triton_problem", lambda *_: None)
    names = ("numbers", "weight", "sender", "distance", "row_ptr", "crystal_ptr", "atom_class")
    batch, mode = make_batch("weighted"), FakeTensorMode(allow_non_fake_inputs=True)
    fake = lambda x: FakeTensor(mode, x.detach().to("meta"), torch.device("cuda:0"))  # noqa: E731

    class Convolutions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = sf.SRCGCNN(atom_fea_len=16).eval()
            for module in self.model.modules():
                for name, x in list(module.named_parameters(recurse=False)):
                    setattr(module, name, torch.nn.Parameter(fake(x), requires_grad=False))
                for name, x in list(module.named_buffers(recurse=False)):
                    setattr(module, name, fake(x))

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            batch = sf.GraphBatch(*tensors)
            return self.model._convolve(*self.model._embed(batch), batch, False)[0]

    program = torch.export.export(Convolutions(), tuple(fake(getattr(batch, name)) for name in names), strict=False)
    calls = [node for node in program.graph.nodes if "srcgcnn_fast" in str(node.target)]
    assert [str(node.target) for node in calls] == ["srcgcnn_fast.gated_conv_stack.default"]
    assert calls[0].meta["val"].device.type == "cuda" and calls[0].meta["val"].shape == (batch.num_rows, 16)


@needs_triton
def test_nothing_waits_for_the_gpu(monkeypatch):
    """On tensors without values, so that whatever read one back would raise; the kernels are not launched."""

    class Kernels:
        def __getattr__(self, _name):
            return self

        def __getitem__(self, _grid):
            return lambda *_a, **_k: None

    monkeypatch.undo()
    monkeypatch.setattr(backend, "kernels", Kernels)

    def stacked(h: torch.Tensor, layer: Layer, graph: Graph) -> None:
        backend.stack(h, [layer, layer], graph)
        if graph.features is None:
            backend.edge_shells(graph.distance, *graph[2:5])

    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        convolution.waits(mode, Problem, stacked)
        h = mode.from_tensor(torch.zeros(1, 1))
        with pytest.raises(DataDependentOutputException):  # what the test relies on
            bool(h[0, 0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
def test_no_model_waits_for_the_gpu(make_batch, monkeypatch, model_type, training):
    """What surrounds the operators, forward and backward, likewise."""
    monkeypatch.undo()
    model = model_type(atom_fea_len=16).train(training)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        batch = make_batch("weighted")._map(mode.from_tensor)
        model(batch).sum().backward()


@runs
def test_the_transposed_index_follows_its_graph():
    graph = Problem("ragged", 8, 41).graph()
    first = backend.transposed(graph)
    assert backend.transposed(graph) is first
    expected = torch.argsort(graph.sender, stable=True)
    assert torch.equal(first.edge.long(), expected)
    assert torch.equal(first.receiver.long(), reference.receivers(Edges(*graph[:5]))[expected])
    assert torch.equal(first.col_ptr.diff().long(), torch.bincount(graph.sender, minlength=35))
    sender = torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.int32)
    for rows in [[0, 2, 4, 6], [0, 1, 2, 6]] * 50:  # which take the place in memory of those that are gone
        row_ptr = torch.tensor(rows, dtype=torch.int32)
        found = backend.transposed(graph._replace(sender=sender, row_ptr=row_ptr))
        assert torch.equal(found.receiver, backend._transpose(sender, row_ptr).receiver)
        del row_ptr
    graph.sender[0] = (graph.sender[0] + 1) % 35
    assert not torch.equal(backend.transposed(graph).edge, first.edge)
    gc.collect()  # else what earlier tests left might go meanwhile
    kept = len(backend._transposed)
    with torch.inference_mode():  # whose tensors have no version
        inside = graph._replace(sender=graph.sender.clone(), row_ptr=graph.row_ptr.clone())
    assert torch.equal(backend.transposed(inside).edge, backend.transposed(graph).edge)
    del graph
    assert len(backend._transposed) == kept - 1


def test_graphs_that_are_captured_together_share_the_transposed_index(monkeypatch):
    """Otherwise a replay would find that of other edges."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    graph = Problem("ragged", 8, 41).graph()
    graph = graph._replace(sender=graph.sender.as_subclass(OnGpu))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert backend.transposed(graph) is not backend.transposed(graph)
    with backend.captured_together():
        first = backend.transposed(graph)
        assert backend.transposed(graph) is first
        assert backend.transposed(graph._replace(sender=graph.sender.clone())) is not first
    assert backend.transposed(graph) is not first


@needs_triton
def test_bad_shapes_and_types_are_refused():
    convolution.bad_input(Problem)


@pytest.mark.parametrize("found", ["3.2.0", "3.0.0+git1", "2.3.1"])
def test_an_old_triton_is_refused_with_a_sentence(monkeypatch, found):
    old = types.ModuleType("triton")
    old.__version__ = found
    monkeypatch.setitem(sys.modules, "triton", old)
    assert backend.problem() is not None and f"Triton {found} is too old: 3.3 or newer" in backend.problem()


def test_a_missing_triton_is_refused_with_the_mend(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install" in str(backend.problem())


def test_the_choice_of_a_backend(monkeypatch):
    """What a call on a CUDA tensor takes, on a machine that need not have a GPU."""
    like = lambda dtype: types.SimpleNamespace(device=torch.device("cuda"), dtype=dtype)  # noqa: E731
    monkeypatch.setattr(registry, "triton_problem", lambda *_: None)
    monkeypatch.setattr(registry, "cuda_problem", lambda *_: "the CUDA kernels were not built")
    monkeypatch.setattr(registry, "_say_once", lambda reason, instead="reference": said.append(reason))
    said: list[str] = []
    assert registry.select(like(torch.float32)) == "triton"
    assert said == ["the CUDA kernels were not built"]
    said.clear()
    assert registry.select(like(torch.float64)) == "reference"
    assert registry.select(like(torch.float32), edge_statistics_grad=True) == "reference"
    assert len(said) == 2 and "float32" in said[0]
    monkeypatch.setattr(registry, "triton_problem", lambda *_: "Triton 3.2 is too old")
    assert registry.select(like(torch.float32)) == "reference"
    assert said[2] == "Triton 3.2 is too old"
    monkeypatch.setenv("SRCGCNN_FAST_BACKEND", "cpu")
    with pytest.raises(sf.InputError, match="does not take tensors on 'cuda'"):
        registry.select(like(torch.float32))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_backend_says_so():
    status = sf.backends()["triton"]
    assert status.built and not status.available and status.reason == "torch sees no CUDA device"
    with pytest.raises(sf.InputError, match="cannot run here: torch sees no CUDA device"), sf.use_backend("triton"):
        pass
