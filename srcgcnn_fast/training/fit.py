"""Train one model by one recipe, so that the run can be stopped, resumed and repeated."""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import random
import signal
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ..errors import InputError, require
from ..files import sweep, write_text
from ..graph.parameters import as_python
from ..graph.store_writer import alone
from ..nn import CGCNN, SRCGCNN, synchronize_batch_norm
from ..ops.precision import use_precision
from ..serialization import check_replaceable, check_savable, save_model
from . import distributed
from .averaging import ExponentialAverage
from .callbacks import Checkpoints, RunBar, RunFiles
from .data import GraphDataModule
from .module import Recipe, TrainingModule


@dataclass(frozen=True)
class FitResult:
    """A finished run."""

    model: CGCNN | SRCGCNN
    """With the weights of the best epoch, on the CPU, in eval mode; also in ``run_dir/model``."""
    history: list[dict[str, float]]
    """One row an epoch: epoch, train_loss, lr, seconds, crystals_per_second, …, val_…; also ``metrics.csv``."""
    best: dict[str, float]
    """The row of the best epoch: lowest ``val_mae`` (several targets: ``val_mae_scaled``), or highest ``val_auc`` (of
    several such the highest ``val_accuracy``)."""
    seconds: float
    """Wall time of this call, s; training alone is the sum of the history's ``seconds``."""
    run_dir: Path


def fit(
    model: CGCNN | SRCGCNN,
    data: GraphDataModule,
    run_dir: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    resume: bool = False,
    accelerator: str = "auto",
    precision: str = "float32",
    captured: bool = False,
    logger: Logger | str | None = None,
    callbacks: Sequence[pl.Callback] = (),
    progress: bool = False,
) -> FitResult:
    """Train ``model`` on ``data`` and keep the best epoch.

    ``run_dir`` receives ``run.json`` (everything that decides the run), ``metrics.csv``, ``best.ckpt``, ``last.ckpt``
    and, at the end, ``model/`` for ``load_model``. With ``resume`` an interrupted run continues from ``last.ckpt``, or
    from its beginning if it was stopped within the first epoch; on the CPU it ends with the same bits as an
    uninterrupted one, wherever it was killed. The initial weights are the caller's: seed before building the model.

    Processes that ``torchrun`` started and that all make this call train as one: they share every batch, batch norm is
    synchronised, rank 0 writes, all return the same. Losses, gradients and batches are those of one process with the
    same ``data`` (but for rounding, and for dropout, which differs), so a run may be resumed with
    another number of processes. All must see ``run_dir``.

    Args:
        recipe: optimiser, schedule and epochs; ``Recipe()`` if not given.
        seed: of dropout and workers (the data module has its own for split and order). The process's own random
            numbers go on where they were, but for a GPU's.
        accelerator: "cpu", "gpu", or "auto" for what Lightning finds.
        precision: of a GPU's arithmetic, as :func:`srcgcnn_fast.use_precision` names it.
        captured: on a GPU, replay CUDA graphs of a step (:class:`srcgcnn_fast.CapturedTraining`), which pays where
            batches are small; sums have another order, and a dropout draws other numbers. One process, the compiled
            kernels.
        logger: a Lightning logger, "tensorboard" for event files in ``run_dir``, or "wandb" for Weights & Biases;
            ``metrics.csv`` comes anyway.
        progress: show a bar.

    Raises:
        InputError: ``run_dir`` holds another run, another process trains there, there is nothing to resume, no GPU to
            train on, ``captured`` is not possible, ``model`` could not be saved, or the loss is no longer finite.
        SystemExit: 143, after SIGTERM; the run can be resumed.
    """
    seed = as_python(seed)
    if not 0 <= seed < 2**32:
        raise InputError(f"The seed {seed} is not a number from 0 to 2³² - 1.")
    if accelerator == "gpu" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise InputError("PyTorch finds no GPU here; train with accelerator 'cpu' or 'auto' (srcgcnn-fast doctor).")
    if captured and (accelerator == "cpu" or not torch.cuda.is_available()):
        raise InputError("Captured training needs a CUDA GPU; leave captured out.")
    distributed.join()
    recipe = recipe or Recipe()
    directory = Path(run_dir)
    with ExitStack() as claim, _in_training(model, data, recipe, seed, captured) as module:
        monitor = _monitor(module, data)
        record = _record(module, data)  # which reads all graphs
        checkpoint = distributed.on_rank_zero(_claim, directory, record | {"precision": precision}, resume, claim)
        files = RunFiles(directory, monitor, larger_is_better=module.classification, patience=recipe.patience)
        unit = model.metadata.units[0] if monitor == "val_mae" else ""
        averages = [_moving_average(recipe.ema)] if recipe.ema is not None else []
        bars = [RunBar(type(model).__name__.replace("SR", "SR-"), monitor, unit)] if progress else []
        started = time.perf_counter()
        if distributed.is_shared():
            synchronize_batch_norm(model)
        options = distributed.trainer_options()
        plugins = [*options.pop("plugins", []), Checkpoints()]
        with use_precision(precision), _quiet(), _deterministic(), _random_numbers(seed):
            trainer = pl.Trainer(
                max_epochs=recipe.epochs,
                accelerator=accelerator,
                **options,
                plugins=plugins,
                deterministic="warn",
                gradient_clip_val=recipe.gradient_clip,
                logger=_logger(logger, directory),
                callbacks=[files, *averages, *bars, *callbacks],
                enable_progress_bar=progress,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                profiler=_NoProfiler(),
                default_root_dir=directory,
            )
            with _signals():
                trainer.fit(module, data, ckpt_path=checkpoint)
        # A process that was killed between the last checkpoint and this table left an old one.
        distributed.on_rank_zero(files.write)
        best = distributed.on_rank_zero(Checkpoints().load_checkpoint, directory / "best.ckpt")
        module.load_state_dict(best["state_dict"])
        model.cpu().eval()
        scores = {name: value for name, value in files.best.items() if math.isfinite(value)}
        model.metadata.extra |= {"training": record, "best_epoch": scores}
        distributed.on_rank_zero(save_model, model, directory / "model")
        return FitResult(model, files.history, files.best, time.perf_counter() - started, directory)


