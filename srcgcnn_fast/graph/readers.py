"""Whatever holds crystals, read one :class:`Record` at a time: files, folders, tables, objects."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import math
import os
import re
import sqlite3
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from io import StringIO
from itertools import chain, dropwhile, islice, takewhile
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ..errors import InputError, one_line, require
from ..files import in_utf8
from .cif import read_cif, read_text, text_encoding
from .crystal import (
    AnyCrystal,
    Crystal,
    MixedCrystal,
    check_policy,
    checked_crystal,
    from_ase,
    from_pymatgen,
    settled,
)
from .elements import ELEMENT_SYMBOLS, is_built_in_file
from .pool import CifPool
from .quick_cif import read_quickly

logger = logging.getLogger(__name__)

__all__ = ["Crystal", "Record", "as_crystal", "read_inputs"]

STRUCTURE_COLUMNS = ("lattice", "frac_coords", "atomic_numbers")
ID_COLUMNS = ("material_id", "id")
"""What a table or an entry calls its crystals by: the first that it has."""
_ENTRY_IDS = ("mat_id", "entry_id")
"""What entries of pymatgen and of Alexandria are called by, where they have none of those."""
_NOT_TARGETS = {*STRUCTURE_COLUMNS, *ID_COLUMNS, *_ENTRY_IDS, "formula", "n_sites", "structure"}
_STRUCTURES = ("structure", "initial_structure", "computed_structure_entry")
"""The columns that hold them in tables of pandas, of Matbench Discovery for instance."""
_PANDAS_INDEX = re.compile(r"__index_level_\d+__$")
"""What pandas calls the rows' numbers in a Parquet file."""
_PAIR = re.compile(r"""(\w+)\s*=\s*("(?:\\.|[^"\\])*"|'[^']*'|\{[^}]*\}|\[[^]]*\]|\S+)""")
"""A name and its value in the second line of a frame of extended XYZ."""
_SPACE = re.compile(r"[ \t\n\r]*")
_ENTRIES = re.compile(r'[ \t\n\r]*\{[ \t\n\r]*"entries"[ \t\n\r]*:')
"""How a file of Alexandria begins, whose entries are a list."""
_DECODER = json.JSONDecoder()
_DEUTERIUM = re.compile(r"(?<!\S)[Dd](?!\S)")
_ATOM_INIT = "atom_init.json"
_ATOMIC_NUMBERS = {symbol: number for number, symbol in enumerate(ELEMENT_SYMBOLS) if symbol} | {"D": 1}
_MAX_READERS = 16
"""Processes that read CIF files, this one among them, where there are as many cores."""
_GROUP = 64
"""CIF files that a process is given at a time."""
_FEW_FILES = 256
"""Up to this many CIF files no process is started but for those that need pymatgen."""
_ROWS = 1024
"""Of a table, read at a time."""
_BUFFER = 1 << 20
"""Bytes of a Parquet file's column that are read at a time: else a whole row group, which may be the whole file."""


@dataclass
class Record:
    """One input: a crystal with its targets, or the sentence that says why there is none."""

    id: str
    crystal: AnyCrystal | None = None
    targets: dict[str, float] = field(default_factory=dict)
    error: str | None = None


def as_crystal(structure: Any, name: str | None = None, disorder: str = "error") -> AnyCrystal:
    """One crystal as arrays.

    Args:
        structure: a :class:`Crystal` or (lattice (3, 3) Å, frac_coords (n, 3), numbers (n,)), a pymatgen
            ``Structure`` or its dictionary, ASE ``Atoms``, or the path of a file that holds one structure.
            Oxidation states are ignored and deuterium counts as hydrogen.
        name: what error messages call it.
        disorder: for sites that are not one full atom: "error"; "majority", the species (or vacancy) with the largest
            share; "average", all of them, as a :class:`~srcgcnn_fast.graph.crystal.MixedCrystal`.

    Raises:
        InputError: it is none of these; it is disordered and must not be; it is empty, not finite, or not periodic;
            its lattice is singular; an element is not among H to Fm.
    """
    return settled(_as_crystal(structure, name), disorder)


def _as_crystal(structure: Any, name: str | None) -> AnyCrystal:
    if isinstance(structure, str | os.PathLike):
        return _only_crystal(_path(structure))
    if isinstance(structure, MixedCrystal):
        return structure
    kind = type(structure).__name__
    label = name or f"The {kind} object"
    if _is_arrays(structure):
        lattice, frac_coords, numbers = structure
        return checked_crystal(lattice, frac_coords, numbers, name or "The crystal")
    if _is_structure(structure):
        return from_pymatgen(structure, label)
    if hasattr(structure, "get_scaled_positions") and hasattr(structure, "cell"):
        return from_ase(structure, label)
    if _has(structure, "sites"):
        return _from_dictionary(structure, name or "The structure dictionary")
    is_held = _is_structure(getattr(structure, "structure", None))  # as by an entry of a phase diagram
    wanted = (
        "its .structure" if is_held else "a pymatgen Structure, ASE Atoms, a path, or (lattice, frac_coords, numbers)"
    )
    raise InputError(f"{label} is not a crystal; give {wanted}.")


