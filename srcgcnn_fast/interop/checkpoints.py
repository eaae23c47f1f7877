"""Checkpoints (`.pth.tar`) of the published programs, txie-93/cgcnn and sata-deep/SR-CGCNN, read and written."""

from __future__ import annotations

import io
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, one_line
from ..files import atomic_path
from ..graph.build import GraphParameters
from ..graph.elements import MAX_ATOMIC_NUMBER, element_features, is_built_in
from ..nn import CGCNN, SRCGCNN, ModelMetadata
from ..serialization import check_parts

_PUBLISHED = {  # file name -> target, unit, as the list of pre-trained models has them
    "formation-energy-per-atom": ("formation_energy_per_atom", "eV/atom"),
    "final-energy-per-atom": ("final_energy_per_atom", "eV/atom"),
    "band-gap": ("band_gap", "eV"),
    "efermi": ("efermi", "eV"),
    "bulk-moduli": ("bulk_moduli", "log10(GPa)"),
    "shear-moduli": ("shear_moduli", "log10(GPa)"),
    "poisson-ratio": ("poisson_ratio", ""),
    "semi-metal-classification": ("semi_metal_classification", ""),
}
_UNITS = dict(_PUBLISHED.values())
_OURS = "srcgcnn_fast"
"""What the published programs have no place for stands under this name in ``args``, where they ignore it."""
_NO_ERROR_YET = 1e10
"""What main.py starts from."""
_SCALARS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}


def load_upstream_checkpoint(
    path: str | os.PathLike[str], atom_init: str | os.PathLike[str] | None = None
) -> CGCNN | SRCGCNN:
    """The model of a published program's checkpoint, in eval mode, with its normaliser and graph parameters.

    Nothing in the file is executed: only tensors, numbers, strings and containers are accepted. The architecture
    follows from the shapes of the weights. Graphs are padded, as both programs do; those of a file that
    :func:`save_upstream_checkpoint` wrote are the model's own, as are its target, unit and element vectors.

    Args:
        path: a file that ``main.py`` of either program saved.
        atom_init: the ``atom_init.json`` it was trained with, where that is not the published one.

    Raises:
        InputError: the file cannot be read, holds something else, or contradicts itself.
    """
    path = Path(path)
    checkpoint = _read(path)
    state, args = checkpoint["state_dict"], checkpoint.get("args")
    args = args if isinstance(args, Mapping) else {}
    kind, sizes = _architecture(path, state, args)
    gaussians, graph = _data_options(path, args, sizes["nbr_fea_len"])
    ours = _ours(path, args, sizes)
    if atom_init is None and "element_table" in ours:
        table = ours["element_table"]
    else:
        table = _element_table(path, sizes["orig_atom_fea_len"], atom_init)
    try:
        model = kind(**sizes, **gaussians)
        model.load_state_dict(state, strict=True)
    except (RuntimeError, InputError) as error:
        raise InputError(f"{path} does not fit {kind.__name__}: {one_line(error)}.") from error
    model.element_table = torch.from_numpy(table).to(model.element_table)
    model.metadata = _metadata(path, checkpoint, args, ours.get("graph", graph), sizes)
    if ours:
        model.metadata.targets, model.metadata.units = ours["targets"], ours["units"]
    return model.eval()


