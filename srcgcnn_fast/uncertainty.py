"""Mean and standard deviation of a prediction: from an ensemble, or from one model with its dropout left on."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from pathlib import Path

import torch
from torch import Tensor

from .errors import InputError
from .files import atomic_directory, names_in, read_directory, restore
from .graph.batch import GraphBatch
from .nn import CGCNN, SRCGCNN, ModelMetadata
from .serialization import load_model, save_model

ENSEMBLE = "ensemble.json"
_FORMAT = "srcgcnn_fast ensemble"
DROPOUT_SCALE = "dropout_scale"
"""Where a model's ``metadata.extra`` keeps the calibration of its dropout."""


class Sampler:
    """Several predictions of one crystal; their mean, and ``scale`` times their standard deviation.

    ``scale`` has one factor per target, from :func:`srcgcnn_fast.training.calibrate`; 1 before.
    """

    metadata: ModelMetadata
    scale: tuple[float, ...]

    @property
    def models(self) -> Sequence[CGCNN | SRCGCNN]:
        raise NotImplementedError

    def samples(self, batch: GraphBatch) -> Tensor:
        """(M, B, T) in the targets' units; a classifier's P(class 1)."""
        raise NotImplementedError

    def predict(self, batch: GraphBatch) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (B, T) each, in the targets' units."""
        samples = self.samples(batch)
        return samples.mean(dim=0), samples.std(dim=0) * _factors(tuple(self.scale), samples.dtype, samples.device)


def _scale(given: Iterable[float], targets: Sequence[str]) -> tuple[float, ...]:
    """As the samplers keep it; 1 for each target where none is given."""
    try:
        scale = tuple(float(x) for x in given) or (1.0,) * len(targets)
    except (TypeError, ValueError):
        scale = ()
    if len(scale) != len(targets) or not all(0 < x < inf for x in scale):
        raise InputError(f"scale is a positive number for each of {', '.join(targets)}, not {given!r}.")
    return scale