def read_inputs(
    source: Any,
    *,
    targets: str | Sequence[str] | None = None,
    timeout: float = 60.0,
    skip: int = 0,
    disorder: str = "error",
) -> Iterator[Record]:
    """One :class:`Record` per input, in order. What is wrong with one input becomes its ``Record.error``.

    Args:
        source: the path of a CIF, POSCAR/CONTCAR (``*.vasp``), extended XYZ, pymatgen JSON (``.json``,
            ``.json.gz``, ``.json.bz2``; also tables of pandas, as matbench's, and Alexandria's entries), ASE database
            (``.db``) or Parquet file (columns ``material_id`` or ``id``, ``lattice`` (9), ``frac_coords`` (3n),
            ``atomic_numbers`` (n), and numbers as targets); a folder
            with ``id_prop.csv`` (rows ``id,target``, files ``id.cif``; a first row ``id,name,...`` names the targets)
            or without (every structure file, by name); one object that :func:`as_crystal` takes, or a dictionary of
            such a ``structure`` with its id and numbers; an iterable of them, or a dictionary id -> object. Records of
            several files have the ids that each file alone gives them. A pandas Series is such a dictionary, of one
            record for each of its labels.
        targets: names of the targets to keep, or one name; by default all numbers that the source has. A blank is NaN.
        timeout: seconds for one CIF file of a folder or an iterable. What gemmi does not read in a moment is read
            in a child process that is ended after this time, or beyond 4 GiB of memory (Linux); a single file is
            read in this process without a limit.
        skip: leave out so many records at the beginning; files that hold one record are then not read.
        disorder: as in :func:`as_crystal`.

    Raises:
        InputError: the path does not exist or is of no known kind, the folder has no structure files, or a
            target does not exist in the source.
    """
    if not timeout > 0:
        raise InputError(f"timeout is {timeout}; give a positive number of seconds.")
    check_policy(disorder)
    wanted = [targets] if isinstance(targets, str) else targets
    return _settled(_records(source, wanted, timeout, skip), disorder)


def _settled(records: Iterator[Record], disorder: str) -> Iterator[Record]:
    try:
        for record in records:
            if isinstance(record.crystal, MixedCrystal):
                try:
                    record.crystal = settled(record.crystal, disorder)
                except InputError as error:
                    record.crystal, record.error = None, str(error)
            if not record.id.isascii():
                record.id = in_utf8(record.id)
            if record.error is not None and not record.error.isascii():
                record.error = in_utf8(record.error)
            yield record
    finally:
        if hasattr(records, "close"):
            records.close()


def _records(source: Any, targets: Sequence[str] | None, timeout: float, skip: int) -> Iterator[Record]:
    wanted = list(targets) if targets is not None else None
    if isinstance(source, str | os.PathLike):
        path = _path(source)
        if source == "":  # which Path takes for the current folder
            raise InputError("The path of the structures is an empty text; give that of a file or folder.")
        if not os.path.exists(path):
            raise InputError(f"{path} does not exist; give the path of a structure file or folder.")
        if path.is_dir():
            return _read_folder(path, wanted, timeout, skip)
        if file_kind(path) == "parquet":
            return _read_parquet(path, wanted, skip)
        return islice(_read_file(path, wanted), skip, None)
    if hasattr(source, "columns") and hasattr(source, "iloc"):
        raise InputError(
            "A DataFrame is not read, since its columns may mean anything; give its column of structures, "
            'frame.to_dict("records") where there is a column "structure" beside ids and targets, or the Parquet file.'
        )
    is_column = is_series(source)
    items: Iterator[_Item]
    if not is_column and is_single(source):
        items, count = iter([_Item("0", source)]), 1
    elif is_column or isinstance(source, Mapping):
        items = (_Item(str(key), x, is_named=True, wanted=wanted, is_one=is_column) for key, x in source.items())
        count = len(source)
    elif isinstance(source, Iterable):
        items = (_Item(_default_id(value, index), value, wanted=wanted) for index, value in enumerate(source))
        count = len(source) if isinstance(source, Sequence) else -1
    else:
        raise InputError(
            f"A {type(source).__name__} holds no crystals; give a path, a structure, or an iterable of structures."
        )
    return _select(_read_items(items, count, timeout, skip), wanted)


def _path(text: str | os.PathLike[str]) -> Path:
    """Raises InputError: it is what a file holds."""
    if "\n" in str(text) and not os.path.exists(text):
        raise InputError(
            "A text of several lines is no path; write it to a file, or give pymatgen's Structure.from_str(…)."
        )
    return Path(text)


# ---- objects


def _is_arrays(value: Any) -> bool:
    if isinstance(value, Crystal):
        return True
    if not isinstance(value, tuple | list) or len(value) != 3 or isinstance(value[0], str | os.PathLike | Mapping):
        return False
    try:
        return np.shape(value[0]) in ((3, 3), (9,)) and np.asarray(value[0]).dtype.kind in "fiu"
    except ValueError:
        return False


def _is_structure(value: Any) -> bool:
    """pymatgen's; a row of a table may have columns of these names, and a site has them, too."""
    has_sites = hasattr(value, "frac_coords") and hasattr(value, "sites")
    return has_sites and hasattr(getattr(value, "lattice", None), "matrix")


def _has(value: Any, key: str) -> bool:
    """Is it a dictionary with this key? One of pymatgen's compositions, which know elements alone, refuses to tell."""
    try:
        return isinstance(value, Mapping) and key in value
    except Exception:
        return False


def is_series(value: Any) -> bool:
    """A column of a pandas table."""
    return hasattr(value, "iloc") and hasattr(value, "index") and not hasattr(value, "columns")


def is_single(value: Any) -> bool:
    return (
        _is_arrays(value)
        or _is_structure(value)
        or (hasattr(value, "get_scaled_positions") and hasattr(value, "cell"))
        or (_has(value, "sites") and _has(value, "lattice"))
        or _is_entry(value)
    )


def _is_entry(value: Any) -> bool:
    """A dictionary of a ``structure`` and what is known of it, as of the Materials Project; not one id -> structure."""
    if not _has(value, "structure"):
        return False
    held = value["structure"]
    if not (_is_structure(held) or _has(held, "sites")):
        return False
    others = (x for key, x in value.items() if key != "structure")
    return any(not (is_single(x) or file_kind(x) or _has(x, "structure")) for x in others)


def _plain_dictionary(value: Mapping[str, Any], name: str) -> Crystal | None:
    """An ordered pymatgen dictionary without pymatgen, which takes a hundred times longer; None where it is needed."""
    try:
        lattice, sites = value["lattice"], value["sites"]
        if not all(lattice.get("pbc", (True,))):
            return None
        held = [site["species"] for site in sites]
        if not all(len(species) == 1 and species[0]["occu"] == 1 for species in held):
            return None
        numbers = [_ATOMIC_NUMBERS[species[0]["element"]] for species in held]
        return checked_crystal(lattice["matrix"], [site["abc"] for site in sites], numbers, name)
    except (KeyError, TypeError, AttributeError, InputError):
        return None


