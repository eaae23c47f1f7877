from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import srcgcnn_fast as sf
from srcgcnn_fast.errors import InputError
from srcgcnn_fast.interop import CGConv, acceleration, difference
from srcgcnn_fast.interop import geometric as ours

GRAPHS = {
    "random": (30, 200),
    "sparse, isolated nodes": (40, 25),
    "one node, one edge": (1, 1),
    "no edges": (5, 0),
    "no nodes": (0, 0),
    "self loops and double edges": (3, 40),
}


def theirs(*args, **kwargs):
    geometric = pytest.importorskip("torch_geometric.nn", reason="torch-geometric is not installed")
    return geometric.CGConv(*args, **kwargs).double()


def graph(kind="random", channels=5, dim=4, seed=0):
    """x, edge_index in no order, edge_attr (None without features); float64."""
    generator = torch.Generator().manual_seed(seed)
    n, e = GRAPHS[kind]
    widths = (channels, channels) if isinstance(channels, int) else channels
    sizes = (n, n) if isinstance(channels, int) else (n, n + 3)
    ends = [torch.randint(0, max(size, 1), (e,), generator=generator) for size in sizes]
    x = [torch.randn(size, w, dtype=torch.float64, generator=generator) for size, w in zip(sizes, widths, strict=True)]
    attr = torch.randn(e, dim, dtype=torch.float64, generator=generator) if dim else None
    return (x[0] if isinstance(channels, int) else tuple(x)), torch.stack(ends), attr


def outcome(layer, x, edge_index, edge_attr):
    """Output, gradients of inputs and parameters, buffers."""
    xs = [x] if isinstance(x, torch.Tensor) else list(x)
    leaves = [a.clone().requires_grad_() for a in [*xs, *([] if edge_attr is None else [edge_attr])]]
    given = leaves[0] if len(xs) == 1 else tuple(leaves[:2])
    out = layer(given, edge_index, None if edge_attr is None else leaves[-1])
    weight = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).reshape(out.shape)
    wanted = [*leaves, *layer.parameters()]
    gradients = torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, gradients, strict=True)]
    return [out, *found, *layer.buffers()]


