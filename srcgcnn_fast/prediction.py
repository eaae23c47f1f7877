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
from .serialization import load_model

if TYPE_CHECKING:
    import pandas as pd

    from .graph import CrystalGraph, GraphBatch, GraphParameters
    from .nn import CGCNN, SRCGCNN

_CHUNK = 1024
"""Crystals read and turned into graphs at a time: what bounds the memory of a long input."""


def predict(
    model: CGCNN | SRCGCNN | str | os.PathLike[str],
    inputs: Any,
    *,
    batch_atoms: int = 20_000,
    timeout: float = 60.0,
    isolated: Literal["error", "warn", "keep"] | None = None,
    progress: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """What ``model`` predicts for every crystal of ``inputs``, built into graphs as the model was trained on them.

    A crystal that cannot be predicted is a row with NaN and one sentence in ``error``; the others go on. Targets
    that the input carries are ignored. The crystals are read in chunks; only the results are kept.

    Args:
        model: a model, or what :func:`load_model` takes. Runs on its own device; its train or eval mode is kept.
        inputs: a path (CIF, POSCAR, extxyz, pymatgen JSON, Parquet, a folder of such) or an iterable of structures
            (pymatgen, ASE, paths, or lattice, fractional coordinates and atomic numbers).
        batch_atoms: most graph rows in one forward pass; one larger crystal goes alone.
        timeout: seconds for reading one CIF file among several.
        isolated: what an atom without any neighbour means for its crystal, in place of the model's own setting:
            "error" an error row, "keep" a prediction.
        progress: called after each input is read, with the number read so far.

    Returns:
        One row per input in input order: ``id``, a column per target in its unit (a classifier: P(class 1)),
        ``error`` (None where there is none).

    Raises:
        InputError: the model or the inputs as a whole cannot be read.
    """
    pandas = require("pandas", "A table of predictions", extra="io")
    model = load_model(model) if isinstance(model, str | os.PathLike) else model
    targets = list(model.metadata.targets)
    if {"id", "error"} & set(targets) or len(set(targets)) < len(targets):
        raise InputError(f"The model's targets {targets} clash as columns beside id and error; rename them.")
    ids, table, errors = run_over(
        model, inputs, model.predict, len(targets),
        batch_atoms=batch_atoms, timeout=timeout, isolated=isolated, progress=progress,
    )  # fmt: skip
    columns = {name: table[:, i] for i, name in enumerate(targets)}
    return pandas.DataFrame(
        {
            "id": pandas.Series(ids, dtype=object),
            **columns,
            "error": pandas.Series(errors, dtype=object),
        }
    )


def run_over(
    model: CGCNN | SRCGCNN,
    inputs: Any,
    function: Callable[[GraphBatch], torch.Tensor],
    width: int,
    *,
    batch_atoms: int = 20_000,
    timeout: float = 60.0,
    isolated: Literal["error", "warn", "keep"] | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[str], np.ndarray, list[str | None]]:
    """What ``function``, a method of ``model`` from a batch of B crystals to (B, width), gives for every input.

    Arguments are those of :func:`predict`.

    Returns:
        ids; (n, width) float64, NaN where there is an error; the sentence of each error, else None.
    """
    if batch_atoms < 1:
        raise InputError(f"batch_atoms is {batch_atoms}; give at least 1.")
    parameters = model.metadata.graph if isolated is None else replace(model.metadata.graph, isolated=isolated)
    ids: list[str] = []
    errors: list[str | None] = []
    values: list[np.ndarray] = []
    training = model.training
    model.eval()
    try:
        for chunk in _chunks(_counted(read_inputs(inputs, targets=(), timeout=timeout), progress)):
            found, failures = _run_over_chunk(model, chunk, function, width, parameters, batch_atoms)
            ids += [record.id for record in chunk]
            values.append(found)
            errors += failures
    finally:
        model.train(training)
    return ids, np.concatenate(values) if values else np.empty((0, width)), errors


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


def _counted(records: Iterator[Record], progress: Callable[[int], None] | None) -> Iterator[Record]:
    for count, record in enumerate(records, start=1):
        if progress is not None:
            progress(count)
        yield record


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    while chunk := list(islice(records, _CHUNK)):
        yield chunk


def _run_over_chunk(
    model: Any,
    records: Sequence[Record],
    function: Callable[[GraphBatch], torch.Tensor],
    width: int,
    parameters: GraphParameters,
    batch_atoms: int,
) -> tuple[np.ndarray, list[str | None]]:
    """(len(records), width) float64, NaN where the sentence beside it is not None."""
    weight = model.embedding.weight
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32  # of the distances
    values = np.full((len(records), width), np.nan)
    graphs, errors = _graphs(model, records, parameters, np.float64 if dtype == torch.float64 else np.float32)
    for batch in _batches(graphs, batch_atoms):
        with torch.inference_mode():
            outputs = function(collate([graphs[i] for i in batch], dtype).to(weight.device))
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
