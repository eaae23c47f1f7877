"""Predictions for files, folders, tables and structures, as one table."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from .capture import CapturedModel
from .errors import InputError, require
from .files import atomic_path
from .graph import GraphBatch, GraphStore, Record, build_graphs, collate, open_store, read_inputs
from .graph.build import build_crystals
from .graph.crystal import MixedCrystal
from .graph.elements import MAX_ATOMIC_NUMBER, MIXES_BUILT_IN, is_built_in, with_vector, without_vector
from .graph.readers import is_series
from .graph.store import is_store, packed_store
from .nn.models import in_eval_mode
from .serialization import check_metadata
from .uncertainty import MonteCarloDropout, Sampler, load_predictor

if TYPE_CHECKING:
    import pandas as pd

    from .graph import GraphBatch, GraphParameters
    from .graph.crystal import AnyCrystal
    from .graph.packing import Packing
    from .nn import CGCNN, SRCGCNN

logger = logging.getLogger(__name__)

Predictor = Callable[[GraphBatch], torch.Tensor]
Chunk = tuple[Sequence[str], np.ndarray, list[str | None]]
"""Ids of n inputs, their values (n, n_targets) float64, and the sentence of each whose values are NaN."""

_CHUNK = 1024
"""Crystals read and turned into graphs at a time: what bounds the memory of a long input."""
_CHUNK_ATOMS = 100_000
"""Where they are large, of so many atoms."""
_PREPARED = 16
"""So many times as many, where the graphs are there: a GPU takes a thousand in less time than their names."""
_AHEAD = 4
"""Batches of a store that threads put together while a GPU has the one before."""


def predict(
    model: CGCNN | SRCGCNN | Sampler | str | os.PathLike[str],
    inputs: Any,
    *,
    dropout_passes: int | None = None,
    batch_atoms: int = 20_000,
    timeout: float = 60.0,
    isolated: Literal["error", "warn", "keep"] | None = None,
    disorder: Literal["error", "majority", "average"] | None = None,
    captured: bool = False,
    progress: bool | Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """What ``model`` predicts for every crystal of ``inputs``, built into graphs as the model was trained on them.

    A crystal that cannot be predicted is a row with NaN and one sentence in ``error``; the others go on. Targets
    that the input carries are ignored. The crystals are read in chunks; only the results are kept.

    Args:
        model: a model, an ensemble, or the path of either. Runs on its own device; its train or eval mode is kept.
        inputs: a path (CIF, POSCAR, extxyz, pymatgen JSON, Parquet, a folder of such), an iterable of structures
            (pymatgen, ASE, paths, or lattice, fractional coordinates and atomic numbers), a dictionary or pandas
            Series id -> structure, or a store that :func:`prepare` wrote, whose graphs must be those of the model.
        dropout_passes: predict so many times with the model's dropout left on, for a mean and a standard deviation.
        batch_atoms: most graph rows in one forward pass; one larger crystal goes alone.
        timeout: seconds for reading one CIF file among several.
        isolated: for crystals that have an atom without neighbours, in place of the model's own setting: "error" gives
            an error row, "keep" a prediction, "warn" a prediction that the log counts.
        disorder: for sites that are not one full atom, in place of the model's own setting: "error", "majority" or
            "average".
        captured: on a GPU, replay a CUDA graph for each size of batch (:class:`srcgcnn_fast.CapturedModel`), which pays
            for small ``batch_atoms``.
        progress: True for a progress bar, or a function that is told the number of inputs read so far.

    Returns:
        One row per input in input order, with the index of a Series: ``id``, a column per target in its unit (a
        classifier: P(class 1)), ``error`` (None where there is none). An ensemble, or dropout left on, gives the mean,
        and after each target ``NAME_std``: its standard deviation, calibrated where training did so.

    Raises:
        InputError: the model or the inputs as a whole cannot be read, a store has other graphs than the model wants, or
            ``captured`` without a GPU.
    """
    pandas = require("pandas", "A table of predictions", extra="io")
    predictor = _predictor(model, dropout_passes)
    models = predictor.models if isinstance(predictor, Sampler) else [predictor]
    check_metadata(models[0])
    metadata = models[0].metadata
    suffixes = ("", "_std") if isinstance(predictor, Sampler) else ("",)
    columns = [f"{target}{suffix}" for target in metadata.targets for suffix in suffixes]
    if {"id", "error"} & set(columns) or len(set(columns)) < len(columns):
        raise InputError(f"The model's targets {columns} clash as columns beside id and error; rename them.")
    function: Predictor
    if isinstance(predictor, Sampler):
        if captured:
            raise InputError("Captured predictions are of one model without spread; leave captured out.")
        function = partial(_side_by_side, predictor)
    else:
        function = CapturedModel(predictor) if captured else predictor.predict
    with _told(progress) as told:
        ids, table, errors = run_over(
            models, inputs, function, len(columns),
            batch_atoms=batch_atoms, timeout=timeout, isolated=isolated, disorder=disorder, progress=told,
        )  # fmt: skip
    frame = pandas.DataFrame(
        {
            "id": pandas.Series(ids, dtype=object),
            **{name: table[:, i] for i, name in enumerate(columns)},
            "error": pandas.Series(errors, dtype=object),
        }
    )
    if is_series(inputs):  # so that a column of it goes into the table that the Series is of
        frame.index = inputs.index
    return frame


@contextmanager
def _told(progress: bool | Callable[[int], None] | None) -> Iterator[Callable[[int], None] | None]:
    """Who is told the number of inputs read so far: a bar, if that is asked for, which shows after a moment."""
    if not isinstance(progress, bool):
        yield progress
        return
    try:
        from tqdm.auto import tqdm
    except ImportError:
        logger.info("Without tqdm there is no progress bar.")
        yield None
        return
    pause = 0.1 if sys.stderr.isatty() else 10  # s; a log file need not hold every step
    with tqdm(desc="predict", unit=" crystals", mininterval=pause, delay=1, disable=not progress) as bar:
        yield lambda count: bar.update(count - bar.n)


def _side_by_side(sampler: Sampler, batch: GraphBatch) -> torch.Tensor:
    """(B, 2T): mean and standard deviation of each target."""
    return torch.stack(sampler.predict(batch), dim=2).flatten(1)


def run_over(
    models: Sequence[CGCNN | SRCGCNN],
    inputs: Any,
    function: Predictor,
    width: int,
    *,
    batch_atoms: int = 20_000,
    timeout: float = 60.0,
    isolated: Literal["error", "warn", "keep"] | None = None,
    disorder: Literal["error", "majority", "average"] | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[str], np.ndarray, list[str | None]]:
    """What ``function``, from a batch of B crystals to (B, width), gives for every input.

    ``models`` are those that it uses, on one device and trained on graphs of one kind. Other arguments are those of
    :func:`predict`.

    Returns:
        ids; (n, width) float64, NaN where there is an error; the sentence of each error, else None.
    """
    if batch_atoms < 1:
        raise InputError(f"batch_atoms is {batch_atoms}; give at least 1.")
    model = models[0]
    own = model.metadata.graph
    parameters = replace(own, isolated=isolated or own.isolated, disorder=disorder or own.disorder)
    is_captured = isinstance(function, CapturedModel)  # which takes batches on the CPU itself
    device = torch.device("cpu") if is_captured else model.element_table.device
    ids: list[str] = []
    errors: list[str | None] = []
    values: list[np.ndarray] = []
    with in_eval_mode(models):
        if (store := _as_store(inputs)) is not None:
            chunks = _of_store(model, function, store, width, parameters, batch_atoms, progress, device)
        else:
            call = function if is_captured else _moving(function, device)
            read = read_inputs(inputs, targets=(), timeout=timeout, disorder=parameters.disorder)
            records = _chunks(_counted(read, progress))
            chunks = (_run_over_chunk(model, chunk, width, call, parameters, batch_atoms) for chunk in records)
        for names, found, failures in chunks:
            ids += names
            values.append(found)
            errors += failures
    return ids, np.concatenate(values) if values else np.empty((0, width)), errors


def check_table(path: str | os.PathLike[str]) -> Path:
    """The path of a table that :func:`write_table` can write.

    Raises:
        InputError: another suffix than ``.csv``, ``.parquet`` or ``.json``, or pyarrow is missing for Parquet.
    """
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".parquet", ".json"):
        raise InputError(f"{path} has the suffix {path.suffix!r}; give .csv, .parquet or .json.")
    if path.suffix.lower() == ".parquet":
        require("pyarrow", "Writing Parquet", extra="io")
    return path


def write_table(frame: pd.DataFrame, path: str | os.PathLike[str]) -> Path:
    """Write a table as ``.csv``, ``.parquet`` or ``.json`` (a list of rows), whole or not at all.

    Raises:
        InputError: another suffix, or ``path`` cannot be written.
    """
    path = check_table(os.path.expanduser(path))  # as pandas would
    texts = {name: "string" for name in ("id", "error") if name in frame}  # also where no row has an error
    writers: dict[str, Callable[[Path], Any]] = {
        ".csv": lambda file: frame.to_csv(file, index=False),
        ".parquet": lambda file: frame.astype(texts).to_parquet(file, index=False),
        ".json": lambda file: _write_json(frame, file),
    }
    with atomic_path(path) as temporary:
        writers[path.suffix.lower()](temporary)
    return path


def _write_json(frame: pd.DataFrame, file: Path) -> None:
    """All digits; pandas' ``to_json`` has 15 decimals, few of which are left of small numbers."""
    many = _PREPARED * _CHUNK  # a dictionary a row takes ten times the room of the table
    with file.open("w", encoding="utf-8") as lines:
        for first in range(0, len(frame), many):
            part = frame.iloc[first : first + many]
            rows = part.astype(object).where(part.notna(), None).to_dict("records")
            lines.write(("," if first else "[") + json.dumps(rows, indent=1)[1:-2])  # without its brackets
        lines.write("\n]\n" if len(frame) else "[]\n")


