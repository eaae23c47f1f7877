from __future__ import annotations

import copy
import gc
import io
import itertools
import logging
import math
import os

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

import srcgcnn_fast as sf
from srcgcnn_fast.errors import InputError
from srcgcnn_fast.interop import CGConv, acceleration, difference, indexed, restore
from srcgcnn_fast.interop.switch import Difference

PROGRAMS = ["written here", "txie-93/cgcnn", "cgcnn2", "SR-CGCNN, standard", "SR-CGCNN", "SR-CGCNN, all options"]

pytestmark = pytest.mark.compiled


@pytest.fixture
def operator_calls(monkeypatch):
    """Counts the convolutions that the operators of this package compute."""
    from srcgcnn_fast import functional

    calls, convolve = [], functional.gated_conv

    def counted(*args, **kwargs):
        calls.append(args[1])
        return convolve(*args, **kwargs)

    monkeypatch.setattr(functional, "gated_conv", counted)
    return calls


@pytest.mark.parametrize("kind", ["Gaussians", "padded", "any features"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_equal_to_the_program_itself(name, training, kind, published, operator_calls, published_batch):
    model = published(name).train(training)
    fast = sf.accelerate(copy.deepcopy(model))
    operator_calls.clear()
    found = difference(fast, published_batch(kind), reference=model)
    assert max(found.output, found.gradient, found.buffers) < 1e-11, found
    assert len(operator_calls) == (3 if "SR-CGCNN" in name and "standard" not in name else 2)
    assert all((batch.edge_features is None) == (kind != "any features") for batch in operator_calls)


@pytest.mark.parametrize("name", PROGRAMS)
def test_float32_without_gradients(name, published, published_batch):
    model = published(name, torch.float32).eval()
    fast, batch = sf.accelerate(copy.deepcopy(model)), published_batch(dtype=torch.float32)
    with torch.no_grad():
        theirs, ours = (m(*batch) for m in (model, fast))
    theirs, ours = (x[0] if isinstance(x, tuple) else x for x in (theirs, ours))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_training_is_the_same_step_by_step(published, published_batch):
    model = published()
    fast = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, fast)]
    sf.accelerate(fast)  # after the optimiser was made
    for step in range(6):
        batch = published_batch("padded", seed=step)
        target = torch.randn(5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        losses = []
        for m, optimizer in zip((model, fast), optimizers, strict=True):
            loss = nn.functional.mse_loss(m(*batch), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    for ours, theirs in zip(fast.state_dict().values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_what_stays(published, operator_calls, published_batch):
    model = published()
    model.convs[0].eval()
    model.convs[1].fc_full.weight.requires_grad_(False)
    seen = []
    model.convs[0].register_forward_hook(lambda module, args, out: seen.append((module, out.shape)))
    before = {"keys": list(model.state_dict()), "class": type(model), "layer": type(model.convs[0])}
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    modules = dict(model.named_modules())
    assert sf.accelerate(model) is model and sf.accelerate(model) is model
    operator_calls.clear()
    model(*published_batch())
    assert list(model.state_dict()) == before["keys"]
    assert all(parameters[k] is p for k, p in model.named_parameters())
    assert all(buffers[k] is b for k, b in model.named_buffers())
    assert all(modules[k] is m for k, m in model.named_modules())
    assert isinstance(model, before["class"]) and isinstance(model.convs[0], before["layer"])
    assert not model.convs[0].training and model.convs[1].training
    assert seen == [(model.convs[0], (50, 16))] and len(operator_calls) == 2
    assert all(reason is None for reason in acceleration(model).values()) and len(acceleration(model)) == 3
    restore(model)
    assert type(model) is before["class"] and type(model.convs[0]) is before["layer"]
    assert all(reason == "not accelerated yet" for reason in acceleration(model).values())


def test_edges_between_crystals_and_rows_out_of_order(published, published_batch):
    model = published()
    atoms, fea, idx, _ = published_batch(m=5)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(50, generator=generator)
    anywhere = torch.randint(0, 50, idx.shape, generator=generator)
    for index in (idx, anywhere, idx.flip(0), idx.int()):
        batch = (atoms, fea, index, [order[:7], order[7:8], order[8:]])
        found = difference(sf.accelerate(copy.deepcopy(model)), batch, reference=model)
        assert max(found.output, found.gradient, found.buffers) < 1e-11


@pytest.mark.parametrize("seed", range(20))
def test_blocks_are_the_shortest_runs_that_no_edge_leaves(seed):
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 30, (), generator=generator))
    near = torch.arange(n)[:, None] + torch.randint(-2, 3, (n, 2), generator=generator)
    index = torch.where(torch.rand(n, 1, generator=generator) < 0.5, torch.arange(n)[:, None], near).clamp(0, n - 1)
    ends = [b for b in range(1, n) if bool((index[:b] < b).all()) and bool((index[b:] >= b).all())]
    assert indexed.blocks(index.amin(1), index.amax(1)).tolist() == [0, *ends, n]


def test_a_batch_is_converted_once_a_pass_and_forgotten_with_its_tensors(published, monkeypatch, published_batch):
    made, build = [], indexed.edge_batch
    monkeypatch.setattr(indexed, "edge_batch", lambda *args: made.append(1) or build(*args))
    for name, layers in (("written here", 2), ("SR-CGCNN", 3)):
        if name == "SR-CGCNN" and not os.environ.get("SRCGCNN_PEERS"):
            continue
        model, batch = sf.accelerate(published(name)).eval(), published_batch()
        made.clear()
        model(*batch)
        assert len(made) == 1, layers
    model, (atoms, fea, idx, rows) = sf.accelerate(published()).eval(), published_batch()
    plain = restore(copy.deepcopy(model))
    for change in ("nothing", "an index", "a row of features", "through NumPy", "through data", "other features"):
        if change == "an index":
            idx[3, 4] = idx[2, 1]
        elif change == "a row of features":
            fea[7, 1] = fea[8, 2]
        elif change == "through NumPy":
            idx.numpy()[5, 5], fea.numpy()[2] = idx.numpy()[4, 4], fea.numpy()[3]
        elif change == "through data":
            fea.data.mul_(0.5)
        elif change == "other features":
            fea = fea.clone()
        made.clear()
        torch.testing.assert_close(model(atoms, fea, idx, rows), plain(atoms, fea, idx, rows), msg=change)
        assert len(made) == 1
    other = published_batch(m=12, seed=1)  # written over by NumPy, for a layer that was not called on it before
    h = torch.randn(50, 16, dtype=torch.float64)
    model.convs[0](h, fea, idx)
    fea.numpy()[:], idx.numpy()[:] = other[1].numpy(), other[2].numpy()
    torch.testing.assert_close(model.convs[1](h, fea, idx), plain.convs[1](h, fea, idx))
    with torch.inference_mode():
        inside = [x.clone() for x in (atoms, fea, idx)]
        torch.testing.assert_close(model(*inside, rows), plain(*inside, rows))
    key = id(idx)
    assert key in indexed._cache._entries
    del idx, batch
    gc.collect()
    assert key not in indexed._cache._entries


def _own_activation(model):
    class ConvLayer(type(model.convs[0])):
        def forward(self, atom_in_fea, nbr_fea, nbr_fea_idx):
            return super().forward(atom_in_fea, nbr_fea, nbr_fea_idx).tanh()

    model.convs[0].__class__ = ConvLayer


def _own_prediction(model):
    class ConvLayer(type(model.convs[0])):
        def forward(self, atom_in_fea, nbr_fea, nbr_fea_idx):
            out = super().forward(atom_in_fea, nbr_fea, nbr_fea_idx)
            return out if self.training else out.tanh()

    model.convs[0].__class__ = ConvLayer


def _own_attribute(model):
    model.convs[0].forward = lambda atom_in_fea, nbr_fea, nbr_fea_idx: atom_in_fea


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (_own_activation, "differs from the published formula"),
        (_own_prediction, "differs from the published formula"),
        (_own_attribute, "was replaced on the object"),
        (lambda m: setattr(m.convs[0], "sigmoid", nn.Tanh()), "its sigmoid is Tanh"),
        (lambda m: setattr(m.convs[0], "softplus1", nn.Softplus(beta=2)), "beta"),
        (lambda m: setattr(m.convs[0], "bn1", nn.LayerNorm(32)), "its bn1 is LayerNorm"),
        (lambda m: setattr(m.convs[0], "fc_full", nn.Bilinear(2, 2, 2)), "its fc_full is Bilinear"),
        (lambda m: nn.utils.parametrizations.weight_norm(m.convs[0].fc_full), "its fc_full is Parametrized"),
    ],
)
def test_a_layer_with_another_formula_is_named_and_left(change, word, published, caplog):
    model = published()
    change(model)
    kept = model.convs[0].__class__
    with caplog.at_level(logging.WARNING):
        sf.accelerate(model)
    assert type(model.convs[0]) is kept and word in acceleration(model)["convs.0 (ConvLayer)"]
    assert acceleration(model)["convs.1 (ConvLayer)"] is None
    assert "convs.0 (ConvLayer) is not accelerated" in caplog.text and word in caplog.text