def _from_dictionary(value: Mapping[str, Any], name: str) -> AnyCrystal:
    plain = _plain_dictionary(value, name)
    if plain is not None:
        return plain
    structure_class = require("pymatgen.core", "Reading pymatgen dictionaries", extra="io").Structure
    if "lattice" not in value:
        raise InputError(f"{name} has no lattice; give a periodic structure.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            structure = structure_class.from_dict(dict(value))
    except Exception as error:
        raise InputError(
            f"{name} is not a pymatgen Structure ({type(error).__name__}: {one_line(error)}); export it again."
        ) from error
    return from_pymatgen(structure, name)


def _only_crystal(path: Path) -> AnyCrystal:
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist; give the path of a structure file.")
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the path of one structure file.")
    records = list(_read_file(path, None))
    if len(records) != 1:
        raise InputError(f"{path.name} holds {len(records)} structures; read it with read_inputs.")
    if records[0].crystal is None:
        raise InputError(records[0].error or f"{path.name} holds no crystal; check the file.")
    return records[0].crystal


# ---- many inputs, the CIF files among them in child processes


@dataclass
class _Item:
    id: str
    value: Any = None
    targets: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    is_named: bool = False
    """Has the source given the id, before that which a file holds?"""
    wanted: list[str] | None = None
    """Targets to read from a file: what is true or false is one by name, as alone."""
    is_one: bool = False
    """Is it one record, whatever a file holds?"""


def _default_id(value: Any, index: int) -> str:
    is_path = isinstance(value, str | os.PathLike) and "\n" not in str(value)
    return _stem(Path(value)) if is_path else str(index)


def _read_items(items: Iterable[_Item], count: int, timeout: float, skip: int = 0) -> Iterator[Record]:
    """Records in the order of the ``count`` (-1: unknown) items; many CIF files are read by other processes, too."""
    items = iter(items)
    while skip > 0 and (item := next(items, None)) is not None:
        if item.error is not None or file_kind(item.value) in ("cif", "poscar"):
            skip -= 1
        else:
            records = _finish(item)
            skip -= sum(1 for _ in islice(records, skip))
            yield from records
    if count == 1:
        for item in items:
            yield from _finish(item)
        return
    processes = min(_MAX_READERS, _cores())
    pool = CifPool(timeout, max(1, processes - 1))
    waiting: deque[_Files] = deque()
    seen = 0
    try:
        for are_files, group in _groups(items):
            seen += len(group)
            ahead = 0
            if are_files:
                many = processes > 1 and max(count, seen) > _FEW_FILES
                ahead = 4 * processes if many else 0
                waiting.append(_Files(group, pool, many))
                group = []
            while len(waiting) > ahead:
                yield from _first_of(waiting)
            for item in group:
                yield from _finish(item)
        while waiting:
            yield from _first_of(waiting)
    finally:
        pool.close()


class _Files:
    """CIF files that another process reads, or this one."""

    def __init__(self, items: list[_Item], pool: CifPool, others: bool) -> None:
        self.items, self.pool = items, pool
        self.paths = [Path(item.value) for item in items]
        self.future = pool.submit(self.paths) if others else None
        self.found: list[AnyCrystal | None] | None = None

    def read_here(self) -> bool:
        """Read them, unless another process has begun or it is done; whether there was something to do."""
        if self.found is not None or (self.future is not None and not self.future.cancel()):
            return False
        self.found = [read_quickly(path) for path in self.paths]
        return True

    def records(self) -> Iterator[Record]:
        self.read_here()
        if self.found is None:
            assert self.future is not None
            results: Iterable[AnyCrystal | str] = self.future.result()
        else:
            slow = {i: self.pool.submit([self.paths[i]]) for i, crystal in enumerate(self.found) if crystal is None}
            results = (slow[i].result()[0] if crystal is None else crystal for i, crystal in enumerate(self.found))
        for item, result in zip(self.items, results, strict=True):
            if isinstance(result, str):
                yield Record(item.id, None, item.targets, result)
            else:
                yield Record(item.id, result, item.targets)


def _first_of(waiting: deque[_Files]) -> Iterator[Record]:
    """Records of the first files; while another process reads those, others are read here."""
    first = waiting.popleft()
    first.read_here()
    while first.future is not None and not (first.found or first.future.done()):
        if not any(files.read_here() for files in waiting):
            break
    yield from first.records()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_cif_file(item: _Item) -> bool:
    return item.error is None and file_kind(item.value) == "cif" and os.path.isfile(item.value)


def _groups(items: Iterable[_Item]) -> Iterator[tuple[bool, list[_Item]]]:
    """(True, up to ``_GROUP`` CIF files) or (False, one item that is anything else)."""
    files: list[_Item] = []
    for item in items:
        is_file = _is_cif_file(item)
        if is_file:
            files.append(item)
        if files and (not is_file or len(files) == _GROUP):
            yield True, files
            files = []
        if not is_file:
            yield False, [item]
    if files:
        yield True, files


def _finish(item: _Item) -> Iterator[Record]:
    if item.error is not None:
        yield Record(item.id, None, item.targets, item.error)
    elif isinstance(item.value, str | os.PathLike):
        yield from _file_records(item)
    else:
        if isinstance(item.value, Record):
            record = replace(item.value, targets=dict(item.value.targets))  # the caller's own stays as it is
        else:
            record = _entry_record(item.id, item.value, f"Structure {item.id}")
            record.targets.update(item.targets)
        if item.is_named:
            record.id = item.id
        yield record


def _entry_record(id: str, entry: Any, name: str) -> Record:
    """A structure object or dictionary, or a dictionary of a ``structure``, perhaps its id, and its targets."""
    if _has(entry, "structure"):
        data = entry.get("data")  # where pymatgen's entries hold what they were given beside the energy
        known = {**data, **{k: x for k, x in entry.items() if x is not None}} if isinstance(data, Mapping) else entry
        given = [known[key] for key in (*ID_COLUMNS, *_ENTRY_IDS) if known.get(key) is not None]
        id = name = str(given[0]) if given else id
        targets, entry = _numbers_of(known), entry["structure"]
        if isinstance(entry, str) and entry.lstrip().startswith("{"):  # some exports keep a structure as JSON text
            entry = _json_or_none(entry)
    else:
        info = getattr(entry, "info", None) or getattr(entry, "properties", None)
        targets = _numbers_of(info) if isinstance(info, Mapping) else {}
    return _record(id, targets, lambda: _as_crystal(entry, name))


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _file_records(item: _Item) -> Iterator[Record]:
    try:
        path = _path(item.value)
        if not os.path.isfile(path):
            state = "is no file" if os.path.exists(path) else "does not exist"
            raise InputError(f"{path} {state}; give the path of a structure file.")
        records = _read_file(path, item.wanted, is_part=True)
        first = list(islice(records, 2))
        if item.is_one and len(first) != 1:
            count = "several structures" if first else "no structure"
            raise InputError(f"{path} holds {count}, and a Series has one a row; give it in a list.")
    except InputError as error:
        yield Record(item.id, None, item.targets, str(error))
        return
    for record in chain(first, records):
        if item.is_named and len(first) == 1:
            record.id = item.id
        record.targets.update(item.targets)
        yield record


def _record(id: str, targets: dict[str, float], read: Any) -> Record:
    try:
        return Record(id, read(), targets)
    except InputError as error:
        return Record(id, None, targets, str(error))


# ---- folders


def _read_folder(folder: Path, wanted: list[str] | None, timeout: float, skip: int) -> Iterator[Record]:
    if (folder / "row_count.npy").is_file():
        raise InputError(f"{folder} is a store of prepared graphs and holds no structures; give what it was made from.")
    _check_atom_init(folder / _ATOM_INIT)
    table = folder / "id_prop.csv"
    if table.is_file():
        names, items = _id_prop_items(table, wanted)
        return _select(_read_items(items, len(items), timeout, skip), names)
    files = [folder / name for name in sorted(_file_names(folder)) if _may_hold_structures(name)]
    if not files:
        has_folders = any(entry.is_dir() for entry in os.scandir(folder))
        advice = "folders in it are not read, so give a dictionary name -> path of" if has_folders else "put there"
        raise InputError(f"{folder} has no structure files; {advice} CIF, POSCAR, extended XYZ, JSON or Parquet files.")
    if wanted and all(file_kind(p) in ("cif", "poscar") for p in files):
        raise InputError(
            f"{folder} has no id_prop.csv and so no target {', '.join(wanted)}; add one with rows id,target."
        )
    found = (_Item(_stem(p), p, wanted=wanted) for p in files)
    return _select(_read_items(found, len(files), timeout, skip), wanted)


def is_read(folder: Path, name: str) -> bool:
    """Does a file of that name decide what a folder's crystals are?"""
    return name == "id_prop.csv" or (not (folder / "id_prop.csv").is_file() and _may_hold_structures(name))


def _may_hold_structures(name: str) -> bool:
    return bool(file_kind(name)) and not name.startswith(".") and name != _ATOM_INIT


def _check_atom_init(path: Path) -> None:
    """Published data folders hold the element vectors; ours are the model's, so say where the two differ."""
    if path.is_file() and not is_built_in_file(path):
        logger.warning(
            "%s differs from the built-in element vectors and is not read: the model's own are used; "
            "to train with others, set model.element_table in Python.",
            path,
        )


def _id_prop_items(table: Path, wanted: list[str] | None) -> tuple[list[str], list[_Item]]:
    rows = [(number, row) for number, row in _csv_lines(table) if any(row)]
    if not rows:
        raise InputError(f"{table} is empty; write one row id,target for each structure.")
    if rows[0][1][0].lower() in ("id", "material_id", "cif_id", "name"):
        names = rows.pop(0)[1][1:]
    else:
        names = ["target"] if any(len(row) > 1 for _, row in rows) else []
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"{table} has {names.count(twice[0])} columns {twice[0]!r}; give each target its own name.")
    present = _file_names(table.parent)
    number, first = rows[0] if rows else (0, [""])
    hint = ""
    are_names = number == 1 and _may_name_columns(first) and not _structure_file(table.parent, first[0], present)
    if are_names:
        hint = f"a row of names begins with id, not with {first[0]!r}"
        if not first[0]:
            hint = "its first column has no name; leave that out (index=False in pandas)"
    elif not names and _has_other_separator(first[0]):
        hint = "it has no comma, which separates id and target"
    keep = _chosen(names, wanted, str(table), hint)
    items = [_id_prop_item(table, number, row, names, keep, present) for number, row in rows]
    if are_names:
        items[0].error = f"Row 1 of {table.name} has neither a structure file nor a number; if it holds names: {hint}."
    return keep, items


