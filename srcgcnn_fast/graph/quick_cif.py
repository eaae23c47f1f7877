"""CIF files by gemmi, many times faster than by pymatgen: what is beyond doubt is read, anything else left to it."""

from __future__ import annotations

import logging
import math
import os
import re
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np

from ..errors import InputError
from .cif import COORDINATES, HALL, HERMANN_MAUGUIN, INT_NUMBERS, NUMBER, check_formula, parse_formula, read_text
from .cif_symmetry import fits, group_number, is_group, is_p1, stated_symmetry
from .crystal import Crystal, checked_crystal
from .elements import ELEMENT_SYMBOLS

logger = logging.getLogger(__name__)

_MAX_BYTES = 4_000_000
_MAX_IMAGES = 20_000
"""Sites times symmetry operations; what is larger is read under the time limit."""
_SITE_TOLERANCE = 1e-4  # pymatgen's: images of a site nearer than this on every axis are one atom
_DIRECTION = np.array([1.0, 0.7548776662, 0.5698402910])
_SNAP = 1e-4  # pymatgen's: coordinates this near to a third are meant so, where there is symmetry
_CELL = (*(f"_cell_length_{x}" for x in "abc"), *(f"_cell_angle_{x}" for x in ("alpha", "beta", "gamma")))
_OPERATIONS = ("_symmetry_equiv_pos_as_xyz", "_space_group_symop_operation_xyz")
_IDENTITY = ("x,y,z", "+x,+y,+z")
_TYPE = re.compile(r"([A-Z][a-z]?)(\d*[+-]|[+-]\d+)?")
_LABEL = re.compile(r"([A-Z][a-z]?)\d*")
_OPERATION = re.compile(r"[-+*\dxyz./]+,[-+*\dxyz./]+,[-+*\dxyz./]+")
_UNUSUAL = ("_magn", ".magn", "_moment", "_modulation_", "_xyz_")

# Elements in the order of pymatgen's electronegativities, so that sites come in the order of its own reader (padding
# of short rows points to the first one). The noble gases without one have no place.
_ORDER = """
Fr Cs K Rb Ba Ra Na Sr Li Ca Ac La Tb Yb Ce Pm Pr Nd Sm Eu Gd Dy Y Ho Er Tm Lu Pu Am Bk Cf Cm Es Fm Hf Th Mg Zr Np Sc U
Pa Ta Ti Mn Be Nb Al Tl V Zn Cr Cd In Ga Fe Co Cu Re Si Tc Ni Ag Sn Hg Po Ge Bi B Sb Te Mo As P At H Ir Os Pd Rn Ru Pt
Rh Pb W Au C Se S Xe I Br Kr N Cl O F
"""
_RANK = {ELEMENT_SYMBOLS.index(symbol): rank for rank, symbol in enumerate(_ORDER.split())}
_NUMBERS = {symbol: number for number, symbol in enumerate(ELEMENT_SYMBOLS) if symbol} | {"D": 1}


class _Doubt(Exception):
    """Something that pymatgen and its checks shall judge."""


@cache
def gemmi_cif() -> Any:
    """gemmi's CIF parser, or None where it is not installed."""
    try:
        from gemmi import cif
    except ImportError:
        logger.warning(
            "CIF files are read many times faster with gemmi, and symmetry operations compared with the space group "
            'that a file names: python -m pip install "srcgcnn_fast[io]"'
        )
        return None
    return cif


def read_quickly(path: Path) -> Crystal | None:
    """The one ordered structure of a CIF file as :func:`~srcgcnn_fast.graph.cif.read_cif` gives it, or None.

    None says nothing about the file but that pymatgen shall read it: more than one structure or none, anything that
    is not a full known element with plain coordinates, coincident sites, symmetry given by a name alone, content that
    contradicts the formula, no formula to compare with, a large file.
    """
    cif = gemmi_cif()
    if cif is None:
        return None
    try:
        about = os.stat(path)
        if about.st_size > _MAX_BYTES or not S_ISREG(about.st_mode):
            return None
        text = read_text(path)
        small = text.lower()
        if any(part in small for part in _UNUSUAL):
            return None
        return _crystal(cif, text, path.name)
    except (_Doubt, InputError, OSError, ValueError, RuntimeError, IndexError, EOFError):
        return None


