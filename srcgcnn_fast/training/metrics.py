"""Scores of a regressor and of a classifier, each from all predictions at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, require


def regression_metrics(predicted: Tensor, target: Tensor, names: Sequence[str], std: Tensor) -> dict[str, float]:
    """``mae``, ``rmse`` (in the target's unit) and ``r2`` of ``predicted`` (n, T) against ``target`` (n, T).

    Of several targets, whose units may differ, nothing is averaged but what has none: ``mae_scaled``, by which epochs
    are ranked, is the mean of MAE / ``std`` (T,), and each target has its own ``mae_NAME``, ``rmse_NAME`` and
    ``r2_NAME``. A NaN in ``target`` is not counted; a target without any value scores NaN and does not count in
    ``mae_scaled``. R² is NaN below two crystals, and 0 where all have one value that is not met.
    """
    columns = zip(predicted.cpu().double().T, target.cpu().double().T, strict=True)
    scores = [_scores(found[given.isfinite()], given[given.isfinite()]) for found, given in columns]
    if len(names) == 1:
        return scores[0]
    scaled = torch.tensor([score["mae"] for score in scores], dtype=torch.float64) / std.double().cpu()
    each = {f"{kind}_{name}": score[kind] for name, score in zip(names, scores, strict=True) for kind in score}
    return {"mae_scaled": float(scaled.nanmean()), **each}


def _scores(found: Tensor, given: Tensor) -> dict[str, float]:
    if not len(given):
        return dict.fromkeys(("mae", "rmse", "r2"), math.nan)
    squares = float((found - given).square().sum())
    return {
        "mae": float((found - given).abs().mean()),
        "rmse": math.sqrt(squares / len(given)),
        "r2": _r2(squares, given) if len(given) > 1 else math.nan,
    }


def _r2(squares: float, given: Tensor) -> float:
    """Not torchmetrics': it takes sums of squares below 1e-4 for 0, which they are in some units, and answers 1."""
    if given.max() > given.min():
        return 1 - squares / float((given - given.mean()).square().sum())
    return float(squares == 0)


def check_classes(labels: np.ndarray) -> None:
    """Raises InputError: some label is neither 0 nor 1."""
    if len(other := labels[~np.isin(labels, (0.0, 1.0))]):
        raise InputError(f"A classifier's target must be 0 or 1 for every crystal; this one has {other[0]:g}, too.")


def classification_metrics(probability: Tensor, label: Tensor) -> dict[str, float]:
    """Accuracy, precision, recall and F1 at P(class 1) = ½, and the area under the ROC curve.

    ``probability`` (n,) is P(class 1) and ``label`` (n,) is 0 or 1. The area is NaN where one class is absent,
    and every score where a probability is.

    Raises:
        InputError: a label is something else.
    """
    functional = require("torchmetrics.functional.classification", "Scoring", extra="train")
    probability, label = (x.cpu().double().flatten() for x in (probability, label))
    check_classes(label.numpy())
    label = label.long()
    if not probability.isfinite().all():  # of which torchmetrics would make other numbers than probabilities
        return dict.fromkeys(("accuracy", "precision", "recall", "f1", "auc"), math.nan)
    both = len(torch.unique(label)) == 2
    return {
        "accuracy": float(functional.binary_accuracy(probability, label)),
        "precision": float(functional.binary_precision(probability, label)),
        "recall": float(functional.binary_recall(probability, label)),
        "f1": float(functional.binary_f1_score(probability, label)),
        "auc": float(functional.binary_auroc(probability, label)) if both else math.nan,
    }


def decimals(error: float) -> int:
    """Four, or as many as leave an ``error`` three digits where the unit makes it small."""
    return max(4, 2 - math.floor(math.log10(error))) if 0 < error < math.inf else 4
