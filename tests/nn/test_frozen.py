"""What a model keeps between calls in inference is used as long as it is true, and no longer."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import srcgcnn_fast as sf
from srcgcnn_fast.nn.models import CrystalModel

pytestmark = pytest.mark.compiled

MODELS = pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])


def trained(model_type, **options):
    torch.manual_seed(0)
    model = model_type(2, 16, 20, 2, **options)
    for norm in (x for x in model.modules() if isinstance(x, nn.BatchNorm1d)):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        if norm.affine:
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    return model.eval()


def layer_of(model) -> nn.Linear:
    return model.shared_conv.fc_full if isinstance(model, sf.SRCGCNN) else model.convs[1].fc_full


def norm_of(model) -> nn.BatchNorm1d:
    return model.recurrent_bn1s[1] if isinstance(model, sf.SRCGCNN) else model.convs[1].bn1


@torch.no_grad()
def ordinary(model, batch) -> torch.Tensor:
    """What the model gives when it keeps nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CrystalModel, "_frozen_network", lambda self: None)
        return model(batch)


@pytest.fixture
def looked_up(monkeypatch):
    """How many times parameters were looked up."""
    count = [0]
    for kind in (sf.CGCNN, sf.SRCGCNN):

        def layers(self, found=kind._layers):
            count[0] += 1
            return found(self)

        monkeypatch.setattr(kind, "_layers", layers)
    return count


@MODELS
@pytest.mark.parametrize("options", [{}, {"n_targets": 2}, {"classification": True}], ids=["one", "two", "classes"])
def test_parameters_are_looked_up_once(looked_up, make_batch, model_type, options):
    model = trained(model_type, **options)
    with torch.no_grad():
        for kind, seed in (("plain", 0), ("weighted", 1), ("one atom", 2), ("plain", 3)):
            batch = make_batch(kind, seed)
            found, calls = model(batch), looked_up[0]
            assert torch.equal(found, ordinary(model, batch)) and looked_up[0] == calls + 1
    assert looked_up[0] == 5  # one of the model's, and those of the ordinary calls


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.T.contiguous().T


def replace_table(model) -> None:
    model.element_table = torch.rand_like(model.element_table)


def hooked(model) -> None:
    model.conv_to_fc.register_forward_hook(lambda module, given, out: 2 * out)


def parametrized(model) -> None:
    parametrize.register_parametrization(model.fc_out, "weight", Half())


def longer(model) -> None:
    if isinstance(model, sf.SRCGCNN):
        model.recurrent_bn1s.append(copy.deepcopy(model.recurrent_bn1s[0]))
        model.recurrent_bn2s.append(copy.deepcopy(model.recurrent_bn2s[0]))
    else:
        model.convs.append(copy.deepcopy(model.convs[0]))


