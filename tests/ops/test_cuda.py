"""The CUDA kernels against the reference in float64, without a GPU: their source, compiled for the CPU.

cuda/emulation.h supplies CUDA's execution model. Indices, layouts, orders, barriers and the precision of the products
are tested so; speed and the GPU itself are not.
"""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path

import pytest
import torch

import srcgcnn_fast as sf
from srcgcnn_fast.ops import cuda as backend
from srcgcnn_fast.ops import reference, registry
from srcgcnn_fast.ops.cpu import Graph, Layer
from srcgcnn_fast.ops.reference import BatchNorm, Edges

_spec = importlib.util.spec_from_file_location("problem", Path(__file__).parent / "cuda" / "problem.py")
assert _spec is not None and _spec.loader is not None
problem_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(problem_module)
A100, H100, MIDDLE, TINY = (getattr(problem_module, name) for name in ("A100", "H100", "MIDDLE", "TINY"))
KINDS_OF_WEIGHTS, Problem, relative = problem_module.KINDS_OF_WEIGHTS, problem_module.Problem, problem_module.relative

pytestmark = pytest.mark.usefixtures("on_the_emulation")


@KINDS_OF_WEIGHTS
@pytest.mark.parametrize("kind", ["plain", "weighted", "ragged", "one atom", "isolated", "no edges", "many crystals"])
def test_stack(make_batch, kind, shared):
    Problem(make_batch(kind, seed=3), 16, 41, 3, shared).check()


@pytest.mark.parametrize(("width", "n_features"), [(64, 41), (7, 41), (1, 3), (33, 5), (48, 9), (128, 60)])
def test_any_width_and_number_of_gaussians(make_batch, width, n_features):
    Problem(make_batch("isolated", seed=5), width, n_features, 2, True).check()
    Problem(make_batch("weighted", seed=5), width, n_features, 1, True).check()


@KINDS_OF_WEIGHTS
def test_generic_edge_features(make_batch, shared):
    Problem(make_batch("weighted", seed=6), 16, 23, 2, shared, features=True).check()


def test_more_layers_than_one_launch_prepares(make_batch):
    Problem(make_batch("isolated"), 8, 5, 18, False).check()


@KINDS_OF_WEIGHTS
def test_bits_do_not_depend_on_the_gpu(library, make_batch, shared):
    """Nor on the order of its warps and blocks: what fits, what is recomputed, and where the groups end, follow from
    the shared memory; the order would show a missing barrier."""
    batch = make_batch("plain", seed=4)
    batch.distance[::2] = (batch.distance[::2] * 3).round() / 3
    problem = Problem(batch, 40, 41, 2, shared)
    library.gpu(*H100)
    first = problem.check()
    for gpu, descending in ((H100, True), (A100, False), (MIDDLE, False), (TINY, True)):
        library.gpu(*gpu, descending)
        assert torch.equal(problem.found(), first)


@KINDS_OF_WEIGHTS
@pytest.mark.parametrize("gpu", [MIDDLE, TINY], ids=["three classes", "two classes"])
@pytest.mark.parametrize("kind", ["one crystal", "plain"])
def test_crystals_too_large_for_a_block(library, make_batch, kind, gpu, shared):
    library.gpu(*gpu)
    problem = Problem(make_batch(kind), 16, 41, 3, shared)
    largest = int(problem.edges.crystal_ptr.diff().max())
    assert library.cuda_scratch_size(32, [16, 3, 41, 0, int(shared), 0, 0], largest) > 0  # it fits no block
    problem.check()


@pytest.mark.parametrize(("width", "largest"), [(64, 119), (128, 53)])
def test_large_blocks_with_all_their_tiles(library, make_batch, width, largest):
    """119 rows of 128 on an H100 at width 64, 53 of 64 at 128, where a small block takes 64 and 32."""
    library.gpu(*H100)
    batch = make_batch("plain", seed=9)  # 5, 1, 17, 30, 2, 64 and 3 rows
    batch.crystal_ptr = torch.tensor([0, largest, 119, 122] if largest < 119 else [0, 119, 122], dtype=torch.int32)
    Problem(batch, width, 41, 2, True).check()


def test_bits_do_not_depend_on_what_else_is_in_the_batch(make_batch):
    batch = make_batch("plain", seed=8)
    problem = Problem(batch, 16, 41, 2, True)
    together = problem.found()
    for c, (first, end) in enumerate(zip(batch.crystal_ptr[:-1].tolist(), batch.crystal_ptr[1:].tolist(), strict=True)):
        if c in (0, 3, 5):
            begin, stop = batch.row_ptr[first], batch.row_ptr[end]
            index = torch.tensor([0, end - first], dtype=torch.int32)
            edges = problem.graph()
            alone = edges._replace(
                distance=edges.distance[begin:stop].clone(), sender=(edges.sender[begin:stop] - first).contiguous(),
                row_ptr=(edges.row_ptr[first : end + 1] - begin).contiguous(), crystal_ptr=index,
            )  # fmt: skip
            out = backend.stack(problem.h[first:end].float(), problem.float_layers(), alone)
            assert torch.equal(out, together[first:end])