def _may_name_columns(row: list[str]) -> bool:
    """May it, though it does not begin with id? pandas leaves the name of the first column empty."""
    return len(row) > 1 and all(row[1:]) and not any(map(_is_number, row[1:]))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _has_other_separator(text: str) -> bool:
    return ";" in text or "\t" in text


def _csv_lines(table: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of each line."""
    reader, number = csv.reader(read_text(table).splitlines()), 0
    try:
        for row in reader:
            number += 1
            if reader.line_num > number:  # a row of several
                raise csv.Error
            cells = [x.strip() for x in row]
            while len(cells) > 1 and not cells[-1]:  # as spreadsheets leave them
                cells.pop()
            yield number, cells
    except csv.Error as error:
        number = max(number, 1)
        raise InputError(
            f'{table} has a quotation mark (") without its other one, in line {number} or the next; take it out.'
        ) from error


def files_elsewhere(folder: Path) -> list[Path]:
    """The structure files that ``id_prop.csv`` names outside of the folder itself, as ``part/crystal``."""
    table = folder / "id_prop.csv"
    if not table.is_file() or os.sep not in read_text(table):
        return []
    return [item.value for item in _id_prop_items(table, [])[1] if item.value and item.value.parent != folder]


def _file_names(folder: Path) -> set[str]:
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}


def _id_prop_item(
    table: Path, number: int, row: list[str], names: list[str], keep: list[str], present: set[str]
) -> _Item:
    id, values = row[0], dict(zip(names, row[1:], strict=False))
    item = _Item(id, _structure_file(table.parent, id, present), is_named=True)
    if item.value is None:
        item.error = f"{id} (row {number} of {table.name}) has no structure file; add {id}.cif to {table.parent}."
        if _has_other_separator(id):
            what = "has no comma" if len(row) == 1 else "has the comma within a number"
            point = "" if len(row) == 1 else ", and write numbers with a point"
            item.error = f"{id} (row {number} of {table.name}) {what}; separate id and target by one{point}."
    if any(row[1 + len(names) :]):
        item.error = (
            f"{id} (row {number} of {table.name}) has {len(row)} cells where there are {1 + len(names)} columns; "
            "write numbers with a point, and a name over each column."
        )
    for name in keep:
        text = values.get(name, "")
        try:
            item.targets[name] = _target(text)
        except ValueError:
            item.error = f"{id} (row {number} of {table.name}) has the {name} {text!r}; give a number or a blank."
    return item


def _target(text: str) -> float:
    value = float(text) if text else math.nan
    if math.isinf(value) or "_" in text:  # a digit separator to Python alone
        raise ValueError
    return value


def _structure_file(folder: Path, id: str, present: set[str]) -> Path | None:
    names = [f"{id}{suffix}" for suffix in (".cif", ".cif.gz", ".json", ".json.gz", ".vasp", ".extxyz", ".xyz")]
    for name in [*names, id] if id else ():
        is_here = name in present or (os.sep in name and (folder / name).is_file())
        if is_here and name != _ATOM_INIT and file_kind(name):
            return folder / name
    return None


def _chosen(names: Sequence[str], wanted: list[str] | None, where: str, hint: str = "") -> list[str]:
    missing = [name for name in wanted or () if name not in names]
    if missing:
        has = ", ".join(names) or "none"
        raise InputError(f"{where} has no target {', '.join(missing)}; {hint or f'it has {has}'}.")
    return list(names) if wanted is None else wanted


# ---- files


def file_kind(value: Any) -> str | None:
    """The format that a path's name stands for; None where there is none."""
    if not isinstance(value, str | os.PathLike):
        return None
    name = os.path.basename(os.fspath(value)).lower()
    plain = name.removesuffix(".gz")
    if plain.endswith((".cif", ".mcif")):
        return "cif"
    if plain.endswith(".json") or name.endswith(".json.bz2"):
        return "json"
    if name.startswith(("poscar", "contcar")) or name.endswith((".vasp", ".poscar")):
        return "poscar"
    if name.endswith((".xyz", ".extxyz")):
        return "extxyz"
    if name.endswith(".db"):
        return "ase"
    return "parquet" if name.endswith((".parquet", ".pq")) else None


def _stem(path: Path) -> str:
    name = path.name.removesuffix(".gz").removesuffix(".bz2")
    stem, _, suffix = name.rpartition(".")
    known = suffix.lower() in ("cif", "mcif", "json", "vasp", "poscar", "xyz", "extxyz", "db", "parquet", "pq")
    return stem if stem and known else name


def _read_file(path: Path, wanted: list[str] | None, *, is_part: bool = False) -> Iterator[Record]:
    kind = file_kind(path)
    if kind is None:
        raise InputError(
            f"{path.name} is of no known kind; "
            "name it *.cif, POSCAR, *.vasp, *.extxyz, *.json(.gz, .bz2), *.db or *.parquet."
        )
    if kind == "parquet":
        return _read_parquet(path, wanted, is_part=is_part)
    if kind in ("cif", "poscar"):
        _chosen([], None if is_part else wanted, path.name)
        read = read_cif if kind == "cif" else _read_poscar
        return iter([_record(_stem(path), {}, lambda: read(path))])
    read_many = {"json": _read_json, "extxyz": _read_extxyz, "ase": _read_ase_database}[kind]
    return _select(read_many(path), wanted)


def _select(records: Iterator[Record], wanted: list[str] | None) -> Iterator[Record]:
    """Keep the wanted targets; a record that has some of them gets NaN for the others, one with none an error.

    What is true or false is a target, 1 or 0, where it is wanted by name.
    """
    for record in records:
        if wanted:
            has = record.targets
            record.targets = {name: float(has.get(name, math.nan)) for name in wanted}
            if record.error is None and not any(name in has for name in wanted):
                record.crystal = None
                record.error = f"{record.id} has no target {', '.join(wanted)}; it has {', '.join(has) or 'none'}."
        elif wanted is not None:
            record.targets = {}
        else:
            record.targets = {name: x for name, x in record.targets.items() if not isinstance(x, bool)}
        yield record


def _read_poscar(path: Path) -> AnyCrystal:
    poscar = require("pymatgen.io.vasp.inputs", "Reading POSCAR files", extra="io").Poscar
    try:
        text = read_text(path)
        if not text.strip():
            raise InputError(f"{path.name} is empty; give a POSCAR file.")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            structure = poscar.from_str(_with_positive_scale(text, path.name)).structure
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{path.name} is not a POSCAR file ({type(error).__name__}: {one_line(error)}); correct it."
        ) from error
    reasons = [one_line(w.message) for w in caught]
    for reason in reasons:
        logger.debug("%s: %s", path.name, reason)
    if any("false names" in reason or "cannot be determined" in reason for reason in reasons):
        raise InputError(_NO_ELEMENTS.format(path.name))
    return from_pymatgen(structure, path.name)


