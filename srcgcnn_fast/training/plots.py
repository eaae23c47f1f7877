"""Parity plots, learning curves and errors by depth, size and element, as PNG files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import require
from ..files import atomic_path
from ..graph.elements import ELEMENT_SYMBOLS

COLOURS = ("#1f6f8b", "#d1603d", "#6b8f3c", "#7a5195")


def parity_plot(
    path: str | os.PathLike[str],
    panels: Mapping[str, tuple[np.ndarray, np.ndarray]],
    quantity: str,
    unit: str = "",
    dpi: int = 150,
) -> Path:
    """Predicted against given values, one panel per model: ``panels[title] = (target (n,), predicted (n,))``."""
    figure, axes = new_figure(len(panels), width=4.2, height=4.2)
    values = np.concatenate([np.concatenate(pair) for pair in panels.values()])
    low, high = float(values.min()), float(values.max())
    margin = 0.05 * (high - low) or 1.0
    limits = (low - margin, high + margin)
    for axis, colour, (title, (target, predicted)) in zip(axes, COLOURS, panels.items(), strict=False):
        axis.plot(limits, limits, color="0.6", linewidth=1, zorder=1)
        axis.scatter(target, predicted, s=12, alpha=0.6, linewidths=0, color=colour, zorder=2)
        mae = float(np.abs(predicted - target).mean())
        axis.set_title(f"{title}: MAE {mae:.3g} {unit}".rstrip(), fontsize=10)
        axis.set(xlim=limits, ylim=limits, aspect="equal")
        axis.set_xlabel(f"{_label(quantity, unit)}, given")
    axes[0].set_ylabel(f"{_label(quantity, unit)}, predicted")
    return save_figure(figure, path, dpi)


def learning_curves(
    path: str | os.PathLike[str],
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    unit: str = "",
    dpi: int = 150,
) -> Path:
    """Training loss and the MAE on the validation set against the epoch, one line per model."""
    figure, (left, right) = new_figure(2, width=4.4, height=3.4)
    for colour, (name, rows) in zip(COLOURS, histories.items(), strict=False):
        epochs = [row["epoch"] for row in rows]
        left.plot(epochs, [row["train_loss"] for row in rows], label=name, color=colour)
        right.plot(epochs, [row["val_mae"] for row in rows], label=name, color=colour)
    left.set(xlabel="epoch", ylabel="training loss (normalised)")
    right.set(xlabel="epoch", ylabel=_label("validation MAE", unit))
    for axis, name in ((left, "train_loss"), (right, "val_mae")):
        if all(row[name] > 0 for rows in histories.values() for row in rows):
            axis.set_yscale("log")
    right.legend(frameon=False)
    return save_figure(figure, path, dpi)


def depth_plot(
    path: str | os.PathLike[str], steps: Mapping[int, np.ndarray], layers: Mapping[str, float], unit: str = ""
) -> Path:
    """Mean absolute error against T, ``steps[T] = (S,)`` of S seeds; the error of each CGCNN as a line across."""
    figure, (axis,) = new_figure(1, width=5.5, height=3.6)
    for k, (name, error) in enumerate(layers.items()):
        axis.axhline(error, label=name, color=COLOURS[0], linestyle=("-", "--", ":")[k % 3])
    means = [float(errors.mean()) for errors in steps.values()]
    spread = [float(errors.std(ddof=1)) if len(errors) > 1 else 0.0 for errors in steps.values()]
    axis.errorbar(list(steps), means, yerr=spread, marker="o", label="SR-CGCNN", color=COLOURS[1], capsize=3)
    axis.set_xticks(list(steps))
    axis.set(xlabel="steps T", ylabel=_label("MAE", unit))
    axis.legend(frameon=False)
    return save_figure(figure, path, 100)


def size_plot(
    path: str | os.PathLike[str], groups: Mapping[str, tuple[int, Mapping[str, float]]], unit: str = ""
) -> Path:
    """Mean absolute error by size, ``groups[range] = (crystals, {model: error})``."""
    figure, (axis,) = new_figure(1, width=6.0, height=3.4)
    names = list(next(iter(groups.values()))[1])
    for k, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        places = np.arange(len(groups)) + (k - (len(names) - 1) / 2) * 0.8 / len(names)
        axis.bar(places, [errors[name] for _, errors in groups.values()], 0.8 / len(names), label=name, color=colour)
    axis.set_xticks(range(len(groups)), [f"{name}\n({count})" for name, (count, _) in groups.items()])
    axis.set(xlabel="atoms in the cell (crystals)", ylabel=_label("MAE", unit))
    axis.legend(frameon=False)
    return save_figure(figure, path, 100)


def element_plot(
    path: str | os.PathLike[str], numbers: np.ndarray, errors: Mapping[str, np.ndarray], unit: str = ""
) -> Path:
    """Mean absolute error of the crystals with each element: atomic ``numbers`` (n,), ``errors[model]`` (n,)."""
    figure, (axis,) = new_figure(1, width=11.0, height=3.4)
    for (name, values), colour in zip(errors.items(), COLOURS, strict=False):
        axis.plot(range(len(numbers)), values, "o-", label=name, color=colour, markersize=3.5, linewidth=0.8)
    labels = ["\n" * (k % 2) + ELEMENT_SYMBOLS[z] for k, z in enumerate(numbers)]  # on two lines, else they touch
    axis.set_xticks(range(len(numbers)), labels, fontsize=7)
    axis.set(ylabel=_label("MAE", unit), xlim=(-1, len(numbers)), ylim=(0, None))
    axis.legend(frameon=False)
    return save_figure(figure, path, 100)


def _label(quantity: str, unit: str) -> str:
    return f"{quantity.replace('_', ' ')} ({unit})" if unit else quantity.replace("_", " ")


def new_figure(columns: int, width: float, height: float) -> tuple[Any, Sequence[Any]]:
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


def save_figure(figure: Any, path: str | os.PathLike[str], dpi: int = 150) -> Path:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
    return Path(path)
