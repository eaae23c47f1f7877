"""The models: parameters, options, pooling, what they refuse."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import srcgcnn_fast as sf
from srcgcnn_fast.graph import element_features
from srcgcnn_fast.nn import norm as norms
from srcgcnn_fast.ops import fused


def test_parameters_are_those_of_the_paper():
    assert sf.CGCNN().count_conv_parameters() == 66_432
    assert sf.SRCGCNN().count_conv_parameters() == 22_912
    assert round(22_912 / 66_432, 3) == 0.345


def test_state_dict_names_are_the_published_ones():
    assert {k.split(".")[0] for k in sf.CGCNN(n_h=2).state_dict()} == {
        "embedding",
        "convs",
        "conv_to_fc",
        "fcs",
        "fc_out",
    }
    recurrent = sf.SRCGCNN(recurrent_layer_norm=True, recurrent_learnable_alpha=True).state_dict()
    assert {k.split(".")[0] for k in recurrent} == {
        "embedding", "shared_conv", "recurrent_bn1s", "recurrent_bn2s", "recurrent_norm", "recurrent_alpha",
        "conv_to_fc", "fc_out",
    }  # fmt: skip
    assert not any(k.startswith("recurrent_norm") for k in sf.SRCGCNN().state_dict())


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_shared_norms_have_one_scale_and_shift_and_their_own_statistics(backend, make_batch):
    """The same as norms of their own that hold equal numbers, whose gradients are summed."""
    batch = make_batch("weighted")
    torch.manual_seed(0)
    shared = sf.SRCGCNN(3, 8, 8, recurrent_shared_norms=True).double()
    own = sf.SRCGCNN(3, 8, 8).double()
    own.load_state_dict(shared.state_dict(), strict=False)
    norms = [(shared.recurrent_bn1s, own.recurrent_bn1s), (shared.recurrent_bn2s, own.recurrent_bn2s)]
    for one, many in norms:
        torch.nn.init.uniform_(one[0].weight, 0.5, 2)
        torch.nn.init.normal_(one[0].bias)
        for norm in many:
            norm.load_state_dict(one[0].state_dict())
    results = [model(batch) for model in (shared, own)]
    torch.testing.assert_close(*results)
    for out in results:
        out.square().sum().backward()
    for one, many in norms:
        for name in ("weight", "bias"):
            total = sum(getattr(norm, name).grad for norm in many)
            torch.testing.assert_close(getattr(one[0], name).grad, total, rtol=1e-9, atol=1e-12)
        for a, b in zip(one, many, strict=True):
            torch.testing.assert_close(a.running_mean, b.running_mean)
            torch.testing.assert_close(a.running_var, b.running_var)
    assert not torch.equal(shared.recurrent_bn1s[0].running_mean, shared.recurrent_bn1s[1].running_mean)
    torch.testing.assert_close(shared.eval()(batch), own.eval()(batch))
    assert sf.SRCGCNN(6, recurrent_shared_norms=True).count_conv_parameters() == 22_144


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
def test_every_step_can_be_returned(backend, make_batch, model_type):
    batch, model = make_batch("weighted"), model_type(3, atom_fea_len=8, h_fea_len=8).eval()
    out, steps = model(batch, return_steps=True)
    assert len(steps) == 3
    assert all(s.shape == (batch.num_rows, 8) for s in steps)
    torch.testing.assert_close(out, model(batch))


def test_pooling_is_the_weighted_mean(make_batch):
    batch, model = make_batch("weighted"), sf.SRCGCNN(1, atom_fea_len=8).eval()
    _, (h,) = model(batch, return_steps=True)
    pooled = model.features(batch)
    for c in range(batch.num_crystals):
        rows = slice(int(batch.crystal_ptr[c]), int(batch.crystal_ptr[c + 1]))
        atoms = h[batch.atom_class.long()][(batch.atom_class >= rows.start) & (batch.atom_class < rows.stop)]
        torch.testing.assert_close(pooled[c], atoms.mean(0), rtol=1e-5, atol=1e-6)


def test_multiple_targets_and_units(make_batch):
    batch, model = make_batch("plain"), sf.CGCNN(1, atom_fea_len=8, n_targets=2).eval()
    model.metadata = sf.ModelMetadata(("a", "b"), ("eV", "GPa"), (1.0, -2.0), (3.0, 0.5))
    torch.testing.assert_close(
        model.predict(batch), model(batch) * torch.tensor([3.0, 0.5]) + torch.tensor([1.0, -2.0])
    )
    for call in (model.predict, model.features, model.embed):
        with pytest.raises(sf.InputError, match="takes a GraphBatch, not a list"):
            call([batch])
    with pytest.raises(sf.InputError, match="one unit, mean and std per target"):
        sf.ModelMetadata(("a", "b"), ("eV",), (0.0, 0.0), (1.0, 1.0))
    for count in (1, 3):  # which would be stretched over the outputs, or the outputs over them
        model.metadata = sf.ModelMetadata(*(count * (x,) for x in ("a", "eV", 1.0, 2.0)))
        with pytest.raises(sf.InputError, match=f"{count} targets for 2 outputs"):
            model.predict(batch)


def test_units_of_several_targets_go_to_a_device_once(make_batch, monkeypatch):
    """A GPU is waited for when they do; made in inference mode, they serve gradients all the same."""
    batch, model, made, tensor = make_batch("plain"), sf.CGCNN(1, 8, n_targets=3).eval(), [], torch.tensor
    model.metadata.std, model.metadata.mean = (2.0, 3.0, 5.0), (-0.125, 0.25, 1e-3)
    monkeypatch.setattr(torch, "tensor", lambda *a, **k: made.append(1) or tensor(*a, **k))
    with torch.inference_mode():
        found = [model.predict(batch) for _ in range(3)]
    assert len(made) == 2 and all(torch.equal(x, found[0]) for x in found)
    model.predict(batch).sum().backward()
    assert torch.equal(model.fc_out.bias.grad, len(found[0]) * tensor(model.metadata.std))
    model.metadata.std = (4.0, 3.0, 5.0)
    torch.testing.assert_close(model.predict(batch)[:, 1:], found[0][:, 1:])
    assert not torch.allclose(model.predict(batch)[:, 0], found[0][:, 0])


def test_a_classifier_gives_log_probabilities(make_batch):
    batch, model = make_batch("plain"), sf.SRCGCNN(1, atom_fea_len=8, classification=True).eval()
    out = model(batch)
    torch.testing.assert_close(out.exp().sum(1), torch.ones(batch.num_crystals))
    torch.testing.assert_close(model.predict(batch), out.exp()[:, 1:])


def test_hyperparameters_rebuild_the_model():
    for model in (sf.CGCNN(2, 8, 16, 3, True), sf.SRCGCNN(4, recurrent_layer_norm=True, n_targets=2, nbr_fea_len=17)):
        twin = type(model)(**model.hyperparameters)
        assert twin.hyperparameters == model.hyperparameters
        twin.load_state_dict(model.state_dict(), strict=True)


def test_copies_and_pickles(make_batch):
    batch, model = make_batch("plain"), sf.SRCGCNN(2, atom_fea_len=8).eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(batch), model(batch))


def conv_linear(model) -> nn.Linear:
    return model.shared_conv.fc_full if isinstance(model, sf.SRCGCNN) else model.convs[0].fc_full


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
@pytest.mark.parametrize(
    "derive",
    [
        lambda layer: prune.random_unstructured(layer, "weight", amount=0.5),
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
        torch.nn.utils.parametrizations.weight_norm,
    ],
    ids=["pruned", "weight norm by a hook", "spectral norm by a hook", "parametrized"],
)
def test_weights_that_hooks_derive_train(make_batch, model_type, derive):
    torch.manual_seed(0)
    batch, model = make_batch("plain"), model_type(2, 8, 8)
    derive(conv_linear(model))
    originals = {name: x for name, x in conv_linear(model).named_parameters() if name != "bias"}
    before = {name: x.detach().clone() for name, x in originals.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(batch).square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(x, before[name]) for name, x in originals.items())
    found = model.eval()(batch)
    twin = model_type(2, 8, 8).eval()  # the same network of what they have come to
    conv_linear(model)(torch.zeros(1, conv_linear(model).in_features))
    state = {name: x for name, x in model.state_dict().items() if name in twin.state_dict()}
    twin.load_state_dict(state, strict=False)
    conv_linear(twin).weight.data.copy_(conv_linear(model).weight)
    torch.testing.assert_close(found, twin(batch))


@pytest.mark.parametrize("training", [False, True])
def test_convolutions_that_somebody_watches_are_called(make_batch, training):
    torch.manual_seed(0)
    batch, model = make_batch("weighted"), sf.CGCNN(2, 8, 8).train(training)
    with torch.set_grad_enabled(training):
        _, plain = model(batch), model(batch)
        seen = []
        handle = model.convs[1].register_forward_hook(lambda module, given, out: seen.append(out))
        torch.testing.assert_close(model(batch), plain)
        assert [x.shape for x in seen] == [(batch.num_rows, 8)]
        handle.remove()
        model.convs[1].register_forward_hook(lambda module, given, out: 2 * out)
        assert not torch.allclose(model(batch), plain)
        assert torch.equal(model(batch, return_steps=True)[0], model(batch))


@pytest.mark.parametrize(
    ("model_type", "name"),
    [(sf.CGCNN, "embedding"), (sf.CGCNN, "fc_out"), (sf.CGCNN, "convs.1"), (sf.SRCGCNN, "conv_to_fc")],
)
@pytest.mark.parametrize("training", [False, True])
def test_a_forward_that_somebody_replaced_is_called(make_batch, model_type, name, training):
    torch.manual_seed(0)
    batch, model = make_batch("weighted"), model_type(2, 8, 8).train(training)
    part = model.get_submodule(name)
    with torch.set_grad_enabled(training):
        before = [model(batch) for _ in range(3)][-1]
        part.forward = lambda *given, own=part.forward: own(*given) + 1
        after = model(batch)
        assert not torch.allclose(after, before)
        if name == "fc_out":
            torch.testing.assert_close(after, before + 1)
        del part.forward
        torch.testing.assert_close(model(batch), before)


def test_a_norm_without_scale_among_others(make_batch):
    """Shared norms alone take the first one's."""
    torch.manual_seed(0)
    batch, model = make_batch("weighted"), sf.SRCGCNN(2, 8, 8).eval()
    nn.init.uniform_(model.recurrent_bn1s[0].weight, 2, 3)
    expected = model(batch)  # the second's scale is still 1, its shift 0
    model.recurrent_bn1s[1] = nn.BatchNorm1d(16, affine=False).eval()
    torch.testing.assert_close(model(batch), expected)


