"""The whole path in two minutes: make data, train both models, compare them, predict crystals that they never saw."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..prediction import predict
from .alloys import formation_energy, ordered_alloys, write_alloys
from .compare import Comparison, compare

TARGET = "formation_energy_per_atom"


def demo(
    out_dir: str | os.PathLike[str] | None = None,
    *,
    crystals: int = 2400,
    epochs: int = 40,
    seed: int = 0,
    progress: bool = False,
) -> str:
    """Run the demonstration; returns its report as text.

    Makes ``crystals`` fcc alloys with effective-medium formation energies, trains a three-layer CGCNN and a three-step
    SR-CGCNN on 80 % of them, and predicts textbook alloys. Everything is written to ``out_dir``, by default a directory
    in the user's cache.

    Raises:
        InputError: ``out_dir`` cannot be written, or an optional dependency is missing.
    """
    out = Path(out_dir) if out_dir is not None else cache_directory() / "demo"
    data = write_alloys(out / "alloys.parquet", crystals, seed, progress)
    comparison = compare(data, TARGET, out_dir=out, epochs=epochs, lr=2e-3, seed=seed, progress=progress)
    return "\n".join(
        [
            f"\n{_explain(comparison)}\n",
            comparison.table(),
            "\nFormation energies of ordered alloys that were made afterwards (eV/atom):\n",
            _new_alloys(comparison),
            f"\nEverything is in {out}:",
            "  alloys.parquet                        the crystals and their energies",
            "  compare.md, compare.json              this table, with the settings",
            "  parity.png, learning_curves.png       predicted against given energies; error by epoch",
            "  cgcnn/model, sr_cgcnn/model           the trained models, for example:",
            f"  srcgcnn-fast predict {out / 'sr_cgcnn' / 'model'} YOUR.cif --out predictions.csv",
        ]
    )


def cache_directory() -> Path:
    """Where this platform keeps files that can be made again."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache") / "srcgcnn_fast"


def _explain(comparison: Comparison) -> str:
    sizes = comparison.crystals
    mae, guess = comparison.sr_cgcnn.mae, comparison.mean_predictor_mae
    return (
        f"Both networks learned the formation energy of {sizes['train']:,} fcc alloys and were then asked about "
        f"{sizes['test']:,} others.\n"
        f"MAE is the mean absolute error on those. Always answering the mean would give {guess:.4f} eV/atom; "
        f"SR-CGCNN errs by {mae:.4f}.\n"
        "CGCNN has three convolution layers of its own, SR-CGCNN applies one layer three times."
    )


def _new_alloys(comparison: Comparison) -> str:
    alloys = ordered_alloys()
    tables = {c.name: predict(c.fit.model, list(alloys.values())) for c in comparison.contestants}
    lines = [
        "| alloy        | effective medium | CGCNN   | SR-CGCNN |",
        "| ------------ | ---------------- | ------- | -------- |",
    ]
    for i, (name, atoms) in enumerate(alloys.items()):
        cgcnn, sr_cgcnn = (_value(tables[c.name], i) for c in comparison.contestants)
        lines.append(f"| {name:<12} | {formation_energy(atoms):>16.4f} | {cgcnn:>7.4f} | {sr_cgcnn:>8.4f} |")
    return "\n".join(lines)


def _value(table: Any, row: int) -> float:
    if table["error"][row]:
        raise InputError(table["error"][row])
    return float(table[TARGET][row])
