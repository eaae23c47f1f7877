"""Splits that the user brings, k folds, and the folds of matbench."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, require
from ..graph.readers import ID_COLUMNS
from ..graph.store import GraphStore
from .data import Split, as_indices

logger = logging.getLogger(__name__)

PARTS = Split._fields
MATBENCH = {
    "matbench_dielectric": 4764,
    "matbench_jdft2d": 636,
    "matbench_log_gvrh": 10987,
    "matbench_log_kvrh": 10987,
    "matbench_mp_e_form": 132752,
    "matbench_mp_gap": 106113,
    "matbench_perovskites": 18928,
    "matbench_phonons": 1265,
}
"""Crystals in each regression task on structures of matbench v0.1 (Dunn et al., npj Comput. Mater. 6, 138 (2020))."""
_MATBENCH_SEED = 18012019


def read_split(
    path: str | os.PathLike[str], store: GraphStore, targets: str | Sequence[str] = (), column: str = "split"
) -> Split:
    """The split of ``store`` that a file gives by the crystals' ids.

    Args:
        path: a CSV or Parquet table with the ids in ``material_id`` or ``id`` and "train", "val" or "test" in
            ``column``; it may be the data set itself. Or a JSON file, {"train": [ids], "val": [ids], "test": [ids]}.
        targets: names; crystals of the store that have none of these are left out.
        column: of the table.

    Crystals that the file leaves blank or does not name are left out, and ids that the store does not hold (what has
    no graph) are passed over; both are counted in the log.

    Raises:
        InputError: the file cannot be read, names another part, puts an id into two, or names no crystal of the store,
            or two crystals of the store have the same id.
    """
    path = Path(path)
    part_of: dict[str, str] = {}
    for name, part in _rows(path, column):
        if part not in PARTS:
            raise InputError(f"{path} puts {name} into {part!r}; the parts are train, val and test.")
        if part_of.setdefault(name, part) != part:
            raise InputError(f"{path} puts {name} into {part_of[name]} and into {part}; name it once.")
    place = _places(store)
    usable = np.isfinite(store.target_array(targets)).any(axis=1).tolist() if targets else [True] * len(store)
    parts: dict[str, list[int]] = {part: [] for part in PARTS}
    for name, part in part_of.items():
        if name in place and usable[place[name]]:
            parts[part].append(place[name])
    found = sum(name in place for name in part_of)
    if not found:
        raise InputError(f"No id of {path} is in the store, whose first is {store.ids[0]}; use the same ids.")
    if found < len(part_of):
        logger.warning("%d ids of %s have no graph and are passed over", len(part_of) - found, path)
    if found < len(store):
        logger.warning("%d of %d crystals are in no part of %s and are left out", len(store) - found, len(store), path)
    return Split(*(np.sort(np.array(parts[part], dtype=np.int64)) for part in PARTS))


def _places(store: GraphStore) -> dict[str, int]:
    place = {name: i for i, name in enumerate(store.ids)}
    if len(place) < len(store):
        raise InputError("Some crystals of the store share an id, so a split by id is ambiguous; make the ids unique.")
    return place


def _rows(path: Path, column: str) -> Iterable[tuple[str, str]]:
    """(id, part) of every crystal that the file puts somewhere."""
    try:
        if path.suffix == ".json":
            parts = json.loads(path.read_text(encoding="utf-8-sig"))
            return [(str(name), part) for part, names in parts.items() for name in names]
        if path.suffix == ".parquet":
            file = require("pyarrow.parquet", "Reading a Parquet file", extra="io").ParquetFile(path)
            header = file.schema_arrow.names
            names = [name for name in dict.fromkeys((*ID_COLUMNS, column)) if name in header]  # structures are long
            table = file.read(names)
            values = zip(*(table.column(name).to_pylist() for name in names), strict=True)
            return _pairs(path, column, header, (dict(zip(names, row, strict=True)) for row in values))
        with open(path, newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            return _pairs(path, column, list(reader.fieldnames or []), reader)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"There is no split file {path}; check the path.") from error
    except (OSError, ValueError, AttributeError, TypeError, KeyError, csv.Error) as error:
        raise InputError(f"{path} is not a split file ({error}); give a CSV, Parquet or JSON file.") from error


def _pairs(path: Path, column: str, header: list[str], rows: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    key = next((name for name in ID_COLUMNS if name in header), None)
    if key is None or column not in header:
        raise InputError(f"{path} has the columns {', '.join(header)}; a split needs id (or material_id) and {column}.")
    return [(str(row[key]), str(row[column]).strip()) for row in rows if str(row[column] or "").strip()]


def k_folds(
    indices: np.ndarray, k: int, seed: int = 0, val: float = 0.1, labels: np.ndarray | None = None
) -> list[Split]:
    """Cut ``indices`` into ``k`` test sets; of the rest of each, the share ``val`` validates and the others train.

    Args:
        labels: class of each index; test and validation part of every fold then have about the same shares of them.

    Raises:
        InputError: there are fewer than two folds, or more than crystals, or ``indices`` is no list of them.
    """
    indices = as_indices("What is cut into folds", indices)
    if not 2 <= k <= len(indices):
        advice = f"ask for 2 to {len(indices)}" if len(indices) > 1 else "give more crystals"
        raise InputError(f"{len(indices)} crystals cannot be cut into {k} folds; {advice}.")
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(indices))
    classes = np.zeros(len(indices)) if labels is None else np.asarray(labels)
    order = order[np.argsort(classes[order], kind="stable")]
    rests = [np.delete(order, np.s_[i::k]) for i in range(k)]
    return [_fold(indices[x], indices[order[i::k]], val, generator, classes[x]) for i, x in enumerate(rests)]


def _fold(rest: np.ndarray, test: np.ndarray, val: float, generator: np.random.Generator, classes: np.ndarray) -> Split:
    if not 0 < val < 1:
        raise InputError(f"The share {val} to validate is not between 0 and 1.")
    order = generator.permutation(len(rest))
    groups = [order[classes[order] == label] for label in np.unique(classes)]
    held = np.concatenate([group[: max(1, round(val * len(group)))] for group in groups])
    return Split(np.sort(np.delete(rest, held)), np.sort(rest[held]), np.sort(test))


def matbench_folds(store: GraphStore, task: str, seed: int = 0, val: float = 0.1) -> list[Split]:
    """The five folds of a matbench v0.1 task; of each training set the share ``val`` validates.

    The crystals carry matbench's ids, as ``srcgcnn-fast download matbench`` writes them. The folds are those of the
    package ``matbench`` where it is installed; else its rule for regression, scikit-learn's ``KFold`` with the seed
    18012019, which gives the same.

    Raises:
        InputError: the task is unknown, or the store does not hold all of its crystals.
    """
    place = _places(store)
    tests = _matbench_tests(task)
    missing = [name for test in tests for name in test if name not in place]
    if missing:
        raise InputError(
            f"The store lacks {len(missing)} crystals of {task}, such as {missing[0]}; its folds need all of them."
        )
    generator = np.random.default_rng(seed)
    whole = np.array([place[name] for test in tests for name in test], dtype=np.int64)
    folds = []
    for test in tests:
        held = np.array([place[name] for name in test], dtype=np.int64)
        rest = np.setdiff1d(whole, held)
        folds.append(_fold(rest, held, val, generator, np.zeros(len(rest))))
    return folds


def _matbench_tests(task: str) -> list[list[str]]:
    try:
        from matbench.metadata import mbv01_validation
    except ImportError:
        pass
    else:
        splits: Any = mbv01_validation.splits
        if task in splits:
            return [list(fold["test"]) for fold in splits[task].values()]
    if task not in MATBENCH:
        known = ", ".join(MATBENCH)
        raise InputError(f"The folds of {task} need the package matbench; without it there are those of {known}.")
    model_selection = require("sklearn.model_selection", "matbench's rule for its folds", extra="sklearn")
    size = MATBENCH[task]
    digits, stem = len(str(size)), task.removeprefix("matbench_").replace("_", "-")
    folds = model_selection.KFold(5, shuffle=True, random_state=_MATBENCH_SEED).split(np.arange(size))
    return [[f"mb-{stem}-{i + 1:0{digits}d}" for i in test] for _, test in folds]
