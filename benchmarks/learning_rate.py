"""Is the learning rate that Lightning's finder proposes better than the default?

    SRCGCNN_TEST_DATA=… python benchmarks/learning_rate.py

Formation energy and band gap of ``mp/val.parquet``, 80/10/10, batches of 64, 30 epochs, one seed: MAE of the best
epoch.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.tuner import Tuner

import srcgcnn_fast as sf
from srcgcnn_fast.training import GraphDataModule, Recipe, TrainingModule, fit

EPOCHS, BATCH = 30, 64


def proposed(kind: type, data: GraphDataModule) -> float:
    torch.manual_seed(0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", enable_model_summary=False, **quiet)
    module = TrainingModule(kind(), data, Recipe())
    found = Tuner(trainer).lr_find(module, data, min_lr=1e-5, max_lr=0.3, num_training=100, update_attr=False)
    return found.suggestion()


def error(kind: type, data: GraphDataModule, lr: float) -> float:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        return fit(kind(), data, folder, Recipe(epochs=EPOCHS, lr=lr), accelerator="cpu").best["val_mae"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        store = sf.prepare(Path(os.environ["SRCGCNN_TEST_DATA"]) / "mp" / "val.parquet", Path(folder) / "graphs")
        for target in ("formation_energy_per_atom", "band_gap"):
            for kind in (sf.SRCGCNN, sf.CGCNN):
                data = GraphDataModule(store, target, batch_size=BATCH)
                rates = (proposed(kind, data), Recipe.lr)
                print(target, kind.__name__, {f"{lr:.1e}": f"{error(kind, data, lr):.3f}" for lr in rates}, flush=True)