_NO_ELEMENTS = "{} does not name its elements; add the line of element symbols (VASP 5 format)."


def _with_positive_scale(text: str, name: str) -> str:
    """The text of a POSCAR file without what pymatgen misreads: a comment behind the numbers of atoms, and a scale that
    stands for a volume, by which it multiplies Cartesian coordinates.
    """
    lines = text.splitlines()
    rows = [re.split("[#!]", line)[0].split() for line in lines[5:]]
    elements, counts = rows[:2]
    counted = takewhile(_are_whole, dropwhile(lambda row: not _are_whole(row), rows))
    n_atoms = sum(int(x) for row in counted for x in row)
    if n_atoms > len(lines):  # for each of which pymatgen would make room
        raise InputError(f"{name} has {len(lines)} lines for {n_atoms} atoms; correct the numbers of atoms.")
    if counts[0].isdigit() and len(elements) != len(counts):
        raise InputError(
            f"{name} has {len(elements)} elements and {len(counts)} numbers of atoms; correct either line."
        )
    if counts[0].isdigit():
        lines[6] = " ".join(counts)
    elif elements[0].isdigit() and not counts[0].lower().startswith("s"):
        flags = lines[7].split()[3:6]  # which pymatgen takes for fluorine and tritium
        if len(flags) == 3 and all(re.fullmatch(r"\.?[TF](RUE|ALSE)?\.?", flag, re.I) for flag in flags):
            raise InputError(_NO_ELEMENTS.format(name))
    scale = float(lines[1])
    if scale < 0:
        volume = abs(np.linalg.det([[float(x) for x in line.split()[:3]] for line in lines[2:5]]))
        lines[1] = repr((-scale / float(volume)) ** (1 / 3))
    return "\n".join(lines) + "\n"


