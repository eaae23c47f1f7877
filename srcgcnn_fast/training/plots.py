"""Parity plots and learning curves as PNG files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import require
from ..files import atomic_path

_COLOURS = ("#1f6f8b", "#d1603d", "#6b8f3c", "#7a5195")


def parity_plot(
    path: str | os.PathLike[str],
    panels: Mapping[str, tuple[np.ndarray, np.ndarray]],
    quantity: str,
    unit: str = "",
) -> Path:
    """Predicted against given values, one panel per model: ``panels[title] = (target (n,), predicted (n,))``."""
    figure, axes = _figure(len(panels), width=4.2, height=4.2)
    values = np.concatenate([np.concatenate(pair) for pair in panels.values()])
    low, high = float(values.min()), float(values.max())
    margin = 0.05 * (high - low) or 1.0
    limits = (low - margin, high + margin)
    for axis, colour, (title, (target, predicted)) in zip(axes, _COLOURS, panels.items(), strict=False):
        axis.plot(limits, limits, color="0.6", linewidth=1, zorder=1)
        axis.scatter(target, predicted, s=12, alpha=0.6, linewidths=0, color=colour, zorder=2)
        mae = float(np.abs(predicted - target).mean())
        axis.set_title(f"{title}: MAE {mae:.3g} {unit}".rstrip(), fontsize=10)
        axis.set(xlim=limits, ylim=limits, aspect="equal")
        axis.set_xlabel(f"{_label(quantity, unit)}, given")
    axes[0].set_ylabel(f"{_label(quantity, unit)}, predicted")
    return _save(figure, path)


def learning_curves(
    path: str | os.PathLike[str],
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    metric: str = "val_mae",
    unit: str = "",
) -> Path:
    """Training loss and ``metric`` on the validation set against the epoch, one line per model."""
    figure, (left, right) = _figure(2, width=4.4, height=3.4)
    for colour, (name, rows) in zip(_COLOURS, histories.items(), strict=False):
        epochs = [row["epoch"] for row in rows]
        left.plot(epochs, [row["train_loss"] for row in rows], label=name, color=colour)
        right.plot(epochs, [row[metric] for row in rows], label=name, color=colour)
    left.set(xlabel="epoch", ylabel="training loss (normalised)")
    right.set(xlabel="epoch", ylabel=_label(metric.replace("val_", "validation ").replace("mae", "MAE"), unit))
    for axis, name in ((left, "train_loss"), (right, metric)):
        if all(row[name] > 0 for rows in histories.values() for row in rows):
            axis.set_yscale("log")
    right.legend(frameon=False)
    return _save(figure, path)


def _label(quantity: str, unit: str) -> str:
    return f"{quantity.replace('_', ' ')} ({unit})" if unit else quantity.replace("_", " ")


def _figure(columns: int, width: float, height: float) -> tuple[Any, Sequence[Any]]:
    require("matplotlib", "Plotting", extra="train")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # the pyplot state would choose a display
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width * columns, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: str | os.PathLike[str]) -> Path:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return Path(path)
