"""Scores of a regressor and of a classifier, each from all predictions at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import require


def regression_metrics(predicted: Tensor, target: Tensor) -> dict[str, float]:
    """Mean absolute error, root mean squared error and R² of ``predicted`` (n, T) against ``target`` (n, T).

    The errors are in the target's units and averaged over the T targets; R² is NaN below two crystals.
    """
    functional = require("torchmetrics.functional", "Scoring", extra="train")
    predicted, target = predicted.cpu().double(), target.cpu().double()
    n_targets = target.shape[1]
    return {
        "mae": float(functional.mean_absolute_error(predicted, target)),
        "rmse": float(functional.mean_squared_error(predicted, target, squared=False, num_outputs=n_targets).mean()),
        "r2": float(functional.r2_score(predicted, target)) if len(target) > 1 else math.nan,
    }


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