@pytest.mark.parametrize("value", [-1, 10**6, "another crystal"])
@pytest.mark.parametrize("gpu", [H100, TINY], ids=["small", "large"])
def test_a_sender_outside_its_crystal_gives_nan_in_its_row_alone(library, make_batch, value, gpu):
    library.gpu(*gpu)
    problem = Problem(make_batch("plain"), 16, 41, 1, True)
    sound, graph = problem.found(), problem.graph()
    row = 30  # in a crystal of 30 rows
    graph.sender[graph.row_ptr[row] + 5] = 120 if value == "another crystal" else value
    out = problem.found(graph)
    others = torch.arange(len(out)) != row
    assert out[row].isnan().all() and torch.equal(out[others], sound[others])


@pytest.mark.parametrize("gpu", [H100, TINY], ids=["small", "large"])
def test_bad_pointers_give_nan(library, make_batch, monkeypatch, gpu):
    library.gpu(*gpu)
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)  # so that NaN is what a kernel wrote
    problem = Problem(make_batch("plain"), 16, 41, 1, True)
    sound, graph = problem.found(), problem.graph()
    row_ptr = graph.row_ptr.clone()
    row_ptr[30] = 10**6
    out = problem.found(graph._replace(row_ptr=row_ptr))
    others = (torch.arange(len(out)) != 29) & (torch.arange(len(out)) != 30)
    assert out[29:31].isnan().all() and torch.equal(out[others], sound[others])
    for at, value in ((3, 10**6), (0, 1), (-1, 5), (2, -7)):
        crystal_ptr = graph.crystal_ptr.clone()
        crystal_ptr[at] = value
        assert problem.found(graph._replace(crystal_ptr=crystal_ptr)).isnan().all()


@pytest.mark.parametrize("gpu", [H100, TINY], ids=["small", "large"])
def test_rows_by_species(library, make_batch, gpu):
    library.gpu(*gpu)
    problem = Problem(make_batch("plain"), 12, 41, 2, True)
    species = torch.arange(len(problem.h), dtype=torch.int32) % 7
    table = problem.h[:7].float()
    problem.h = problem.h[:7][species.long()]
    expected = problem.check()
    assert torch.equal(backend.stack(table, problem.float_layers(), problem.graph(), species), expected)
    species[3] = 7
    out = backend.stack(table, problem.float_layers()[:1], problem.graph(), species)
    assert out[3].isnan().all() and not out[5:].isnan().any()  # a crystal of five rows


def test_the_gate_is_right_at_both_ends():
    """c for large c, exp(c) for very negative c, no overflow, no NaN."""
    ends = torch.tensor([-700.0, -80, -30, -10, -1, -1e-6, 0, 1e-6, 1, 30, 700], dtype=torch.float64)
    f, c = (x.reshape(-1) for x in torch.meshgrid(ends, ends, indexing="ij"))
    n, index = len(f), lambda *x: torch.tensor(x, dtype=torch.int32)
    zero, one = torch.zeros(2 * n), torch.ones(2 * n)
    layer = Layer(
        torch.zeros(2 * n, 2 * n + 1), None, zero, torch.cat([f, c]).float(), one[:n], zero[:n], zero, one, zero[:n],
        one[:n], 0.0, 0.0, False, False,
    )  # fmt: skip
    graph = Graph(torch.ones(1), None, index(0), index(0, 1), index(0, 1), None, None, None, 0.0, 0.2)
    start = torch.full((1, n), -200.0)  # softplus keeps what is small there
    out = backend.stack(start + 200, [layer], graph)[0].double()
    gate = torch.sigmoid(f.float().double()) * torch.nn.functional.softplus(c.float().double())
    expected = torch.nn.functional.softplus(gate)
    assert torch.isfinite(out).all()
    limit = torch.finfo(torch.float32).eps * (8 + f.abs() + c.abs())
    assert ((out - expected).abs() / expected < limit).all()


@pytest.mark.parametrize("gpu", [H100, TINY], ids=["from the table", "for each edge"])
def test_the_term_of_an_edge(library, gpu):
    """At distances within, between and beyond the Gaussians, where nothing else hides its error."""
    library.gpu(*gpu)
    n, width, k = 16, 32, 41
    g = torch.Generator().manual_seed(0)
    distance = torch.cat([torch.rand(12 * n - 4, generator=g) * 9, torch.tensor([0.0, 8.0, 8.1, 12.0])])
    index = lambda *x: torch.tensor(x, dtype=torch.int32)  # noqa: E731
    sender = torch.zeros(12 * n, dtype=torch.int32)
    edges = Edges(distance, None, sender, torch.arange(0, 12 * n + 1, 12, dtype=torch.int32), index(0, n))
    weight = torch.zeros(2 * width, 2 * width + k)
    weight[:, 2 * width :] = 4 * torch.rand(2 * width, k, generator=g) - 2
    zero, one = torch.zeros(2 * width), torch.ones(2 * width)
    vectors = (one, zero, one[:width], zero[:width], zero, one, zero[:width], one[:width])
    graph = Graph(*edges[:5], None, None, None, 0.0, 0.2)
    h = torch.zeros(n, width)
    ours = backend.stack(h, [Layer(weight, None, *vectors, 0.0, 0.0, False, False)], graph)
    g1, b1, g2, b2, m1, v1, m2, v2 = (x.double() for x in vectors)
    norms = BatchNorm(g1, b1, m1, v1, eps=0.0), BatchNorm(g2, b2, m2, v2, eps=0.0)
    edges = edges._replace(distance=distance.double())
    truth = reference.gated_conv(h.double(), edges, torch.ones(n).double(), weight.double(), None, *norms)
    assert relative(ours, truth) < 3e-7


