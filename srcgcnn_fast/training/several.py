"""Several runs that belong together: the folds of a cross-validation, the members of an ensemble."""

from __future__ import annotations

import csv
import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..files import atomic_path
from ..nn import CGCNN, SRCGCNN
from ..uncertainty import Ensemble, check_replaceable, save_ensemble
from .calibration import calibrate
from .data import GraphDataModule, Split
from .evaluate import Evaluation, evaluate
from .fit import FitResult, check_trainable, fit, has_begun
from .module import Recipe

Build = Callable[[GraphDataModule], CGCNN | SRCGCNN]
"""Makes a model for the data, from torch's random state."""


@dataclass(frozen=True)
class CrossValidation:
    """The test part of every fold, predicted by the model that was not trained on it."""

    evaluations: list[Evaluation]
    run_dir: Path

    @property
    def scores(self) -> dict[str, tuple[float, float]]:
        """name -> mean and standard deviation over the folds."""
        names = self.evaluations[0].metrics
        columns = {name: np.array([found.metrics[name] for found in self.evaluations]) for name in names}
        return {name: (float(column.mean()), float(column.std(ddof=1))) for name, column in columns.items()}

    def write(self) -> Path:
        """``folds.csv``: the scores of each fold; ``predictions.csv``: every crystal, by the fold that held it out."""
        scores = [{"fold": k, **found.metrics} for k, found in enumerate(self.evaluations)]
        _write(self.run_dir / "folds.csv", list(scores[0]), [list(row.values()) for row in scores])
        names = [f"{name}{suffix}" for name in self.evaluations[0].target_names for suffix in ("", "_predicted")]
        values = [
            np.stack([fold.target, fold.predicted], axis=2).reshape(len(fold.ids), -1) for fold in self.evaluations
        ]
        rows = (
            [name, k, *row]
            for k, (fold, table) in enumerate(zip(self.evaluations, values, strict=True))
            for name, row in zip(fold.ids, table.tolist(), strict=True)
        )
        return _write(self.run_dir / "predictions.csv", ["id", "fold", *names], rows)


def cross_validate(
    build: Build,
    make_data: Callable[[Split], GraphDataModule],
    folds: Sequence[Split],
    run_dir: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    resume: bool = False,
    **options: Any,
) -> CrossValidation:
    """Train one model per fold, from the same seed, in ``run_dir/fold_0``, …; score each on the crystals it never saw.

    Args:
        build: makes an untrained model for a data module, such as ``lambda data: CGCNN()``; it is called after the
            seed is set.
        make_data: makes the data module of a split.
        folds: from :func:`~srcgcnn_fast.training.k_folds` or :func:`~srcgcnn_fast.training.matbench_folds`.
        resume: go on with what an interrupted call left.
        options: others of :func:`fit`.

    Raises:
        InputError: as :func:`fit`; or there are no folds, or ``build`` does not make a new model at each call.
    """
    directory, evaluations = Path(run_dir), []
    parts = [make_data(split) for split in folds]
    if not parts:
        raise InputError("There are no folds to train on; k_folds makes them.")
    _check_build(build, parts[0])
    for data in parts:
        if "fold" in data.targets:
            raise InputError("The table of all folds' predictions has a column fold, so no target may; rename it.")
        if not len(data.parts["test"].indices):
            raise InputError("A fold has no test crystals to score; give each some.")
        check_trainable(build(data), data, recipe)  # every fold, before the first is trained
    for k, data in enumerate(parts):
        torch.manual_seed(seed)
        result = _run(build(data), data, directory / f"fold_{k}", recipe, seed, resume, options)
        evaluations.append(evaluate(result.model, data, "test"))
    found = CrossValidation(evaluations, directory)
    found.write()
    return found


def train_ensemble(
    build: Build,
    data: GraphDataModule,
    run_dir: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    members: int = 5,
    seed: int = 0,
    resume: bool = False,
    **options: Any,
) -> Ensemble:
    """Train ``members`` models on the same crystals, from the seeds ``seed``, ``seed`` + 1, …, and calibrate them.

    The seed decides initial weights and order of the batches. ``run_dir`` receives the run of each (``member_0``, …)
    and, at the end, ``model`` with the ensemble, whose standard deviation covers 68.3 % of the validation errors.

    Args:
        build: makes an untrained model for ``data``, such as ``lambda data: CGCNN()``; it is called after the seed is
            set.
        resume: go on with what an interrupted call left.
        options: others of :func:`fit`.

    Raises:
        InputError: as :func:`fit`; or there are fewer than two members, a target that no validation crystal has, or
            nothing in which members would differ, or ``build`` does not make a new model at each call.
    """
    if members < 2:
        raise InputError(f"An ensemble of {members} has no spread; train at least two models.")
    _check_build(build, data)
    for name, column in zip(data.targets, data.target_values("val").T, strict=True):
        if np.isnan(column).all():
            raise InputError(f"No validation crystal has a value of {name} to calibrate with; split otherwise.")
    if len(data.loader("train", shuffle=True)) == 1 and _start_alike(build, data, seed):
        raise InputError(
            "The members start from the same weights and would learn from the same single batch, so they would be "
            "alike; use smaller batches, or members with weights of their own."
        )
    directory, order, trained = Path(run_dir), data.seed, []
    check_replaceable(directory / "model")
    if resume and has_begun(directory / f"member_{members}"):
        raise InputError(f"{directory} holds more than {members} members; ask for as many as there are, or more.")
    try:
        for k in range(members):
            data.seed = order + k
            torch.manual_seed(seed + k)
            result = _run(build(data), data, directory / f"member_{k}", recipe, seed + k, resume, options)
            trained.append(result.model)
    finally:
        data.seed = order
    ensemble = Ensemble(trained)
    calibrate(ensemble, data)
    save_ensemble(ensemble, directory / "model")
    return ensemble


def _check_build(build: Build, data: GraphDataModule) -> None:
    """Is it called with the data, and makes a new model each time?"""
    advice = "give a function that makes a model for the data, such as lambda data: CGCNN()."
    if isinstance(build, type | torch.nn.Module) or not callable(build):
        raise InputError(f"build is a {type(build).__name__}; {advice}")
    try:
        inspect.signature(build).bind(data)
    except TypeError as error:
        raise InputError(f"build cannot be called with the data module ({error}); {advice}") from None
    if build(data) is build(data):  # which would learn from one run to the next
        raise InputError(f"build gives the same model at each call; {advice}")


def _start_alike(build: Build, data: GraphDataModule, seed: int) -> bool:
    """Do members of two seeds have the same weights, and no dropout?"""
    models = []
    for k in (0, 1):
        torch.manual_seed(seed + k)
        models.append(build(data))
    first, second = (model.state_dict() for model in models)
    return models[0].dropout is None and all(torch.equal(x, second[name]) for name, x in first.items())


def _run(
    model: CGCNN | SRCGCNN,
    data: GraphDataModule,
    directory: Path,
    recipe: Recipe | None,
    seed: int,
    resume: bool,
    options: dict[str, Any],
) -> FitResult:
    return fit(model, data, directory, recipe, seed=seed, resume=resume and has_begun(directory), **options)


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    return path