@torch.no_grad()
@pytest.mark.parametrize("width", [16, 20])
@pytest.mark.parametrize("biases", ["alike", "own", "some"])
def test_layers_of_one_weight_keep_their_biases(make_batch, width, biases):
    """Eagerly, and through the operators, as compiled code calls them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            return function(*arguments, **keywords or {})

    torch.manual_seed(0)
    batch, model = make_batch("weighted"), sf.CGCNN(3, width, 8).eval()
    linears = [conv.fc_full for conv in model.convs]
    for linear in linears[1:]:
        linear.weight = linears[0].weight
        linear.bias = linears[0].bias if biases == "alike" else nn.Parameter(torch.randn(2 * width))
    if biases == "some":
        linears[1].bias = None
    with sf.use_backend("reference"):
        expected = model(batch)
    torch.testing.assert_close(model(batch), expected)
    with Watch():
        found = model(batch)
    torch.testing.assert_close(found, expected)


def test_defaults_of_torch_do_not_matter(make_batch, tmp_path):
    batch = make_batch("weighted")
    torch.manual_seed(0)
    model = sf.SRCGCNN(2, 8, 8)
    expected = model.eval()(batch)
    sf.save_model(model, tmp_path / "model")
    fused._kept_constants.clear()
    with torch.device("meta"):  # whose memory nobody may touch, such as a GPU's
        assert torch.equal(model(batch), expected)
        with torch.no_grad():
            torch.testing.assert_close(model(batch), expected)
        model.train()(batch).sum().backward()
        loaded = sf.load_model(tmp_path / "model")
        assert sf.SRCGCNN(2, 8, 8).element_table.device.type == "cpu"  # no state_dict brings it
        on_meta = sf.SRCGCNN(2, 8, 8)
    for empty in (on_meta, sf.SRCGCNN(2, 8, 8).to("meta"), torch.nn.Sequential(sf.SRCGCNN(2, 8, 8).to("meta"))):
        filled = empty.to_empty(device="cpu").eval()
        (filled[0] if isinstance(filled, torch.nn.Sequential) else filled).load_state_dict(model.state_dict())
        assert torch.equal(filled(batch), model.eval()(batch))
    torch.testing.assert_close(loaded(make_batch("weighted")), expected)
    try:
        torch.set_default_dtype(torch.float64)
        assert sf.SRCGCNN(2, 8, 8)(batch).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.compiled
def test_weights_without_memory_of_their_own_are_one_sentence(make_batch, grad):
    from torch.testing._internal.two_tensor import TwoTensor

    model, batch = sf.SRCGCNN(2, 16, 8).eval(), make_batch("plain")
    weight = model.shared_conv.fc_full.weight.data
    model.shared_conv.fc_full.weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    with torch.set_grad_enabled(grad), pytest.raises(sf.InputError, match="weight is a TwoTensor, whose numbers"):
        model(batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_inference_mode_trains(make_batch, dtype):
    batch, model = make_batch("weighted"), sf.SRCGCNN(2, 8, 8).to(dtype)
    with torch.inference_mode():
        model.eval()(batch)
        model.features(batch)
        model.train()(batch)
    out = model(batch).sum()
    gradient = torch.autograd.grad(out, model.embedding.weight, create_graph=True)[0]
    gradient.sum().backward()
    assert torch.isfinite(model.embedding.weight.grad).all()


def test_places_of_one_norm_without_momentum_count_one_by_one(make_batch):
    """As if the modules were called one after the other."""
    torch.manual_seed(0)
    batch = make_batch("weighted")
    model = sf.CGCNN(3, 8, 8).double()
    model.convs[1] = model.convs[2] = model.convs[0]
    model.convs[0].bn2.momentum = model.convs[0].bn1.momentum = None
    other = copy.deepcopy(model)
    h = other.embed(batch)
    for conv in other.convs:
        h = conv(h, batch)
    model(batch)
    for name, found in model.named_buffers():
        torch.testing.assert_close(found, other.get_buffer(name))


def test_another_convolution_in_place_of_ours(make_batch):
    class Nothing(nn.Module):
        def forward(self, h, batch):
            return h

    torch.manual_seed(0)
    batch, model = make_batch("plain"), sf.CGCNN(2, 8, 8).eval()
    shorter = sf.CGCNN(1, 8, 8).eval()
    shorter.load_state_dict(model.state_dict(), strict=False)
    model.convs[1] = Nothing()
    torch.testing.assert_close(model(batch), shorter(batch))


def test_hooks_within_a_convolution_are_said_not_to_be_called(make_batch, caplog):
    norms._say_once.cache_clear()
    model = sf.SRCGCNN(2, 8, 8).eval()
    model.recurrent_bn1s[0].register_forward_hook(lambda module, given, out: 2 * out)
    model(make_batch("plain"))
    assert "Hooks on the BatchNorm1d of a convolution are not called" in caplog.text


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("name", "part"),
    [("fc_full", Doubled(57, 16)), ("fc_full", nn.Sequential()), ("bn1", nn.Identity()), ("bn2", nn.LayerNorm(8))],
)
def test_parts_of_a_convolution_with_a_forward_of_their_own_are_refused(make_batch, name, part, training):
    model = sf.CGCNN(2, 8, 8).train(training)
    setattr(model.convs[0], name, part)
    with pytest.raises(sf.InputError, match=type(part).__name__):
        model(make_batch("plain"))


@torch.no_grad()
def test_an_element_table_may_lie_in_any_order(make_batch):
    """As ``DataFrame.to_numpy`` gives it: column by column."""
    batch, model = make_batch("plain"), sf.CGCNN(2, 16, 8).eval()
    expected = model(batch)
    model.element_table = model.element_table.T.contiguous().T
    for _ in range(2):
        torch.testing.assert_close(model(batch), expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("number", [-1, 101, 300])
def test_a_number_that_is_no_element_is_one_sentence(backend, make_batch, number):
    """In training, in inference, layer by layer, and whether rows or the elements of the table are fewer."""
    says = f"Row 3 of the batch has the atomic number {number}, but the element table holds 0 to 100; correct it"
    for kind in ("one crystal", "large"):
        batch = make_batch(kind)
        batch.numbers[3] = number
        watched = sf.CGCNN(n_conv=2)
        watched.convs[1].register_forward_hook(lambda *_: None)
        for model in (sf.CGCNN(n_conv=2), sf.SRCGCNN(n_recurrent_steps=2), watched):
            for call in (model, model.eval(), model.predict, model.embed, model.features):
                for grad in (True, False):
                    with torch.set_grad_enabled(grad), pytest.raises(sf.InputError, match=says):
                        call(batch)


def test_a_seed_gives_the_published_initialisation():
    """Construction draws random numbers in the published programs' order."""
    torch.manual_seed(7)
    model = sf.CGCNN(2, atom_fea_len=8, h_fea_len=16, n_h=2)
    torch.manual_seed(7)
    layers = [torch.nn.Linear(92, 8), torch.nn.Linear(57, 16), torch.nn.Linear(57, 16), torch.nn.Linear(8, 16)]
    layers += [torch.nn.Linear(16, 16), torch.nn.Linear(16, 1)]
    ours = [model.embedding, *(c.fc_full for c in model.convs), model.conv_to_fc, model.fcs[0], model.fc_out]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(layers, ours, strict=True))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"n_conv": 0}, "n_conv must be a whole number of at least 1, not 0"),
        ({"n_conv": 3.0}, "n_conv must be a whole number of at least 1, not 3.0"),
        ({"atom_fea_len": "64"}, "atom_fea_len must be a whole number of at least 1, not '64'"),
        ({"n_h": True}, "n_h must be a whole number"),
        ({"classification": True, "n_targets": 2}, "one target"),
        ({"step": 0.0}, "step must be a positive number of Å"),
        ({"step": "0.2"}, "step must be a positive number of Å, not '0.2'"),
        ({"dmin": None}, "dmin, .* must be a number of Å, not None"),
        ({"dropout": 1.0}, "dropout is a probability from 0 to below 1, not 1.0"),
        ({"dropout": "0.1"}, "dropout is a probability"),
    ],
)
def test_bad_arguments(arguments, says):
    with pytest.raises(sf.InputError, match=says):
        sf.CGCNN(**arguments)


def test_element_vectors():
    table = element_features()
    assert table.shape == (101, 92)
    assert table[0].sum() == 0
    assert (table[1:].sum(1) >= 5).all()
    assert not table.flags.writeable