def _predictor(model: Any, dropout_passes: int | None) -> CGCNN | SRCGCNN | Sampler:
    found = load_predictor(model) if isinstance(model, str | os.PathLike) else model
    if isinstance(found, Sampler):
        if dropout_passes is None:
            return found
        raise InputError("An ensemble has its own spread; predict without dropout passes, or with one of its members.")
    if not hasattr(found, "metadata"):
        raise InputError(
            f"predict takes a CGCNN or SRCGCNN, an ensemble, or the path of either, not a {type(found).__name__}; give "
            "the model that it holds."
        )
    return found if dropout_passes is None else MonteCarloDropout(found, dropout_passes)


def _counted(records: Iterator[Record], progress: Callable[[int], None] | None) -> Iterator[Record]:
    for count, record in enumerate(records, start=1):
        if progress is not None:
            progress(count)
        yield record


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    atoms = 0
    for record in records:
        chunk.append(record)
        atoms += len(record.crystal.numbers) if record.crystal is not None else 0
        if len(chunk) == _CHUNK or atoms >= _CHUNK_ATOMS:
            yield chunk
            chunk, atoms = [], 0
    if chunk:
        yield chunk


def _run_over_chunk(
    model: Any, records: Sequence[Record], width: int, call: Predictor, parameters: GraphParameters, batch_atoms: int
) -> Chunk:
    names = [record.id for record in records]
    crystals = {i: record.crystal for i, record in enumerate(records) if record.crystal is not None}
    has_mixed = any(isinstance(crystal, MixedCrystal) for crystal in crystals.values())
    is_packed = crystals and not has_mixed and _distance_dtype(model) == torch.float32
    rows, join, failures = (_packed if is_packed else _graphs)(model, names, crystals, parameters)
    errors = [failures.get(i, record.error) for i, record in enumerate(records)]
    good = np.array(list(rows), dtype=np.int64)
    cuts = _cuts(np.array(list(rows.values()), dtype=np.int64), batch_atoms)
    places = [good[begin:stop] for begin, stop in cuts]
    values = np.full((len(records), width), np.nan)
    for place, found in zip(places, _run(call, map(join, places)), strict=True):
        values[place] = found
    _mark(values, good, names, errors)
    return names, values, errors