def _crystal(cif: Any, text: str, name: str) -> Crystal:
    blocks = [(block, found) for block in cif.read_string(text) if (found := block.find_loop(COORDINATES[0]))]
    if len(blocks) != 1:
        raise _Doubt
    block, found = blocks[0]
    loop = found.get_loop()
    width, values = loop.width(), loop.values
    columns = {tag.lower(): values[k::width] for k, tag in enumerate(loop.tags)}
    _check_occupancy(columns.get("_atom_site_occupancy"))
    if not {"0", "?", "."}.issuperset(columns.get("_atom_site_attached_hydrogens", ())):
        raise _Doubt
    groups = {*columns.get("_atom_site_disorder_group", ())} - {"0", "?", "."}
    if len(groups) > 1 or "dum" in columns.get("_atom_site_calc_flag", ()):
        raise _Doubt
    labels = columns.get("_atom_site_label", [])
    numbers = _numbers(columns.get("_atom_site_type_symbol"), labels)
    coords = np.array([_floats(columns.get(tag, [])) for tag in COORDINATES]).T
    if not labels or coords.shape != (len(labels), 3) or not np.isfinite(coords).all():
        raise _Doubt
    lattice = _lattice(*_floats([block.find_value(tag) or "?" for tag in _CELL]))
    operations = _operations(cif, block, text)
    formula = cif.as_string(block.find_value("_chemical_formula_sum") or "")
    if operations is None:
        coords = coords - np.floor(coords)
        _check_apart(coords, 2 * _SITE_TOLERANCE)
    else:
        if not fits(operations[0], lattice):
            raise _Doubt
        coords, numbers = _expanded(coords, numbers, operations)
        if not parse_formula(formula):
            raise _Doubt
    elements = set(numbers)
    if len(elements) > 1:
        rank = [_RANK.get(n, -1) for n in numbers]
        if min(rank) < 0:
            raise _Doubt
        if any(a > b for a, b in pairwise(rank)):
            order = np.argsort(rank, kind="stable")
            coords, numbers = coords[order], [numbers[i] for i in order]
    crystal = checked_crystal(lattice, coords, numbers, name)
    units = cif.as_string(block.find_value("_cell_formula_units_Z") or "")
    check_formula({"_chemical_formula_sum": formula, "_cell_formula_units_Z": units}, Counter(numbers), name)
    return crystal


def _floats(texts: list[str]) -> list[float]:
    try:
        found = [float(x) for x in texts]
    except ValueError:
        if not all(NUMBER.fullmatch(x) for x in texts):
            raise _Doubt from None
        return [float(x.partition("(")[0]) for x in texts]
    if "_" in "".join(texts):  # a digit separator to Python alone
        raise _Doubt
    return found


def _check_occupancy(texts: list[str] | None) -> None:
    for text in set(texts or ()):
        if text not in ("1", "1.0") and not 1 - 1e-6 < float(text) < 1 + 1e-6:
            raise _Doubt


def _numbers(types: list[str] | None, labels: list[str]) -> list[int]:
    symbols, pattern = (labels, _LABEL) if types is None else (types, _TYPE)
    if len(symbols) != len(labels):
        raise _Doubt
    known: dict[str, int] = {}
    for symbol in set(symbols):
        match = pattern.fullmatch(symbol)
        if match is None or match[1] not in _NUMBERS:
            raise _Doubt
        known[symbol] = _NUMBERS[match[1]]
    return [known[symbol] for symbol in symbols]


def _lattice(a: float, b: float, c: float, *angles: float) -> np.ndarray:
    """Rows a, b, c in Å with c along z and a in the plane of x and z, as pymatgen's."""
    if not (all(0 < x < 180 for x in angles) and min(a, b, c) > 0):
        raise _Doubt
    cosine = [0.0 if x == 90 else math.cos(math.radians(x)) for x in angles]
    sine = [1.0 if x == 90 else math.sin(math.radians(x)) for x in angles]
    star = (cosine[0] * cosine[1] - cosine[2]) / (sine[0] * sine[1])
    if not -1 < star < 1:
        raise _Doubt
    return np.array(
        [
            [a * sine[1], 0.0, a * cosine[1]],
            [-b * sine[0] * star, b * sine[0] * math.sqrt(1 - star * star), b * cosine[0]],
            [0.0, 0.0, c],
        ]
    )


