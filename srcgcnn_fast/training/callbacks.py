"""What a run writes while it trains, and the one progress bar that it shows."""

from __future__ import annotations

import csv
import io
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.plugins.io import TorchCheckpointIO
from tqdm import tqdm

from ..errors import InputError
from ..files import atomic_path

logger = logging.getLogger(__name__)


class RunFiles(Checkpoint):
    """Writes ``best.ckpt``, ``last.ckpt`` and ``metrics.csv`` after every epoch, each whole or not at all.

    The history of epochs travels in the checkpoints, so a resumed run continues the same table. ``patience`` ends the
    run; it reads the history alone, so that a run which was killed after its last epoch does not get another one.
    """

    def __init__(self, directory: Path, monitor: str, larger_is_better: bool, patience: int | None = None) -> None:
        self.directory = directory
        self.monitor = monitor
        self.sign = -1.0 if larger_is_better else 1.0
        self.patience = patience
        self.history: list[dict[str, float]] = []

    @property
    def best(self) -> dict[str, float]:
        """The row of the best epoch; of several the most accurate classifier, then the earliest."""
        return min(self.history, key=self._rank)

    def _rank(self, row: dict[str, float]) -> tuple[float, float]:
        # An area is soon 1 where few crystals validate, long before P = 1/2 divides the classes.
        score = self.sign * row[self.monitor]
        return math.inf if math.isnan(score) else score, -row.get("val_accuracy", 0.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or self.out_of_patience()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        scores = {name: float(f"{float(value):.7g}") for name, value in trainer.callback_metrics.items()}
        self.history.append({"epoch": trainer.current_epoch + 1, **scores})
        if self.best is self.history[-1]:
            trainer.save_checkpoint(self.directory / "best.ckpt")
        trainer.save_checkpoint(self.directory / "last.ckpt")
        if trainer.is_global_zero:
            self.write()
        logger.info(", ".join(f"{name} {value:.5g}" for name, value in self.history[-1].items()))
        trainer.should_stop = trainer.should_stop or self.out_of_patience()

    def out_of_patience(self) -> bool:
        """Have the last ``patience`` epochs brought nothing better?"""
        if self.patience is None or not self.history:
            return False
        return len(self.history) >= self.best["epoch"] + self.patience

    def write(self) -> None:
        """``metrics.csv`` from the history."""
        write_table(self.directory / "metrics.csv", self.history)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]


class Checkpoints(TorchCheckpointIO):
    """Writes a checkpoint where it belongs, whole or not at all; Lightning's way is by the directory of temporary
    files, which may be on another disk. Nothing in one is executed, which ``Trainer.fit`` can be told since 2.6 alone.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(path):  # of a callback that the caller brings
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        data = io.BytesIO()
        torch.save(checkpoint, data)
        try:
            with atomic_path(path) as temporary:
                temporary.write_bytes(data.getbuffer())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        try:
            found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file fails anywhere inside the unpickler
            kind = type(error).__name__
            raise InputError(f"{path} is damaged ({kind}); copy it again, or start another run.") from error
        return found


class RunBar(ProgressBar):
    """One tqdm bar for all epochs, with time left, crystals a second and the latest score beside it."""

    def __init__(self, title: str, monitor: str, unit: str) -> None:
        super().__init__()
        self.title = title
        self.monitor = monitor
        self.unit = unit
        self._disabled = False
        self._score = ""

    def disable(self) -> None:
        self._disabled = True

    def enable(self) -> None:
        self._disabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        per_epoch = int(trainer.num_training_batches)
        self._bar = tqdm(
            total=(trainer.max_epochs or 0) * per_epoch,
            initial=trainer.current_epoch * per_epoch,
            desc=self.title,
            disable=self._disabled,
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
            bar_format="{desc} {percentage:3.0f}%|{bar:24}| {elapsed}<{remaining}{postfix}",
        )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._crystals, self._started = 0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._crystals += len(batch[1])
        speed = self._crystals / (time.perf_counter() - self._started)
        text = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}, {speed:,.0f} crystals/s{self._score}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._score = f", {self.monitor} {float(trainer.callback_metrics[self.monitor]):.4g} {self.unit}".rstrip()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._bar.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "_bar"):
            self._bar.close()


def write_table(path: str | os.PathLike[str], rows: list[dict[str, float]]) -> None:
    """As a CSV file; a row may lack what others have, as those of a run from before it was measured do."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        names = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
