"""A trained model on one part of a data module."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..files import atomic_path
from ..nn import CGCNN, SRCGCNN
from .data import GraphDataModule
from .metrics import classification_metrics, regression_metrics, target_metrics


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

    def write(self, path: str | os.PathLike[str]) -> Path:
        """As a CSV file: id, then the given and the predicted value of each target."""
        names = [f"{name}{suffix}" for name in self.target_names for suffix in ("", "_predicted")]
        values = np.stack([self.target, self.predicted], axis=2).reshape(len(self.ids), -1)
        with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", *names])
            writer.writerows([name, *row] for name, row in zip(self.ids, values.tolist(), strict=True))
        return Path(path)


@torch.inference_mode()
def evaluate(model: CGCNN | SRCGCNN, data: GraphDataModule, part: str = "test") -> Evaluation:
    """Predict one part ("train", "val" or "test") with ``model``, on the model's device, and score it."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        batches = [model.predict(graphs.to(device)).cpu() for graphs, _, _ in data.loader(part)]
    finally:
        model.train(training)
    predicted, target = torch.cat(batches).double(), torch.from_numpy(data.target_values(part))
    if model.hyperparameters["classification"]:
        scores = classification_metrics(predicted, target)
    else:
        std = torch.tensor(model.metadata.std)
        scores = regression_metrics(predicted, target) | target_metrics(predicted, target, data.targets, std)
    return Evaluation(data.ids(part), data.targets, target.numpy(), predicted.numpy(), scores)
