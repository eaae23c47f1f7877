"""Gradients of whole models: to be differentiated again, many at once, of parameters that several layers share."""

from __future__ import annotations

import pytest
import torch

import srcgcnn_fast as sf

SMALL = {"atom_fea_len": 16, "h_fea_len": 16, "n_h": 3}


def tied() -> sf.CGCNN:
    """Two places of one convolution, and of one layer of the head."""
    model = sf.CGCNN(n_conv=2, **SMALL)
    model.convs[1], model.fcs[1] = model.convs[0], model.fcs[0]
    return model


def watched() -> sf.CGCNN:
    """Its convolutions are called one after the other."""
    model = sf.CGCNN(n_conv=2, **SMALL)
    model.convs[1].register_forward_hook(lambda module, given, out: None)
    return model


MODELS = {
    "CGCNN": lambda: sf.CGCNN(**SMALL),
    "tied": tied,
    "watched": watched,
    "SR-CGCNN": lambda: sf.SRCGCNN(**SMALL),
    "shared norms": lambda: sf.SRCGCNN(recurrent_shared_norms=True, **SMALL),
    "between steps": lambda: sf.SRCGCNN(recurrent_layer_norm=True, recurrent_learnable_alpha=True, **SMALL),
}


@pytest.fixture(params=MODELS)
def model(request) -> sf.CGCNN | sf.SRCGCNN:
    """In float64, with statistics and scales that are not those of the start."""
    torch.manual_seed(0)
    made = MODELS[request.param]().double()
    with torch.no_grad():
        for name, x in [*made.named_parameters(), *made.named_buffers()]:
            if x.is_floating_point() and name != "element_table":
                x.copy_(torch.rand_like(x) + 0.5 if name.endswith(("var", "bn1.weight", "bn2.weight")) else x)
    return made


def relative(found, expected) -> float:
    pairs = [(x.detach(), y.detach()) for x, y in zip(found, expected, strict=True) if y is not None]
    return max(float((x - y).norm() / y.norm().clamp_min(1e-8)) for x, y in pairs)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.compiled
def test_gradients_to_be_differentiated_again_are_the_gradients(model, make_batch, training):
    """And their own gradients, of a penalty on them, and those of a penalty on these, are those of the reference."""
    model.train(training)

    def gradients(backend: str, create_graph: bool):
        batch = make_batch("weighted")
        batch.distance = batch.distance.double().requires_grad_(not training)
        leaves = list({id(x): x for x in model.parameters()}.values()) + [batch.distance] * (not training)
        with sf.use_backend(backend):
            out = model(batch).square().sum()
            first = torch.autograd.grad(out, leaves, create_graph=create_graph)
            if not create_graph:
                return first, None
            higher = []
            for order in (2, 3):
                penalty = sum(x.square().sum() for x in (higher or first) if x is not None)
                found = torch.autograd.grad(penalty, leaves, create_graph=order < 3, allow_unused=True)
                higher = [*higher, *found]
            return [x.detach() for x in first], [None if x is None else x.detach() for x in higher]

    (plain, _), (again, second), (exact, exact_second) = (
        gradients(*x) for x in (("cpu", False), ("cpu", True), ("reference", True))
    )
    limit = 1e-9 if training else 1e-12  # gradients at biases before a batch norm are zero but for rounding
    large = [float(x.norm()) > 1e-6 * max(float(y.norm()) for y in exact) for x in exact]
    assert sum(large) > 8
    for found in (plain, again):
        assert relative(*([x for x, keep in zip(each, large, strict=True) if keep] for each in (found, exact))) < limit
    half = len(second) // 2
    for found, expected in ((second[:half], exact_second[:half]), (second[half:], exact_second[half:])):
        size = max(float(x.norm()) for x in expected if x is not None)
        for x, y in zip(found, expected, strict=True):
            assert (x is None) == (y is None)
            assert x is None or float((x - y).norm()) < 1e-9 * size


@pytest.mark.compiled
def test_statistics_that_moved_meanwhile_do_not_count(model, make_batch):
    """Those of the forward pass do."""
    batch, leaves = make_batch("weighted"), list(model.parameters())
    batch.distance = batch.distance.double()
    expected = torch.autograd.grad(model.eval()(batch).sum(), leaves)
    out = model(batch).sum()
    model.train()(batch)
    assert relative(torch.autograd.grad(out, leaves, create_graph=True), expected) < 1e-9


def test_many_gradients_at_once(model, make_batch):
    batch = make_batch("ragged")
    batch.distance = batch.distance.double().requires_grad_()
    out = model.eval()(batch)[:, 0]
    every = torch.eye(len(out), dtype=torch.float64)
    (found,) = torch.autograd.grad(out, batch.distance, every, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(out, batch.distance, x, retain_graph=True)[0] for x in every]
    assert relative([found], [torch.stack(expected)]) < 1e-12


@pytest.mark.parametrize("kind", ["weighted", "many crystals"])  # whose rows are looked up in a table
@pytest.mark.parametrize("field", ["numbers", "weight", "sender", "distance"])
@pytest.mark.parametrize("training", [False, True])
def test_what_is_written_to_before_the_backward_pass_does_not_count(model, make_batch, kind, field, training):
    """PyTorch says that it was, or the gradients are right."""
    model = model.float().train(training)
    leaves = [p for name, p in model.named_parameters() if name.startswith(("convs", "shared", "recurrent"))]
    for result in (model, lambda batch: model(batch, return_steps=True)[1][-1]):  # and of the convolutions alone
        batch = make_batch(kind)
        expected = torch.autograd.grad(result(batch).sum(), leaves)
        out = result(batch).sum()
        getattr(batch, field)[::2] = 3
        try:
            found = torch.autograd.grad(out, leaves)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            size = max(float(x.norm()) for x in expected)
            assert all(float((x - y).norm()) < 1e-4 * size for x, y in zip(found, expected, strict=True))