def save_upstream_checkpoint(model: CGCNN | SRCGCNN, path: str | os.PathLike[str]) -> Path:
    """Write ``model`` as a checkpoint that ``predict.py`` of the published programs loads (CGCNN: either; SRCGCNN:
    SR-CGCNN's).

    Target, unit, graph parameters and element vectors of its own go along for :func:`load_upstream_checkpoint`.
    Those programs pad their graphs; a model trained on unpadded ones predicts otherwise there for a crystal with
    fewer than 12 neighbours within 8 Å. They read the element vectors from their own ``atom_init.json``.

    Raises:
        InputError: the model has what those programs cannot express, or ``path`` cannot be written.
    """
    path, options = Path(path), model.hyperparameters
    graph, metadata = model.metadata.graph, model.metadata
    told = (graph.radius, graph.max_neighbors, options["dmin"], options["step"], options["nbr_fea_len"])
    if told != (8.0, 12, 0.0, 0.2, 41):
        raise InputError(
            f"Cannot write {path}: the published predict.py knows only a radius of 8 Å, 12 neighbours and 41 Gaussians "
            f"from 0 Å in steps of 0.2 Å, and this model has (radius, neighbours, from, step, Gaussians) = {told}."
        )
    if not options["classification"] and options["n_targets"] != 1:
        raise InputError(
            f"Cannot write {path}: the published programs predict one target, and this model has "
            f"{options['n_targets']}; train one model per target."
        )
    if options.get("recurrent_shared_norms"):
        raise InputError(
            f"Cannot write {path}: every step's batch norms have their own scale and shift in the published program, "
            "and this model shares them; train one without recurrent_shared_norms."
        )
    check_parts(model)
    args = {name: options[name] for name in ("atom_fea_len", "h_fea_len", "n_h")}
    args["task"] = "classification" if options["classification"] else "regression"
    args["data_options"] = ["."]
    if isinstance(model, SRCGCNN):
        steps = options["n_recurrent_steps"]
        args |= {"conv_mode": "shared_recurrent", "n_conv": steps, "n_recurrent_steps": steps}
        args |= {name: options[name] for name in ("recurrent_layer_norm", "recurrent_learnable_alpha")}
    else:
        args |= {"conv_mode": "standard", "n_conv": options["n_conv"]}
    args[_OURS] = {"targets": list(metadata.targets), "units": list(metadata.units), "graph": asdict(graph)}
    if model.element_table.any() and not is_built_in(model.element_table):
        args[_OURS]["element_table"] = model.element_table.detach().cpu().float().tolist()
    best = metadata.extra.get("best_epoch", {})  # of our training, which comes after that of a file
    before = metadata.extra.get("best_mae_error", 0.0 if options["classification"] else _NO_ERROR_YET)
    score = best.get("val_auc" if options["classification"] else "val_mae", before)
    checkpoint = {
        "epoch": int(best.get("epoch", metadata.extra.get("epoch", 0))),
        "state_dict": {name: value.detach().cpu() for name, value in model.state_dict().items()},
        "best_mae_error": float(score),
        "normalizer": {"mean": metadata.mean[0], "std": metadata.std[0]},
        "args": args,
    }
    with atomic_path(path) as temporary:
        content = io.BytesIO()
        torch.save(checkpoint, content)  # into a file it has an error of its own where the disk is full
        temporary.write_bytes(content.getbuffer())
    return path