def _operations(cif: Any, block: Any, text: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Rotations (g, 3, 3) and translations (g, 3); None where x, y, z is the only operation."""
    columns = [column for tag in _OPERATIONS if len(column := block.find_values(tag))]
    if not columns:
        if stated_symmetry(text):
            raise _Doubt
        return None
    if len(columns) > 1:
        raise _Doubt
    texts = ["".join(cif.as_string(value).lower().split()) for value in columns[0]]
    named = {
        tag: cif.as_string(text) for tag in (*HERMANN_MAUGUIN, *HALL, *INT_NUMBERS) if (text := block.find_value(tag))
    }
    if all(text in _IDENTITY for text in texts):
        if not all(is_p1(text) for text in named.values()):
            raise _Doubt
        return None
    if not all(_OPERATION.fullmatch(text) for text in texts):
        raise _Doubt
    rotations, translations, group = _matrices(tuple(texts))
    stated = [group_number(f"Hall {text}" if tag in HALL else text) for tag, text in named.items()]
    if group and not {None, group}.issuperset(stated):
        raise _Doubt
    return rotations, translations


@cache
def _matrices(texts: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Rotations, translations and, where their setting is tabulated, the number of their space group."""
    from gemmi import GroupOps, Op, find_spacegroup_by_ops

    operations = [Op(text) for text in texts]
    if len({operation.triplet() for operation in operations}) != len(operations):
        raise _Doubt
    rotations = np.array([operation.rot for operation in operations]) / Op.DEN
    translations = np.array([operation.tran for operation in operations])
    if not (np.abs(np.abs(np.linalg.det(rotations)) - 1) < 1e-9).all() or not is_group(rotations, translations, Op.DEN):
        raise _Doubt
    group = find_spacegroup_by_ops(GroupOps(operations))
    return rotations, translations / Op.DEN, group.number if group else None


def _check_apart(coords: np.ndarray, tolerance: float) -> None:
    """No two sites so near on every axis; sorted along one direction, only neighbours need to be looked at."""
    coords = (coords - 0.123456) % 1.0  # few sites are at the edge then
    if (coords < tolerance).any():
        for k in range(3):
            coords = np.concatenate([coords, coords[coords[:, k] < tolerance] + np.eye(3)[k]])
    along = coords @ _DIRECTION
    order = np.argsort(along)
    along = along[order]
    for step in range(1, len(along)):
        close = np.flatnonzero(along[step:] - along[:-step] < 2.33 * tolerance)
        if not len(close):
            return
        apart = np.abs(coords[order[close + step]] - coords[order[close]])
        if (apart < tolerance).all(axis=1).any():
            raise _Doubt


def _expanded(
    coords: np.ndarray, numbers: list[int], operations: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, list[int]]:
    """Every image of every site, those of a special position once; sites of one orbit must not be listed twice."""
    rotations, translations = operations
    if len(coords) * len(rotations) > _MAX_IMAGES:
        raise _Doubt
    for third in (1 / 3, 2 / 3):
        coords = np.where(np.abs(coords / third - 1) <= _SNAP, third, coords)
    images = np.einsum("gij,nj->ngi", rotations, coords) + translations
    images -= np.floor(images)
    kept: list[np.ndarray] = []
    kept_numbers: list[int] = []
    for own, number in zip(images, numbers, strict=True):
        apart = own[:, None] - own
        apart = np.abs(apart - np.rint(apart)).max(axis=2)
        if ((apart > 0.1 * _SITE_TOLERANCE) & (apart < 10 * _SITE_TOLERANCE)).any():
            raise _Doubt  # one atom or two: a matter of digits
        on_one_before = np.tril(apart < _SITE_TOLERANCE, -1).any(axis=1)
        first = np.flatnonzero(~on_one_before)
        kept.append(own[first])
        kept_numbers += [number] * len(first)
    atoms = np.concatenate(kept)
    _check_apart(atoms, 10 * _SITE_TOLERANCE)
    return atoms, kept_numbers
