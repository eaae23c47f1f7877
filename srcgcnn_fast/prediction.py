"""Predictions for files, folders, tables and structures, as one table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from .errors import InputError, require
from .files import atomic_path
from .graph import Record, build_graphs, collate, read_inputs
from .graph.elements import ELEMENT_SYMBOLS
from .uncertainty import Ensemble, MonteCarloDropout, Sampler, load_predictor

if TYPE_CHECKING:
    import pandas as pd

    from .graph import CrystalGraph, GraphParameters
    from .nn import CGCNN, SRCGCNN

_CHUNK = 1024
"""Crystals read and turned into graphs at a time: what bounds the memory of a long input."""


def predict(
    model: CGCNN | SRCGCNN | Sampler | str | os.PathLike[str],
    inputs: Any,
    *,
    dropout_passes: int | None = None,
    batch_atoms: int = 20_000,
    timeout: float = 60.0,
    isolated: Literal["error", "warn", "keep"] | None = None,
    progress: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """What ``model`` predicts for every crystal of ``inputs``, built into graphs as the model was trained on them.

    A crystal that cannot be predicted is a row with NaN and one sentence in ``error``; the others go on. Targets
    that the input carries are ignored. The crystals are read in chunks; only the results are kept.

    Args:
        model: a model, an ensemble, or the path of either. Runs on its own device; its train or eval mode is kept.
        inputs: a path (CIF, POSCAR, extxyz, pymatgen JSON, Parquet, a folder of such) or an iterable of structures
            (pymatgen, ASE, paths, or lattice, fractional coordinates and atomic numbers).
        dropout_passes: predict so many times with the model's dropout left on, for a mean and a standard deviation.
        batch_atoms: most graph rows in one forward pass; one larger crystal goes alone.
        timeout: seconds for reading one CIF file among several.
        isolated: what an atom without any neighbour means for its crystal, in place of the model's own setting:
            "error" an error row, "keep" a prediction.
        progress: called after each input is read, with the number read so far.

    Returns:
        One row per input in input order: ``id``, a column per target in its unit (a classifier: P(class 1)),
        ``error`` (None where there is none). An ensemble, or dropout left on, gives the mean, and after each target
        ``NAME_std``: its standard deviation, calibrated where training did so.

    Raises:
        InputError: the model or the inputs as a whole cannot be read.
    """
    pandas = require("pandas", "A table of predictions", extra="io")
    predictor = _predictor(model, dropout_passes)
    models = predictor.models if isinstance(predictor, Sampler) else [predictor]
    metadata = models[0].metadata
    if batch_atoms < 1:
        raise InputError(f"batch_atoms is {batch_atoms}; give at least 1.")
    parameters = metadata.graph if isolated is None else replace(metadata.graph, isolated=isolated)
    suffixes = ("", "_std") if isinstance(predictor, Sampler) else ("",)
    names = [f"{target}{suffix}" for target in metadata.targets for suffix in suffixes]
    if {"id", "error"} & set(names) or len(set(names)) < len(names):
        raise InputError(f"The model's targets {names} clash as columns beside id and error; rename them.")

    ids: list[str] = []
    errors: list[str | None] = []
    values: list[np.ndarray] = []
    training = [each.training for each in models]
    for each in models:
        each.eval()
    try:
        for chunk in _chunks(_counted(read_inputs(inputs, targets=(), timeout=timeout), progress)):
            found, failures = _predict_chunk(predictor, chunk, parameters, batch_atoms)
            ids += [record.id for record in chunk]
            values.append(found)
            errors += failures
    finally:
        for each, mode in zip(models, training, strict=True):
            each.train(mode)
    table = np.concatenate(values) if values else np.empty((0, len(names)))
    columns = {name: table[:, i] for i, name in enumerate(names)}
    return pandas.DataFrame(
        {
            "id": pandas.Series(ids, dtype=object),
            **columns,
            "error": pandas.Series(errors, dtype=object),
        }
    )


def write_table(frame: pd.DataFrame, path: str | os.PathLike[str]) -> Path:
    """Write a table as ``.csv``, ``.parquet`` or ``.json`` (a list of rows), whole or not at all.

    Raises:
        InputError: another suffix, or ``path`` cannot be written.
    """
    path = Path(path)
    writers: dict[str, Callable[[Path], Any]] = {
        ".csv": lambda file: frame.to_csv(file, index=False),
        ".parquet": lambda file: frame.to_parquet(file, index=False),
        ".json": lambda file: frame.to_json(file, orient="records", indent=1, double_precision=15),
    }
    if path.suffix.lower() not in writers:
        raise InputError(f"{path} has the suffix {path.suffix!r}; give .csv, .parquet or .json.")
    if path.suffix.lower() == ".parquet":
        require("pyarrow", "Writing Parquet", extra="io")
    with atomic_path(path) as temporary:
        writers[path.suffix.lower()](temporary)
    return path


def _predictor(model: Any, dropout_passes: int | None) -> CGCNN | SRCGCNN | Sampler:
    found = load_predictor(model) if isinstance(model, str | os.PathLike) else model
    if dropout_passes is None:
        return found
    if isinstance(found, Ensemble):
        raise InputError("An ensemble has its own spread; predict without dropout passes, or with one of its members.")
    return MonteCarloDropout(found, dropout_passes)


def _counted(records: Iterator[Record], progress: Callable[[int], None] | None) -> Iterator[Record]:
    for count, record in enumerate(records, start=1):
        if progress is not None:
            progress(count)
        yield record


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    while chunk := list(islice(records, _CHUNK)):
        yield chunk


def _predict_chunk(
    predictor: Any, records: Sequence[Record], parameters: GraphParameters, batch_atoms: int
) -> tuple[np.ndarray, list[str | None]]:
    """(len(records), T or 2T) float64, NaN where the sentence beside it is not None."""
    is_sampler = isinstance(predictor, Sampler)
    model = predictor.models[0] if is_sampler else predictor
    weight = model.embedding.weight
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32  # of the distances
    values = np.full((len(records), len(model.metadata.targets) * (1 + is_sampler)), np.nan)
    graphs, errors = _graphs(model, records, parameters, np.float64 if dtype == torch.float64 else np.float32)
    for batch in _batches(graphs, batch_atoms):
        with torch.inference_mode():
            outputs = predictor.predict(collate([graphs[i] for i in batch], dtype).to(weight.device))
        if is_sampler:  # mean and standard deviation of each target, side by side
            outputs = torch.stack(outputs, dim=2).flatten(1)
        values[batch] = outputs.double().cpu().numpy()
        for i in batch:
            if not np.isfinite(values[i]).all():
                values[i] = np.nan
                errors[i] = f"{records[i].id}: the model's output is not finite; check its weights and the structure."
    return values, errors


def _graphs(
    model: Any, records: Sequence[Record], parameters: GraphParameters, distance_dtype: Any
) -> tuple[dict[int, CrystalGraph], list[str | None]]:
    """The graph of each record that has one, by position, and the sentence of each that has none."""
    errors = [record.error for record in records]
    good = [i for i, record in enumerate(records) if record.crystal is not None]
    built = build_graphs(
        [records[i].crystal for i in good],
        parameters.radius,
        parameters.max_neighbors,
        parameters.symmetry_tolerance,
        padded=parameters.padded,
        isolated=parameters.isolated,
        errors="collect",
        distance_dtype=distance_dtype,
    )
    has_vector = model.element_table.any(dim=1).cpu().numpy()
    graphs = {}
    for i, graph in zip(good, built, strict=True):
        if isinstance(graph, InputError):
            errors[i] = f"{records[i].id}: {graph}"
        elif not has_vector[graph.numbers].all():
            symbol = ELEMENT_SYMBOLS[graph.numbers[~has_vector[graph.numbers]][0]]
            errors[i] = f"{records[i].id} has {symbol}, which the model's element table lacks; leave it out."
        else:
            graphs[i] = graph
    return graphs, errors


def _batches(graphs: dict[int, CrystalGraph], batch_atoms: int) -> Iterator[list[int]]:
    """Positions in order, cut where a batch would exceed ``batch_atoms`` rows."""
    batch: list[int] = []
    rows = 0
    for i, graph in graphs.items():
        if batch and rows + graph.n_rows > batch_atoms:
            yield batch
            batch, rows = [], 0
        batch.append(i)
        rows += graph.n_rows
    if batch:
        yield batch
