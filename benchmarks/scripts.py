"""The published training scripts on a folder of CIFs, as they are and with one line more, each in its own process."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PROGRAMS = {
    "CGCNN": ("cgcnn", []),
    "SR-CGCNN": ("SR-CGCNN/SR-CGCNN", ["--conv-mode", "shared_recurrent", "--n-conv", "3"]),
}
LINE = "    import srcgcnn_fast; srcgcnn_fast.accelerate(model)\n"
_BEFORE = "    # define loss func and optimizer\n"
_STEP = re.compile(r"Epoch: \[(\d+)\]\[\d+/\d+\]\tTime ([\d.]+) .*?Data ([\d.]+) ")


def cif_folder(where: Path, crystals: Path, atom_init: Path, count: int) -> None:
    """``count`` random crystals as the published programs read them: CIFs, id_prop.csv, atom_init.json."""
    import pandas as pd
    from pymatgen.core import Structure

    where.mkdir()
    frame = pd.read_parquet(crystals).sample(count, random_state=0)
    for row in frame.itertuples():
        structure = Structure(np.reshape(row.lattice, (3, 3)), row.atomic_numbers, np.reshape(row.frac_coords, (-1, 3)))
        structure.to(str(where / f"{row.material_id}.cif"), fmt="cif")
    lines = [f"{row.material_id},{row.formation_energy_per_atom}\n" for row in frame.itertuples()]
    (where / "id_prop.csv").write_text("".join(lines))
    shutil.copy(atom_init, where / "atom_init.json")


def copy_program(source: Path, where: Path, accelerated: bool) -> None:
    """The program's main.py and its package; with ``accelerated`` one line more, after the model is made."""
    shutil.copytree(source / "cgcnn", where / "cgcnn", ignore=shutil.ignore_patterns("__pycache__"))
    text = (source / "main.py").read_text()
    if text.count(_BEFORE) != 1:
        raise AssertionError(f"{source}/main.py is not the script that this benchmark knows")
    where.mkdir(exist_ok=True)
    (where / "main.py").write_text(text.replace(_BEFORE, LINE + _BEFORE) if accelerated else text)


@dataclass
class Run:
    losses: list[list[float]]
    """Of every step, by epoch, unrounded."""
    steps: list[float]
    """Seconds of all steps of each epoch, without the time that the script's loader takes."""
    loading: list[float]
    """Seconds that the loader takes in each epoch."""
    total: float
    """Seconds of the whole script: reading, training, validation, test."""

    @property
    def epoch_seconds(self) -> float:
        """Median epoch but for the first, in which everything is used for the first time."""
        return statistics.median(self.steps[1:])


def run(where: Path, data: Path, options: list[str], epochs: int) -> Run:
    command = [sys.executable, str(Path(__file__).with_name("record_losses.py")), "losses.json", "main.py", str(data)]
    command += ["--epochs", str(epochs), "--train-ratio", "0.8", "--print-freq", "1", *options]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, check=False)
    total = time.perf_counter() - start
    if done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    losses = iter(json.loads((where / "losses.json").read_text()))
    by_epoch: dict[int, list[tuple[float, float, float]]] = {}
    for epoch, took, loading in _STEP.findall(done.stdout):
        by_epoch.setdefault(int(epoch), []).append((next(losses), float(took), float(loading)))
    epochs_ = list(by_epoch.values())
    return Run(
        [[loss for loss, _, _ in steps] for steps in epochs_],
        [sum(took - loading for _, took, loading in steps) for steps in epochs_],
        [sum(loading for _, _, loading in steps) for steps in epochs_],
        total,
    )
