"""From rows to crystals, and a whole network at once, against the reference in float64."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from convolution import relative

import srcgcnn_fast as sf
from srcgcnn_fast import functional
from srcgcnn_fast.errors import InputError
from srcgcnn_fast.functional import Dense
from srcgcnn_fast.ops import cpu, fused, reference

pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.skipif(not sf.backends()["cpu"].available, reason="the CPU kernels are not built"),
]
KINDS = ["plain", "weighted", "ragged", "one atom", "isolated", "no edges", "many crystals"]
LIMIT = {torch.float32: 1e-6, torch.float64: 1e-14}


def layers_of(sizes: tuple[int, ...], bias: bool = True, seed: int = 0) -> list[Dense]:
    g = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.rand(*s, generator=g, dtype=torch.float64) - 0.5  # noqa: E731
    pairs = pairwise(sizes)
    return [Dense(rand(o, i), rand(o) if bias else None) for i, o in pairs]


def leaf(x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if x is None else x.detach().to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(64, 128, 1), (7, 5, 3), (16, 33, 20, 2), (48, 1)], ids=str)
def test_readout_equals_the_reference(make_batch, kind, sizes, dtype):
    batch = make_batch(kind)
    h = torch.randn(batch.num_rows, sizes[0], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    upstream = torch.randn(batch.num_crystals, sizes[-1], generator=torch.Generator().manual_seed(2)).double()
    layers = layers_of(sizes, bias=sizes[0] != 48)
    results = []
    for form, precision in ((reference.readout, torch.float64), (None, dtype)):
        x, own = leaf(h, precision), [Dense(leaf(w, precision), leaf(b, precision)) for w, b in layers]
        out = functional.readout(x, batch, own) if form is None else form(x, batch.weight, batch.crystal_ptr, own)
        out.backward(upstream.to(precision))
        results.append([out, x.grad, *(p.grad for layer in own for p in layer if p is not None)])
    for truth, found in zip(*results, strict=True):
        assert relative(found, truth) < LIMIT[dtype] * 3


def test_more_crystals_than_blocks_that_are_summed_apart():
    """1 100 crystals: blocks of 32, several of which share their sums."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(1, 5, (1100,), generator=g)
    crystal_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), rows.cumsum(0)]).int()
    row_weight = torch.randint(1, 5, (int(rows.sum()),), generator=g).double()
    h = torch.randn(len(row_weight), 16, generator=g, dtype=torch.float64)
    upstream = torch.randn(len(rows), 2, generator=g, dtype=torch.float64)
    layers, results = layers_of((16, 24, 2)), []
    for form in (reference.readout, fused.readout):
        x, own = leaf(h, torch.float64), [Dense(leaf(w, torch.float64), leaf(b, torch.float64)) for w, b in layers]
        out = form(x, row_weight, crystal_ptr, own)
        out.backward(upstream)
        results.append([out, x.grad, *(p.grad for layer in own for p in layer)])
    for truth, found in zip(*results, strict=True):
        assert relative(found, truth) < 1e-13


def test_the_readout_is_differentiable_twice(make_batch):
    batch = make_batch("weighted").to(dtype=torch.float64)
    h = torch.randn(batch.num_rows, 5, dtype=torch.float64, requires_grad=True)
    parameters = [leaf(p, torch.float64) for layer in layers_of((5, 6, 2)) for p in layer]

    def run(h, *p):
        return functional.readout(h, batch, [Dense(*p[:2]), Dense(*p[2:])])

    assert torch.autograd.gradcheck(run, (h, *parameters))
    assert torch.autograd.gradgradcheck(run, (h, *parameters))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
@pytest.mark.parametrize("brings", ["nothing", "atoms", "edges"])
def test_a_network_at_once_equals_its_parts(make_batch, monkeypatch, kind, model_type, brings):
    batch = make_batch(kind)
    if brings == "atoms":
        batch.atom_features = torch.rand(batch.num_rows, 92)
    if brings == "edges":
        batch.edge_features = torch.rand(batch.num_edges, 41)
    torch.manual_seed(0)
    model = model_type(2, 32, 20, 2, n_targets=3)
    model.train()(make_batch("plain"))  # running statistics that are not those of a new model
    model.eval()
    calls = []
    at_once = cpu.NetworkParameters.run
    monkeypatch.setattr(cpu.NetworkParameters, "run", lambda *a: calls.append(1) or at_once(*a))
    with torch.no_grad():
        found = model(batch)
        with sf.use_backend("reference"):
            truth = copy.deepcopy(model).double()(batch.to(dtype=torch.float64))
        assert calls == [1]
        assert relative(found, truth) < LIMIT[torch.float32]
        double = copy.deepcopy(model).double()(batch.to(dtype=torch.float64))
    assert relative(double, truth) < 1e-13 and calls == [1, 1]


@pytest.mark.parametrize("kind", ["many crystals", "large"])
def test_a_network_has_the_same_bits_whatever_the_threads_and_neighbours(make_batch, kind):
    batch = make_batch(kind)
    model = sf.SRCGCNN().eval()
    with torch.no_grad():
        whole = model(batch)
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 3, 16):  # the more, the fewer crystals each takes at once
                torch.set_num_threads(threads)
                assert torch.equal(whole, model(batch))
        finally:
            torch.set_num_threads(before)
        fourth = int(batch.crystal_ptr[3]), int(batch.crystal_ptr[4])
        rows, edges = slice(*fourth), slice(int(batch.row_ptr[fourth[0]]), int(batch.row_ptr[fourth[1]]))
        alone = sf.graph.GraphBatch(
            batch.numbers[rows], batch.weight[rows], batch.sender[edges] - fourth[0], batch.distance[edges],
            batch.row_ptr[fourth[0] : fourth[1] + 1] - batch.row_ptr[fourth[0]],
            torch.tensor([0, fourth[1] - fourth[0]], dtype=torch.int32), torch.arange(fourth[1] - fourth[0]).int(),
        )  # fmt: skip
        assert torch.equal(whole[3:4], model(alone))