def test_tf32_is_used_where_it_is_allowed(make_batch, monkeypatch):
    problem = Problem(make_batch("weighted"), 32, 41, 1, True)
    exact = problem.expected(torch.float64)
    assert relative(problem.found(), exact) < 1e-6
    monkeypatch.setattr(backend, "_precision", lambda: "tf32")
    assert 1e-5 < relative(problem.found(), exact) < 1e-3


def test_an_error_of_cuda_is_raised(library, make_batch):
    problem = Problem(make_batch("isolated"), 16, 41, 1, True)
    library.fail_once()
    with pytest.raises(RuntimeError, match="CUDA: invalid value"):
        problem.found()


def test_a_batch_without_rows(make_batch):
    problem = Problem(make_batch("isolated"), 16, 41, 1, True)
    none = torch.zeros(0, dtype=torch.int32)
    graph = Graph(torch.zeros(0), None, none, none.new_zeros(1), none.new_zeros(1), None, None, None, 0.0, 0.2)
    assert backend.stack(torch.zeros(0, 16), problem.float_layers(), graph).shape == (0, 16)


def test_bad_input_is_refused(make_batch):
    problem = Problem(make_batch("isolated"), 16, 41, 1, True)
    h, layers, graph = problem.h.float(), problem.float_layers(), problem.graph()
    with pytest.raises(sf.InputError, match="sender must be a contiguous"):
        backend.stack(h, layers, graph._replace(sender=graph.sender.long()))
    with pytest.raises(sf.InputError, match="h must be a contiguous"):
        backend.stack(h[1:], layers, graph)
    with pytest.raises(sf.InputError, match="crystal_ptr must be a contiguous"):
        backend.stack(h, layers, graph._replace(crystal_ptr=graph.crystal_ptr.long()))
    with pytest.raises(sf.InputError, match="up to 128 features, not 129"):
        backend.stack(torch.zeros(len(h), 129), layers, graph)


def test_the_choice_of_a_backend(monkeypatch):
    """What a call on a CUDA tensor takes, on a machine that need not have a GPU."""
    like = lambda dtype=torch.float32, width=64: types.SimpleNamespace(  # noqa: E731
        device=torch.device("cuda"), dtype=dtype, shape=(5, width)
    )
    said: list[tuple[str, str]] = []
    monkeypatch.setattr(registry, "_say_once", lambda reason, instead="reference": said.append((reason, instead)))
    monkeypatch.setattr(registry, "triton_problem", lambda: None)
    monkeypatch.setattr(registry, "cuda_problem", lambda: None)
    assert registry.select(like(), inference=True) == "cuda"
    assert registry.select(like()) == "cuda" and registry.select(like(width=500)) == "cuda" and not said
    assert registry.select(like(width=129), inference=True) == "triton"
    assert "up to 128 features in inference, not 129" in said[-1][0] and said[-1][1] == "Triton"
    assert registry.select(like(torch.float64), inference=True) == "reference" and said[-1][1] == "reference"
    monkeypatch.setattr(registry, "cuda_problem", lambda: "the driver is too old")
    assert registry.select(like(), inference=True) == "triton" and said[-1] == ("the driver is too old", "Triton")
    said.clear()
    assert registry.select(like()) == "triton" and said[-1] == ("the driver is too old", "Triton")
    monkeypatch.setattr(registry, "triton_problem", lambda: "there is no Triton")
    assert registry.select(like(), inference=True) == "reference" and said[-1] == ("there is no Triton", "reference")
    monkeypatch.setattr(registry, "_require", lambda name: None)
    monkeypatch.setenv("SRCGCNN_FAST_BACKEND", "cuda")
    with pytest.raises(sf.InputError, match="cannot take this input: the driver is too old"):
        registry.select(like(), inference=True)
    monkeypatch.setattr(registry, "cuda_problem", lambda: None)
    assert registry.select(like(), inference=True) == "cuda"
    assert registry.select(like()) == "cuda"
    with pytest.raises(sf.InputError, match="exist in the reference only"):
        registry.select(like(), edge_statistics_grad=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_backend_says_so():
    status = sf.backends()["cuda"]
    assert not status.available
    assert status.reason == ("torch sees no CUDA device" if status.built else registry.cuda_problem())
    with pytest.raises(sf.InputError, match="cannot run here"), sf.use_backend("cuda"):
        pass
