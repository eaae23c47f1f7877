"""Scores against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from srcgcnn_fast import InputError
from srcgcnn_fast.training.metrics import classification_metrics, regression_metrics


def test_regression():
    predicted, target = torch.tensor([[1.0, 4.0], [3.0, 0.0]]), torch.tensor([[2.0, 2.0], [3.0, 4.0]])
    gap = {"mae": (1 + 0) / 2, "rmse": math.sqrt(0.5), "r2": 1 - 1 / 0.5}
    volume = {"mae": (2 + 4) / 2, "rmse": math.sqrt(10), "r2": 1 - 20 / 2}
    std = torch.tensor([2.0, 4.0])
    assert regression_metrics(predicted[:, :1], target[:, :1], ["gap"], std[:1]) == pytest.approx(gap)
    both = {f"{kind}_{name}": score[kind] for name, score in (("gap", gap), ("volume", volume)) for kind in score}
    both["mae_scaled"] = (0.5 / 2 + 3 / 4) / 2
    assert regression_metrics(predicted, target, ["gap", "volume"], std) == pytest.approx(both)  # and no mean of units
    assert math.isnan(regression_metrics(predicted[:1], target[:1], ["gap", "volume"], std)["r2_gap"])


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_a_score_does_not_depend_on_the_unit(unit):
    target = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)
    predicted, std = target + torch.tensor([[0.1], [-0.2], [0.3]]), torch.ones(1)
    scores = regression_metrics(predicted * unit, target * unit, ["x"], std)
    expected = {"mae": 0.2 * unit, "rmse": math.sqrt(0.14 / 3) * unit, "r2": 1 - 0.14 / (14 / 3)}
    assert scores == pytest.approx(expected, rel=1e-6, abs=0)
    assert regression_metrics(predicted, torch.ones(3, 1), ["x"], std)["r2"] == 0
    assert regression_metrics(torch.ones(3, 1), torch.ones(3, 1), ["x"], std)["r2"] == 1


def test_classification():
    scores = classification_metrics(
        torch.tensor([[0.9], [0.8], [0.3], [0.6]]), torch.tensor([[1.0], [1.0], [0.0], [0.0]])
    )
    assert scores == pytest.approx({"accuracy": 0.75, "precision": 2 / 3, "recall": 1.0, "f1": 0.8, "auc": 1.0})
    ranked = classification_metrics(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1]))
    assert ranked["auc"] == pytest.approx(0.75)
    assert math.isnan(classification_metrics(torch.tensor([0.2, 0.7]), torch.tensor([1, 1]))["auc"])
    unknown = classification_metrics(torch.tensor([0.9, math.nan, 0.3, 0.6]), torch.tensor([1, 1, 0, 0]))
    assert unknown.keys() == scores.keys() and all(map(math.isnan, unknown.values()))
    with pytest.raises(InputError, match=r"must be 0 or 1 for every crystal; this one has 0\.7, too"):
        classification_metrics(torch.tensor([0.2, 0.7]), torch.tensor([0.0, 0.7]))
