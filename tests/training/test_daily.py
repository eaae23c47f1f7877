"""What daily work needs of a run: missing labels, early stopping, class weights, frozen parts."""

from __future__ import annotations

import logging
import sys

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from srcgcnn_fast import CGCNN, SRCGCNN, InputError, load_model
from srcgcnn_fast.graph import GraphStore
from srcgcnn_fast.training import GraphDataModule, Recipe, Split, TrainingModule, evaluate, fit
from srcgcnn_fast.training.metrics import regression_metrics

SPLIT = Split(np.arange(0, 100), np.arange(100, 130), np.arange(130, 160))


def small(**options) -> SRCGCNN:
    torch.manual_seed(0)
    return SRCGCNN(n_recurrent_steps=2, atom_fea_len=16, h_fea_len=16, **options)


def with_targets(store: GraphStore, **targets: np.ndarray) -> GraphStore:
    return GraphStore.from_graphs([store[i] for i in range(len(store))], targets=targets)


# ---- missing labels


def test_a_missing_label_weighs_nothing(alloys):
    data = GraphDataModule(alloys, ["energy", "volume"], split=SPLIT)
    for name, power in (("mse", 2), ("mae", 1)):
        module = TrainingModule(small(n_targets=2), data, Recipe(loss=name))
        output = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], requires_grad=True)
        target = torch.tensor([[0.1, float("nan")], [0.3, 17.0]])
        error = (output - (target - module.target_mean) / module.target_std).abs() ** power
        loss = module.loss(output, target)
        assert loss.item() == pytest.approx(float(error.detach().nansum() / 3))
        loss.backward()
        assert output.grad[0, 1] == 0 and (output.grad.flatten()[[0, 2, 3]] != 0).all()


def test_the_normaliser_takes_the_labels_that_are_there(alloys, caplog):
    with caplog.at_level(logging.WARNING):
        data = GraphDataModule(alloys, ["energy", "volume"], split=SPLIT)
    assert "16 crystals lack volume" in caplog.text
    module = TrainingModule(small(n_targets=2), data, Recipe())
    volume = alloys.targets["volume"][:100]
    assert module.target_mean[1].item() == pytest.approx(np.nanmean(volume))
    assert module.target_std[1].item() == pytest.approx(np.nanstd(volume))
    assert module.target_mean[0].item() == pytest.approx(alloys.targets["energy"][:100].mean())


def test_what_a_missing_label_was_does_not_matter(alloys, tmp_path):
    """Half of the volumes gone, and two crystals without any label: as if those two had never been there."""
    energy, volume = alloys.targets["energy"].copy(), alloys.targets["volume"].copy()
    volume[::2], energy[[4, 6]] = np.nan, np.nan
    data = GraphDataModule(with_targets(alloys, energy=energy, volume=volume), ["energy", "volume"], batch_size=32)
    assert sum(len(part.indices) for part in data.parts.values()) == 158
    result = fit(small(n_targets=2), data, tmp_path, Recipe(epochs=3, lr=5e-3), accelerator="cpu")
    evaluation = evaluate(result.model, data, "val")
    error = np.abs(evaluation.predicted - evaluation.target)
    assert np.isnan(error[:, 1]).any()
    row = result.best
    assert row["val_mae_volume"] == pytest.approx(np.nanmean(error[:, 1]), rel=1e-5)
    assert row["val_mae_energy"] == pytest.approx(np.nanmean(error[:, 0]), rel=1e-5)
    assert "val_mae" not in row  # an average over units would mean nothing
    scaled = np.nanmean(error, axis=0) / np.array(result.model.metadata.std)
    assert row["val_mae_scaled"] == pytest.approx(scaled.mean(), rel=1e-5)
    assert row["val_mae_scaled"] == min(line["val_mae_scaled"] for line in result.history)


def test_scores_leave_out_what_is_missing():
    target = torch.tensor([[1.0, np.nan], [2.0, 5.0], [4.0, 6.0]])
    predicted = torch.tensor([[1.5, 99.0], [2.0, 4.0], [3.0, 6.0]])
    names, std = ["a", "b"], torch.tensor([2.0, 4.0])
    scores = regression_metrics(predicted, target, names, std)
    expected = {"mae_a": 0.5, "rmse_a": (1.25 / 3) ** 0.5, "r2_a": 1 - 1.25 / (14 / 3)}
    expected |= {"mae_b": 0.5, "rmse_b": 0.5**0.5, "r2_b": 1 - 1 / 0.5, "mae_scaled": (0.25 + 0.125) / 2}
    assert scores == pytest.approx(expected)
    nothing = regression_metrics(predicted, torch.where(torch.tensor([True, False]), target, torch.nan), names, std)
    assert nothing["mae_scaled"] == 0.25 and np.isnan(nothing["rmse_b"])


def test_a_target_that_nothing_trains_is_a_sentence(alloys):
    volume = alloys.targets["volume"].copy()
    volume[:100] = np.nan
    store = with_targets(alloys, energy=alloys.targets["energy"], volume=volume)
    with pytest.raises(InputError, match="No training crystal has a value of volume"):
        TrainingModule(small(n_targets=2), GraphDataModule(store, ["energy", "volume"], split=SPLIT), Recipe())


# ---- early stopping


class Killed(Exception):
    pass