def assert_same(mine, other, *inputs):
    for x, y in zip(outcome(mine, *inputs), outcome(other, *inputs), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


CHANNELS = {"narrow": 5, "wide": 16, "bipartite": (6, 5)}
OPTIONS = {
    "plain": {},
    "batch norm": {"batch_norm": True},
    "mean": {"aggr": "mean", "batch_norm": True},
    "max": {"aggr": "max"},
    "no bias": {"bias": False},
}


def cases():
    """All of the first graph; of the others each width with or without features. Batch norm cannot train on one row."""
    modes = {"train": True, "eval": False}
    for kind, dim, width, option, mode in product(GRAPHS, (0, 4), CHANNELS, OPTIONS, modes):
        wanted = kind == "random" or (dim == 0) == (width == "narrow")
        can_train = GRAPHS[kind][0] > 1 or width == "bipartite" or not OPTIONS[option].get("batch_norm")
        if wanted and (can_train or mode == "eval"):
            name = f"{kind}-{dim}-{width}-{option}-{mode}"
            yield pytest.param(kind, dim, CHANNELS[width], OPTIONS[option], modes[mode], id=name)


@pytest.mark.parametrize(("kind", "dim", "channels", "options", "training"), cases())
def test_equal_to_pyg(kind, dim, channels, options, training):
    torch.manual_seed(0)
    other = theirs(channels, dim, **options).train(training)
    torch.manual_seed(0)
    mine = CGConv(channels, dim, **options).double().train(training)
    assert list(mine.state_dict()) == list(other.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(mine.parameters(), other.parameters(), strict=True))
    assert repr(mine) == repr(other)
    inputs = graph(kind, channels, dim)
    assert_same(mine, copy.deepcopy(other), *inputs)
    replaced = copy.deepcopy(other)
    if channels != (6, 5) or kind != "no nodes":
        sf.accelerate(replaced)
        assert acceleration(replaced) == {"the model (CGConv)": None}
        assert_same(replaced, other, *inputs)


@pytest.fixture
def operator_calls(monkeypatch):
    calls, summed = [], ours._summed_messages
    monkeypatch.setattr(ours, "_summed_messages", lambda *a: calls.append(a[3]) or summed(*a))
    if sf.backends()["cpu"].available:
        return calls
    pytest.skip("no compiled backend on this machine")


@pytest.mark.parametrize("size", [1e9, 3e9, 1e30, -1e3, -1e30])
def test_gradients_of_large_features_that_no_gate_sees(operator_calls, size):
    torch.manual_seed(0)  # sums of 1e30 cancel with some weights
    other = theirs(16, 4).float()
    with torch.no_grad():
        for linear in (other.lin_f, other.lin_s):
            linear.weight[:, [3, 19]] = 0
    x, *edges = (a.float() if a.is_floating_point() else a for a in graph(channels=16, dim=4))
    x[:, 3] = size
    found = outcome(sf.accelerate(copy.deepcopy(other)), x, *edges)
    for mine, expected in zip(found, outcome(other, x, *edges), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


def test_what_the_compiled_operator_computes(operator_calls):
    for aggr, expected in (("add", 1), ("mean", 2), ("max", 2)):
        CGConv(16, 4, aggr=aggr).double()(*graph(channels=16))
        assert len(operator_calls) == expected
    layer, (x, index, _) = CGConv(16, 41).double(), graph(channels=16)
    fea = torch.exp(-((torch.rand(200, 1, dtype=torch.float64) * 30 - torch.arange(41)) ** 2))
    layer(x, index, fea)
    assert operator_calls[2].edge_features is None  # recognised
    weight, bias = (torch.cat([getattr(m, name) for m in (layer.lin_f, layer.lin_s)]) for name in ("weight", "bias"))
    by_formula = ours._messages(x, x, weight, bias, *index, fea)
    expected = x + torch.zeros_like(x).index_add(0, index[1], by_formula)
    torch.testing.assert_close(layer(x, index, fea), expected, rtol=1e-10, atol=1e-12)


def test_formula():
    """Without PyTorch Geometric: each edge by hand."""
    layer, (x, index, attr) = CGConv(5, 4).double(), graph("self loops and double edges")
    expected = x.clone()
    for (j, i), e in zip(index.T.tolist(), attr, strict=True):
        z = torch.cat([x[i], x[j], e])
        expected[i] += torch.sigmoid(layer.lin_f(z)) * nn.functional.softplus(layer.lin_s(z))
    torch.testing.assert_close(layer(x, index, attr), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("channels", [5, (6, 5)], ids=["square", "bipartite"])
def test_reversed_flow(channels):
    other, inputs = theirs(channels, 4, flow="target_to_source"), graph(channels=channels)
    x, index, attr = inputs
    index = index.flip(0)
    mine = CGConv(channels, 4, flow="target_to_source").double()
    mine.load_state_dict(other.state_dict())
    if channels == 5:
        assert_same(mine, other, x, index, attr)
        assert_same(sf.accelerate(copy.deepcopy(other)), other, x, index, attr)


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo, torch.sparse_csc])
def test_sparse_adjacency(layout):
    n, generator = 12, torch.Generator().manual_seed(0)
    adjacency = (torch.rand(n, n, generator=generator) < 0.3).double()  # rows are targets
    receiver, sender = adjacency.nonzero().T
    sparse = adjacency.to_sparse(layout=layout)
    layer, x = CGConv(5).double(), torch.randn(n, 5, dtype=torch.float64, generator=generator)
    expected = layer(x, torch.stack([sender, receiver]))
    for _ in range(2):
        torch.testing.assert_close(layer(x, sparse), expected)
    if layout is torch.sparse_csc:
        return  # PyTorch Geometric does not take it
    other = theirs(5)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x, sparse), expected)
    torch.testing.assert_close(sf.accelerate(other)(x, sparse), expected)
    with pytest.raises(InputError, match="source_to_target"):
        CGConv(5, flow="target_to_source").double()(x, sparse)


