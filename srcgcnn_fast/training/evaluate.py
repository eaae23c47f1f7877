"""A trained model on one part of a data module."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..files import atomic_path
from ..nn import CGCNN, SRCGCNN
from ..nn.models import in_eval_mode
from ..uncertainty import Sampler
from .data import GraphDataModule
from .metrics import classification_metrics, regression_metrics


@dataclass(frozen=True)
class Evaluation:
    """Given and predicted values of n crystals, T targets, in the target's units (a classifier: P(class 1))."""

    ids: list[str]
    target_names: tuple[str, ...]
    target: np.ndarray
    """(n, T) float64, NaN where there is none."""
    predicted: np.ndarray
    """(n, T) float64."""
    metrics: dict[str, float]
    std: np.ndarray | None = None
    """(n, T) float64, standard deviation of the predictions of an ensemble or of dropout left on."""

    def write(self, path: str | os.PathLike[str]) -> Path:
        """As a CSV file: id, then the given and the predicted value of each target, and ``NAME_std`` if there is."""
        spread = [] if self.std is None else [self.std]
        suffixes = ("", "_predicted", "_std")[: 2 + len(spread)]
        names = [f"{name}{suffix}" for name in self.target_names for suffix in suffixes]
        values = np.stack([self.target, self.predicted, *spread], axis=2).reshape(len(self.ids), -1)
        with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["id", *names])
            writer.writerows([name, *row] for name, row in zip(self.ids, values.tolist(), strict=True))
        return Path(path)


@torch.inference_mode()
def evaluate(model: CGCNN | SRCGCNN | Sampler, data: GraphDataModule, part: str = "test") -> Evaluation:
    """Predict one part ("train", "val" or "test") with ``model``, on its device, and score it.

    An :class:`~srcgcnn_fast.uncertainty.Ensemble` is scored by its mean, and the standard deviation is kept.

    Raises:
        InputError: there is no such part, it is empty, or its targets or graphs are not those of the model; a target
            may have another name in its place.
    """
    models = model.models if isinstance(model, Sampler) else [model]
    _check(models[0], data, part)
    device = next(models[0].parameters()).device
    loader = data.loader(part)
    loader.device = device
    with in_eval_mode(models):
        batches: list[Any] = [model.predict(graphs.to(device)) for graphs, _, _ in loader]
    std = None
    if isinstance(model, Sampler):
        std = torch.cat([spread for _, spread in batches]).double().cpu().numpy()
        batches = [mean for mean, _ in batches]
    predicted, target = torch.cat(batches).double().cpu(), torch.from_numpy(data.target_values(part))
    if models[0].hyperparameters["classification"]:
        scores = classification_metrics(predicted, target)
    else:
        scale = torch.tensor(models[0].metadata.std)
        scores = regression_metrics(predicted, target, data.targets, scale)
    return Evaluation(data.ids(part), data.targets, target.numpy(), predicted.numpy(), scores, std)


def _check(model: CGCNN | SRCGCNN, data: GraphDataModule, part: str) -> None:
    if not len(data.parts[part].indices):
        raise InputError(f"There are no {part} crystals to score; choose another part, or another split.")
    known = model.metadata.targets
    moved = [name for k, name in enumerate(data.targets) if name in known and known.index(name) != k]
    if len(known) != len(data.targets) or moved:
        raise InputError(
            f"The model predicts {', '.join(known)}, the data hold {', '.join(data.targets)}; name the same."
        )
    data.check_graphs(model.metadata.graph)