@pytest.mark.parametrize("size", [1.0, 300.0], ids=["powers", "sums"])
@pytest.mark.parametrize("brings", ["nothing", "atoms", "edges"])
@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
def test_threads_share_out_huge_crystals_without_a_change_of_bits(make_batch, model_type, brings, size):
    batch = make_batch("huge crystals")
    if brings == "atoms":
        batch.atom_features = torch.rand(batch.num_rows, 92)
    if brings == "edges":
        batch.edge_features = torch.rand(batch.num_edges, 41)
    torch.manual_seed(0)
    model = model_type(2, 32, 20)
    model.train()(make_batch("plain"))  # norms that differ from layer to layer
    model.eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "fc_full.weight" in name:
                weight.mul_(size)  # where powers of two leave their bounds, sums of the terms take their place
    before, by_threads = torch.get_num_threads(), []
    for threads in (1, 2, 3, 5):  # of two, the largest crystal is shared; of five, two are
        torch.set_num_threads(threads)
        found = []
        with torch.no_grad():
            for dtype in (torch.float32, torch.float64):
                mine, graphs = copy.deepcopy(model).to(dtype), batch.to(dtype=dtype)
                h = torch.linspace(-1, 1, 32 * batch.num_rows, dtype=dtype).view(-1, 32)
                found += [mine(graphs), functional.stacked_gated_conv(h, graphs, mine._layers())[0]]
        by_threads.append(found)
    torch.set_num_threads(before)
    with sf.use_backend("reference"), torch.no_grad():
        truth = copy.deepcopy(model).double()(batch.to(dtype=torch.float64))
    assert relative(by_threads[0][2], truth) < 1e-12
    for other in by_threads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(by_threads[0], other, strict=True))


def test_gradients_of_training_have_the_same_bits_whatever_the_threads(make_batch):
    batch, gradients = make_batch("many crystals"), []
    model = sf.CGCNN()
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        model.zero_grad()
        model(batch).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.set_num_threads(before)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", ["embedding", "conv_to_fc", "fc_out"])
def test_hooks_and_replaced_layers_are_called(make_batch, name):
    batch, model = make_batch("plain"), sf.CGCNN().eval()
    seen = []
    with torch.no_grad():
        plain = model(batch)
        handle = getattr(model, name).register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(model(batch), plain)
        assert seen == [1]
        handle.remove()
        setattr(
            model, name, torch.nn.Sequential(getattr(model, name), torch.nn.Linear(*[plain_width(model, name)] * 2))
        )
        assert not torch.allclose(model(batch), plain)


def plain_width(model, name: str) -> int:
    return getattr(model, name).out_features


def test_a_classifier_drops_between_its_layers_in_training_only(make_batch):
    batch = make_batch("plain")
    torch.manual_seed(0)
    model = sf.CGCNN(1, 16, 24, classification=True)
    first, second = model(batch), model(batch)
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(batch), model(batch))
    model.dropout.p = 0.0
    torch.testing.assert_close(model.train()(batch), model(batch))


def test_autocast_is_not_bypassed(make_batch):
    batch, model = make_batch("plain"), sf.CGCNN().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(batch).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("width", "sizes", "sentence"),
    [(5, (6, 3, 1), "takes 6 features, but is given 5"), (6, (), "at least one layer")],
)
def test_what_does_not_fit_is_named(make_batch, width, sizes, sentence):
    batch = make_batch("plain")
    with pytest.raises(InputError, match=sentence):
        functional.readout(torch.zeros(batch.num_rows, width).double(), batch, layers_of(sizes))


def test_more_layers_than_the_kernels_take(make_batch):
    batch, model = make_batch("plain"), sf.CGCNN(1, 16, 8, n_h=cpu.MOST_LAYERS).eval()
    with sf.use_backend("reference"):
        expected = model(batch)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(batch), expected)


@pytest.mark.parametrize("field", ["weight", "crystal_ptr"])
def test_a_batch_that_is_written_to_before_the_backward_pass(make_batch, field):
    batch = make_batch("plain")
    batch.weight = batch.weight.double()
    layers = [Dense(torch.zeros(1, 8, dtype=torch.float64, requires_grad=True), None)]
    out = functional.readout(torch.zeros(batch.num_rows, 8, dtype=torch.float64), batch, layers)
    getattr(batch, field)[::2] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize(("place", "index"), [(2, 10**6), (0, 1)])
def test_an_index_that_leaves_the_crystals_is_named(make_batch, place, index):
    batch = make_batch("plain")
    batch.crystal_ptr[place] = index
    with pytest.raises(InputError, match="Bad graph at position"):
        functional.readout(torch.zeros(batch.num_rows, 8), batch, [Dense(torch.zeros(1, 8), None)])
    with torch.no_grad(), pytest.raises(InputError, match="Bad graph at position"):
        sf.CGCNN().eval()(batch)