def test_sparse_tensor_with_values():
    sparse = pytest.importorskip("torch_sparse", reason="torch-sparse is not installed")
    x, index, attr = graph()
    order = (index[1] * 30 + index[0]).argsort(stable=True)
    adjacency = sparse.SparseTensor(row=index[1][order], col=index[0][order], value=attr[order], sparse_sizes=(30, 30))
    other = theirs(5, 4)
    expected = other(x, index, attr)
    torch.testing.assert_close(other(x, adjacency), expected)
    torch.testing.assert_close(sf.accelerate(other)(x, adjacency), expected)


def test_edge_index_class_of_pyg():
    pyg = pytest.importorskip("torch_geometric", reason="torch-geometric is not installed")
    x, index, attr = graph()
    index = index[:, index[1].argsort(stable=True)]
    wrapped = pyg.EdgeIndex(index, sparse_size=(30, 30), sort_order="col")
    other = theirs(5, 4)
    expected = other(x, index, attr)
    torch.testing.assert_close(sf.accelerate(other)(x, wrapped, attr), expected)


def test_edges_are_sorted_once_a_pass(monkeypatch):
    sorts, argsort = [], torch.argsort
    monkeypatch.setattr(torch, "argsort", lambda *a, **k: sorts.append(1) or argsort(*a, **k))
    layers, (x, index, attr) = [CGConv(5, 4).double() for _ in range(3)], graph()
    for layer in layers:
        x = layer(x, index, attr)
    assert len(sorts) == 1
    before = layers[0](x, index, attr)
    index.numpy()[0, 0] = (int(index[0, 0]) + 1) % 30  # PyTorch does not see this
    after = layers[0](x, index, attr)
    assert len(sorts) == 3 and not torch.equal(before, after)
    torch.testing.assert_close(after, layers[0](x, index.clone(), attr))


@pytest.mark.parametrize("given", ["features", "Gaussians"])
def test_gradients_against_differences(given):
    layer, (x, index, attr) = CGConv(3, 4).double(), graph("self loops and double edges", 3)
    if given == "Gaussians":
        attr = torch.exp(-((attr[:, :1] - torch.arange(4)) ** 2))
        assert torch.autograd.gradcheck(lambda x: layer(x, index, attr), x.requires_grad_())
        assert torch.autograd.gradgradcheck(lambda x: layer(x, index, attr), x)
    else:
        inputs = (x.requires_grad_(), attr.requires_grad_())
        assert torch.autograd.gradcheck(lambda x, a: layer(x, index, a), inputs)
        assert torch.autograd.gradgradcheck(lambda x, a: layer(x, index, a), inputs)


def test_gradients_of_layers_in_a_row_to_be_differentiated_again():
    """What both layers are given counts once in each."""
    layer, (x, index, attr) = CGConv(5, 4).double(), graph()
    index = index[:, index[1].argsort(stable=True)]  # no other order would let the edges pass as they are
    leaves = [x.requires_grad_(), attr.requires_grad_(), *layer.parameters()]

    def gradients(**options):
        return torch.autograd.grad(layer(layer(x, index, attr), index, attr).square().sum(), leaves, **options)

    for found, expected in zip(gradients(create_graph=True), gradients(), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("aggr", ["add", "max"])
@pytest.mark.parametrize("gaussians", [True, False])
def test_inputs_may_be_written_to_before_the_backward_pass(gaussians, aggr):
    layer, (x, index, attr) = CGConv(5, 4, aggr=aggr).double(), graph()
    index = index[:, index[1].argsort(stable=True)]
    attr = torch.exp(-((attr[:, :1] - torch.arange(4)) ** 2)) if gaussians else attr
    expected = torch.autograd.grad(layer(x, index, attr).square().sum(), list(layer.parameters()))
    for write in (lambda x: x.zero_(), lambda x: x.numpy().fill(0)):
        own, given = x.clone(), attr.clone()
        with torch.no_grad():
            CGConv(5, 4).double()(own, index, given)  # what is kept of this serves no backward pass
        out = layer(own, index, given)
        write(own)
        write(given)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), list(layer.parameters())), expected)