class _DType:
    """Stands in for ``numpy.dtype`` while a checkpoint is read, so that no NumPy code sees what the file says."""

    def __init__(self, code: str, *_: Any) -> None:
        if code not in _SCALARS:
            raise ValueError(f"a NumPy scalar of type {code!r}")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _scalar(dtype: _DType, data: bytes | str) -> float | int | bool:
    """Stands in for ``numpy.core.multiarray.scalar``; Python 2 pickles give the bytes as latin-1 text."""
    raw = data.encode("latin-1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype=dtype.order + dtype.code, count=1)[0].item()


_ALLOWED: list[Any] = [
    (_DType, "numpy.dtype"),
    (_scalar, "numpy.core.multiarray.scalar"),  # NumPy 1
    (_scalar, "numpy._core.multiarray.scalar"),  # NumPy 2
]


def _read(path: Path) -> dict[str, Any]:
    """The checkpoint's dictionary; its ``state_dict`` maps names to finite tensors."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"There is no checkpoint {path}; check the path.") from error
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror or error}; give a .pth.tar file.") from error
    try:
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True, encoding="latin-1")
    except (Exception, MemoryError) as error:  # a damaged file fails anywhere inside the unpickler
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asked:
            raise InputError(
                f"{path} was refused: it asks to load {asked[1]}, and a checkpoint may hold only tensors, numbers, "
                "strings and containers; re-save its state_dict, args and normalizer as such."
            ) from error
        raise InputError(
            f"{path} cannot be read as a checkpoint: it is damaged, cut short or not a file of torch.save; "
            "download or copy it again."
        ) from error
    if isinstance(found, Mapping) and "pytorch-lightning_version" in found:
        raise InputError(
            f"{path} is a Lightning checkpoint; save its model with srcgcnn_fast.save_model and load that."
        )
    if not isinstance(found, Mapping) or not isinstance(found.get("state_dict"), Mapping):
        held = f" (it has {_names(found)})" if isinstance(found, Mapping) else ""
        raise InputError(
            f"{path} is not a checkpoint of CGCNN or SR-CGCNN: it lacks the entry 'state_dict'{held}; "
            "give a .pth.tar file that main.py of either program saved."
        )
    return dict(found)


def _architecture(path: Path, state: Mapping[str, Any], args: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """Class and constructor arguments from the shapes of the weights, compared with what ``args`` says."""
    shared = "shared_conv.fc_full.weight" in state
    conv = "shared_conv.fc_full.weight" if shared else "convs.0.fc_full.weight"
    needed = ("embedding.weight", conv, "conv_to_fc.weight", "fc_out.weight")
    missing = [name for name in needed if not (isinstance(state.get(name), Tensor) and state[name].ndim == 2)]
    if missing:
        ours = re.compile(r"(embedding|convs\.\d+|shared_conv|recurrent_\w+|conv_to_fc|fcs\.\d+|fc_out)(\.|$)")
        foreign = [name for name in state if not ours.match(str(name))]
        held = f" and has {_names(foreign)}" if foreign else ""
        raise InputError(
            f"{path} is another program's checkpoint: its state_dict lacks {_names(missing)}{held}; "
            "give one of CGCNN or SR-CGCNN."
        )
    broken = [n for n, v in state.items() if not isinstance(v, Tensor) or not bool(torch.isfinite(v).all())]
    if broken:
        raise InputError(
            f"{path} holds values that are not finite numbers in {_names(broken)}; train that model again."
        )

    width, atom_fea_len = state["embedding.weight"].shape[1], state["embedding.weight"].shape[0]
    outputs = state["fc_out.weight"].shape[0]
    task = args.get("task", "classification" if outputs == 2 else "regression")
    if task not in ("classification", "regression"):
        raise InputError(f"{path} was trained for the task {task!r}; give a regression or classification checkpoint.")
    sizes = {
        "atom_fea_len": atom_fea_len,
        "h_fea_len": state["conv_to_fc.weight"].shape[0],
        "n_h": 1 + _count(state, "fcs"),
        "classification": task == "classification",
        "n_targets": 1 if task == "classification" else outputs,
        "orig_atom_fea_len": width,
        "nbr_fea_len": state[conv].shape[1] - 2 * atom_fea_len,
    }
    said = {name: sizes[name] for name in ("atom_fea_len", "h_fea_len", "n_h")}
    if shared:
        steps = _count(state, "recurrent_bn1s")
        sizes["n_recurrent_steps"] = steps
        sizes["recurrent_layer_norm"] = "recurrent_norm.weight" in state
        sizes["recurrent_learnable_alpha"] = "recurrent_alpha" in state
        said["n_conv" if args.get("n_recurrent_steps") is None else "n_recurrent_steps"] = steps
    else:
        sizes["n_conv"] = said["n_conv"] = _count(state, "convs")
    for name, value in said.items():
        if isinstance(args.get(name), int | float) and args[name] != value:
            raise InputError(
                f"{path} contradicts itself: its args say {name} = {args[name]}, its weights have {value}; "
                "take the file as the training program saved it."
            )
    if sizes["classification"] and outputs != 2:
        raise InputError(
            f"{path} contradicts itself: its args say classification, its last layer has {outputs} output(s) and not "
            "2; take the file as the training program saved it."
        )
    return (SRCGCNN if shared else CGCNN), sizes


def _data_options(path: Path, args: Mapping[str, Any], nbr_fea_len: int) -> tuple[dict[str, Any], GraphParameters]:
    """What ``args['data_options']`` (root, neighbours, radius, dmin, step) says of the graphs; else the defaults.

    The published checkpoints hold a data base's options there, which say nothing of the graph.
    """
    given = args.get("data_options")
    values = [12, 8.0, 0.0, 0.2]
    try:
        numbers = [float(value) for value in list(given)[1:5]] if isinstance(given, list | tuple) else []
    except (TypeError, ValueError):
        numbers = []
    if not all(map(math.isfinite, numbers)):
        numbers = []
    values[: len(numbers)] = numbers
    neighbors, radius, dmin, step = values
    expected = len(np.arange(dmin, radius + step, step)) if step > 0 and (radius - dmin) / step < 1e6 else 0
    if nbr_fea_len != expected or neighbors < 1 or neighbors != int(neighbors):
        raise InputError(
            f"{path} was trained on {nbr_fea_len} Gaussians of the distance, which {int(neighbors)} neighbours within "
            f"{radius:g} Å, from {dmin:g} Å in steps of {step:g} Å, do not give ({expected}); put [root, neighbours, "
            "radius, dmin, step] of its training into args['data_options']."
        )
    graph = GraphParameters(radius=radius, max_neighbors=int(neighbors), padded=True)
    return {"dmin": dmin, "step": step}, graph


def _ours(path: Path, args: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`save_upstream_checkpoint` adds, checked; empty for a file of the published programs."""
    given = args.get(_OURS)
    if given is None:
        return {}
    try:
        ours: dict[str, Any] = {name: tuple(given[name]) for name in ("targets", "units")}
        if any(len(x) != sizes["n_targets"] or not all(isinstance(y, str) for y in x) for x in ours.values()):
            raise ValueError("targets and units must be one text for each target")
        ours["graph"] = GraphParameters(**given["graph"])
        if "element_table" in given:
            shape = (MAX_ATOMIC_NUMBER + 1, sizes["orig_atom_fea_len"])
            ours["element_table"] = np.asarray(given["element_table"], dtype=np.float32).reshape(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} has args['{_OURS}'] that do not describe its model ({one_line(error)}); write the file again."
        ) from error
    return ours