def test_pooling_with_another_formula_is_left(published, published_batch):
    model = published()

    class Summed(type(model)):
        def pooling(self, atom_fea, crystal_atom_idx):
            return torch.stack([atom_fea[rows].sum(0) for rows in crystal_atom_idx])

    model.__class__ = Summed
    assert "output differs" in acceleration(sf.accelerate(model))["the model (Summed)"]
    found = difference(model, published_batch())
    assert found.output < 1e-12


def test_pooling_takes_what_the_programs_own_takes(published):
    model, fea = published(), torch.randn(5, 16, dtype=torch.float64)
    fast = sf.accelerate(copy.deepcopy(model))
    tensors = [torch.tensor([0, 1, -1]), torch.tensor([3, -3])]
    for rows in (tensors, [x.int() for x in tensors], [x.numpy() for x in tensors], [x.tolist() for x in tensors]):
        torch.testing.assert_close(fast.pooling(fea, rows), model.pooling(fea, rows), rtol=1e-13, atol=0)
    for wrong in (5, -6):
        with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
            fast.pooling(fea, [torch.tensor([0, 1, 2]), torch.tensor([3, wrong])])


def test_a_layer_or_pooling_that_records_something_is_left(published, published_batch):
    model = published()

    class Counting(type(model)):
        def pooling(self, atom_fea, crystal_atom_idx):
            self.calls += 1
            return super().pooling(atom_fea, crystal_atom_idx)

    class ConvLayer(type(model.convs[0])):
        def forward(self, atom_in_fea, nbr_fea, nbr_fea_idx):
            self.out = super().forward(atom_in_fea, nbr_fea, nbr_fea_idx)
            return self.out

    model.register_buffer("calls", torch.zeros((), dtype=torch.int64))
    model.__class__, model.convs[0].__class__ = Counting, ConvLayer
    found = acceleration(sf.accelerate(model))
    assert int(model.calls) == 0  # the small example ran on a copy
    assert (
        "it writes self.calls" in found["the model (Counting)"] and "it writes self.out" in found["convs.0 (ConvLayer)"]
    )
    assert found["convs.1 (ConvLayer)"] is None
    out = model(*published_batch())
    assert int(model.calls) == 1 and out.shape == (5, 1) and model.convs[0].out.shape == (50, 16)