def _are_whole(row: list[str]) -> bool:
    return bool(row) and all(x.isdecimal() for x in row)


def _read_extxyz(path: Path) -> Iterator[Record]:
    stem = _stem(path)
    try:
        encoding = text_encoding(path)
        with open(path, encoding=encoding, errors="replace") as file:
            frames = _extxyz_frames(file, path.name)
            first = list(islice(frames, 2))
            for index, frame in enumerate(chain(first, frames)):
                id = stem if len(first) == 1 else f"{stem}-{index}"
                yield Record(id, None, {}, frame) if isinstance(frame, str) else _frame(frame, id, path.name)
    except OSError as error:
        yield Record(stem, None, {}, f"{path.name} cannot be read ({one_line(error)}); check the file.")


def _extxyz_frames(file: TextIO, name: str) -> Iterator[Any]:
    """The Atoms of each frame, or why there are none. ASE is given one frame at a time: it would read as many lines as
    a damaged first line asks for, and end at a frame that it cannot read.
    """
    read = require("ase.io.extxyz", "Reading extended XYZ files", extra="io").read_xyz
    index, line = 0, file.readline()
    while line.strip():
        index += 1
        if not re.fullmatch(r"\d{1,18}", line.strip()):
            reason = f"its first line {one_line(line)[:40]!r} is no number of atoms"
            yield f"{name} cannot be read from frame {index} on ({reason}); correct that frame."
            return
        lines = [line, *islice(file, int(line) + 1)]
        if len(lines) < int(line) + 2:
            reason = f"the file ends before its {int(line)} atoms"
            yield f"{name} cannot be read from frame {index} on ({reason}); correct that frame."
            return
        while (line := file.readline()).lstrip().startswith("VEC"):  # vectors of the cell behind the atoms
            lines.append(line)
        text = "".join([*lines[:2], *(_DEUTERIUM.sub("H", atom) for atom in lines[2:])])
        try:
            yield next(read(StringIO(text), 0, _extxyz_info))
        except Exception as error:  # ASE's, of whatever a line may hold
            reason = f"{type(error).__name__}: {one_line(error)}"
            yield f"Frame {index} of {name} cannot be read ({reason}); correct it."
    if any(line.strip() for line in file):
        yield f"{name} has a blank line after frame {index}, where the format ends; remove it."
    elif index == 0:
        yield f"{name} has no frames; give a file in extended XYZ format."


def _extxyz_info(line: str) -> dict[str, Any]:
    """As ASE reads it, but an id that looks like a number or a truth value (001, 7e3, T) as it is written."""
    info = require("ase.io.extxyz", "Reading extended XYZ files", extra="io").key_val_str_to_dict(line)
    written = dict(_PAIR.findall(line))
    for key in ID_COLUMNS:
        if not isinstance(info.get(key, ""), str):
            info[key] = written.get(key, "").strip("\"'{}[]")
            if not info[key]:
                del info[key]
    return info


def _frame(atoms: Any, id: str, where: str) -> Record:
    info = {**atoms.info, **(getattr(atoms.calc, "results", None) or {})}
    id = str(info.get("material_id", info.get("id", id)))
    return _record(id, _numbers_of(info), lambda: from_ase(atoms, f"{id} ({where})"))


def _read_ase_database(path: Path) -> Iterator[Record]:
    connect = require("ase.db", "Reading ASE databases", extra="io").connect
    stem, count = _stem(path), 0
    try:
        _check_ase_database(path)
        with connect(path, type="db", append=True) as database:  # else ASE leaves a connection open for every question
            for row in _ase_rows(database):
                info = {**row.key_value_pairs, **{k: row[k] for k in ("energy",) if k in row}}
                id = str(info.get("material_id", info.get("id", f"{stem}-{row.id}")))
                yield _record(id, _numbers_of(info), partial(_row_crystal, row, f"{id} ({path.name})"))
                count += 1
    except Exception as error:  # SQLite's, or ASE's of whatever a row may hold
        message = f"is not an ASE database ({one_line(error)}); write it again."
        if count:
            reason = f"{type(error).__name__}: {one_line(error)}"
            message = f"cannot be read from row {count + 1} on ({reason}); correct that row."
        yield Record(f"{stem}-{count + 1}" if count else stem, None, {}, f"{path.name} {message}")
        return
    if not count:
        yield Record(stem, None, {}, f"{path.name} has no rows; give an ASE database of structures.")


