"""The operators as PyTorch sees them: schema, fakes, autograd, compilation."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

import srcgcnn_fast as sf
from srcgcnn_fast import functional, nn
from srcgcnn_fast.functional import BatchNorm
from srcgcnn_fast.ops import cpu, fused, triton
from srcgcnn_fast.ops.cpu import Layer
from srcgcnn_fast.ops.reference import Edges

pytestmark = pytest.mark.skipif(not sf.backends()["cpu"].available, reason="the CPU kernels are not built")


def arguments(batch, training, features=False, n_features=6):
    """Everything that gated_conv takes, at the smallest width of the kernels."""
    g = torch.Generator().manual_seed(1)
    rand = lambda *s: torch.rand(*s, generator=g, dtype=torch.float64)  # noqa: E731
    width = cpu.kernel_width(torch.float64)
    given = rand(batch.num_edges, n_features) if features else None
    edges = Edges(batch.distance.double(), given, batch.sender, batch.row_ptr, batch.crystal_ptr, 0.0, 1.5)
    graph = fused.with_shells(edges)
    c = 2 * width
    layer = Layer(
        (rand(c, c + n_features) - 0.5), rand(c), rand(c) + 0.5, rand(c), rand(width) + 0.5, rand(width),
        rand(c), rand(c) + 0.5, rand(width), rand(width) + 0.5, 1e-5, 1e-5, training, training,
    )  # fmt: skip
    return rand(batch.num_rows, width), layer, graph, fused.moments(batch.weight.double(), graph, n_features)


@pytest.mark.parametrize(("training", "features"), [(True, False), (False, False), (True, True)])
def test_opcheck(make_batch, training, features):
    batch = make_batch("isolated", seed=2)
    h, layer, graph, moments = arguments(batch, training, features)
    ops = torch.ops.srcgcnn_fast
    basic = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.edge_shells.default, (graph.distance, *graph[2:5]))
    torch.library.opcheck(ops.edge_moments.default, (moments.row_weight, *graph, 6))
    layer = layer._replace(**{name: getattr(layer, name).requires_grad_() for name in Layer._fields[:6]})
    torch.library.opcheck(ops.gated_conv.default, (h.requires_grad_(), *layer, *graph, *moments), test_utils=basic)
    grad, m = torch.rand_like(h), torch.rand_like(h)
    torch.library.opcheck(
        ops.gated_conv_backward.default, (grad, h, m, *layer, *graph, *moments, not training), test_utils=basic
    )
    frozen = [x.detach() for x in layer[:10]]
    torch.library.opcheck(
        ops.gated_conv_stack.default, (h.detach(), frozen[:1], frozen[1:2], frozen[2:], [1e-5] * 2, True, *graph)
    )
    readout = [torch.rand(3, h.shape[1], dtype=h.dtype), None, torch.rand(2, 3, dtype=h.dtype), torch.rand(2).double()]
    layers = (frozen[:1], frozen[1:2], frozen[2:], [1e-5] * 2, True)
    embedding = [torch.rand(h.shape[1], 5, dtype=h.dtype), None]
    for species, table, dense in (
        (None, h.detach(), [None, None, *readout]),
        (batch.numbers, torch.rand(101, 5, dtype=h.dtype), [*embedding, *readout[:2]]),
    ):
        given = (table, species, moments.row_weight, dense, *layers, *graph)
        torch.library.opcheck(ops.gated_conv_network.default, given)


@pytest.mark.parametrize(("model_type", "biased"), [(sf.CGCNN, True), (sf.SRCGCNN, False)])
def test_a_traced_network_is_one_operator(make_batch, model_type, biased):
    """In inference; with the numbers of the call that nobody traces, bit by bit, and for other batches, too."""
    torch._dynamo.reset()
    model = model_type(2, atom_fea_len=16, h_fea_len=8, n_targets=3).eval()
    if not biased:
        model.conv_to_fc.bias = None
    found = []

    def seen(module, _inputs):
        found.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return module.forward

    call = torch.compile(model, fullgraph=True, backend=seen, dynamic=True)
    with torch.no_grad():
        for batch in (make_batch("weighted"), make_batch("plain")):
            assert torch.equal(call(batch), model(batch))
    for names in found:
        assert [name for name in names if "srcgcnn_fast" in name] == ["srcgcnn_fast.gated_conv_network"]
    call(make_batch("weighted")).sum().backward()  # gradients take the operators that have some
    assert model.embedding.weight.grad.abs().max() > 0


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_first_and_second_derivatives(make_batch, training, features):
    """Random projections of the derivatives of every input, and, with fixed statistics, of the edges."""
    batch = make_batch("isolated", seed=2)
    h, layer, graph, moments = arguments(batch, training, features)
    leaves = [x.requires_grad_() for x in (h, *layer[:6])]
    slot = "features" if features else "distance"
    leaves += [] if training else [getattr(graph, slot).requires_grad_()]

    def op(h, weight, bias, gamma1, beta1, gamma2, beta2, *edge):
        given = layer._replace(weight=weight, bias=bias, gamma1=gamma1, beta1=beta1, gamma2=gamma2, beta2=beta2)
        moved = graph._replace(**{slot: edge[0]}) if edge else graph
        if edge and not features:  # the finite differences of gradcheck move distances: new shells
            moved = fused.with_shells(Edges(edge[0], None, *graph[2:5], graph.dmin, graph.step))
        return torch.ops.srcgcnn_fast.gated_conv(h, *given, *moved, *moments)[0]

    assert torch.autograd.gradcheck(op, leaves, eps=1e-6, atol=1e-7, fast_mode=True)
    assert torch.autograd.gradgradcheck(op, leaves, eps=1e-6, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("training", [False, True])
def test_gradcheck_of_the_layer(backend, make_batch, training):
    batch = make_batch("weighted", seed=4).to(dtype=torch.float64)
    g = torch.Generator().manual_seed(2)
    width, n_features = 2, 4
    shapes = [(batch.num_rows, width), (4, 4 + n_features), (4,), (4,), (4,), (2,), (2,)]
    leaves = [torch.rand(*s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]

    def layer(h, weight, bias, g1, b1, g2, b2):
        state = [torch.ones(k, dtype=torch.float64) for k in (4, 4, 2, 2)]
        bn1, bn2 = BatchNorm(g1, b1, *state[:2], training), BatchNorm(g2, b2, *state[2:], training)
        return functional.gated_conv(h, batch, weight, bias, bn1, bn2, step=2.5)[::7]

    assert torch.autograd.gradcheck(layer, leaves, eps=1e-6, atol=1e-7, fast_mode=True)


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_the_reference_is_differentiable_twice(backend, make_batch):
    batch = make_batch("isolated", seed=4).to(dtype=torch.float64)
    g = torch.Generator().manual_seed(2)
    shapes = [(batch.num_rows, 2), (4, 8), (4,)]
    leaves = [torch.rand(*s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]

    def layer(h, weight, bias):
        bn1, bn2 = (BatchNorm(None, None, torch.zeros(k), torch.ones(k), True) for k in (4, 2))
        return functional.gated_conv(h, batch, weight, bias, bn1, bn2, step=2.5)[::3]

    assert torch.autograd.gradgradcheck(layer, leaves, eps=1e-5, atol=1e-5)


def test_fake_tensors_outside_of_their_mode(make_batch):
    with FakeTensorMode() as mode:
        conv = nn.GatedConv(16).eval()
    batch = make_batch("plain")._map(mode.from_tensor)
    out = conv(mode.from_tensor(torch.rand(batch.num_rows, 16)), batch)
    assert type(out) is FakeTensor and out.shape == (batch.num_rows, 16)


def compiled_by_default(model_type, training: bool, backend: str) -> bool:
    """Of the eight, four with every pair of a model, a mode and a backend."""
    return (model_type is sf.CGCNN) ^ training ^ (backend == "cpu")


@pytest.mark.parametrize(
    ("model_type", "training", "backend"),
    [
        pytest.param(*case, marks=() if compiled_by_default(*case) else pytest.mark.slow)
        for case in itertools.product((sf.CGCNN, sf.SRCGCNN), (False, True), ("reference", "cpu"))
    ],
    indirect=["backend"],
)
def test_compile_full_graph(backend, make_batch, training, model_type):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = model_type(2, atom_fea_len=8, h_fea_len=8).train(training)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    batches = [make_batch("weighted", seed=s) for s in (1, 2)]
    results = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)):
        model.load_state_dict(start)
        for batch in batches:
            batch.cache.clear()
            model.zero_grad()
            out = call(batch)
            out.sum().backward()
        results.append(
            [out.detach(), *(p.grad.clone() for p in model.parameters()), *map(torch.clone, model.buffers())]
        )
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("most", [2**24, 7])
def test_rows_of_a_table_on_a_gpu(monkeypatch, most):
    """As index_select, with two derivatives; the gradient from products, all rows at once and one at a time."""
    monkeypatch.setattr(triton, "_MOST_ONES", most)
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(9, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    species = torch.randint(0, 9, (30,), generator=generator, dtype=torch.int32)
    assert torch.equal(fused._Lookup.apply(table, species), table.index_select(0, species))
    rows = torch.rand(30, 4, generator=generator, dtype=torch.float64)
    expected = torch.zeros_like(table).index_add(0, species, rows)
    torch.testing.assert_close(triton.sum_by_species(rows, species, 9), expected)
    assert torch.autograd.gradcheck(fused._Lookup.apply, (table, species))
    assert torch.autograd.gradgradcheck(fused._Lookup.apply, (table, species))