@pytest.mark.parametrize(
    "context",
    [torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta")],
    ids=["inference mode", "autocast", "default device"],
)
def test_the_small_example_does_without_the_callers_context(context, published):
    model = published()

    class ConvLayer(type(model.convs[0])):
        def forward(self, atom_in_fea, nbr_fea, nbr_fea_idx):
            return nn.functional.dropout(super().forward(atom_in_fea, nbr_fea, nbr_fea_idx), 0.5, True)

    model.convs[1].__class__ = ConvLayer
    state = torch.get_rng_state()
    with context:
        sf.accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)
    reasons = acceleration(model)
    assert "output differs" in reasons.pop("convs.1 (ConvLayer)") and set(reasons.values()) == {None}


def test_nothing_to_accelerate():
    with pytest.raises(InputError, match=r"Nothing in this Linear can be accelerated"):
        sf.accelerate(nn.Linear(3, 3))


@pytest.mark.parametrize(
    "model", [sf.CGCNN(), sf.SRCGCNN(), nn.Sequential(CGConv(4))], ids=["CGCNN", "SRCGCNN", "CGConv"]
)
def test_a_model_of_ours_is_fast_as_it_is(model, caplog):
    assert sf.accelerate(model) is model and acceleration(model) == {}
    name = type(model).__name__
    assert caplog.messages == [f"This {name} computes with the layers of this package, and is fast as it is."]


