"""Scores of a regressor and of a classifier, each from all predictions at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import require


def regression_metrics(predicted: Tensor, target: Tensor) -> dict[str, float]:
    """Mean absolute error, root mean squared error and R² of ``predicted`` (n, T) against ``target`` (n, T).

    The errors are in the target's units and averaged over the T targets; R² is NaN below two crystals. A NaN in
    ``target`` is not counted, nor is a target without any value.
    """
    functional = require("torchmetrics.functional", "Scoring", extra="train")
    columns = []
    for found, given in zip(predicted.cpu().double().T, target.cpu().double().T, strict=True):
        found, given = found[given.isfinite()], given[given.isfinite()]
        if len(given):
            columns.append(
                (
                    functional.mean_absolute_error(found, given),
                    functional.mean_squared_error(found, given, squared=False),
                    functional.r2_score(found, given) if len(given) > 1 else torch.tensor(math.nan),
                )
            )
    means = [float(torch.stack(column).mean()) for column in zip(*columns, strict=True)] or [math.nan] * 3
    return dict(zip(("mae", "rmse", "r2"), means, strict=True))


def target_metrics(predicted: Tensor, target: Tensor, names: Sequence[str], std: Tensor) -> dict[str, float]:
    """Of several targets: ``mae_NAME`` of each in its unit, and ``mae_scaled``, the mean of MAE / ``std`` (T,).

    The last is what epochs of a model with several targets are ranked by. One target has neither.
    """
    if len(names) < 2:
        return {}
    error = (predicted - target).abs().double().cpu()
    scores = {f"mae_{name}": float(column.nanmean()) for name, column in zip(names, error.T, strict=True)}
    return {**scores, "mae_scaled": float((error.nanmean(dim=0) / std.double().cpu()).nanmean())}


def classification_metrics(probability: Tensor, label: Tensor) -> dict[str, float]:
    """Accuracy, precision, recall and F1 at P(class 1) = ½, and the area under the ROC curve.

    ``probability`` (n,) is P(class 1) and ``label`` (n,) is 0 or 1. The area is NaN where one class is absent.
    """
    functional = require("torchmetrics.functional.classification", "Scoring", extra="train")
    probability, label = probability.cpu().double().flatten(), label.cpu().long().flatten()
    both = len(torch.unique(label)) == 2
    return {
        "accuracy": float(functional.binary_accuracy(probability, label)),
        "precision": float(functional.binary_precision(probability, label)),
        "recall": float(functional.binary_recall(probability, label)),
        "f1": float(functional.binary_f1_score(probability, label)),
        "auc": float(functional.binary_auroc(probability, label)) if both else math.nan,
    }