def assigned(model) -> None:
    state = {name: x + 0.1 if x.is_floating_point() else x for name, x in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def of_another_class(model) -> None:
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.fc_out.__class__ = Doubled


def restored(model) -> None:
    other = copy.deepcopy(model)
    other.fc_out.weight += 0.1
    model.__setstate__(other.__getstate__())


def restored_in_part(model) -> None:
    other = copy.deepcopy(layer_of(model))
    other.weight *= 1.5
    layer_of(model).__setstate__(other.__dict__)


CHANGES = {
    "in place": lambda m: layer_of(m).weight.mul_(1.5),
    "in place, unseen": lambda m: layer_of(m).weight.data.mul_(1.5),
    "statistics in place": lambda m: norm_of(m).running_mean.add_(1),
    "another parameter": lambda m: setattr(m.fc_out, "weight", nn.Parameter(m.fc_out.weight + 0.1)),
    "another parameter of a layer": lambda m: setattr(layer_of(m), "bias", nn.Parameter(layer_of(m).bias + 0.1)),
    "no bias": lambda m: m.fc_out.register_parameter("bias", None),
    "other data": lambda m: setattr(layer_of(m).weight, "data", layer_of(m).weight.data * 1.5),
    "other data in another order": lambda m: setattr(m.fcs[0].weight, "data", transposed(m.fcs[0].weight.data * 2)),
    "the same data, turned": lambda m: setattr(m.fcs[0].weight, "data", m.fcs[0].weight.data.T),
    "another buffer": lambda m: setattr(norm_of(m), "running_var", norm_of(m).running_var + 1),
    "another norm's eps": lambda m: setattr(norm_of(m), "eps", 0.5),
    "another module": lambda m: setattr(m, "embedding", nn.Linear(92, 16)),
    "another module of a list": lambda m: m.fcs.__setitem__(0, nn.Linear(20, 20)),
    "more steps": longer,
    "another table": replace_table,
    "another basis": lambda m: m._hyperparameters.update(step=0.3),
    "a hook": hooked,
    "a parametrization": parametrized,
    "a loaded state": assigned,
    "another class": of_another_class,
    "a restored model": restored,
    "a restored module": restored_in_part,
}


@MODELS
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_every_change_is_seen(make_batch, model_type, change):
    model, batch = trained(model_type), make_batch("weighted")
    before = model(batch)
    assert model._frozen.network.takes(batch)
    change(model)
    found, expected = model(batch), ordinary(model, batch)
    assert torch.equal(found, expected)
    assert not torch.allclose(found, before, rtol=1e-3)
    assert torch.equal(model(batch), expected)  # what was kept anew


def other_shape(model) -> None:
    model.fcs[0].weight.data = model.fcs[0].weight.data.view(10, 40)


def other_type(model) -> None:
    norm_of(model).running_var.data = norm_of(model).running_var.data.view(torch.int32)


@pytest.mark.parametrize("change", [other_shape, other_type])
@torch.no_grad()
def test_the_same_memory_seen_otherwise_is_refused(make_batch, change):
    model, batch = trained(sf.SRCGCNN), make_batch("plain")
    model(batch)
    change(model)
    for call in (model, lambda batch: ordinary(model, batch)):
        with pytest.raises((sf.InputError, RuntimeError)):
            call(batch)


@torch.no_grad()
def test_what_comes_between_the_steps_is_seen(make_batch):
    model, batch = trained(sf.SRCGCNN), make_batch("plain")
    before = model(batch)
    model.recurrent_norm = nn.LayerNorm(16)
    normed = model(batch)
    assert torch.equal(normed, ordinary(model, batch)) and not torch.allclose(normed, before)
    model.recurrent_norm = None
    assert torch.equal(model(batch), before)
    model.recurrent_alpha = nn.Parameter(torch.zeros(2))
    gated = model(batch)
    assert torch.equal(gated, ordinary(model, batch)) and not torch.allclose(gated, before)


class Half(nn.Module):
    def forward(self, x):
        return x / 2


def pruned(model) -> nn.Linear:
    return prune.l1_unstructured(layer_of(model), "weight", amount=0.3)


def parametrized_layer(model) -> nn.Linear:
    parametrize.register_parametrization(layer_of(model), "weight", Half())
    return layer_of(model)


def plain_attribute(model) -> nn.Linear:
    head = model.fc_out
    weight = head.weight.data.clone()
    del head.weight
    head.weight = weight * 0.5
    return head


@MODELS
@pytest.mark.parametrize("derive", [pruned, parametrized_layer, plain_attribute])
@torch.no_grad()
def test_weights_that_follow_from_others_are_not_kept(make_batch, model_type, derive):
    model, batch = trained(model_type), make_batch("weighted")
    before = model(batch)
    layer = derive(model)
    derived = model(batch)
    assert torch.equal(derived, ordinary(model, batch)) and not torch.allclose(derived, before)
    if derive is plain_attribute:
        layer.weight = layer.weight * 2
    elif derive is pruned:
        layer.weight_orig.mul_(2)
    else:
        layer.parametrizations.weight.original.mul_(3)
    assert torch.equal(model(batch), ordinary(model, batch)) and not torch.allclose(model(batch), derived)


@MODELS
@torch.no_grad()
def test_modes_are_seen(make_batch, model_type):
    """Statistics of the batch, of one norm alone too, move as they do without; dropout drops."""
    model, batch = trained(model_type, dropout=0.5), make_batch("plain")
    before, twin = model(batch), copy.deepcopy(model)
    model.dropout.train()
    assert not torch.allclose(model(batch), before)
    model.dropout.eval()
    assert torch.equal(model(batch), before)
    for each in (model, twin):
        norm_of(each).train()
    assert torch.equal(model(batch), ordinary(twin, batch))
    for name, x in model.state_dict().items():
        assert torch.equal(x, twin.state_dict()[name]), name
    model.eval()
    assert torch.equal(model(batch), ordinary(model, batch))


@MODELS
@torch.no_grad()
def test_what_never_holds_is_seldom_laid_out(monkeypatch, make_batch, model_type):
    """Parameters of another member of an ensemble at each call, for instance; and then the same ones again."""
    model, batch, made = trained(model_type), make_batch("one atom"), []
    freeze = CrystalModel._freeze
    monkeypatch.setattr(CrystalModel, "_freeze", lambda *given: made.append(1) or freeze(*given))
    expected = ordinary(model, batch)
    for k in range(51):
        shifted = {name: x + 0.01 * k for name, x in model.named_parameters()}
        found = torch.func.functional_call(model, shifted, (batch,))
        assert torch.equal(found, expected) == (k == 0)
    assert len(made) == 3
    for _ in range(20):
        assert torch.equal(model(batch), expected)
    assert len(made) == 4 and model._frozen.was_used


@MODELS
@torch.no_grad()
def test_what_is_kept_outlives_dropout_that_drops(looked_up, make_batch, model_type):
    model, batch = trained(model_type, dropout=0.5), make_batch("plain")
    for _ in range(3):
        model.dropout.train()
        model(batch)
        model.dropout.eval()
        model(batch)
    assert looked_up[0] == 4


@MODELS
def test_calls_of_other_kinds_go_their_own_way(make_batch, model_type):
    model, batch = trained(model_type), make_batch("weighted")
    with torch.no_grad():
        expected = model(batch)
        with sf.use_backend("reference"):
            plain = model(batch)
        with torch.autocast("cpu"):
            mixed = model(batch)
        shifted = {name: x + 0.1 for name, x in model.named_parameters()}
        functional = torch.func.functional_call(model, shifted, (batch,))
        exact = model.double()(batch)
        again = model.float()(batch)
    for other in (plain, mixed, exact):
        assert not torch.equal(other, expected)
        torch.testing.assert_close(other, expected, rtol=0.1, atol=0.02, check_dtype=False)
    assert not torch.allclose(functional, expected) and torch.equal(again, expected)
    out = model(batch)
    assert out.requires_grad
    out.sum().backward()
    assert model.fc_out.weight.grad is not None
    _, slope = torch.func.jvp(lambda b: model.fc_out(b), (torch.ones(1, 20),), (torch.ones(1, 20),))
    torch.testing.assert_close(slope[0], model.fc_out.weight.sum(1))


@torch.no_grad()
def test_batches_of_other_kinds_go_their_own_way(make_batch):
    model, batch = trained(sf.SRCGCNN), make_batch("plain")
    expected = model(batch)
    torch.testing.assert_close(model(batch.to(dtype=torch.float64)), expected)
    for name, x in (
        ("atom_features", torch.rand(batch.num_rows, 92)),
        ("edge_features", torch.rand(batch.num_edges, 41)),
    ):
        given = make_batch("plain")
        setattr(given, name, x)
        assert torch.equal(model(given), ordinary(model, given)) and not torch.allclose(model(given), expected)
    for name in ("numbers", "weight", "distance", "sender", "row_ptr", "crystal_ptr"):
        given, x = make_batch("plain"), getattr(batch, name)
        setattr(given, name, torch.stack([x, x], 1)[:, 0])  # not contiguous
        assert torch.equal(model(given), expected)
        with torch.enable_grad():
            torch.testing.assert_close(model(given), expected)
            torch.testing.assert_close(model.features(given), model.features(batch))
            model.train()(given).sum().backward()
        model.load_state_dict(trained(sf.SRCGCNN).state_dict())
        model.eval()
    batch.numbers = batch.numbers.long()
    with pytest.raises(sf.InputError, match="With species, atom_fea must be a table"):
        model(batch)
    wrong = make_batch("plain")
    wrong.numbers[3] = 200
    with pytest.raises(sf.InputError, match="200"):
        model(wrong)


@MODELS
@pytest.mark.parametrize(
    "given", [torch.Tensor.double, lambda x: torch.stack([x, x], 1)[:, 0]], ids=["float64", "strided"]
)
@torch.no_grad()
def test_what_kernels_read_as_a_copy_is_not_kept(make_batch, model_type, given):
    model, batch = trained(model_type), make_batch("plain")
    expected, again, norm = model(batch), model(batch), norm_of(model)
    assert torch.equal(again, expected)  # what was used is laid out anew at the next call
    norm.running_mean, norm.running_var = given(norm.running_mean), given(norm.running_var)
    for _ in range(2):
        assert torch.equal(model(batch), expected)
    norm.running_mean += 1
    found = model(batch)
    assert torch.equal(found, ordinary(model, batch)) and not torch.allclose(found, expected)


@MODELS
@torch.no_grad()
def test_copies_keep_nothing_and_nothing_keeps_a_model(make_batch, model_type):
    model, batch = trained(model_type), make_batch("plain")
    expected = model(batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert twin._frozen is None
        assert torch.equal(twin(batch), expected)
    twin = copy.deepcopy(model)
    twin.fc_out.bias += 1
    twin(batch)
    assert torch.equal(model(batch), expected) and torch.equal(twin(batch), ordinary(twin, batch))
    gone = weakref.ref(twin.fc_out)
    gc.disable()
    try:
        del twin
        assert gone() is None
    finally:
        gc.enable()