def test_verify(published, caplog, published_batch):
    model = published(dtype=torch.float32)
    state = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.INFO):
        sf.accelerate(model, verify=published_batch(dtype=torch.float32))
    assert "Verified: output" in caplog.text
    assert all(torch.equal(x, state[k]) for k, x in model.state_dict().items())
    names = ("atom_fea", "nbr_fea", "nbr_fea_idx", "crystal_atom_idx")
    named = dict(zip(names, published_batch(dtype=torch.float32), strict=True))
    assert difference(model, named).rounding


def test_verify_finds_what_a_small_example_does_not_show(published, published_batch):
    model = published()

    class ConvLayer(type(model.convs[0])):
        def forward(self, atom_in_fea, nbr_fea, nbr_fea_idx):
            out = super().forward(atom_in_fea, nbr_fea, nbr_fea_idx)
            return out if len(out) < 20 else 2 * out

    model.convs[1].__class__ = ConvLayer
    for batch, error, said in ((published_batch(), InputError, "does not agree"), ((1, 2, 3, 4), TypeError, None)):
        with pytest.raises(error, match=said):
            sf.accelerate(model, verify=batch)
        assert type(model.convs[1]) is ConvLayer and set(acceleration(model).values()) == {"not accelerated yet"}
    with pytest.raises(InputError, match="does not agree with its own formulas"):
        sf.accelerate(sf.accelerate(model), verify=published_batch())  # it was accelerated before


def test_nan_is_no_rounding():
    assert Difference(0.0, 1e-5, 0.0, torch.float32).rounding
    assert not any(Difference(*numbers, torch.float32).rounding for numbers in itertools.permutations((math.nan, 0, 0)))


def test_hooks_on_parts_are_called(published, operator_calls, caplog, published_batch):
    model = sf.accelerate(published())
    seen = []
    handle = model.convs[0].sigmoid.register_forward_hook(lambda *_: seen.append(1))
    operator_calls.clear()
    model(*published_batch())
    assert seen == [1] and len(operator_calls) == 1
    handle.remove()
    model(*published_batch())
    assert seen == [1] and len(operator_calls) == 3


def test_hooks_elsewhere_leave_the_pooling(published, published_batch, caplog):
    model, seen = sf.accelerate(published()), []
    model.conv_to_fc.register_forward_hook(lambda *_: seen.append(1))
    with caplog.at_level(logging.WARNING):
        model(*published_batch())
    assert seen == [1] and not caplog.text


class _Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _own_forward(part):
    forward = part.forward
    part.forward = lambda x: 0.5 * forward(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer.fc_full, "__class__", _Doubled),
        lambda layer: setattr(layer, "softplus1", nn.ReLU()),
        lambda layer: _own_forward(layer.fc_full),
        lambda layer: _own_forward(layer.bn1),
        lambda layer: nn.utils.parametrizations.spectral_norm(layer.fc_full),
    ],
    ids=["another linear map", "another activation", "forward of the map", "forward of the norm", "spectral norm"],
)
def test_parts_that_are_exchanged_later(change, published, operator_calls, published_batch):
    model = published()
    fast = sf.accelerate(copy.deepcopy(model))
    for m in (model, fast):
        torch.manual_seed(0)
        change(m.convs[0])
    operator_calls.clear()
    (output, buffers), expected = (
        (m(*published_batch()).detach(), torch.cat([x.double().flatten() for x in m.buffers()])) for m in (fast, model)
    )
    torch.testing.assert_close((output, buffers), expected, rtol=1e-11, atol=1e-12)
    assert len(operator_calls) == 1
    exchanged = type(fast.convs[0].fc_full) is not nn.Linear or type(fast.convs[0].softplus1) is not nn.Softplus
    assert (acceleration(fast)["convs.0 (ConvLayer)"] is not None) == exchanged


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda layer, h, fea, idx: layer(h, fea, idx), 2),
        (lambda layer, h, fea, idx: layer(h, fea, idx, 2.0), 0),
        (lambda layer, h, fea, idx: layer(h, fea, idx, scale=2.0), 0),
        (lambda layer, h, fea, idx: layer(atoms=h, fea=fea, idx=idx), 0),
    ],
    ids=["published", "positional", "keyword", "other names"],
)
def test_arguments_of_its_own(call, expected, published, operator_calls, published_batch):
    model = published().eval()

    class Scaled(type(model.convs[0])):
        def forward(self, atoms, fea, idx, scale=1.0):
            return scale * super().forward(atoms, fea, idx)

    class Net(type(model)):
        def forward(self, h, fea, idx, rows):
            h = self.embedding(h)
            for layer in self.convs:
                h = call(layer, h, fea, idx)
            return self.fc_out(self.conv_to_fc(self.pooling(h, rows)))

    model.__class__ = Net
    for layer in model.convs:
        layer.__class__ = Scaled
    fast = sf.accelerate(copy.deepcopy(model))
    operator_calls.clear()
    torch.testing.assert_close(fast(*published_batch()), model(*published_batch()), rtol=1e-11, atol=1e-12)
    assert len(operator_calls) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda a, f, i, c: (a, f, i + 100, c),
        lambda a, f, i, c: (a, f[:-1], i, c),
        lambda a, f, i, c: (a, f[..., :-1], i, c),
        lambda a, f, i, c: (a[:-1], f, i, c),
        lambda a, f, i, c: (a, f, i, c[:-1]),
        lambda a, f, i, c: (a[:1], f[:1, :1], i[:1, :1] * 0, [torch.arange(1)]),
    ],
    ids=["index too large", "rows", "features", "atoms", "crystals", "one edge"],
)
def test_bad_input_raises_what_it_raised(change, published, published_batch):
    model, batch = published(), change(*published_batch())
    with pytest.raises(Exception) as theirs:
        model(*batch)
    with pytest.raises(type(theirs.value)):
        sf.accelerate(model)(*batch)