def _ase_rows(database: Any) -> Iterator[Any]:
    """All by their numbers, some at a time: what ASE is asked for, it takes into memory at once."""
    last, found = 0, _ROWS
    while found == _ROWS:
        found = 0
        for row in database.select(f"id>{last}", limit=_ROWS, sort="id"):
            yield row
            last, found = row.id, found + 1


def _check_ase_database(path: Path) -> None:
    """ASE would write its tables into whatever database lacks them."""
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'systems'").fetchone():
            raise sqlite3.DatabaseError("it has no table of systems")


def _row_crystal(row: Any, name: str) -> Crystal:
    try:
        atoms = row.toatoms()
    except Exception as error:  # of a calculator or constraint that ASE does not know, for instance
        raise InputError(
            f"{name} cannot be read ({type(error).__name__}: {one_line(error)}); write it again."
        ) from error
    return from_ase(atoms, name)


def _read_json(path: Path) -> Iterator[Record]:
    stem = _stem(path)
    try:
        text = read_text(path)
        if not text.strip():
            raise ValueError("the file is empty")
        is_list = _is_json_list(text)
        content = None if is_list else json.loads(text)
    except (OSError, EOFError, gzip.BadGzipFile, ValueError, RecursionError) as error:
        advice = "write its lines as one list" if "Extra data: line 2" in str(error) else "export it again"
        yield Record(stem, None, {}, f"{path.name} is not a JSON file ({one_line(error)}); {advice}.")
        return
    if isinstance(content, Mapping) and (kind := _other_table(content)):
        yield Record(stem, None, {}, f"{path.name} is {kind}.")
        return
    if isinstance(content, Mapping) and ("sites" in content or _is_entry(content)):
        entries: Iterable[tuple[str, Any]] = [(stem, content)]
    elif isinstance(content, Mapping) and {"columns", "data"} <= content.keys():
        entries = _rows_of_split(content, stem)
    elif isinstance(content, Mapping) and _is_by_columns(content):
        entries = _rows_of_columns(content, stem)
    elif is_list or (isinstance(content, Mapping) and isinstance(content.get("entries"), list)):
        rows = _json_list(text) if content is None else content["entries"]
        entries = ((f"{stem}-{i}", entry) for i, entry in enumerate(rows))
    elif isinstance(content, Mapping):
        entries = content.items()
    else:
        entries = []
    first = next(iter(entries := iter(entries)), None)
    if first is None:
        yield Record(stem, None, {}, f"{path.name} holds no structures; give a pymatgen Structure or a list of them.")
        return
    for id, given in chain([first], entries):
        entry = _named_structure(given)
        held = entry.get("structure") if isinstance(entry, Mapping) else None
        if isinstance(entry, Mapping) and not (isinstance(held, str) and not held.lstrip().startswith("{")):
            yield _entry_record(str(id), entry, f"{id} ({path.name})")
        else:
            message = f"{id} ({path.name}) is not a pymatgen Structure dictionary; give one with lattice and sites."
            yield Record(str(id), None, {}, message)


def _named_structure(row: Any) -> Any:
    """The row of a table with what it holds as ``structure``, and beside it what an entry of pymatgen knows."""
    name = next((x for x in _STRUCTURES if isinstance(row, Mapping) and x in row), None)
    if name is None or (name == "structure" and not _has(row[name], "structure")):
        return row
    held, others = row[name], {key: x for key, x in row.items() if key != name}
    return {**held, **others} if _has(held, "structure") else {**others, "structure": held}


def _is_json_list(text: str) -> bool:
    try:
        return all(True for _ in _json_list(text))
    except (ValueError, RecursionError):
        return False


def _json_list(text: str) -> Iterator[Any]:
    """The entries of a list, perhaps Alexandria's, one at a time: all take some five times the room of the text.

    Raises:
        ValueError: the text is something else.
    """
    head = _ENTRIES.match(text)
    at = _behind_space(text, head.end() if head else 0)
    if not text.startswith("[", at):
        raise ValueError
    at = _behind_space(text, at + 1)
    while not text.startswith("]", at):
        entry, at = _DECODER.raw_decode(text, at)
        yield entry
        at = _behind_space(text, at)
        if text.startswith(",", at):
            at = _behind_space(text, at + 1)
            if text.startswith("]", at):
                raise ValueError
        elif not text.startswith("]", at):
            raise ValueError
    at = _behind_space(text, at + 1)
    if head:
        if not text.startswith("}", at):
            raise ValueError
        at = _behind_space(text, at + 1)
    if at < len(text):
        raise ValueError


def _behind_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


def _other_table(content: Mapping[str, Any]) -> str:
    """What ASE writes where nobody asks for another form, and what to do; empty for anything else."""
    return "an ASE database in JSON; write it as *.extxyz or *.db" if {"ids", "nextid"} <= content.keys() else ""


def _is_by_columns(content: Mapping[str, Any]) -> bool:
    """Is it a table as pandas writes it by default, a dictionary label -> value for each column?"""
    rows = next((content[name] for name in _STRUCTURES if name in content), None)
    if not isinstance(rows, Mapping) or {"structure", "sites"} & rows.keys():
        return False
    return all(isinstance(x, Mapping) and x.keys() == rows.keys() for x in content.values()) and any(
        map(_holds_sites, rows.values())
    )


def _holds_sites(value: Any) -> bool:
    held = _json_or_none(value) if isinstance(value, str) else value
    return _has(held, "sites") or (_has(held, "structure") and _has(held["structure"], "sites"))


def _rows_of_columns(content: Mapping[str, Any], stem: str) -> Iterator[tuple[str, Any]]:
    for label in next(iter(content.values())):
        id = f"{stem}-{label}" if label.isdecimal() else label
        yield id, {name: column[label] for name, column in content.items()}


def _rows_of_split(content: Mapping[str, Any], stem: str) -> Iterator[tuple[str, Any]]:
    """Rows of a table in pandas' "split" form, as matbench's files are: index, columns, data."""
    columns, rows = content["columns"], content["data"]
    for index, row in zip(content.get("index", range(len(rows))), rows, strict=False):
        yield index if isinstance(index, str) else f"{stem}-{index}", dict(zip(columns, row, strict=False))


