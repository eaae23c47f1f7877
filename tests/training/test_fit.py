"""Runs learn, repeat, resume to the same bits, and refuse what cannot work."""

from __future__ import annotations

import copy
import csv
import dataclasses
import errno
import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.utils.prune

from srcgcnn_fast import CGCNN, SRCGCNN, InputError, load_model
from srcgcnn_fast.graph import GraphStore
from srcgcnn_fast.ops.precision import tf32_is_allowed
from srcgcnn_fast.training import GraphDataModule, Recipe, Split, TrainingModule, compare, evaluate, fit
from srcgcnn_fast.training.callbacks import RunBar, RunFiles, write_table
from srcgcnn_fast.training.fit import check_trainable
from srcgcnn_fast.training.module import _Losses, normalizer
from srcgcnn_fast.training.optimizers import make_optimizer
from srcgcnn_fast.training.report import compare_study
from srcgcnn_fast.training.study import pair_study


class StopIn(pl.Callback):
    """Fails in the middle of an epoch, as a lost machine does."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            raise RuntimeError("stopped")


def run(store, directory, *, target="energy", epochs=4, resume=False, callbacks=(), recipe=None, **options):
    torch.manual_seed(0)
    model = SRCGCNN(n_recurrent_steps=2, atom_fea_len=16, h_fea_len=16, classification=target == "high")
    data = GraphDataModule(store, target, **{"batch_size": 32, **options})
    recipe = recipe or Recipe(epochs=epochs, lr=5e-3)
    return fit(model, data, directory, recipe, resume=resume, callbacks=callbacks, accelerator="cpu")


def last_weights(directory):
    return torch.load(directory / "last.ckpt", weights_only=True)["state_dict"]


def test_training_beats_the_mean(alloys, tmp_path):
    split = Split(np.arange(120), np.arange(120, 160), np.arange(120, 160))
    data = GraphDataModule(alloys, "energy", split=split, batch_size=16)
    torch.manual_seed(0)
    result = fit(CGCNN(), data, tmp_path / "run", Recipe(epochs=20, lr=5e-3), accelerator="cpu")
    guess = np.abs(data.target_values("val") - data.target_values("train").mean()).mean()
    assert result.best["val_mae"] < 0.6 * guess
    assert result.history[-1]["train_loss"] < 0.5 * result.history[0]["train_loss"]
    assert [row["epoch"] for row in result.history] == list(range(1, 21))
    assert result.best["val_mae"] == min(row["val_mae"] for row in result.history)
    with open(tmp_path / "run" / "metrics.csv") as file:
        assert [float(row["val_mae"]) for row in csv.DictReader(file)] == [row["val_mae"] for row in result.history]
    # The saved model is the best epoch's, in the target's units.
    loaded = load_model(tmp_path / "run" / "model")
    assert loaded.metadata.targets == ("energy",)
    assert loaded.metadata.extra["training"]["lr"] == 5e-3
    assert loaded.metadata.extra["best_epoch"] == result.best
    evaluation = evaluate(loaded, data, "val")
    assert evaluation.metrics["mae"] == pytest.approx(result.best["val_mae"], rel=1e-5)
    assert evaluation.metrics["mae"] == pytest.approx(np.abs(evaluation.predicted - evaluation.target).mean())


def test_a_loaded_model_trains_as_a_new_one(alloys, tmp_path):
    """In training mode, which loading does not give it, nor an earlier run or one that failed with frozen parts."""
    data, recipe = GraphDataModule(alloys, "energy", batch_size=32), Recipe(epochs=1)
    torch.manual_seed(0)
    model = CGCNN(n_conv=2, atom_fea_len=8, h_fea_len=8, dropout=0.5)
    expected = fit(copy.deepcopy(model), data, tmp_path / "new", recipe, accelerator="cpu").history[0]["train_loss"]
    copied = copy.deepcopy(model).eval()
    assert fit(copied, data, tmp_path / "eval", recipe, accelerator="cpu").history[0]["train_loss"] == expected
    counts = [int(copied.convs[0].bn1.num_batches_tracked)]
    fit(copied, data, tmp_path / "again", recipe, accelerator="cpu")
    with pytest.raises(RuntimeError, match="stopped"):
        frozen = Recipe(epochs=2, freeze=("convolutions",))
        fit(copied, data, tmp_path / "fails", frozen, callbacks=[StopIn(1)], accelerator="cpu")
    fit(copied, data, tmp_path / "after", recipe, accelerator="cpu")
    counts.append(int(copied.convs[0].bn1.num_batches_tracked))
    assert counts == [4, 12]


def test_scoring_meanwhile_leaves_frozen_statistics_as_they_are(alloys, tmp_path):
    class Score(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            evaluate(module.model, data, "test")

    data = GraphDataModule(alloys, "energy", batch_size=32)
    torch.manual_seed(0)
    model = CGCNN(n_conv=2, atom_fea_len=8, h_fea_len=8)
    before = model.convs[0].bn1.running_mean.clone()
    recipe = Recipe(epochs=3, freeze=("convolutions",))
    fit(model, data, tmp_path, recipe, callbacks=[Score()], accelerator="cpu")
    assert torch.equal(model.convs[0].bn1.running_mean, before)
    scored = evaluate(model, data).predicted
    assert np.array_equal(evaluate(model.train(), data).predicted, scored)
    assert model.convs[0].bn1.training and torch.equal(model.convs[0].bn1.running_mean, before)


def test_the_best_epoch_is_kept_not_the_last(alloys, tmp_path):
    result = run(alloys, tmp_path, recipe=Recipe(epochs=6, lr=0.05, schedule="constant"))
    assert result.best["val_mae"] < 0.99 * result.history[-1]["val_mae"]
    scored = evaluate(load_model(tmp_path / "model"), GraphDataModule(alloys, "energy"), "val")
    assert scored.metrics["mae"] == pytest.approx(result.best["val_mae"], rel=1e-5)


@pytest.mark.parametrize(
    ("target", "options"),
    [("energy", {}), ("energy", {"batch_rows": 150}), ("energy", {"num_workers": 1}), ("high", {})],
    ids=["regression", "rows", "worker", "dropout"],
)
def test_resume_ends_with_the_same_bits(alloys, tmp_path, target, options):
    whole = run(alloys, tmp_path / "whole", target=target, **options)
    with pytest.raises(RuntimeError, match="stopped"):
        run(alloys, tmp_path / "cut", target=target, callbacks=[StopIn(2)], **options)
    assert not (tmp_path / "cut" / "model").exists()
    resumed = run(alloys, tmp_path / "cut", target=target, resume=True, **options)
    expected, found = last_weights(tmp_path / "whole"), last_weights(tmp_path / "cut")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    timing = ("seconds", "crystals_per_second", "data_wait", "memory_mib")
    for a, b in zip(whole.history, resumed.history, strict=True):
        assert {k: v for k, v in a.items() if k not in timing} == {k: v for k, v in b.items() if k not in timing}


MODERN = Recipe(epochs=4, lr=5e-3, optimizer="adamw", weight_decay=0.1, schedule="one_cycle", loss="mae", ema=0.9)
MUON = dataclasses.replace(MODERN, optimizer="muon")
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon needs PyTorch 2.9")


@pytest.mark.parametrize("recipe", [MODERN, pytest.param(MUON, marks=needs_muon)], ids=["adamw", "muon"])
def test_averaged_weights_resume_with_the_same_bits(alloys, tmp_path, recipe):
    run(alloys, tmp_path / "whole", recipe=recipe)
    with pytest.raises(RuntimeError, match="stopped"):
        run(alloys, tmp_path / "cut", recipe=recipe, callbacks=[StopIn(2)])
    run(alloys, tmp_path / "cut", recipe=recipe, resume=True)
    for key in ("state_dict", "current_model_state"):
        expected, found = (
            torch.load(tmp_path / name / "last.ckpt", weights_only=True)[key] for name in ("whole", "cut")
        )
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_average_of_the_weights_is_validated_and_kept(alloys, tmp_path):
    result = run(alloys, tmp_path, recipe=MODERN)
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    average, current = last["state_dict"], last["current_model_state"]
    assert not torch.equal(average["model.fc_out.weight"], current["model.fc_out.weight"])
    data = GraphDataModule(alloys, "energy", batch_size=32)
    for state, same in ((average, True), (current, False)):
        result.model.load_state_dict({name.removeprefix("model."): x for name, x in state.items() if "model." in name})
        mae = evaluate(result.model, data, "val").metrics["mae"]
        assert (mae == pytest.approx(result.history[-1]["val_mae"], rel=1e-5)) is same


def test_one_cycle_warms_up_and_ends_near_zero(alloys, tmp_path):
    rates = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])
            assert {group["betas"] for group in trainer.optimizers[0].param_groups} == {(0.9, 0.999)}

    run(alloys, tmp_path, recipe=Recipe(epochs=4, lr=5e-3, optimizer="adamw", schedule="one_cycle", warmup=0.25),
        callbacks=[Watch()])  # fmt: skip
    rates = np.array(rates)
    assert rates[0] == pytest.approx(5e-3 / 25)
    assert rates.max() == pytest.approx(5e-3) and rates[:, 0].argmax() == 3  # a quarter of 16 steps, counted from 0
    assert (rates[-1] < 1e-5).all()


def test_one_cycle_whose_warm_up_is_one_step(alloys, tmp_path):
    """As of twenty epochs of one batch with the usual 0.05: PyTorch's schedule divides by zero there."""
    recipe = Recipe(epochs=20, schedule="one_cycle")
    history = run(alloys, tmp_path, recipe=recipe, batch_size=256).history
    assert history[0]["lr"] == pytest.approx(recipe.lr) and history[-1]["lr"] < 0.01 * recipe.lr
    assert all(np.diff([row["lr"] for row in history]) < 0)


