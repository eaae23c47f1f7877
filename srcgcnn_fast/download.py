"""Crystals of public databases, through their own packages, as one Parquet file that ``prepare`` and ``train`` read."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError, one_line, require
from .files import atomic_path
from .graph.elements import ELEMENT_SYMBOLS
from .graph.readers import as_crystal

Row = tuple[str, Any, dict[str, Any]]
"""Id, structure and values of one crystal."""

KEY = "MP_API_KEY"
_MP_PAGE = 1000
_COMPOSITIONS = ("matbench_expt_gap", "matbench_expt_is_metal", "matbench_glass", "matbench_steels")
_OUR_NAMES = {
    ("matbench_mp_e_form", "e_form"): "formation_energy_per_atom",
    ("matbench_mp_gap", "gap pbe"): "band_gap",
    ("dft_3d", "formation_energy_peratom"): "formation_energy_per_atom",
}
"""Columns whose usual name says the same; others keep theirs, with _ for a space."""


@dataclass(frozen=True)
class Download:
    """A finished download."""

    path: Path
    crystals: int
    targets: tuple[str, ...]
    skipped: list[str]
    """One sentence for each entry that is no ordered periodic crystal."""


def download(
    source: str,
    path: str | os.PathLike[str],
    *,
    dataset: str | None = None,
    targets: str | Sequence[str] = (),
    chemsys: str | Sequence[str] = (),
    limit: int | None = None,
) -> Download:
    """Fetch crystals and write them to the Parquet file ``path``, whole or not at all.

    Columns: ``material_id``, ``formula``, ``lattice`` (9, rows a b c, Å), ``frac_coords`` (3n), ``atomic_numbers`` (n)
    and the targets; a value that the database lacks is NaN.

    Args:
        source: "mp" (Materials Project by ``mp-api``; the key is in the environment variable MP_API_KEY), "matbench"
            (by ``matminer``, where its data are; ids are matbench's) or "jarvis" (by ``jarvis-tools``).
        dataset: a matbench task such as "matbench_mp_e_form", or a JARVIS set (default "dft_3d").
        targets: fields of the database, or one; by default formation energy and band gap, of "matbench" the task's.
        chemsys: chemical systems such as "Li-Fe-O" or "Si-*", or one, only for "mp".
        limit: most crystals.

    Raises:
        InputError: the package, the key or the network is missing, or there is no such data set or field.
    """
    out = Path(path)
    if out.suffix != ".parquet":
        raise InputError(f"{out} is not named like a Parquet file; let it end with .parquet.")
    if source not in _SOURCES:
        raise InputError(f"There is no source {source!r}; choose among {', '.join(_SOURCES)}.")
    if chemsys and source != "mp":
        raise InputError(f"Chemical systems choose within the Materials Project, not within {source}; leave them out.")
    if limit is not None and limit < 1:
        raise InputError(f"A limit of {limit} crystals leaves none; ask for at least 1.")
    if source == "mp" and dataset:
        raise InputError(f"The Materials Project is one data set; leave out {dataset}, or choose by chemical system.")
    targets, chemsys = ([x] if isinstance(x, str) else list(x) for x in (targets, chemsys))  # a text is one
    pandas = require("pandas", "Writing a Parquet file", extra="io")
    with atomic_path(out) as temporary:  # first of all, because a place that cannot be written is known before the work
        names, rows = _SOURCES[source](dataset, targets, chemsys, limit)
        columns, skipped = _columns(rows, names, limit)
        if not columns["material_id"]:
            raise InputError(f"{source} gave no crystal" + (f"; the first problem: {skipped[0]}" if skipped else "."))
        for name in names.values():
            if not np.isfinite(columns[name]).any():
                raise InputError(f"No crystal of {source} has a value of {name}; check the name, or ask for another.")
        pandas.DataFrame(columns).to_parquet(temporary)
    return Download(out, len(columns["material_id"]), tuple(names.values()), skipped)


def _columns(rows: Iterator[Row], names: dict[str, str], limit: int | None) -> tuple[dict[str, list[Any]], list[str]]:
    """Lists by column; ``names`` maps a field of the database to its column."""
    found: dict[str, list[Any]] = {name: [] for name in ("material_id", "formula", "lattice", "frac_coords")}
    found |= {"atomic_numbers": [], **{name: [] for name in names.values()}}
    skipped: list[str] = []
    for id, structure, values in rows:
        if limit is not None and len(found["material_id"]) == limit:
            break
        try:
            crystal = as_crystal(structure, id)
        except InputError as error:
            skipped.append(str(error))
            continue
        numbers, counts = np.unique(crystal.numbers, return_counts=True)
        pairs = zip(numbers, counts, strict=True)
        found["material_id"].append(id)
        found["formula"].append("".join(f"{ELEMENT_SYMBOLS[z]}{n if n > 1 else ''}" for z, n in pairs))
        found["lattice"].append(np.ravel(crystal.lattice))
        found["frac_coords"].append(np.ravel(crystal.frac_coords))
        found["atomic_numbers"].append(np.asarray(crystal.numbers))
        for field, name in names.items():
            found[name].append(_number(values.get(field)))
    return found, skipped


def _number(value: Any) -> float:
    """A value of a database, where None and text such as "na" mean that there is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _asked(what: str, advice: str, ask: Callable[[], Any]) -> Any:
    """What ``ask`` returns; whatever its package raises becomes one sentence."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # some packages print while they load
            return ask()
    except InputError:
        raise
    except Exception as error:  # each package has its own kinds, beside those of the network
        raise InputError(f"{what} could not be had ({one_line(error)}); {advice}") from error


def _materials_project(
    _: str | None, targets: list[str], chemsys: list[str], limit: int | None
) -> tuple[dict[str, str], Iterator[Row]]:
    client = require("mp_api.client", "Downloading from the Materials Project", extra="data")
    key = os.environ.get(KEY, "").strip()
    if not key:
        raise InputError(
            f"The Materials Project wants a key: copy yours from https://materialsproject.org/api and set it "
            f"(export {KEY}=...)."
        )
    targets = targets or ["formation_energy_per_atom", "band_gap"]
    query: dict[str, Any] = {"fields": ["material_id", "structure", *targets]}
    if chemsys:
        query["chemsys"] = chemsys
    if limit is not None:
        query |= {"chunk_size": min(limit, _MP_PAGE), "num_chunks": -(-limit // _MP_PAGE)}

    def ask() -> Any:
        with client.MPRester(key) as rester:
            return rester.materials.summary.search(**query)

    advice = f"check the network, the key in {KEY} and the names asked for."
    documents = _asked("The crystals of the Materials Project", advice, ask)
    for name in targets:
        if documents and not hasattr(documents[0], name):
            raise InputError(
                f"The Materials Project has no field {name}; formation_energy_per_atom is one, band_gap too."
            )
    rows = ((str(d.material_id), d.structure, {name: getattr(d, name) for name in targets}) for d in documents)
    return {name: name for name in targets}, rows


def _matbench(
    task: str | None, targets: list[str], _: list[str], __: int | None
) -> tuple[dict[str, str], Iterator[Row]]:
    if task is None:
        raise InputError("Which task of matbench? Name one, such as matbench_mp_e_form or matbench_jdft2d.")
    if task in _COMPOSITIONS:
        raise InputError(f"{task} has compositions without structures, which these models do not take; choose another.")
    retrieval = require("matminer.datasets", "Downloading matbench", extra="data")
    advice = "check the network and the name of the task."
    table = _asked(f"The data of {task}", advice, lambda: retrieval.load_dataset(task))
    fields = [name for name in table.columns if name != "structure"]
    _check_fields(task, targets, fields)
    digits, stem = len(str(len(table))), task.replace("matbench", "mb").replace("_", "-")
    rows = (
        (f"{stem}-{i + 1:0{digits}d}", structure, {name: table[name].iloc[i] for name in targets or fields})
        for i, structure in enumerate(table["structure"])
    )
    return {name: _column(task, name) for name in targets or fields}, rows


def _jarvis(
    dataset: str | None, targets: list[str], _: list[str], __: int | None
) -> tuple[dict[str, str], Iterator[Row]]:
    figshare = require("jarvis.db.figshare", "Downloading JARVIS", extra="data")
    dataset = dataset or "dft_3d"
    targets = targets or ["formation_energy_peratom", "optb88vdw_bandgap"]
    advice = "check the network, and the name against the list in jarvis-tools."
    entries = _asked(f"The data set {dataset} of JARVIS", advice, lambda: figshare.data(dataset))
    if entries:
        _check_fields(dataset, targets, [name for name in entries[0] if name != "atoms"])
    rows = ((str(e.get("jid", i)), _jarvis_arrays(e["atoms"]), e) for i, e in enumerate(entries))
    return {name: _column(dataset, name) for name in targets}, rows


def _jarvis_arrays(atoms: dict[str, Any]) -> tuple[Any, Any, Any]:
    lattice, coords = np.asarray(atoms["lattice_mat"], dtype=float), np.asarray(atoms["coords"], dtype=float)
    if atoms["cartesian"]:
        coords = np.linalg.solve(lattice.T, coords.T).T
    number = {symbol: z for z, symbol in enumerate(ELEMENT_SYMBOLS)}
    return lattice, coords, [number.get(symbol.strip(), 0) for symbol in atoms["elements"]]


def _check_fields(dataset: str, targets: Sequence[str], fields: Sequence[str]) -> None:
    for name in targets:
        if name not in fields:
            raise InputError(f"{dataset} has no field {name}; it has {', '.join(fields)}.")


def _column(dataset: str, field: str) -> str:
    return _OUR_NAMES.get((dataset, field), field.replace(" ", "_"))


_SOURCES: dict[str, Callable[..., tuple[dict[str, str], Iterator[Row]]]] = {
    "mp": _materials_project,
    "matbench": _matbench,
    "jarvis": _jarvis,
}
