"""Resident memory of an epoch of training on a store, in a process of its own: ``python resident.py STORE``."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path

MIB = 2**20


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main(store: str) -> dict[str, float]:
    import torch

    torch.set_num_threads(2)
    a = torch.randn(256, 256, requires_grad=True)
    (a @ a).sum().backward()
    before = status("VmRSS")
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    import srcgcnn_fast as sf
    from srcgcnn_fast.training import GraphDataModule, Recipe, fit

    imported = status("VmRSS")  # Lightning, and what it imports where it is installed (Triton, SciPy, matplotlib)
    data = GraphDataModule(sf.open_store(store), "formation_energy_per_atom", split=(0.9, 0.1, 0.0), batch_size=256)
    with tempfile.TemporaryDirectory() as out:
        fit(sf.SRCGCNN(), data, Path(out), Recipe(epochs=1))
    return {
        "resident in training, MiB": (status("VmHWM") - before) / MIB,
        "of that imports, MiB": (imported - before) / MIB,
        "torch alone, MiB": before / MIB,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
