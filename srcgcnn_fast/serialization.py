"""A model as a directory: ``model.safetensors`` (weights) and ``config.json`` (everything else that it needs)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from . import __version__
from .errors import InputError, one_line
from .files import atomic_directory, names_in, read_directory
from .graph.build import GraphParameters
from .graph.elements import is_built_in
from .nn import CGCNN, SRCGCNN, ModelMetadata
from .nn.models import CrystalModel

logger = logging.getLogger(__name__)

FORMAT = "srcgcnn_fast model"
FORMAT_VERSION = 1
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_BUILT_IN_TABLE = "cgcnn-92"
_MODELS = {"CGCNN": CGCNN, "SRCGCNN": SRCGCNN}


def save_model(model: CGCNN | SRCGCNN, directory: str | os.PathLike[str]) -> Path:
    """Write ``model`` to ``directory``, which appears whole or not at all; an earlier model there is replaced.

    Raises:
        InputError: the model is of another type or has other parameters than its hyperparameters say, or norms with an
            ``eps`` of their own; ``directory`` holds anything but a model, or cannot be written.
    """
    check_savable(model)
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps
    target = Path(directory).resolve()
    check_replaceable(target)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    if not is_built_in(model.element_table):
        tensors["element_table"] = model.element_table.detach().cpu().contiguous().clone()
    weights = save(tensors)
    config = _config(model) | {"weights_sha256": hashlib.sha256(weights).hexdigest()}
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    _write_directory(target, {_WEIGHTS: weights, _CONFIG: text.encode()})
    return target


def check_savable(model: CGCNN | SRCGCNN) -> None:
    """Raises InputError: :func:`save_model` could not write the model, wherever."""
    model = getattr(model, "_orig_mod", model)
    if type(model) not in _MODELS.values():
        raise InputError(f"save_model writes CGCNN and SRCGCNN models, not {type(model).__name__}; give one of those.")
    check_parts(model)
    check_metadata(model)
    try:
        json.dumps(_config(model), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The model's metadata must be finite JSON values, or it could not be saved ({error}); change them."
        ) from error


def _config(model: CGCNN | SRCGCNN) -> dict[str, Any]:
    metadata = model.metadata
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "model": type(model).__name__,
        "hyperparameters": model.hyperparameters,
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "targets": list(metadata.targets),
        "units": list(metadata.units),
        "normalizer": {"mean": list(metadata.mean), "std": list(metadata.std)},
        "graph": asdict(metadata.graph),
        "element_table": _BUILT_IN_TABLE if is_built_in(model.element_table) else "element_table",
        "extra": metadata.extra,
    }


def check_metadata(model: CGCNN | SRCGCNN) -> None:
    """Raises InputError: the model's outputs have not each a target, unit, mean and std. Gaussians that end before the
    radius are told in the log.
    """
    metadata, p = model.metadata, model.hyperparameters
    outputs, radius, end = p["n_targets"], metadata.graph.radius, p["dmin"] + (p["nbr_fea_len"] - 1) * p["step"]
    if end + p["step"] / 2 < radius:
        _warn_of_gaussians(end, radius, metadata.graph.n_gaussians(p["dmin"], p["step"]))
    replace(metadata)  # whose constructor compares them with each other
    if len(metadata.targets) != outputs:
        raise InputError(
            f"The model has {outputs} output(s), and its metadata name {len(metadata.targets)} targets "
            f"({', '.join(metadata.targets)}); give each its name."
        )


@cache
def _warn_of_gaussians(end: float, radius: float, wanted: int) -> None:
    logger.warning(
        "The model's Gaussians end at %.3g Å and its graphs at %.3g Å, so it tells no distances beyond apart; make it "
        "with nbr_fea_len=%d, or set metadata.graph to what it was trained on.",
        end, radius, wanted,
    )  # fmt: skip


def check_parts(model: CGCNN | SRCGCNN) -> None:
    """Raises InputError: it is not what loading its state_dict would build."""
    with torch.device("meta"):
        usual = type(model)(**model.hyperparameters)
    states = (model.state_dict(), usual.state_dict())
    shapes = ({name: tuple(getattr(x, "shape", ())) for name, x in of.items()} for of in states)
    other = sorted({name for name, _ in set.symmetric_difference(*(set(x.items()) for x in shapes))})
    if other:
        raise InputError(
            f"A {type(model).__name__} of these hyperparameters has not the same {', '.join(other[:3])}, so it could "
            "not be loaded again; undo pruning and parametrizations (prune.remove), or save its state_dict."
        )
    norms = {name: norm.eps for name, norm in usual.named_modules() if hasattr(norm, "eps")}
    for name, eps in norms.items():
        if (own := getattr(model.get_submodule(name), "eps", eps)) != eps:
            raise InputError(
                f"{name} has an eps of {own:g}, of which no file has a record: loaded again it would have {eps:g}, and "
                "predict otherwise; set it to that."
            )


def loaded(model: Any) -> CGCNN | SRCGCNN:
    """A model, or that of a path.

    Raises:
        InputError: it is neither, or as of :func:`load_model`.
    """
    found: Any = load_model(model) if isinstance(model, str | os.PathLike) else model
    if not isinstance(getattr(found, "_orig_mod", found), CrystalModel):  # torch.compile wraps
        raise InputError(f"Give a CGCNN or SRCGCNN, or the path of one, in place of the {type(found).__name__}.")
    return found  # type: ignore[no-any-return]


def load_model(path: str | os.PathLike[str]) -> CGCNN | SRCGCNN:
    """The model of a directory that :func:`save_model` wrote, or of a published ``.pth.tar``, in eval mode on the CPU.

    Raises:
        InputError: there is none, or it is damaged, foreign, or of a later version.
    """
    path = Path(path)
    with torch.device("cpu"):  # whatever the default is
        if not path.is_file():
            return read_directory(path, _load_directory)
        if path.name in (_CONFIG, _WEIGHTS):
            raise InputError(f"{path} is one file of a model; give its directory {path.parent}.")
        from .interop.checkpoints import load_upstream_checkpoint

        return load_upstream_checkpoint(path)


def _load_directory(path: Path) -> CGCNN | SRCGCNN:
    run = path.parent if path.name == "model" and not path.exists() else path
    if (run / "run.json").is_file() and not ((run / _CONFIG).is_file() or (run / "model").exists()):
        raise InputError(f"There is no model {run / 'model'} yet: the run has not ended; continue it with --resume.")
    if not path.exists():
        raise InputError(f"There is no model {path}; give a directory written by save_model or a .pth.tar file.")
    config = _read_config(path)
    weights = _read_bytes(path / _WEIGHTS, path)
    try:
        tensors = load(weights)
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(
            f"{path / _WEIGHTS} is damaged or cut short ({error}); save or copy the model again."
        ) from error
    try:
        kind = _MODELS[config["model"]]
        model = kind(**config["hyperparameters"]).to(getattr(torch, config["dtype"]))
        model.metadata = ModelMetadata(
            targets=tuple(config["targets"]),
            units=tuple(config["units"]),
            mean=tuple(config["normalizer"]["mean"]),
            std=tuple(config["normalizer"]["std"]),
            graph=GraphParameters(**config["graph"]),
            extra=dict(config["extra"]),
        )
        named, n_targets = len(model.metadata.targets), model.hyperparameters["n_targets"]
        if named != n_targets:
            raise InputError(f"{named} targets for n_targets = {n_targets}")
        stored_table, digest = config["element_table"] != _BUILT_IN_TABLE, config["weights_sha256"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path / _CONFIG} does not describe a model ({type(error).__name__}: {error}); save the model again."
        ) from error
    try:
        if stored_table:
            model.element_table = tensors.pop("element_table").to(model.element_table)
        model.load_state_dict(tensors, strict=True)
    except (KeyError, RuntimeError) as error:
        raise InputError(
            f"{path / _WEIGHTS} does not fit {path / _CONFIG}: {one_line(error)}; save the model again."
        ) from error
    if hashlib.sha256(weights).hexdigest() != digest:
        raise InputError(f"{path / _WEIGHTS} is not the file that was saved; save or copy the model again.")
    return model.eval()


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / _CONFIG).is_file():
        # Of a run or the members of an ensemble; of the run of one; of several runs.
        names = (_CONFIG, "ensemble.json", f"model/{_CONFIG}")
        within = [file for name in names for file in sorted(path.glob(f"[!.]*/{name}"))]
        such = f", such as {within[0].parent}" if within else ""
        raise InputError(f"{path} has no {_CONFIG}, so it is no model; give a directory written by save_model{such}.")
    try:
        config = json.loads(_read_bytes(path / _CONFIG, path))
    except ValueError as error:
        raise InputError(f"{path / _CONFIG} is not valid JSON ({error}); save or copy the model again.") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise InputError(f"{path / _CONFIG} is not of a {FORMAT}; give a directory written by save_model.")
    version = config.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {version}, and srcgcnn_fast {__version__} reads up to {FORMAT_VERSION}; "
            "upgrade srcgcnn_fast."
        )
    return config


def _read_bytes(file: Path, model: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{model} lacks {file.name}; save or copy the model again.") from error
    except OSError as error:
        raise InputError(f"Cannot read {file}: {error.strerror or error}; check its permissions.") from error


def check_replaceable(target: Path) -> None:
    """Only an empty directory or a model of ours, with nothing beside it, is ever replaced."""
    if target.name.endswith(".pth.tar"):
        raise InputError(
            f"{target} is the name of a published checkpoint, which interop.save_upstream_checkpoint writes; give "
            "save_model another."
        )
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target} is a file; give save_model a directory.")
    held = names_in(target)
    if not held:
        return
    foreign = [name for name in held if name not in (_CONFIG, _WEIGHTS)]
    if foreign or _CONFIG not in held:
        names = ", ".join((foreign or held)[:4])
        raise InputError(f"{target} holds other files ({names}); give save_model a new directory.")
    _read_config(target)


def _write_directory(target: Path, files: dict[str, bytes]) -> None:
    try:
        with atomic_directory(target) as new:
            for name, data in files.items():
                with open(new / name, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"Cannot write {target}: {error.strerror or error}; choose another directory.") from error