def _as_store(inputs: Any) -> GraphStore | None:
    if isinstance(inputs, str | os.PathLike) and is_store(inputs):
        return open_store(inputs)
    return inputs if isinstance(inputs, GraphStore) else None


def _of_store(
    model: Any,
    function: Predictor,
    store: GraphStore,
    width: int,
    parameters: GraphParameters,
    batch_atoms: int,
    progress: Callable[[int], None] | None,
    device: torch.device,
) -> Iterator[Chunk]:
    """Chunks of a store's crystals; only what was prepared as the model wants it. Batches are on ``device``."""
    here, there = asdict(replace(store.parameters, isolated=parameters.isolated)), asdict(parameters)
    differ = [name for name in there if here[name] != there[name]]
    if differ:
        has, wants = (", ".join(f"{name}={x[name]!r}" for name in differ) for x in (here, there))
        raise InputError(
            f"The store was prepared with {has}, and the model wants {wants}; prepare it alike, or predict from the "
            "structures."
        )
    if store.n_rejected:
        logger.warning("%d inputs of %s were left out when it was prepared, with no row.", store.n_rejected, store.path)
    is_stricter = parameters.isolated == "error" and store.parameters.isolated != "error"
    failures = store.isolated() if is_stricter else {}
    failures = {crystal: f"{store.ids[crystal]}: {sentence}" for crystal, sentence in failures.items()}
    for crystal, number in store.lacking(model.element_table.cpu()).items():
        failures[crystal] = without_vector(store.ids[crystal], number)
    is_good = np.ones(len(store), dtype=bool)
    is_good[list(failures)] = False
    good = np.flatnonzero(is_good)
    many = _PREPARED * _CHUNK
    ranges = [(first, min(first + many, len(store))) for first in range(0, len(store), many)]
    parts = [good[slice(*np.searchsorted(good, ends))] for ends in ranges]
    cuts = [[part[slice(*cut)] for cut in _cuts(store.row_counts[part], batch_atoms)] for part in parts]
    ahead = _AHEAD if device.type == "cuda" else 0
    batches = _store_batches(store, chain.from_iterable(cuts), device, _distance_dtype(model), ahead)
    begun: _Begun | None = None
    for (first, stop), part, some in zip(ranges, parts, cuts, strict=True):
        with torch.inference_mode():  # on a GPU it is on its way while the next batch is put together
            outputs = [function(batch) for batch in islice(batches, len(some))]
        if begun is not None:  # which the GPU has done by now
            yield _finished(store, begun, width, failures, progress)
        begun = _Begun(first, stop, part, outputs)
    if begun is not None:
        yield _finished(store, begun, width, failures, progress)