def test_negative_indices_count_from_the_end(published, published_batch):
    model = published().eval()
    atoms, fea, idx, rows = published_batch()
    batch = (atoms, fea, idx - len(atoms), rows)
    assert difference(sf.accelerate(model), batch).output == 0


def test_gradients_of_edge_features(published, published_batch):
    model, (atoms, fea, idx, rows) = published().eval(), published_batch()
    wanted = []
    for m in (model, sf.accelerate(copy.deepcopy(model))):
        x = fea.clone().requires_grad_()
        wanted.append(torch.autograd.grad(m(atoms, x, idx, rows).sum(), x)[0])
    torch.testing.assert_close(wanted[1], wanted[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["Gaussians", "any features"])
def test_inputs_may_be_written_to_before_the_backward_pass(kind, published, published_batch):
    model, (_, fea, idx, _) = published(), published_batch(kind)
    h, (layer, other) = torch.randn(50, 16, dtype=torch.float64), sf.accelerate(copy.deepcopy(model)).convs
    expected = torch.autograd.grad(model.convs[0](h, fea, idx).square().sum(), list(model.convs[0].parameters()))
    for write in (lambda x: x.zero_(), lambda x: x.numpy().fill(0)):
        own, given = h.clone(), fea.clone()
        with torch.no_grad():
            other(own, given, idx)  # what is kept of this serves no backward pass
        out = layer(own, given, idx)
        write(own)
        write(given)
        found = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["Gaussians", "any features"])
def test_a_batch_that_is_written_to_between_two_layers(kind, published, published_batch):
    model, (_, fea, idx, _) = published().eval(), published_batch(kind)
    layers, h = sf.accelerate(copy.deepcopy(model)).convs, torch.randn(50, 16, dtype=torch.float64)
    with torch.no_grad():
        layers[0](h, fea, idx)
        idx[0, 1], fea[0, 0, 1] = idx[0, 0], 0.5  # numbers that no sample has
        torch.testing.assert_close(layers[1](h, fea, idx), model.convs[1](h, fea, idx), rtol=1e-11, atol=1e-13)


def test_copies_files_and_pickles(published, tmp_path, published_batch):
    model, batch = sf.accelerate(published("written here").eval()), published_batch()
    out = model(*batch)
    twin = copy.deepcopy(model)
    assert type(twin) is type(model) and torch.equal(twin(*batch), out)
    twin.convs[0].fc_full.weight.data.zero_()
    assert torch.equal(model(*batch), out)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    plain = published()
    plain.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    torch.testing.assert_close(plain.eval()(*batch), out, rtol=1e-11, atol=1e-13)