def test_one_cycle_of_a_single_step_is_refused(alloys, tmp_path):
    """Its rate is that of the end."""
    with pytest.raises(InputError, match="A run of a single step has no cycle; train longer"):
        run(alloys, tmp_path, recipe=Recipe(epochs=1, schedule="one_cycle"), batch_size=256)


def test_weight_decay_spares_biases_and_norms(alloys):
    module = TrainingModule(SRCGCNN(), GraphDataModule(alloys, "energy"), MODERN)
    module.trainer = pl.Trainer(logger=False, enable_checkpointing=False)
    module.recipe = dataclasses.replace(MODERN, schedule="constant")
    decayed, spared = module.configure_optimizers().param_groups
    assert decayed["weight_decay"] == 0.1 and all(p.ndim == 2 for p in decayed["params"])
    assert spared["weight_decay"] == 0.0 and all(p.ndim == 1 for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(list(module.parameters()))


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", pytest.param("muon", marks=needs_muon)])
def test_an_optimizer_has_the_recipes_numbers(name):
    recipe = Recipe(lr=0.5, optimizer=name, muon_lr=0.25, weight_decay=0.125, momentum=0.75)
    groups = make_optimizer(CGCNN(1, 8, 8), recipe).param_groups
    found = [(group["lr"], group["weight_decay"]) for group in groups]
    spared = [(0.5, 0.0)] * (name in ("adamw", "muon"))
    assert found == [(0.5, 0.125), *spared, *[(0.25, 0.125)] * (name == "muon")]
    assert name != "sgd" or groups[0]["momentum"] == 0.75


@needs_muon
@pytest.mark.parametrize("model", [SRCGCNN(), CGCNN()], ids=["sr-cgcnn", "cgcnn"])
def test_muon_orthogonalises_the_steps_of_the_convolutions_alone(model):
    recipe = Recipe(optimizer="muon", lr=1e-3, muon_lr=0.02)
    optimizer = make_optimizer(model, recipe)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        step = p.detach() - before[name]
        if name.endswith("fc_full.weight"):
            size = torch.linalg.svdvals(step) / (0.02 * 0.2 * max(p.shape) ** 0.5)
            assert size.min() > 0.5 and size.max() < 1.5  # five Newton-Schulz iterations end near 1
        else:
            assert step.abs().max() == pytest.approx(1e-3, rel=1e-2)  # of AdamW's first step
    taught = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(taught) == len(set(taught)) == len(before)


@needs_muon
def test_muon_without_convolutions_to_teach_is_adamw(alloys, tmp_path):
    recipe = Recipe(epochs=1, optimizer="muon", freeze=("convolutions",))
    frozen, other = (
        run(alloys, tmp_path / x.optimizer, recipe=x) for x in (recipe, dataclasses.replace(recipe, optimizer="adamw"))
    )
    assert frozen.history[0]["val_mae"] == other.history[0]["val_mae"]


def test_muon_names_the_pytorch_it_needs(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(InputError, match=r"Muon needs PyTorch 2\.9"):
        make_optimizer(SRCGCNN(), Recipe(optimizer="muon"))


def test_the_loss_is_the_recipes(alloys):
    data = GraphDataModule(alloys, "energy")
    output, target = torch.tensor([[1.0], [-2.0]]), torch.tensor([[0.5], [3.0]])
    mae, mse = (TrainingModule(SRCGCNN(), data, Recipe(loss=name)) for name in ("mae", "mse"))
    error = output - (target - mae.target_mean) / mae.target_std
    assert mae.loss(output, target) == error.abs().mean()
    assert mse.loss(output, target) == (error**2).mean()


def test_a_finished_run_resumes_to_itself(alloys, tmp_path):
    first = run(alloys, tmp_path, epochs=2)
    again = run(alloys, tmp_path, epochs=2, resume=True)
    assert again.history == first.history


def test_all_graphs_are_read_once_to_name_a_run(alloys, tmp_path, monkeypatch):
    calls, original = [], GraphDataModule.graph_fingerprint
    monkeypatch.setattr(GraphDataModule, "graph_fingerprint", lambda data: calls.append(data) or original(data))
    extra = run(alloys, tmp_path, epochs=1).model.metadata.extra
    record = json.loads((tmp_path / "run.json").read_text())
    assert len(calls) == 1 and record == json.loads(json.dumps(extra["training"])) | {"precision": "float32"}


def test_numpy_numbers_are_numbers(alloys, tmp_path):
    """As grids make them: the files of the run, its checkpoints and its model are read again."""
    recipe = Recipe(epochs=np.int64(1), lr=np.logspace(-3, -2, 2)[1], milestones=tuple(np.arange(1, 2)))
    data = GraphDataModule(alloys, "energy", batch_size=np.int64(32), seed=np.int64(0))
    for resume in (False, True):
        model = SRCGCNN(np.int64(1), np.int64(16), np.int64(16))
        found = fit(model, data, tmp_path, recipe, seed=np.int64(0), resume=resume, accelerator="cpu")
    assert load_model(tmp_path / "model").hyperparameters == found.model.hyperparameters
    assert fit(SRCGCNN(1, 16, 16), data, tmp_path, Recipe(1, 0.01, milestones=(1,)), resume=True).best == found.best


def test_repeating_gives_the_same_bits_and_another_seed_does_not(alloys, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(alloys, tmp_path / name, epochs=1, seed=seed)
    a, b, c = (last_weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.fc_out.weight"], c["model.fc_out.weight"])


def test_steps_are_those_of_a_plain_loop(alloys, tmp_path):
    """To the bit; the logged loss is the mean over crystals, added in float32."""
    data = GraphDataModule(alloys, "energy", batch_size=33)
    torch.manual_seed(3)
    model = SRCGCNN(atom_fea_len=8, h_fea_len=8)
    plain = copy.deepcopy(model).train()
    result = fit(model, data, tmp_path / "run", Recipe(epochs=1, schedule="constant"), accelerator="cpu")
    module = TrainingModule(plain, data, Recipe())
    optimizer = torch.optim.Adam(plain.parameters(), Recipe().lr, fused=True)
    total = torch.zeros(())
    for graphs, target, _ in GraphDataModule(alloys, "energy", batch_size=33).loader("train", shuffle=True):
        loss = module.loss(plain(graphs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(target)
    trained = result.model.state_dict()
    assert all(torch.equal(x, trained[name]) for name, x in plain.state_dict().items())
    assert result.history[0]["train_loss"] == float(f"{float(total) / len(data.parts['train'].indices):.7g}")


def test_captured_steps_take_the_place_of_the_model_in_training_alone(alloys, monkeypatch):
    """What replays CUDA graphs, which needs a GPU, is a recorder here; tests/gpu has it."""
    calls, weights = [], []
    monkeypatch.setattr(
        "srcgcnn_fast.training.module.CapturedTraining", lambda model: lambda x: calls.append(x) or model(x)
    )
    for captured in (False, True):
        data = GraphDataModule(alloys, "energy", batch_size=33)
        torch.manual_seed(3)
        module = TrainingModule(SRCGCNN(atom_fea_len=8), data, Recipe(epochs=2), captured=captured)
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        pl.Trainer(max_epochs=2, accelerator="cpu", enable_model_summary=False, **options).fit(module, data)
        weights.append(module.model.state_dict())
    assert len(calls) == 2 * len(data.loader("train", shuffle=True))
    assert list(weights[0]) == list(weights[1])
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())


def test_losses_of_many_steps_add_up_one_by_one():
    losses = torch.rand(2500, generator=torch.Generator().manual_seed(0))
    found, expected = _Losses(), torch.zeros(())
    for k, loss in enumerate(losses):
        found.add(loss, k % 7)
        expected += loss * (k % 7)
    assert found.sums() == (float(expected), sum(k % 7 for k in range(2500)))


@pytest.mark.compiled
def test_what_validation_keeps_does_not_keep_the_batch(alloys):
    module = TrainingModule(SRCGCNN(atom_fea_len=8), GraphDataModule(alloys, "energy"), Recipe()).eval()
    (item,) = GraphDataModule(alloys, "energy", batch_size=200).loader("train")._on_device()
    module.on_validation_epoch_start()
    module.validation_step(item, 0)
    (kept,) = module._given
    assert (
        torch.equal(kept, item[1])
        and kept.untyped_storage().nbytes() == 4 * len(kept) < item[1].untyped_storage().nbytes()
    )


def test_lightning_knows_which_hook_runs(alloys, tmp_path):
    """It is noted past nn.Module, and decides what may be logged where."""
    seen = []

    class Watched(pl.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            seen.append(module._current_fx_name)

    fit(SRCGCNN(atom_fea_len=8), GraphDataModule(alloys, "energy"), tmp_path, Recipe(epochs=1), callbacks=[Watched()])
    assert seen == ["on_before_zero_grad"]


def test_normaliser_comes_from_the_training_targets(alloys):
    data = GraphDataModule(alloys, ["energy", "volume"])
    module = TrainingModule(SRCGCNN(n_targets=2), data, Recipe())
    values = data.target_values("train")
    assert len(values) < len(alloys)
    assert module.model.metadata.mean == pytest.approx(tuple(np.nanmean(values, axis=0)))
    assert module.model.metadata.std == pytest.approx(tuple(np.nanstd(values, axis=0)))
    assert not np.allclose(
        module.target_mean.numpy(), np.nanmean(alloys.target_array(["energy", "volume"]), axis=0), rtol=1e-6
    )
    output = torch.zeros(3, 2)
    assert torch.allclose(module.values(output), module.target_mean.expand(3, 2))


@pytest.mark.parametrize("number", [0.3, -2.7, 1e5 + 0.1])
def test_a_constant_target_is_divided_by_one(number):
    """Its mean, and so its deviation, is off by a rounding: 128 of 0.3 deviate by 2e-16."""
    constant = np.full(127, number)
    mean, std = normalizer(np.stack([constant, constant + np.arange(127)], axis=1), ("constant", "other"))
    assert std == [1.0, pytest.approx(np.arange(127).std())] and mean[0] == pytest.approx(number, rel=1e-12)


def test_of_equal_areas_the_most_accurate_epoch_is_kept(tmp_path):
    scores = [(0.9, 0.95), (1.0, 0.5), (math.nan, 1.0), (1.0, 0.75), (1.0, 0.75), (1.0, 0.7), (0.99, 1.0)]
    files = RunFiles(tmp_path, "val_auc", larger_is_better=True, patience=4)
    for epoch, (area, accuracy) in enumerate(scores, start=1):
        files.history.append({"epoch": epoch, "val_auc": area, "val_accuracy": accuracy})
    assert files.best["epoch"] == 4 and not files.out_of_patience()
    files = RunFiles(tmp_path, "val_mae", larger_is_better=False)
    files.history = [{"epoch": k, "val_mae": x} for k, x in enumerate((math.nan, 2.0, 1.0, 1.0))]
    assert files.best["epoch"] == 2


@pytest.mark.parametrize(("shift", "scale", "warns"), [(0, 1, False), (1e5, 1, True), (0.3, 0, False)])
def test_a_target_that_loses_its_digits_is_named(alloys, caplog, shift, scale, warns):
    values = {"energy": shift + scale * alloys.targets["energy"]}
    store = GraphStore.from_graphs(list(alloys), targets=values)
    TrainingModule(SRCGCNN(), GraphDataModule(store, "energy"), Recipe())
    assert ("single precision has steps of 0.008 there; subtract" in caplog.text) is warns


def test_classifier(alloys, tmp_path):
    result = run(alloys, tmp_path, target="high", epochs=20)
    assert result.best["val_auc"] == max(row["val_auc"] for row in result.history)
    trained_on = evaluate(result.model, GraphDataModule(alloys, "high"), "train")
    assert trained_on.predicted.shape == (128, 1)
    assert 0 <= trained_on.predicted.min() < trained_on.predicted.max() <= 1
    assert result.history[-1]["train_loss"] < 0.8 * result.history[0]["train_loss"]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", pytest.param("muon", marks=needs_muon)])
@pytest.mark.parametrize("schedule", ["constant", "multistep", "cosine"])
def test_recipes(alloys, tmp_path, optimizer, schedule):
    recipe = Recipe(
        epochs=3, optimizer=optimizer, schedule=schedule, milestones=(1,), gradient_clip=1.0, weight_decay=1e-3
    )
    rates = [row["lr"] for row in run(alloys, tmp_path, recipe=recipe).history]
    factors = {"constant": [1, 1, 1], "multistep": [1, 0.1, 0.1], "cosine": [1, 0.75, 0.25]}[schedule]
    assert rates == pytest.approx([recipe.lr * factor for factor in factors])


def test_scores_that_are_no_number_are_not_kept(alloys, tmp_path):
    """R² of one crystal, which config.json could not hold; and a precision is in force while the run trains."""
    seen = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer, module):
            seen.append(tf32_is_allowed())

    data = GraphDataModule(alloys, "energy", split=Split(np.arange(40), [40], []), batch_size=32)
    options = {"callbacks": [Watch()], "accelerator": "cpu", "precision": "tf32"}
    result = fit(CGCNN(1, 8, 8), data, tmp_path, Recipe(1), **options)
    assert math.isnan(result.best["val_r2"]) and seen == [True] and not tf32_is_allowed()
    assert load_model(tmp_path / "model").metadata.extra["best_epoch"].keys() == result.best.keys() - {"val_r2"}


def test_no_step_is_longer_than_the_clipped_gradient(alloys, tmp_path):
    data, model = GraphDataModule(alloys, "energy", batch_size=32), CGCNN(1, 8, 8)
    before = [p.clone() for p in model.parameters()]
    fit(model, data, tmp_path, Recipe(1, 1.0, "sgd", momentum=0.0, gradient_clip=1e-3), accelerator="cpu")
    moved = torch.stack([(p - old).square().sum() for p, old in zip(model.parameters(), before, strict=True)]).sum()
    assert 1e-4 < moved.sqrt() < len(data.loader("train", shuffle=True)) * 1.001e-3


def test_several_targets(alloys, tmp_path):
    data = GraphDataModule(alloys, ["energy", "volume"], units=["eV/atom", "Å³"], batch_size=32)
    result = fit(SRCGCNN(n_targets=2), data, tmp_path, Recipe(epochs=1), accelerator="cpu")
    assert load_model(tmp_path / "model").metadata.units == ("eV/atom", "Å³")
    found = evaluate(result.model, data, "val")
    assert found.predicted.shape[1] == 2
    assert found.metrics["mae_scaled"] == pytest.approx(result.best["val_mae_scaled"], rel=1e-5)
    with open(found.write(tmp_path / "table.csv")) as file:
        header, *rows = csv.reader(file)
    assert header == ["id", "energy", "energy_predicted", "volume", "volume_predicted"]
    assert [row[0] for row in rows] == data.ids("val") == found.ids
    values = np.array([row[1:] for row in rows], float)
    np.testing.assert_array_equal(values[:, ::2], found.target)
    np.testing.assert_array_equal(values[:, 1::2], found.predicted)


def test_a_run_is_never_overwritten_nor_continued_with_other_settings(alloys, tmp_path):
    with pytest.raises(InputError, match="no run to resume"):
        run(alloys, tmp_path, resume=True)
    split = Split(np.arange(100), np.arange(100, 130), np.arange(130, 160))
    run(alloys, tmp_path, epochs=1, split=split)
    with pytest.raises(InputError, match="already holds a run"):
        run(alloys, tmp_path, epochs=1)
    for name, option in (("batch_size", 16), ("batch_rows", 100), ("length_buckets", True), ("seed", 1)):
        with pytest.raises(InputError, match=rf"other settings: \w*{name} \(\w+ before, {option} now\); use"):
            run(alloys, tmp_path, epochs=1, split=split, resume=True, **{name: option})
    with pytest.raises(InputError, match=r"lr \(0\.005 before, 0\.001 now\)"):
        run(alloys, tmp_path, recipe=Recipe(epochs=1, lr=1e-3), resume=True)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["model"] == "SRCGCNN" and record["muon_lr"] is None
    (tmp_path / "run.json").write_text(json.dumps(record | {"optimizer": "muon", "muon_lr": 0.04}))
    with pytest.raises(InputError, match=r"other settings: muon_lr \(0.04 before, 0.01 now\); use"):
        run(alloys, tmp_path, recipe=Recipe(1, 5e-3, "muon", 0.01), split=split, resume=True)


class Again(pl.Callback):
    """Somebody starts the same in the first epoch."""

    def __init__(self, *calls):
        self.calls = calls

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        for call in self.calls:
            with pytest.raises(InputError, match=r"^Another process trains in .*; choose another directory"):
                call()


@pytest.mark.skipif(sys.platform == "win32", reason="needs file locks")
def test_one_process_trains_in_a_directory(alloys, tmp_path):
    def again(resume=False):
        run(alloys, tmp_path / "run", epochs=1, resume=resume)

    def compared():
        compare(alloys, "energy", out_dir=tmp_path / "run", epochs=1)

    def studied():
        compare_study(pair_study(["energy"], [0], Recipe(epochs=1)), alloys, tmp_path / "run")

    calls = (again, lambda: again(resume=True), compared, studied)
    run(alloys, tmp_path / "run", epochs=1, callbacks=[Again(*calls)])
    assert not (tmp_path / "run" / ".run.json.lock").exists()
    # A killed one leaves its lock, and perhaps children that live on.
    code = (
        "import os, signal, sys, time\nfrom pathlib import Path\nfrom srcgcnn_fast.training.fit import only_trainer\n"
        "with only_trainer(Path(sys.argv[1])):\n"
        "    child = os.fork()\n    if child:\n        print(child, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    time.sleep(600)"
    )
    killed = subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    child = int(killed.stdout.readline())
    try:
        assert killed.wait() == -signal.SIGKILL and (tmp_path / "run" / ".run.json.lock").exists()
        again(resume=True)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_refused_call_leaves_the_model_as_it_was(alloys, tmp_path):
    one_class = np.flatnonzero(alloys.targets["high"] == 0)
    poor = GraphDataModule(alloys, "high", split=Split(np.arange(100), one_class[:9], one_class[9:]))
    data, single = GraphDataModule(alloys, "energy", batch_size=32), GraphDataModule(alloys, "energy", batch_size=128)
    frozen, cycle = Recipe(epochs=1, freeze=("convolutions",)), Recipe(epochs=1, schedule="one_cycle")
    regressor = fit(CGCNN(1, 8, 8), data, tmp_path / "run", Recipe(epochs=1), accelerator="cpu").model
    regressor.convs[0].train()
    classifier = CGCNN(1, 8, 8, classification=True).eval()
    refused = [
        ("already holds a run", regressor, lambda: fit(regressor, single, tmp_path / "run", frozen)),
        ("no run to resume", regressor, lambda: fit(regressor, single, tmp_path / "none", resume=True)),
        ("logger 'paper'", regressor, lambda: fit(regressor, single, tmp_path / "log", frozen, logger="paper")),
        ("single step", regressor, lambda: fit(regressor, single, tmp_path / "step", cycle, accelerator="cpu")),
        ("one class only", classifier, lambda: fit(classifier, poor, tmp_path / "class")),
        ("one class only", classifier, lambda: check_trainable(classifier, poor, frozen)),
        (None, regressor, lambda: check_trainable(regressor, single, frozen)),
    ]
    for says, model, call in refused:
        before = model.metadata, copy.deepcopy(model.metadata), [part.training for part in model.modules()]
        with pytest.raises(InputError, match=says) if says else nullcontext():
            call()
        assert model.metadata is before[0] and model.metadata == before[1]
        assert [part.training for part in model.modules()] == before[2]
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_could_not_be_saved_is_not_trained(alloys, tmp_path):
    class Own(SRCGCNN):
        pass

    single, missing, pruned = (SRCGCNN(2, 8, 8) for _ in range(3))
    single.metadata.extra["error"], missing.metadata.extra["error"] = np.float32(2.0), math.nan
    torch.nn.utils.prune.l1_unstructured(pruned.conv_to_fc, "weight", 0.5)
    says = ["not Own", "must be finite JSON values", "must be finite JSON values", "undo pruning"]
    for model, message in zip((Own(2, 8, 8), single, missing, pruned), says, strict=True):
        data = GraphDataModule(alloys, "energy", batch_size=32)
        with pytest.raises(InputError, match=message):
            fit(model, data, tmp_path / "run", Recipe(epochs=1), accelerator="cpu")
        with pytest.raises(InputError, match=message):
            check_trainable(model, data, Recipe())
        assert not (tmp_path / "run").exists() and model.metadata.targets == ("target",)


def test_a_run_is_not_continued_with_other_crystals(alloys, tmp_path):
    """Validation and test set have changed places, which no count and no mean tells."""
    train, first, second = np.arange(100), np.arange(100, 130), np.arange(130, 160)
    run(alloys, tmp_path, epochs=1, split=Split(train, first, second))
    with pytest.raises(InputError, match="data_fingerprint"):
        run(alloys, tmp_path, epochs=1, split=Split(train, second, first), resume=True)
    record = json.loads((tmp_path / "run.json").read_text())
    shifted = [dataclasses.replace(graph, distance=graph.distance + np.float32(0.01)) for graph in alloys]
    shifted = GraphStore.from_graphs(shifted, targets=alloys.targets)
    with pytest.raises(InputError, match=r"other settings: graph_fingerprint \(\w+ before, \w+ now\); use"):
        run(shifted, tmp_path, epochs=1, split=Split(train, first, second), resume=True)
    del record["data_fingerprint"], record["graph_fingerprint"]  # a run of an older version
    (tmp_path / "run.json").write_text(json.dumps(record))
    run(alloys, tmp_path, epochs=1, split=Split(train, first, second), resume=True)
    doubled = GraphStore.from_graphs(list(alloys), targets={"energy": 2 * alloys.targets["energy"]})
    with pytest.raises(InputError, match=r"other settings: target_mean .*; target_std \(.*; use"):
        run(doubled, tmp_path, epochs=1, split=Split(train, first, second), resume=True)


def test_dropout_draws_other_numbers_in_every_epoch_and_for_every_seed(alloys, tmp_path):
    seeds = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            seeds.append(torch.initial_seed())

    data, options = GraphDataModule(alloys, "energy", batch_size=64), {"callbacks": [Watch()], "accelerator": "cpu"}
    for seed in (0, 1):
        fit(CGCNN(1, 8, 8, dropout=0.5), data, tmp_path / f"{seed}", Recipe(2), seed=seed, **options)
    assert len(set(seeds)) == 4


@pytest.mark.parametrize("per_node", [{}, {"SLURM_NTASKS_PER_NODE": "8"}])
def test_a_job_of_many_tasks_trains_in_one_process(alloys, tmp_path, monkeypatch, per_node):
    """Job scripts of MPI programs ask for tasks; Lightning would refuse them, or wait for them."""
    job = {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "alloys", "SLURM_PROCID": "3", **per_node}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    assert len(run(alloys, tmp_path, epochs=1).history) == 1


QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def test_the_bar_says_how_many_crystals_a_second(monkeypatch):
    clock = [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    trainer = SimpleNamespace(num_training_batches=2, max_epochs=3, current_epoch=1, callback_metrics={"val_mae": 0.25})
    bar = RunBar("SR-CGCNN", "val_mae", "eV")
    bar.on_train_start(trainer, None)
    for postfix in ("epoch 2/3, 600 crystals/s", "epoch 2/3, 600 crystals/s, val_mae 0.25 eV"):
        bar.on_train_epoch_start(trainer, None)
        for _ in range(2):
            clock[0] += 0.5
            bar.on_train_batch_end(trainer, None, None, (None, torch.zeros(300)), 0)
        assert bar._bar.postfix == postfix
        bar.on_train_epoch_end(trainer, None)
    assert bar._bar.n == 6
    bar.on_train_end(trainer, None)


@pytest.mark.parametrize("batches", [0, 1])
def test_an_epoch_is_timed_with_or_without_validation(alloys, monkeypatch, batches):
    """Without the time of its validation, which takes an hour here."""
    passed, now = [], time.perf_counter

    class Watch(pl.Callback):
        def on_validation_batch_start(self, *_):
            passed.append(3600)

    monkeypatch.setattr(time, "perf_counter", lambda: now() + sum(passed))
    data = GraphDataModule(alloys, "energy", batch_size=32)
    options = {"limit_val_batches": batches, "num_sanity_val_steps": 0, "callbacks": [Watch()], **QUIET}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", **options)
    trainer.fit(TrainingModule(CGCNN(1, 8, 8), data, Recipe(epochs=1)), data)
    assert 0 < trainer.callback_metrics["seconds"] < 60 and len(passed) == batches


@pytest.mark.parametrize("target", ["energy", "high"])
def test_a_trainer_of_ones_own_tests_and_predicts(alloys, target):
    data = GraphDataModule(alloys, target, batch_size=32, split=(0.5, 0.1, 0.4))
    module = TrainingModule(CGCNN(1, 8, 8, classification=target == "high"), data, Recipe())
    trainer, expected = pl.Trainer(accelerator="cpu", **QUIET), evaluate(module.model, data)
    (scores,) = trainer.test(module, data, verbose=False)
    assert scores == pytest.approx({f"test_{name}": value for name, value in expected.metrics.items()}, rel=1e-4)
    found = torch.cat(trainer.predict(module, data.loader("test")))
    np.testing.assert_allclose(found.numpy(), expected.predicted, rtol=1e-5)


def test_a_trainer_of_ones_own_says_what_of_the_recipe_is_left_to_it(alloys, tmp_path, caplog):
    data = GraphDataModule(alloys, "energy", batch_size=64)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    recipe = Recipe(epochs=1, ema=0.9, patience=2, gradient_clip=1.0)
    run(alloys, tmp_path, recipe=recipe)
    assert "the recipe's" not in caplog.text
    for clip, left in ((None, "ema and patience and gradient_clip"), (1.0, "ema and patience")):
        caplog.clear()
        trainer = pl.Trainer(max_epochs=1, accelerator="cpu", gradient_clip_val=clip, **quiet)
        trainer.fit(TrainingModule(CGCNN(1, 8, 8), data, recipe), data)
        assert f"fit does the recipe's {left}, and this Trainer does not" in caplog.text


@pytest.mark.parametrize("target", ["energy", "high"])
def test_a_trainer_of_ones_own_in_bfloat16_alone(alloys, target):
    data, found = GraphDataModule(alloys, target, batch_size=32), []
    for precision in ("32-true", "bf16-true"):
        torch.manual_seed(0)
        model = CGCNN(1, 8, 8, classification=target == "high", dropout=0.0)
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = pl.Trainer(max_epochs=1, precision=precision, accelerator="cpu", **quiet)
        trainer.fit(TrainingModule(model, data, Recipe(epochs=1, lr=1e-3)), data)
        found.append(trainer.callback_metrics)
    score = "val_accuracy" if target == "high" else "val_mae"
    for name in ("train_loss", score):
        assert float(found[1][name]) == pytest.approx(float(found[0][name]), rel=0.05)


def test_divergence_is_a_sentence(alloys, tmp_path):
    with pytest.raises(InputError, match="lower learning rate"):
        run(alloys, tmp_path, recipe=Recipe(epochs=3, lr=1e30, optimizer="sgd"))


def test_bad_requests_are_sentences(alloys, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="optimizer 'lion'"):
        Recipe(optimizer="lion")
    for wrong in ({"epochs": 2.5}, {"epochs": float("nan")}, {"epochs": "3"}, {"epochs": True}, {"patience": 1.5},
                  {"milestones": (10, 20.5)}, {"milestones": [1, "a"]}, {"milestones": (None,)}):  # fmt: skip
        with pytest.raises(InputError, match=rf"{next(iter(wrong))} is .*; give a whole number of epochs"):
            Recipe(**wrong)
    for wrong in ({"lr": "1e-3"}, {"lr": None}, {"warmup": True}, {"ema": "0.99"}, {"weight_decay": [0.1]}):
        with pytest.raises(InputError, match=rf"{next(iter(wrong))} is .*; give a number"):
            Recipe(**wrong)
    with pytest.raises(InputError, match=r"The split is 0\.8; give three fractions"):
        GraphDataModule(alloys, "energy", split=0.8)
    with pytest.raises(InputError, match="trains a CGCNN or SRCGCNN, not a Linear"):
        fit(torch.nn.Linear(1, 1), GraphDataModule(alloys, "energy"), tmp_path / "run", accelerator="cpu")
    with pytest.raises(InputError, match="on a GraphDataModule, not on a GraphStore"):
        fit(SRCGCNN(), alloys, tmp_path / "run", accelerator="cpu")
    whole = Recipe(epochs=3.0, patience=np.float64(2), milestones=[np.int64(4), 5.0])
    assert whole == Recipe(epochs=3, patience=2, milestones=(4, 5)) and isinstance(whole.epochs, int)
    with pytest.raises(InputError, match="0 epochs"):
        Recipe(epochs=0)
    with pytest.raises(InputError, match="learning rate nan"):
        Recipe(lr=float("nan"))
    with pytest.raises(InputError, match=r"Muon's learning rate 0\.0"):
        Recipe(muon_lr=0.0)
    with pytest.raises(InputError, match=r"1 target\(s\), the data 2"):
        TrainingModule(SRCGCNN(), GraphDataModule(alloys, ["energy", "high"]), Recipe())
    with pytest.raises(InputError, match="0 or 1"):
        TrainingModule(SRCGCNN(classification=True), GraphDataModule(alloys, "energy"), Recipe())
    data = GraphDataModule(alloys, "high")
    for part in ("test", "val"):  # which would be taken for 0, or stop the run after its last epoch
        dataset, indices = data.parts[part]
        dataset.targets[indices[0]] = 0.7
        with pytest.raises(InputError, match=r"0 or 1 for every crystal; this one has 0\.7"):
            TrainingModule(SRCGCNN(classification=True), data, Recipe())
    for name in ("weight_decay", "momentum", "gamma"):
        for value in (-0.1, float("nan")):
            with pytest.raises(InputError, match=f"{name} {value} is not a number of at least 0"):
                Recipe(**{name: value})
    with pytest.raises(InputError, match=r"milestones \(20, -5\) are epochs before the first"):
        Recipe(milestones=(20, -5))
    with pytest.raises(InputError, match=r"gradient_clip of -1\.0 bounds nothing"):
        Recipe(gradient_clip=-1.0)
    with pytest.raises(InputError, match="seed -1 is not"):
        fit(SRCGCNN(), GraphDataModule(alloys, "energy"), tmp_path / "run", seed=-1, accelerator="cpu")
    with pytest.raises(InputError, match="patience of 0"):
        Recipe(patience=0)
    with pytest.raises(InputError, match="frozen part 'pooling'"):
        Recipe(freeze="pooling")
    assert Recipe(freeze="head") == Recipe(freeze=["head"]) == Recipe(freeze=("head",))
    with pytest.raises(InputError, match="class weights"):
        Recipe(class_weights=(1.0, -1.0))
    with pytest.raises(InputError, match="for a classifier"):
        TrainingModule(SRCGCNN(), GraphDataModule(alloys, "energy"), Recipe(class_weights="balanced"))
    made = [alloys[i] for i in range(4)]
    for number in (-1, 0, 101):
        bad = [*made[:2], dataclasses.replace(made[2], numbers=made[2].numbers * 0 + number), made[3]]
        store = GraphStore.from_graphs(bad, ids=["a", "b", "c", "d"], targets={"energy": [1, 2, 3, 4]})
        for split in (([0, 1], [2], []), ([2, 1], [3], [])):
            with pytest.raises(InputError, match=f"^c has an atom of atomic number {number}, .* leave it out"):
                data = GraphDataModule(store, "energy", split=Split(*map(np.array, split)))
                TrainingModule(SRCGCNN(), data, Recipe())
    poor = SRCGCNN()
    poor.element_table[:60] = 0
    with pytest.raises(InputError, match=r"^\d+, one of \d+ such crystals, has \w+, which .* lacks; leave it out"):
        TrainingModule(poor, GraphDataModule(alloys, "energy"), Recipe())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for accelerator in ("cpu", "auto"):
        with pytest.raises(InputError, match="needs a CUDA GPU; leave captured out"):
            fit(SRCGCNN(), GraphDataModule(alloys, "energy"), tmp_path / "run", accelerator=accelerator, captured=True)


def test_a_run_leaves_the_process_as_it_was(alloys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def settings():
        level = logging.getLogger("lightning.pytorch").level
        return torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory, level

    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = settings()
    np.random.seed(7)
    random.seed(7)
    expected = np.random.RandomState(7).rand(), random.Random(7).random()
    run(alloys, tmp_path / "run", epochs=1)
    assert before == settings()
    assert (np.random.rand(), random.random()) == expected
    ours = torch.rand(1)
    torch.manual_seed(0)
    SRCGCNN(n_recurrent_steps=2, atom_fea_len=16, h_fea_len=16)
    assert ours == torch.rand(1)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "best.ckpt", "last.ckpt", "metrics.csv", "model", "run.json",
    ]  # fmt: skip


def test_lightning_before_2_6_resumes_too_and_executes_nothing(alloys, tmp_path, monkeypatch):
    begin = pl.Trainer.fit

    def before(self, model, train_dataloaders=None, val_dataloaders=None, datamodule=None, ckpt_path=None):
        return begin(self, model, train_dataloaders, val_dataloaders, datamodule, ckpt_path)

    monkeypatch.setattr(pl.Trainer, "fit", before)
    with pytest.raises(RuntimeError, match="stopped"):
        run(alloys, tmp_path, callbacks=[StopIn(2)])
    assert len(run(alloys, tmp_path, resume=True).history) == 4
    (tmp_path / "best.ckpt").write_bytes(b"")
    with pytest.raises(InputError, match=r"best\.ckpt is damaged"):
        run(alloys, tmp_path, resume=True)
    last = tmp_path / "last.ckpt"
    torch.save({"state_dict": print}, last)
    for data, said in (
        (last.read_bytes(), "UnpicklingError"),
        (last.read_bytes()[:99], "RuntimeError"),
        (b"", "EOFError"),
    ):
        last.write_bytes(data)
        with pytest.raises(InputError, match=rf"last\.ckpt is damaged \({said}\)"):
            run(alloys, tmp_path, resume=True)


def test_checkpoints_go_to_their_disk_alone_and_a_full_one_is_named(alloys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "another disk"))  # which is not there
    write, checkpoints = Path.write_bytes, []

    def full(self, data):
        checkpoints.append(self.name)
        if len(checkpoints) == 3:  # the first of the second epoch
            write(self, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device") as stopped:
        run(alloys, tmp_path / "run", epochs=2)
    assert Path(stopped.value.filename) == tmp_path / "run" / checkpoints[-1]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "best.ckpt", "last.ckpt", "metrics.csv", "run.json",
    ]  # fmt: skip
    monkeypatch.undo()
    assert run(alloys, tmp_path / "run", epochs=2, resume=True).history[1]["epoch"] == 2


def test_a_logger_that_is_not_there_is_one_sentence(alloys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r'wandb: python -m pip install "srcgcnn_fast\[wandb\]"'):
        fit(CGCNN(1, 8, 8), GraphDataModule(alloys, "energy"), tmp_path / "w", Recipe(epochs=1), logger="wandb")
    with pytest.raises(InputError, match=r'tensorboard: python -m pip install "srcgcnn_fast\[tensorboard\]"'):
        fit(CGCNN(1, 8, 8), GraphDataModule(alloys, "energy"), tmp_path / "run", Recipe(epochs=1), logger="tensorboard")
    with pytest.raises(InputError, match="logger 'paper' is unknown"):
        fit(CGCNN(1, 8, 8), GraphDataModule(alloys, "energy"), tmp_path / "new", Recipe(epochs=1), logger="paper")


def test_rows_of_a_run_that_an_older_version_began(tmp_path):
    write_table(tmp_path / "metrics.csv", [{"epoch": 1, "val_mae": 0.5}, {"epoch": 2, "val_mae_scaled": 0.25}])
    assert (tmp_path / "metrics.csv").read_text().split() == ["epoch,val_mae,val_mae_scaled", "1,0.5,", "2,,0.25"]