def _numbers_of(values: Mapping[str, Any]) -> dict[str, float]:
    """The entries that are one finite number or NaN, or true or false."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if key in _NOT_TARGETS:
            continue
        if isinstance(value, bool | np.bool_):
            found[str(key)] = bool(value)
        elif isinstance(value, int | float | np.integer | np.floating):
            with suppress(OverflowError):  # of whole numbers beyond all floats
                if not math.isinf(value):
                    found[str(key)] = float(value)
    return found


def _read_parquet(path: Path, wanted: list[str] | None, skip: int = 0, *, is_part: bool = False) -> Iterator[Record]:
    """Rows with the wanted targets; one file of several may lack some of them, but not all."""
    parquet = require("pyarrow.parquet", "Reading Parquet files", extra="io")
    try:
        table = parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
    except Exception as error:
        raise InputError(f"{path.name} is not a Parquet file ({one_line(error)}); export it again.") from error
    schema = table.schema_arrow
    if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise InputError(f"{path.name} has several columns {twice[0]!r}; give each its own name.")
    missing = [name for name in STRUCTURE_COLUMNS if name not in schema.names]
    if missing:
        raise InputError(f"{path.name} lacks the column {', '.join(missing)}; it has {', '.join(schema.names)}.")
    types = require("pyarrow", "Reading Parquet files", extra="io").types
    numeric = [f.name for f in schema if types.is_integer(f.type) or types.is_floating(f.type)]
    numeric += [f.name for f in schema if types.is_boolean(f.type) and f.name in (wanted or ())]
    text = [name for name in wanted or () if name in schema.names and name not in numeric]
    if text:
        kind = schema.field(text[0]).type
        raise InputError(f"{path.name} has the column {text[0]} of type {kind}, which is no target; give numbers.")
    names = [name for name in numeric if name not in _NOT_TARGETS and not _PANDAS_INDEX.match(name)]
    if is_part and wanted:
        wanted = [name for name in wanted if name in names] or wanted
    keep = _chosen(names, wanted, path.name)
    id_columns = [name for name in ID_COLUMNS if name in schema.names]
    return _parquet_records(table, path.name, keep, id_columns, skip)


def _parquet_records(table: Any, where: str, keep: list[str], id_columns: list[str], skip: int) -> Iterator[Record]:
    columns = [*id_columns, *STRUCTURE_COLUMNS, *keep]
    stem = _stem(Path(where))
    for row, end, batch in _parquet_batches(table, columns, skip):
        if isinstance(batch, Exception):
            reason = f"cannot be read ({one_line(batch)}); export it again."
            yield from (Record(f"{stem}-{k}", None, {}, f"Row {k + 1} of {where} {reason}") for k in range(row, end))
            continue
        held = {name: _rows(batch.column(name)) for name in STRUCTURE_COLUMNS}
        targets = np.array([_floats(batch.column(name)) for name in keep]).reshape(len(keep), len(batch)).T
        ids = [_ids(batch.column(name)) for name in id_columns]
        for i in range(len(batch)):
            id = next((str(given[i]) for given in ids if given[i] is not None), f"{stem}-{row + i}")
            arrays = [held[name][i] for name in STRUCTURE_COLUMNS]
            values = dict(zip(keep, targets[i].tolist(), strict=True))
            yield _parquet_record(id, f"{id} (row {row + i + 1} of {where})", arrays, values)


def _parquet_batches(table: Any, columns: list[str], skip: int) -> Iterator[tuple[int, int, Any]]:
    """Begin and end of runs of rows from ``skip`` on, and each as a batch, or why the rest of its group has none."""
    end = 0
    for group in range(table.num_row_groups):
        row, end = end, end + table.metadata.row_group(group).num_rows
        batches = table.iter_batches(_ROWS, row_groups=[group], columns=columns) if end > skip else iter(())
        while max(row, skip) < end:
            try:
                batch = next(batches)
            except Exception as error:  # pyarrow's, which has many kinds
                yield max(row, skip), end, error
                break
            first = row + min(max(skip - row, 0), len(batch))
            yield first, row + len(batch), batch.slice(first - row)
            row += len(batch)


def _parquet_record(id: str, name: str, arrays: list[Any], targets: dict[str, float]) -> Record:
    for column, array in zip(STRUCTURE_COLUMNS, arrays, strict=True):
        if array is None:
            return Record(id, None, targets, f"{name} has no {column}; fill it in or drop the row.")
    for target, value in targets.items():
        if math.isinf(value):
            return Record(id, None, targets, f"{name} has the {target} {value}; give a finite number or a blank.")
    lattice, frac_coords, numbers = arrays
    return _record(id, targets, lambda: checked_crystal(lattice, frac_coords, numbers, name))


def _ids(column: Any) -> list[Any]:
    """Bytes that are not UTF-8 are written as ``\\xe9``."""
    try:
        given = column.to_pylist()
    except UnicodeDecodeError:
        given = column.cast("large_string").cast("large_binary").to_pylist()
    return [x.decode("utf-8", "backslashreplace") if isinstance(x, bytes) else x for x in given]


def _rows(column: Any) -> list[Any]:
    """One NumPy view a row of a plain list column, else a list; None where the row or an entry of it is missing."""
    is_list = len(getattr(column, "offsets", ())) == len(column) + 1
    if not is_list or column.values.null_count or column.values.type.num_fields:
        return column.to_pylist()
    flat = column.values.to_numpy(zero_copy_only=False)
    ends = column.offsets.to_numpy().tolist()
    valid = column.is_valid().to_pylist()
    return [flat[a:b] if ok else None for a, b, ok in zip(ends, ends[1:], valid, strict=False)]


def _floats(column: Any) -> np.ndarray:
    return column.cast("float64", safe=False).to_numpy(zero_copy_only=False)  # of long integers, the nearest