def _element_table(path: Path, width: int, atom_init: str | os.PathLike[str] | None) -> np.ndarray:
    """(101, width) float32, row = atomic number; a row of zeros where ``atom_init`` lacks the element."""
    if atom_init is None:
        if width != element_features().shape[1]:
            raise InputError(
                f"{path} was trained on element vectors of {width} components and not on the published ones of "
                f"{element_features().shape[1]}; give its atom_init.json as atom_init."
            )
        return element_features().copy()
    table = np.zeros((MAX_ATOMIC_NUMBER + 1, width), dtype=np.float32)
    try:
        for number, vector in json.loads(Path(atom_init).read_bytes()).items():
            if 1 <= int(number) <= MAX_ATOMIC_NUMBER:
                table[int(number)] = np.asarray(vector, dtype=np.float32).reshape(width)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{atom_init} does not give {path} its element vectors: expected a JSON object from atomic number to a "
            f"list of {width} numbers ({one_line(error)})."
        ) from error
    return table


def _metadata(
    path: Path, checkpoint: Mapping[str, Any], args: Mapping[str, Any], graph: GraphParameters, sizes: Mapping[str, Any]
) -> ModelMetadata:
    n, normalizer = sizes["n_targets"], checkpoint.get("normalizer")
    if sizes["classification"]:  # its log-probabilities are not normalised
        normalizer = {"mean": 0.0, "std": 1.0}
    elif not isinstance(normalizer, Mapping):
        normalizer = {}
    mean, std = (_numbers(normalizer.get(key), n) for key in ("mean", "std"))
    if mean is None or std is None:
        raise InputError(
            f"{path} lacks its normalizer's mean and std, without which its outputs have no units; add "
            "checkpoint['normalizer'] = {'mean': ..., 'std': ...}."
        )
    extra = {}
    for key in ("epoch", "best_mae_error"):
        value = _numbers(checkpoint.get(key), 1)
        if value is not None and value[0] != _NO_ERROR_YET:
            extra[key] = int(value[0]) if key == "epoch" else value[0]
    target, unit = _target(path, args)
    targets = (target,) if n == 1 else tuple(f"{target}_{i}" for i in range(n))
    return ModelMetadata(targets=targets, units=(unit,) * n, mean=mean, std=std, graph=graph, extra=extra)


def _target(path: Path, args: Mapping[str, Any]) -> tuple[str, str]:
    """Name and unit from the file name, else from the data base's options that the published checkpoints carry."""
    for name, known in _PUBLISHED.items():
        if path.name.startswith(name):
            return known
    options = args.get("data_options")
    match options:
        case [_, "regression" | "classification", str(name), *_] if name.isidentifier():
            return name, _UNITS.get(name, "")
    return "target", ""


def _numbers(value: Any, n: int) -> tuple[float, ...] | None:
    """``n`` finite floats of a number or tensor (one number serves all), or None."""
    if isinstance(value, Tensor) and value.numel() in (1, n):
        found = [float(x) for x in value.flatten().tolist()]
    elif isinstance(value, int | float):
        found = [float(value)]
    else:
        return None
    found = found * n if len(found) == 1 else found
    return tuple(found) if all(map(math.isfinite, found)) else None


def _count(state: Mapping[str, Any], prefix: str) -> int:
    return len({str(name).split(".")[1] for name in state if str(name).startswith(f"{prefix}.")})


def _names(names: Any) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
