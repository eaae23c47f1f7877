"""Whole epochs on Materials Project crystals: seconds, the kernels' share of them, and memory that stays."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import pytest

import srcgcnn_fast as sf
from srcgcnn_fast.graph import GraphStore, prepare
from srcgcnn_fast.ops import cpu
from srcgcnn_fast.training import GraphDataModule, Recipe, fit

pl = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.slow
TARGET = "formation_energy_per_atom"
LEAK = 16.0
"""MiB over fifteen epochs of five steps; one array of (N, F) kept at each step would be 45."""


def resident() -> float:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


class Watch(pl.Callback):
    """Per epoch: MiB held at its end, and for its training part s of wall and of kernels, and steps."""

    def __init__(self, kernels: Timed) -> None:
        self.kernels = kernels
        self.memory: list[float] = []
        self.epochs: list[tuple[float, float, int]] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self.kernels.seconds, self.started = 0.0, time.perf_counter()

    def on_validation_epoch_start(self, trainer: Any, _module: Any) -> None:
        wall = time.perf_counter() - self.started
        self.epochs.append((wall, self.kernels.seconds, int(trainer.num_training_batches)))

    def on_train_epoch_end(self, *_: Any) -> None:
        self.memory.append(resident())


class Timed:
    """The compiled module, with the time spent in it."""

    def __init__(self, core: Any) -> None:
        self.core = core
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.core, name)
        if not callable(found):
            return found

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return found(*arguments)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Timed:
    if cpu.core is None:
        pytest.skip("the CPU kernels are not built")
    timed = Timed(cpu.core)
    monkeypatch.setattr(cpu, "core", timed)
    return timed


def store(data_dir: Path, name: str, tmp_path: Path) -> GraphStore:
    return prepare(data_dir / "mp" / f"{name}.parquet", tmp_path / name, targets=[TARGET])


@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
def test_memory_does_not_grow(data_dir, tmp_path, kernels, model_type):
    data = GraphDataModule(store(data_dir, "small_1500", tmp_path), TARGET, batch_size=256)
    watch = Watch(kernels)
    fit(model_type(3), data, tmp_path / "run", Recipe(epochs=25), callbacks=[watch])
    early, late = statistics.median(watch.memory[5:10]), statistics.median(watch.memory[20:])
    print(f"\n{model_type.__name__}: {early:.0f} MiB after 5 to 10 epochs, {late:.0f} MiB after 20 to 25")
    assert late - early < LEAK, [round(x) for x in watch.memory]


@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
def test_epoch_of_28000_crystals(data_dir, tmp_path, kernels, model_type):
    """Prints seconds; fails where training learns nothing, or most of it is not spent in the kernels."""
    train, val = (store(data_dir, name, tmp_path) for name in ("train", "val"))
    data = GraphDataModule(train, TARGET, val_store=val, batch_size=256)
    watch = Watch(kernels)
    result = fit(model_type(3), data, tmp_path / "run", Recipe(epochs=3), callbacks=[watch])
    print(f"\n{model_type.__name__}: {len(train)} crystals, {sf.backends()['cpu'].reason}")
    for (wall, inside, steps), row in zip(watch.epochs, result.history, strict=True):
        print(
            f"  {wall:.2f} s, {wall / steps * 1e3:.1f} ms a step, {inside / wall:.0%} of it in the kernels; "
            f"val_mae {row['val_mae']:.3f} eV/atom"
        )
    wall, inside, _ = min(watch.epochs)
    assert inside / wall > 0.5
    assert result.best["val_mae"] < 0.25  # predicting the median gives 0.98
