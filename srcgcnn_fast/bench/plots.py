"""The bar chart of throughput and the roofline, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..training.plots import new_figure, save_figure

if TYPE_CHECKING:
    from .ceilings import Ceilings
    from .report import Row

_COLOURS = {"reference": "#9aa5ad", "cpu": "#1f6f8b", "cpu native": "#d1603d"}
_LABELS = {
    "reference": "reference backend (plain PyTorch), same graph",
    "cpu": "compiled backend, same graph",
    "cpu native": "compiled backend, native graph (symmetry quotient)",
}

_FLOOR_COLOURS = {"nodes": "#6b8f3c", "gates": "#b5cf8f", "memory": "#7a5195"}
_FLOOR_LABELS = {"nodes": "node products", "gates": "gates", "memory": "memory traffic, beside the arithmetic"}


def _series(row: Row) -> str:
    return row.backend if row.graph == "same graph" or row.backend == "reference" else f"{row.backend} native"


def bar_chart(path: Path, rows: Sequence[Row], described: str) -> Path:
    """Crystals per second of every backend, with the most threads that were measured."""
    threads = max(row.threads for row in rows)
    rows = [row for row in rows if row.threads == threads and (row.backend, row.graph) != ("reference", "native")]
    figure, axes = new_figure(2, width=5.0, height=4.0)
    for axis, work in zip(axes, ("inference", "training step"), strict=True):
        shown = [row for row in rows if row.work == work]
        models = list(dict.fromkeys(row.model for row in shown))
        series = list(dict.fromkeys(_series(row) for row in shown))
        slowest = {row.model: row.crystals_per_second for row in shown if _series(row) == series[0]}
        for row in shown:
            k, width = series.index(_series(row)), 0.8 / len(series)
            x = models.index(row.model) + (k - (len(series) - 1) / 2) * width
            axis.bar(x, row.crystals_per_second, width * 0.92, color=_COLOURS[series[k]])
            factor = row.crystals_per_second / slowest[row.model]
            text = f"{row.crystals_per_second:,.0f}" + ("" if k == 0 else f"\n{factor:.1f}×")
            axis.text(x, row.crystals_per_second, text, ha="center", va="bottom", fontsize=8)
        axis.set_xticks(range(len(models)), models)
        axis.set_title(work, fontsize=11)
        axis.margins(y=0.14)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes[0].set_ylabel("crystals per second")
    patches = [axes[0].bar(0, 0, color=_COLOURS[name], label=_LABELS[name]) for name in series]
    figure.legend(handles=patches, loc="outside lower center", ncols=1, frameon=False, fontsize=9)
    figure.suptitle(f"{described}; float32, {_threads(threads)}", fontsize=10)
    return save_figure(figure, path)


def roofline(path: Path, rows: Sequence[Row], ceilings: Mapping[int, Ceilings], described: str) -> Path:
    """Measured time per edge and step of every kernel against the floor that this machine's ceilings set."""
    counts = sorted(ceilings)
    figure, axes = new_figure(len(counts), width=6.2, height=4.6)
    for axis, count in zip(axes, counts, strict=True):
        shown = [row for row in rows if row.threads == count and row.graph == "same graph"]
        kernels = list(dict.fromkeys((row.model, row.work) for row in shown))
        for y, kernel in enumerate(kernels):
            mine = {row.backend: row for row in shown if (row.model, row.work) == kernel}
            least = next(iter(mine.values())).floor
            for k, (part, colour) in enumerate(_FLOOR_COLOURS.items()):
                label = f"floor: {_FLOOR_LABELS[part]}" if y == 0 else None
                axis.barh(y + 0.2 * (k - 1), getattr(least, part), 0.18, color=colour, label=label)
            ends = (y - 0.32, y + 0.32)
            axis.plot([least.total] * 2, ends, color="0.1", label="floor: all of it" if y == 0 else None)
            for backend, row in mine.items():
                label = f"measured: {_LABELS[backend].split(',')[0]}" if y == 0 else None
                axis.plot(row.nanoseconds, y, "D", color=_COLOURS[backend], markersize=8, label=label)
                text = f"{row.nanoseconds:.0f} ns\n{row.nanoseconds / least.total:.1f}× floor"
                axis.annotate(text, (row.nanoseconds, y), (0, -8), textcoords="offset points",
                              ha="center", va="top", fontsize=8)  # fmt: skip
        c = ceilings[count]
        axis.set_title(
            f"{_threads(count)}: {c.flops / 1e9:.0f} GFLOP/s, {c.bandwidth / 1e9:.0f} GB/s, "
            f"{c.exponentials / 1e9:.1f} G exp/s", fontsize=10
        )  # fmt: skip
        axis.set_yticks(range(len(kernels)), [f"{model}\n{work}" for model, work in kernels])
        axis.set_ylim(len(kernels) - 0.3, -0.6)
        axis.set_xscale("log")
        axis.set_xlim(0.5 * min(row.floor.memory for row in shown), 3 * max(row.nanoseconds for row in shown))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_xlabel("nanoseconds per edge and step (logarithmic; left is faster)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(f"Time against this machine's measured ceilings; {described}", fontsize=10)
    return save_figure(figure, path)


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"
