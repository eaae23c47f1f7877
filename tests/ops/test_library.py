"""The operators as PyTorch sees them: schema, fakes, autograd, compilation."""

from __future__ import annotations

import pytest
import torch

import srcgcnn_fast as sf
from srcgcnn_fast import functional
from srcgcnn_fast.functional import BatchNorm
from srcgcnn_fast.ops import library  # noqa: F401  (registers the operators)

pytestmark = pytest.mark.skipif(not sf.backends()["cpu"].available, reason="the CPU kernels are not built")


def arguments(batch, dtype=torch.float64, features=False, width=3, n_features=6):
    g = torch.Generator().manual_seed(1)
    rand = lambda *s: torch.randn(*s, generator=g, dtype=dtype)  # noqa: E731
    given = rand(batch.num_edges, n_features) if features else None
    edges = [batch.distance.to(dtype), given, batch.sender, batch.row_ptr, batch.crystal_ptr, 0.0, 1.5]
    return rand(batch.num_rows, 2 * width), rand(batch.num_rows, 2 * width), rand(n_features, 2 * width), edges


@pytest.fixture
def small(make_batch):
    return make_batch("isolated", seed=2)


@pytest.mark.parametrize("features", [False, True])
def test_opcheck(small, features):
    p, q, w_e, edges = arguments(small, features=features)
    for x in (p, q, w_e):
        x.requires_grad_()
    torch.library.opcheck(torch.ops.srcgcnn_fast.gate_sum.default, (p, q, w_e, *edges))
    grad = torch.rand_like(p[:, :3])
    torch.library.opcheck(
        torch.ops.srcgcnn_fast.gate_sum_backward.default,
        (grad, p, q, w_e, *edges, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    topology = edges[2:5]
    torch.library.opcheck(torch.ops.srcgcnn_fast.neighbor_sum.default, (p, *topology, True))
    weight = small.weight.double()
    torch.library.opcheck(torch.ops.srcgcnn_fast.edge_moments.default, (weight, *edges, w_e.shape[0]))


@pytest.mark.parametrize("features", [False, True])
def test_first_and_second_derivatives(small, features):
    p, q, w_e, edges = arguments(small, features=features)
    slot = 1 if features else 0
    edge = edges[slot].requires_grad_()
    leaves = [x.requires_grad_() for x in (p, q, w_e)]

    def op(p, q, w_e, edge):
        return torch.ops.srcgcnn_fast.gate_sum(p, q, w_e, *edges[:slot], edge, *edges[slot + 1 :])

    assert torch.autograd.gradcheck(op, (*leaves, edge), eps=1e-6, atol=1e-7)
    assert torch.autograd.gradgradcheck(op, (*leaves, edge), eps=1e-6, atol=1e-6)


def test_neighbor_sum_is_differentiable_both_ways(small):
    p, _, _, edges = arguments(small)
    for transpose in (False, True):
        op = lambda h, t=transpose: torch.ops.srcgcnn_fast.neighbor_sum(h, *edges[2:5], t)  # noqa: E731
        assert torch.autograd.gradcheck(op, (p.requires_grad_(),))


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

    assert torch.autograd.gradcheck(layer, leaves, eps=1e-6, atol=1e-7)


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


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
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
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters()), *map(torch.clone, model.buffers())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