def _store_batches(
    store: GraphStore, chosen: Iterable[np.ndarray], device: torch.device, dtype: torch.dtype, ahead: int
) -> Iterator[GraphBatch]:
    """Each choice of crystals, on ``device``; threads put so many batches together ``ahead`` of the consumer."""
    begun: deque[tuple[np.ndarray, Packing | None]] = deque()

    def finished() -> GraphBatch:
        indices, packing = begun.popleft()
        batch = packing.on(device)[0] if packing is not None else store.batch(indices).to(device)
        return batch if dtype == torch.float32 else batch.to(dtype=dtype)

    for indices in chosen:
        packing = store.packing(indices, np.zeros(0, np.float32), pin=device.type == "cuda") if ahead else None
        begun.append((indices, packing))
        if len(begun) > ahead:
            yield finished()
    while begun:
        yield finished()


class _Begun(NamedTuple):
    """A chunk of a store's crystals on its way through the model."""

    first: int
    stop: int
    good: np.ndarray
    """Those of them that have outputs, in order."""
    outputs: list[torch.Tensor]


def _finished(
    store: GraphStore, begun: _Begun, width: int, failures: dict[int, str], progress: Callable[[int], None] | None
) -> Chunk:
    first, stop = begun.first, begun.stop
    names, errors = store.ids[first:stop], list(map(failures.get, range(first, stop)))
    values = np.full((stop - first, width), np.nan)
    if begun.outputs:
        with torch.inference_mode():
            values[begun.good - first] = torch.cat(begun.outputs).double().cpu().numpy()
    _mark(values, begun.good - first, names, errors)
    if progress is not None:
        progress(stop)
    return names, values, errors