@lru_cache(64)
def _factors(scale: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(T,), which to copy anew would let every batch wait for the GPU."""
    with torch.inference_mode(False):
        return torch.tensor(scale, dtype=dtype, device=device)


@dataclass
class Ensemble(Sampler):
    """Models of the same targets that were trained from different seeds (Lakshminarayanan et al. 2017).

    Raises:
        InputError: they are no models, or fewer than two; their targets, graphs or element vectors differ; ``scale`` is
            not a positive number for each target.
    """

    members: Sequence[CGCNN | SRCGCNN]
    scale: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        self.members = list(self.members)
        for member in self.members:
            if not hasattr(member, "metadata"):
                raise InputError(f"The members of an ensemble are models, not {member!r}; load_model reads one.")
        if len(self.members) < 2:
            raise InputError(f"An ensemble of {len(self.members)} has no spread; give at least two models.")
        first, table = self.metadata, self.members[0].element_table.double().cpu()
        for member in self.members[1:]:
            other = member.metadata
            if (other.targets, other.units, other.graph) != (first.targets, first.units, first.graph):
                raise InputError(
                    f"The members of an ensemble predict the same from the same graphs, not {first.targets} from "
                    f"{first.graph} and {other.targets} from {other.graph}."
                )
            if member.classification is not self.members[0].classification:
                raise InputError("Some members of the ensemble are classifiers and others are not; give one kind.")
            if not torch.equal(member.element_table.double().cpu(), table):
                raise InputError("The members of an ensemble have one element_table; give such as were trained so.")
        self.scale = _scale(self.scale, first.targets)

    @property
    def metadata(self) -> ModelMetadata:  # type: ignore[override]
        return self.members[0].metadata

    @property
    def models(self) -> Sequence[CGCNN | SRCGCNN]:
        return self.members

    def samples(self, batch: GraphBatch) -> Tensor:
        return torch.stack([member.predict(batch) for member in self.members])


@dataclass
class MonteCarloDropout(Sampler):
    """One model, asked ``passes`` times with its dropout left on (Gal & Ghahramani 2016).

    A pass drops the same features of every crystal, and repeats drop the same again, so that a prediction does not
    depend on the batch that the crystal is in.

    Raises:
        InputError: the model has no dropout, the passes are fewer than two, or ``scale`` is as for :class:`Ensemble`.
    """

    model: CGCNN | SRCGCNN
    passes: int = 30
    scale: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.model.dropout is None:
            raise InputError("The model has no dropout to leave on; train it with dropout, such as 0.1.")
        if self.passes < 2:
            raise InputError(f"{self.passes} passes have no spread; give at least two.")
        if isinstance(self.scale, Sequence) and not self.scale:
            self.scale = self.metadata.extra.get(DROPOUT_SCALE, ())
        self.scale = _scale(self.scale, self.metadata.targets)

    @property
    def metadata(self) -> ModelMetadata:  # type: ignore[override]
        return self.model.metadata

    @property
    def models(self) -> Sequence[CGCNN | SRCGCNN]:
        return [self.model]

    def samples(self, batch: GraphBatch) -> Tensor:
        pooled = self.model.features(batch)  # dropout acts on the head alone, so the convolutions run once
        rate: float = self.model.dropout.p  # type: ignore[union-attr]
        kept = _kept(self.passes, self.model.hyperparameters["h_fea_len"], rate, pooled.dtype, pooled.device)
        return torch.stack([self.model.predict_from(pooled, each) for each in kept])


@lru_cache(16)
def _kept(passes: int, width: int, rate: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(passes, width): 0 for a feature that a pass drops, else what makes up for those; copied once, too."""
    with torch.inference_mode(False):
        draw = torch.Generator("cpu").manual_seed(0)
        drawn = torch.rand(passes, width, generator=draw, dtype=torch.float32, device="cpu")  # no defaults
        return (drawn >= rate).to(device, dtype) / (1 - rate)


def save_ensemble(ensemble: Ensemble, directory: str | os.PathLike[str]) -> Path:
    """Write every member as a model, and their calibration, to ``directory``, whole or not at all.

    Raises:
        InputError: ``directory`` holds something else than an ensemble, or cannot be written.
    """
    target = Path(directory).resolve()
    check_replaceable(target)
    with atomic_directory(target) as temporary:
        names = [f"member_{number}" for number in range(len(ensemble.members))]
        for name, member in zip(names, ensemble.members, strict=True):
            save_model(member, temporary / name)
        record = {"format": _FORMAT, "format_version": 1, "members": names, "scale": list(ensemble.scale)}
        (temporary / ENSEMBLE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return target


def check_replaceable(target: Path) -> None:
    """Raises InputError: ``target`` holds something else than an ensemble, or something beside it."""
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; give save_ensemble a directory.")
    held = names_in(target) if target.exists() else []
    foreign = [name for name in held if name != ENSEMBLE and not re.fullmatch(r"member_\d+", name)]
    if foreign or (held and ENSEMBLE not in held):
        names = ", ".join((foreign or held)[:4])
        raise InputError(f"{target} holds other files ({names}); give save_ensemble a new directory.")


def load_ensemble(directory: str | os.PathLike[str]) -> Ensemble:
    """The ensemble that :func:`save_ensemble` wrote.

    Raises:
        InputError: there is none, or it is damaged.
    """
    return read_directory(Path(directory), _load_ensemble)


def _load_ensemble(directory: Path) -> Ensemble:
    file = directory / ENSEMBLE
    try:
        record = json.loads(file.read_bytes())
        names, scale = [str(name) for name in record["members"]], tuple(float(x) for x in record["scale"])
        if record["format"] != _FORMAT or record["format_version"] != 1:
            raise ValueError("another format")
    except FileNotFoundError as error:
        raise InputError(f"{directory} has no {ENSEMBLE}, so it is no ensemble; give one that train wrote.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} does not describe an ensemble ({error}); save the ensemble again.") from error
    members = [load_model(file.parent / name) for name in names]
    try:
        return Ensemble(members, scale)
    except InputError as error:
        raise InputError(f"{file} does not describe an ensemble: {error}") from error


def load_predictor(path: str | os.PathLike[str]) -> CGCNN | SRCGCNN | Ensemble:
    """The ensemble or the model of ``path``."""
    restore(path)
    return load_ensemble(path) if (Path(path) / ENSEMBLE).is_file() else load_model(path)
