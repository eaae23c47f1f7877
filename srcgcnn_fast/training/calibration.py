"""How large a predicted standard deviation must be to mean what it says."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from statistics import NormalDist

import numpy as np

from ..errors import InputError
from ..uncertainty import DROPOUT_SCALE, MonteCarloDropout, Sampler
from .data import GraphDataModule
from .evaluate import Evaluation, evaluate
from .plots import new_figure, save_figure

_ROUNDING = 1e4
"""Errors over spread from which on the spread is that of single precision."""
ONE_STD = 2 * NormalDist().cdf(1.0) - 1
"""0.6827: the share of a normal distribution within one standard deviation."""


def calibrate(sampler: Sampler, data: GraphDataModule, part: str = "val") -> tuple[float, ...]:
    """Scale ``sampler`` so that the stated standard deviation covers 68.3 % of the errors of ``part``, per target.

    The factor is that quantile of |error| / standard deviation, which no outlier moves; it is returned, set in
    ``sampler.scale`` and, for dropout, kept in the model's ``metadata.extra``. A classifier's is 1: its probability
    states its own uncertainty.

    Raises:
        InputError: no crystal of ``part`` has the target, or its predictions have no spread but rounding.
    """
    before, scale = sampler.scale, (1.0,) * len(data.targets)
    sampler.scale = scale
    try:
        if not sampler.models[0].hyperparameters["classification"]:
            found = evaluate(sampler, data, part)
            scale = tuple(_factor(found, k, part) for k in range(len(data.targets)))
    finally:
        sampler.scale = before
    sampler.scale = scale
    if isinstance(sampler, MonteCarloDropout):
        sampler.metadata.extra[DROPOUT_SCALE] = list(sampler.scale)
    return sampler.scale


def _factor(found: Evaluation, k: int, part: str) -> float:
    score = standard_scores(found)[k]
    factor = float(np.quantile(np.abs(score), ONE_STD)) if len(score) else np.nan
    if not np.isfinite(factor) or factor == 0:
        raise InputError(
            f"The {part} predictions of {found.target_names[k]} cannot be calibrated: no crystal has both a value and "
            "a spread; use another part."
        )
    if factor > _ROUNDING:
        raise InputError(
            f"The {part} predictions of {found.target_names[k]} cannot be calibrated: their spread, {1 / factor:.0e} "
            "of their errors, is rounding; train members that differ, from other weights or with smaller batches."
        )
    return factor


def standard_scores(found: Evaluation) -> list[np.ndarray]:
    """Per target, error / standard deviation of the crystals that have a value.

    Raises:
        InputError: the evaluation has no standard deviation.
    """
    if found.std is None:
        raise InputError("This evaluation has no standard deviation; evaluate an ensemble, or dropout left on.")
    error = found.predicted - found.target
    with np.errstate(divide="ignore", invalid="ignore"):
        score = error / found.std
    return [column[~np.isnan(column)] for column in score.T]


def coverage(found: Evaluation, levels: np.ndarray) -> np.ndarray:
    """(T, len(levels)): the share of errors inside the central interval that should hold the share ``levels``."""
    reach = np.array([NormalDist().inv_cdf((1 + level) / 2) for level in levels])
    return np.array([(np.abs(score)[:, None] <= reach).mean(axis=0) for score in standard_scores(found)])


def calibration_plot(path: str | os.PathLike[str], found: Evaluation, scale: tuple[float, ...]) -> Path:
    """Observed against expected coverage of ``found``, which ``scale`` calibrated, with and without it."""
    levels = np.linspace(0.01, 0.99, 99)
    if found.std is None:
        raise InputError("This evaluation has no standard deviation; evaluate an ensemble, or dropout left on.")
    raw = dataclasses.replace(found, std=found.std / np.array(scale))
    figure, axes = new_figure(len(found.target_names), width=4.2, height=4.2)
    for k, (axis, name) in enumerate(zip(axes, found.target_names, strict=True)):
        axis.plot((0, 1), (0, 1), color="0.6", linewidth=1)
        axis.plot(levels, coverage(raw, levels)[k], color="#d1603d", label="as predicted")
        axis.plot(levels, coverage(found, levels)[k], color="#1f6f8b", label=f"times {scale[k]:.3g} (from validation)")
        axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title=name.replace("_", " "))
        axis.set_xlabel("expected share of crystals within the interval")
        axis.legend(frameon=False, loc="upper left", fontsize=9)
    axes[0].set_ylabel("observed share")
    return save_figure(figure, path)