def check_trainable(model: CGCNN | SRCGCNN, data: GraphDataModule, recipe: Recipe | None) -> None:
    """Raises InputError: ``data`` cannot train ``model``, or not choose an epoch, or it could not be saved."""
    with _in_training(model, data, recipe or Recipe()) as module:
        _monitor(module, data)


@contextmanager
def _in_training(
    model: CGCNN | SRCGCNN, data: GraphDataModule, recipe: Recipe, seed: int = 0, captured: bool = False
) -> Iterator[TrainingModule]:
    """Frozen parts learn again afterwards, whatever came between; a model that was not trained is as it was."""
    if not hasattr(model, "metadata"):
        raise InputError(f"fit trains a CGCNN or SRCGCNN, not a {type(model).__name__}; give one of those.")
    if not isinstance(data, GraphDataModule):
        raise InputError(f"fit trains on a GraphDataModule, not on a {type(data).__name__}; make one of a store.")
    metadata, modes = model.metadata, [(part, part.training) for part in model.modules()]
    module = TrainingModule(model, data, recipe, seed, captured=captured)
    try:
        check_savable(model)  # or training would end where its model cannot be written
        yield module
    finally:
        module.thaw()
        if not module.has_begun:
            model.metadata = metadata
            for part, training in modes:
                part.training = training


def _monitor(module: TrainingModule, data: GraphDataModule) -> str:
    if not module.classification:
        return "val_mae" if len(data.targets) == 1 else "val_mae_scaled"
    if len(set(data.target_values("val")[:, 0])) < 2:
        raise InputError("The validation set holds one class only, so its ROC area means nothing; make it larger.")
    return "val_auc"


def _record(module: TrainingModule, data: GraphDataModule) -> dict[str, Any]:
    """What must agree between a run and its continuation."""
    return {
        **module.hparams,
        "muon_lr": module.recipe.muon_lr if module.recipe.optimizer == "muon" else None,  # likewise
        "targets": list(data.targets),
        "graph": asdict(data.graph_parameters),
        "batch_size": data.batch_size,
        "batch_rows": data.batch_rows,
        "length_buckets": data.length_buckets or None,  # as runs from before there was a choice have it
        "data_seed": data.seed,
        "crystals": {name: len(part.indices) for name, part in data.parts.items()},
        "data_fingerprint": data.fingerprint(),
        "graph_fingerprint": data.graph_fingerprint(),
        "target_mean": module.target_mean.tolist(),
        "target_std": module.target_std.tolist(),
    }


