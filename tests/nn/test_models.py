"""The models: parameters, options, pooling, what they refuse."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import srcgcnn_fast as sf
from srcgcnn_fast.graph import element_features


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
    with pytest.raises(sf.InputError, match="one unit, mean and std per target"):
        sf.ModelMetadata(("a", "b"), ("eV",), (0.0, 0.0), (1.0, 1.0))


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
        ({"n_conv": 0}, "n_conv must be at least 1"),
        ({"atom_fea_len": 0}, "atom_fea_len must be at least 1"),
        ({"classification": True, "n_targets": 2}, "one target"),
        ({"step": 0.0}, "step must be positive"),
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