def _moving(function: Predictor, device: torch.device) -> Predictor:
    """``function`` of batches on the CPU."""
    if device.type != "cuda":
        return lambda batch: function(batch.to(device))
    return lambda batch: function(batch.pin_memory().to(device, non_blocking=True))


def _run(call: Predictor, batches: Iterable[GraphBatch]) -> Iterator[np.ndarray]:
    """(B, n_targets) float64 of each batch. On a GPU all are on their way before the first is waited for."""
    with torch.inference_mode():
        found = [call(batch) for batch in batches]
    for x in found:
        yield x.double().cpu().numpy()


def _distance_dtype(model: Any) -> torch.dtype:
    dtype = next(model.embedding.parameters(), model.element_table).dtype  # of whatever module stands there
    return torch.float64 if dtype == torch.float64 else torch.float32


def _mark(values: np.ndarray, places: Any, names: Sequence[str], errors: list[str | None]) -> None:
    """Turn the rows of ``places``, a sequence of indices, that are not finite into errors."""
    at = np.asarray(places, dtype=np.int64)
    for i in at[~np.isfinite(values[at]).all(axis=1)].tolist():
        values[i] = np.nan
        errors[i] = f"{names[i]}: the model's output is not finite; check its weights and the structure."


Built = tuple[dict[int, int], Callable[[np.ndarray], GraphBatch], dict[int, str]]
"""Rows of each graph by the crystal's number, what joins those of some numbers, and why other crystals have none."""


def _packed(model: Any, names: Sequence[str], crystals: dict[int, AnyCrystal], parameters: GraphParameters) -> Built:
    """Of crystals without averaged sites, in single precision: as arrays, without an object for each."""
    packed = build_crystals(list(crystals.values()), parameters)
    store, numbers = packed_store(packed, parameters), list(crystals)
    failures = {numbers[k]: f"{names[numbers[k]]}: {error}" for k, error in packed.errors.items()}
    for k, number in store.lacking(model.element_table).items():
        failures[numbers[k]] = without_vector(names[numbers[k]], number)
    counts = zip(numbers, store.row_counts.tolist(), strict=True)
    rows = {i: count for i, count in counts if i not in failures}
    return rows, lambda chosen: store.batch(np.searchsorted(numbers, chosen)), failures


def _graphs(model: Any, names: Sequence[str], crystals: dict[int, AnyCrystal], parameters: GraphParameters) -> Built:
    dtype = _distance_dtype(model)
    built = build_graphs(
        crystals.values(),
        parameters.radius,
        parameters.max_neighbors,
        parameters.symmetry_tolerance,
        padded=parameters.padded,
        isolated=parameters.isolated,
        disorder=parameters.disorder,
        errors="collect",
        distance_dtype=np.float64 if dtype == torch.float64 else np.float32,
    )
    mixes = is_built_in(model.element_table)
    has_vector = with_vector(model.element_table, np.arange(MAX_ATOMIC_NUMBER + 1))
    graphs, failures = {}, {}
    for i, graph in zip(crystals, built, strict=True):
        if isinstance(graph, InputError):
            failures[i] = f"{names[i]}: {graph}"
        elif graph.atom_features is not None and not mixes:
            failures[i] = f"{names[i]}: {MIXES_BUILT_IN}"
        elif not has_vector[graph.numbers].all():
            failures[i] = without_vector(names[i], graph.numbers[~has_vector[graph.numbers]][0])
        else:
            graphs[i] = graph
    rows = {i: graph.n_rows for i, graph in graphs.items()}
    return rows, lambda chosen: collate([graphs[i] for i in chosen.tolist()], dtype), failures


def _cuts(row_counts: np.ndarray, batch_atoms: int) -> Iterator[tuple[int, int]]:
    """First and behind the last of the crystals of each batch, cut where it would exceed ``batch_atoms`` rows."""
    ends = np.cumsum(row_counts)
    first = 0
    while first < len(ends):
        most = batch_atoms + (int(ends[first - 1]) if first else 0)
        stop = max(first + 1, int(np.searchsorted(ends, most, side="right")))
        yield first, stop
        first = stop