def _claim(directory: Path, record: dict[str, Any], resume: bool, claim: ExitStack) -> Path | None:
    """Take ``directory`` for a new run, or check that the run in it is the one to continue, until ``claim`` ends.

    Returns the checkpoint to continue from, if there is one yet.
    """
    check_replaceable(directory / "model")  # or training would end where its model cannot be written
    file, checkpoint = directory / "run.json", directory / "last.ckpt"
    if resume and not has_begun(directory):
        raise InputError(f"There is no run to resume in {directory}; start one without resume.")
    claim.enter_context(only_trainer(directory))
    if not resume:
        check_free(directory)
        _sweep(directory)
        write_text(file, json.dumps(record, indent=2) + "\n")
        return None
    check_same(directory, record)
    _sweep(directory)
    return checkpoint if checkpoint.exists() else None


def only_trainer(directory: Path) -> AbstractContextManager[None]:
    """No other process trains in ``directory`` meanwhile, or it is an InputError; one that is killed frees it."""
    return alone(directory / "run.json", f"Another process trains in {directory}; choose another directory, or wait.")


def has_begun(directory: Path) -> bool:
    """Is there a run to resume?"""
    return (directory / "run.json").exists()


def check_free(directory: Path) -> None:
    """Raises InputError: a run is there already."""
    if (directory / "last.ckpt").exists():
        raise InputError(f"{directory} already holds a run; resume it, or choose another directory.")


def check_same(directory: Path, record: dict[str, Any]) -> None:
    """Raises InputError: the run that is there was started with other values of what ``record`` names."""
    before, record = json.loads((directory / "run.json").read_bytes()), json.loads(json.dumps(record))
    later = [name for name in ("data_fingerprint", "graph_fingerprint") if name not in before]  # than that run
    changed = [
        f"{name} ({before.get(name)} before, {value} now)"
        for name, value in record.items()
        if name not in later and before.get(name) != value
    ]
    if changed:
        raise InputError(f"The run in {directory} was started with other settings: {'; '.join(changed)}; use those.")


def _sweep(directory: Path) -> None:
    for name in ("run.json", "best.ckpt", "last.ckpt", "metrics.csv", "model"):
        sweep(directory / name)


def _moving_average(decay: float) -> pl.Callback:
    kinds = importlib.import_module("lightning.pytorch.callbacks")
    if not hasattr(kinds, "WeightAveraging"):
        raise InputError("A moving average of the weights needs Lightning 2.6; run `pip install -U lightning`.")

    class MovingAverage(kinds.WeightAveraging):  # type: ignore[name-defined, misc]
        state_key = kinds.WeightAveraging.__qualname__

        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            if stage == "fit":  # where the model will be: it is moved after this hook
                self._average_model = ExponentialAverage(pl_module, decay, trainer.strategy.root_device)

    average: pl.Callback = MovingAverage()
    return average


def _logger(choice: Logger | str | None, directory: Path) -> Logger | bool:
    if choice is None or isinstance(choice, Logger):
        return choice or False
    if choice == "tensorboard":
        require("tensorboard", "Logging to TensorBoard", extra="tensorboard")
        from lightning.pytorch.loggers import TensorBoardLogger

        return TensorBoardLogger(directory, name="tensorboard", version="")
    if choice == "wandb":
        require("wandb", "Logging to Weights & Biases", extra="wandb")
        from lightning.pytorch.loggers import WandbLogger

        place = str(directory.resolve())  # decides the run's id, so that a resumed run goes on in the same curves
        run_id = f"{directory.name}-{zlib.crc32(place.encode()):08x}"
        return WandbLogger(name=directory.name, id=run_id, save_dir=directory, project="srcgcnn_fast", resume="allow")
    raise InputError(f"The logger {choice!r} is unknown; use 'tensorboard', 'wandb' or a Lightning logger.")


class _NoProfiler(PassThroughProfiler):
    """Lightning's, which opens and closes a generator around each of some thirty parts of a step."""

    def profile(self, action_name: str) -> Any:
        return _NOTHING


_NOTHING = nullcontext()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning from advertising, and from asking for loader workers that one packed store does not need."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [log.level for log in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        for log in loggers:
            log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for log, level in zip(loggers, levels, strict=True):
                log.setLevel(level)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Undo what Trainer(deterministic=…) sets for the process, and spare its filling of uninitialised memory."""
    settings: Any = importlib.import_module("torch.utils.deterministic")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def _random_numbers(seed: int) -> Iterator[None]:
    """Seed the generators of Python, NumPy and PyTorch for the run; the caller's, but for a GPU's, go on as before."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            pl.seed_everything(seed, workers=True, verbose=False)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _signals() -> Iterator[None]:
    """Lightning turns Ctrl-C into exit(1) and leaves it ignored, and SIGTERM into exit(0); hand on what it was."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SIGTERMException:
        raise SystemExit(128 + signal.SIGTERM) from None
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None