def test_a_whole_model_in_a_file(published, published_batch):
    cgcnn2 = pytest.importorskip("cgcnn2.model", reason="cgcnn2 is not installed")  # a class that can be imported
    model = sf.accelerate(published("cgcnn2").eval())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, cgcnn2.CrystalGraphConvNet) and acceleration(loaded) == acceleration(model)
    batch = published_batch()
    assert torch.equal(loaded(*batch)[0], model(*batch)[0])


def test_a_state_of_its_own(published):
    model = published()

    class ConvLayer(type(model.convs[0])):
        def __getstate__(self):  # an open file, say
            return {name: x for name, x in vars(self).items() if name != "log"}

    model.convs[0].__class__, model.convs[0].log = ConvLayer, None
    fast = sf.accelerate(model)
    assert acceleration(fast)["convs.0 (ConvLayer)"] is None
    fast.convs[0].log = (line for line in "ab")  # cannot be copied
    assert not hasattr(copy.deepcopy(fast).convs[0], "log")


def test_a_class_that_was_exchanged_again_is_not_dropped(published, published_batch):
    model = published()
    model.convs[1].scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    fast = sf.accelerate(model)
    parametrize.register_parametrization(fast.convs[1], "scale", nn.Identity())
    with pytest.raises(InputError, match="A ConvLayer became a Parametrized"):
        restore(fast)
    assert acceleration(fast)["convs.0 (ConvLayer)"] is None and fast.convs[1].scale == 1
    parametrize.remove_parametrizations(fast.convs[1], "scale")
    assert all(type(layer).__name__ == "ConvLayer" for layer in restore(fast).convs)


def test_autocast_runs_the_layers_in_float32(published, operator_calls, published_batch):
    model, batch = published(dtype=torch.float32).eval(), published_batch(dtype=torch.float32)
    fast = sf.accelerate(copy.deepcopy(model))
    operator_calls.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        theirs, ours = model(*batch), fast(*batch)
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.05, atol=0.05)
    assert len(operator_calls) == 2


def test_autocast_leaves_doubles(published, published_batch):
    model, (_, fea, idx, _) = published().eval(), published_batch()
    fast, h = sf.accelerate(copy.deepcopy(model)), torch.randn(50, 16, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (each.convs[0](h, fea, idx) for each in (fast, model))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_half_precision_and_a_forced_reference_use_the_own_formula(published, operator_calls, published_batch):
    fast = sf.accelerate(published(dtype=torch.float32))
    operator_calls.clear()
    with sf.use_backend("reference"):
        assert difference(fast, published_batch(dtype=torch.float32)).gradient < 1e-6
    half = published_batch(dtype=torch.bfloat16)
    assert difference(fast.bfloat16().eval(), half).output == 0 and not operator_calls
    *tensors, rows = half
    assert fast.to("meta")(*(x.to("meta") for x in tensors), rows).is_meta


def test_transforms_and_tracers_see_the_own_formula(published, published_batch):
    model = published().eval()
    fast, (atoms, fea, idx, rows) = sf.accelerate(copy.deepcopy(model)), published_batch()
    parameters = dict(fast.named_parameters())

    def loss(p):
        return torch.func.functional_call(fast, p, (atoms, fea, idx, rows)).sum()

    ours = torch.func.grad(loss)(parameters)
    theirs = torch.autograd.grad(model(atoms, fea, idx, rows).sum(), list(model.parameters()))
    for x, y in zip(ours.values(), theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
    layer, h = fast.convs[0], torch.randn(50, 16, dtype=torch.float64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    traced = torch.jit.trace(layer, (h, fea, idx))
    exported = torch.export.export(layer, (h, fea, idx)).module()
    shifted = idx.flip(0)
    for again in (compiled, traced, exported):
        torch.testing.assert_close(again(h, fea, shifted), model.convs[0](h, fea, shifted), rtol=1e-9, atol=1e-12)


def test_modes_that_see_each_operator_see_the_own_formula(published, published_batch):
    model, batch = published().eval(), published_batch()
    fast, counts = sf.accelerate(copy.deepcopy(model)), []
    for each in (model, fast):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            each(*batch)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        *tensors, rows = batch
        assert fast(*map(mode.from_tensor, tensors), rows).shape == (5, 1)