def test_layers_of_two_types_with_the_same_edges():
    edge_index, x, single = torch.tensor([[1, 2, 0, 1], [0, 1, 2, 2]]), torch.rand(3, 8), CGConv(8)
    double = copy.deepcopy(single).double()
    expected = single(x, edge_index)
    torch.testing.assert_close(double(x.double(), edge_index).float(), expected, rtol=1e-5, atol=1e-5)


def test_more_nodes_with_the_same_edges():
    layers, (x, index, attr) = [CGConv(5, 4) for _ in range(2)], graph()
    attr = attr.float()
    more = torch.cat([layers[0](x.float(), index, attr), torch.ones(3, 5)])
    assert layers[1](more, index, attr).shape == more.shape


def test_a_geometric_network(published):
    pyg = pytest.importorskip("torch_geometric", reason="torch-geometric is not installed")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(pyg.nn.CGConv(16, 41, batch_norm=True) for _ in range(2))
            self.out = nn.Linear(16, 1)

        def forward(self, data):
            x = data.x
            for conv in self.convs:
                x = conv(x, data.edge_index, data.edge_attr).relu()
            return self.out(pyg.nn.global_mean_pool(x, data.batch))

    crystals = []
    for seed in range(4):
        x, index, _ = graph(channels=16, seed=seed)
        fea = torch.exp(-((torch.rand(200, 1, dtype=torch.float64) * 30 - torch.arange(41)) ** 2))
        crystals.append(pyg.data.Data(x=x, edge_index=index, edge_attr=fea))
    data = pyg.data.Batch.from_data_list(crystals)
    model = sf.accelerate(Net().double(), verify=data)
    found = difference(model, data)
    assert max(found.output, found.gradient, found.buffers) < 1e-11
    data.x, data.edge_attr = data.x.float(), data.edge_attr.float()
    assert difference(model.float(), data).rounding


def test_a_subclass_with_another_message_is_left():
    geometric = pytest.importorskip("torch_geometric.nn", reason="torch-geometric is not installed")

    class Halved(geometric.CGConv):
        def message(self, x_i, x_j, edge_attr):
            return 0.5 * super().message(x_i, x_j, edge_attr)

    with pytest.raises(InputError, match=r"Nothing in this Halved can be accelerated .* differs from the published"):
        sf.accelerate(Halved(5, 4))


def test_a_subclass_with_more_arguments():
    geometric = pytest.importorskip("torch_geometric.nn", reason="torch-geometric is not installed")

    class Scaled(geometric.CGConv):
        def forward(self, x, edge_index, edge_attr=None, scale=1.0):
            return scale * super().forward(x, edge_index, edge_attr)

    other, (x, index, attr) = Scaled(5, 4).double(), graph()
    fast = sf.accelerate(copy.deepcopy(other))
    for more in ({}, {"scale": 2.0}):
        torch.testing.assert_close(fast(x, index, attr, **more), other(x, index, attr, **more), rtol=1e-11, atol=1e-12)


def test_hooks_of_message_passing_are_called():
    other, inputs = theirs(5, 4), graph()
    expected, seen = other(*inputs), []
    sf.accelerate(other)
    other.register_message_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(other(*inputs), expected) and seen == [1]


def test_explanations_mask_the_edges_and_leave_layers_as_they_were(operator_calls):
    explain = pytest.importorskip("torch_geometric.explain.algorithm.utils")
    other, inputs = theirs(5, 4), graph()
    fast = sf.accelerate(copy.deepcopy(other))
    layers, found = [other, fast, copy.deepcopy(fast)], []
    operator_calls.clear()
    for layer in layers:
        mask = torch.linspace(-1, 1, 200, dtype=torch.float64, requires_grad=True)
        explain.set_masks(layer, mask, inputs[1])
        out = layer(*inputs)
        found.append(torch.cat([out.flatten(), *torch.autograd.grad(out.sum(), mask)]))
        explain.clear_masks(layer)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]) and not operator_calls
    for layer in layers[1:]:
        assert_same(layer, other, *inputs)
    assert len(operator_calls) == 2


def halve_messages(layer):
    layer.message = lambda x_i, x_j, edge_attr: 0.5 * type(layer).message(layer, x_i, x_j, edge_attr)