def test_patience_ends_the_run_and_a_killed_one_gets_no_epoch_more(alloys, tmp_path, monkeypatch):
    data = GraphDataModule(alloys, "energy", batch_size=32)
    recipe = Recipe(epochs=40, lr=0.05, schedule="constant", patience=2)
    result = fit(small(), data, tmp_path / "whole", recipe, accelerator="cpu")
    epochs = len(result.history)
    assert epochs == result.best["epoch"] + 2 < 40

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:  # after the last epoch, before the model is written
        patch.setattr(sys.modules["srcgcnn_fast.training.fit"], "save_model", killed)
        with pytest.raises(Killed):
            fit(small(), data, tmp_path / "cut", recipe, accelerator="cpu")
    resumed = fit(small(), data, tmp_path / "cut", recipe, resume=True, accelerator="cpu")
    assert len(resumed.history) == epochs
    states = [torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("whole", "cut")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# ---- class weights


def test_class_weights_multiply_each_crystals_loss(alloys):
    rare = np.zeros(160)
    rare[:40:2] = 1.0
    data = GraphDataModule(with_targets(alloys, rare=rare), "rare", split=SPLIT)
    output = torch.log(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.5, 0.5]]))
    target = torch.tensor([[0.0], [1.0], [0.0]])
    plain = -np.log([0.9, 0.2, 0.5])
    for given, weights in {None: (1, 1), (1.0, 3.0): (1, 3), "balanced": (100 / 160, 100 / 40)}.items():
        module = TrainingModule(small(classification=True), data, Recipe(class_weights=given))
        expected = (plain * np.array([weights[0], weights[1], weights[0]])).mean()
        assert float(module.loss(output, target)) == pytest.approx(expected)


def test_balanced_classes_find_more_of_the_rare_one(alloys, tmp_path):
    rare = (alloys.targets["energy"] > np.quantile(alloys.targets["energy"], 0.9)).astype(float)
    data = GraphDataModule(with_targets(alloys, rare=rare), "rare", batch_size=32)
    chance = []
    for weights in (None, "balanced"):
        recipe = Recipe(epochs=8, lr=5e-3, class_weights=weights)
        result = fit(small(classification=True), data, tmp_path / str(weights), recipe, accelerator="cpu")
        chance.append(evaluate(result.model, data, "train").predicted.mean())
    assert chance[1] > 2 * chance[0]


# ---- frozen parts


@pytest.mark.parametrize("recipe", [{}, {"optimizer": "adamw", "weight_decay": 0.5, "ema": 0.9}], ids=["adam", "ema"])
@pytest.mark.parametrize("build", [SRCGCNN, CGCNN])
def test_frozen_parts_stay_batch_norms_included(alloys, tmp_path, recipe, build):
    options = {"recurrent_learnable_alpha": True, "recurrent_layer_norm": True} if build is SRCGCNN else {}
    torch.manual_seed(0)
    model = build(2, 16, 16, **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = GraphDataModule(alloys, "energy", batch_size=32)
    recipe = Recipe(epochs=2, freeze=("embedding", "convolutions"), **recipe)
    fit(model, data, tmp_path, recipe, accelerator="cpu")
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"conv_to_fc.weight", "conv_to_fc.bias", "fc_out.weight", "fc_out.bias"}
    assert all(p.requires_grad for p in model.parameters())  # it can be trained further


def test_a_run_that_ends_early_leaves_nothing_frozen(alloys, tmp_path):
    """Or the next one, which freezes nothing, would train the output layer alone, and not say so."""

    class Stop(pl.Callback):
        def on_train_batch_start(self, *_):
            raise KeyboardInterrupt

    data, recipe = GraphDataModule(alloys, "energy", split=SPLIT), Recipe(epochs=1, freeze=("convolutions", "head"))
    model = small()
    with pytest.raises(KeyboardInterrupt):
        fit(model, data, tmp_path / "run", recipe, callbacks=[Stop()], accelerator="cpu")
    assert all(p.requires_grad for p in model.parameters())
    fit(small(), data, tmp_path / "done", recipe, accelerator="cpu")
    with pytest.raises(InputError, match="already holds a run"):
        fit(model, data, tmp_path / "done", recipe, accelerator="cpu")
    assert all(p.requires_grad for p in model.parameters())


def test_frozen_parts_stay_in_evaluation_mode_whoever_calls_train(alloys):
    module = TrainingModule(small(), GraphDataModule(alloys, "energy"), Recipe(freeze=("convolutions",))).train()
    assert module.model.training and not module.model.recurrent_bn1s[1].training
    assert not module.model.shared_conv.fc_full.weight.requires_grad and module.model.embedding.weight.requires_grad
    module.thaw()
    assert module.model.shared_conv.fc_full.weight.requires_grad
    module.model.shared_conv.fc_full.bias.requires_grad_(False)  # by the user, who keeps it so
    TrainingModule(module.model, GraphDataModule(alloys, "energy"), Recipe(freeze=("convolutions",))).thaw()
    assert [name for name, p in module.model.named_parameters() if not p.requires_grad] == ["shared_conv.fc_full.bias"]


def test_without_freezing_all_moves(alloys, tmp_path):
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, GraphDataModule(alloys, "energy", batch_size=32), tmp_path, Recipe(epochs=2), accelerator="cpu")
    names = ("embedding.weight", "shared_conv.fc_full.weight", "recurrent_bn1s.1.running_mean", "fc_out.weight")
    assert not any(torch.equal(before[name], model.state_dict()[name]) for name in names)
    assert load_model(tmp_path / "model").metadata.extra["training"]["freeze"] == []