def double_sums(layer):
    layer.update = lambda inputs: 2 * inputs


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda layer: setattr(layer, "aggr_module", layer.other), "its aggr_module is SoftmaxAggregation"),
        (lambda layer: setattr(layer, "aggr", "mean"), "its aggr_module is SumAggregation, not MeanAggregation"),
        (halve_messages, "its message was replaced"),
        (double_sums, "its update was replaced"),
    ],
    ids=["aggregation", "name of the aggregation", "message", "update"],
)
def test_parts_of_message_passing_that_are_exchanged_later(change, word, operator_calls):
    other, inputs = theirs(5, 4), graph()
    other.other = pytest.importorskip("torch_geometric.nn").SoftmaxAggregation(learn=True)
    fast = sf.accelerate(copy.deepcopy(other))
    operator_calls.clear()
    for layer in (other, fast):
        change(layer)
    assert_same(fast, other, *inputs)
    assert not operator_calls and word in acceleration(fast)["the model (CGConv)"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda x, i, a: (x[:, :3], i, a), "do not fit"),
        (lambda x, i, a: (x, i, a[:, :2]), "do not fit"),
        (lambda x, i, a: (x, i, a[:7]), "7 rows for 200 edges"),
        (lambda x, i, a: (x, i + 25, a), "points outside"),
        (lambda x, i, a: (x, i - 1, a), "points outside"),
    ],
)
def test_bad_input(change, word):
    with pytest.raises(InputError, match=word):
        CGConv(5, 4).double()(*change(*graph()))


def test_bad_options():
    for options, word in (({"aggr": "mul"}, "aggr"), ({"flow": "both"}, "flow")):
        with pytest.raises(InputError, match=word):
            CGConv(5, **options)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(layer):
    layer.lin_s.__class__ = Doubled


def doubled_by_an_attribute(layer):
    forward = layer.lin_s.forward
    layer.lin_s.forward = lambda x: 2 * forward(x)


def doubled_by_a_hook(layer):
    layer.lin_s.register_forward_hook(lambda module, given, out: 2 * out)


@pytest.mark.parametrize("aggr", ["add", "mean", "max"])
@pytest.mark.parametrize("change", [doubled, doubled_by_an_attribute, doubled_by_a_hook])
def test_parts_that_are_more_than_their_weights_are_called(change, aggr):
    torch.manual_seed(0)
    changed = CGConv(5, 4, aggr=aggr).double()
    expected = copy.deepcopy(changed)
    change(changed)
    with torch.no_grad():
        expected.lin_s.weight *= 2
        expected.lin_s.bias *= 2
        torch.testing.assert_close(changed(*graph()), expected(*graph()), rtol=1e-9, atol=1e-11)


def test_pruned_weights_train():
    torch.manual_seed(0)
    layer = CGConv(5, 4).double()
    prune.random_unstructured(layer.lin_f, "weight", amount=0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layer(*graph()).square().mean().backward()
        optimizer.step()
    plain = CGConv(5, 4).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    plain.lin_f.weight.data = layer.lin_f.weight_orig.data * layer.lin_f.weight_mask
    torch.testing.assert_close(layer(*graph()), plain(*graph()), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_autocast_leaves_layers_of_other_types_theirs(dtype):
    layer = CGConv(5, 4).to(dtype)
    x, index, attr = graph()
    expected = layer(x.to(dtype), index, attr.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x.to(dtype), index, attr.to(dtype)), expected)


def test_autocast():
    layer, (x, index, attr) = CGConv(16, 4), graph(channels=16)
    x, attr = x.float(), attr.float()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, index, attr)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, layer(x, index, attr))


@pytest.mark.parametrize("aggr", ["add", "mean"])
def test_traced_and_transformed(aggr):
    layer, (x, index, attr) = CGConv(5, 4, aggr=aggr).double(), graph()
    expected, other = layer(x, index, attr), graph(seed=1)[1]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    exported = torch.export.export(layer, (x, index, attr)).module()
    for again in (compiled, exported):
        torch.testing.assert_close(again(x, index, attr), expected)
        torch.testing.assert_close(again(x, other, attr), layer(x, other, attr))
    several = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.vmap(lambda x: layer(x, index, attr))(several)[0], expected)
