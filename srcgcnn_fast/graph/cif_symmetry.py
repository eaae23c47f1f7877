"""Symmetry of CIF files: is it said without doubt, and does it fit the cell and the atoms that came of it?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import InputError
from .crystal import AnyCrystal, Composition, MixedCrystal

_TERM = re.compile(r"[-+]?([xyz]|\d+/\d+|\d+\.?\d*|\.\d+)")
_STATEMENT = re.compile(
    r"(?<!\S)(_(?:symmetry[._](?:equiv|space|int)|space_group)\S*)(?=\s+('[^'\n]*'|\"[^\"\n]*\"|\S+))", re.IGNORECASE
)
_COMMENT = re.compile(r"(?<!\S)#.*")
_NONE = ("", "?", ".", "P1", "1", "TRICLINIC")
_MISFIT = 0.01
"""Of the longest cell length squared; cells follow from their symmetry up to rounding."""
_IMAGE_TOLERANCE = 0.02  # of a cell edge; images that rounded coordinates keep apart were merged within half of it
_NEAREST = 0.3  # Å; full atoms are nowhere as near as this, images of rounded coordinates are
_NEAREST_SPLIT = 0.05  # Å; the same for positions that exclude each other


def is_operation(text: str) -> bool:
    """Is it like 'x, y+1/2, -z', each axis and one number at most once? pymatgen reads anything."""
    parts = "".join(text.lower().split()).split(",")
    return len(parts) == 3 and all(_is_coordinate(part) for part in parts)


def _is_coordinate(text: str) -> bool:
    terms = [_TERM.fullmatch(term) for term in re.split(r"(?<!^)(?=[-+])", text)]
    kinds = [term[1] if term[1] in "xyz" else "number" for term in terms if term]
    return len(kinds) == len(terms) == len(set(kinds))


def is_p1(text: str) -> bool:
    """Does the symbol or number of a space group name P1, or nothing?"""
    return "".join(text.split()).upper() in _NONE


def stated_symmetry(text: str) -> str | None:
    """The first item in the text of a file, whatever its block, that speaks of more symmetry than P1 has."""
    for match in _STATEMENT.finditer(_COMMENT.sub("", text)):
        tag, value = match[1], match[2].strip("'\"")
        if "symop" in tag.lower() or "equiv" in tag.lower():
            if not tag.lower().endswith("id"):
                return tag
        elif not is_p1(value) and not value.startswith("_"):
            return f"the space group {value}"
    return None


def fits(rotations: np.ndarray, lattice: np.ndarray) -> bool:
    """Do rotations (g, 3, 3) of fractional coordinates keep the lengths and angles of the lattice (rows, Å)?"""
    metric = lattice @ lattice.T
    return bool(np.abs(rotations.transpose(0, 2, 1) @ metric @ rotations - metric).max() <= _MISFIT * metric.max())


def is_group(rotations: np.ndarray, translations: np.ndarray, unit: int) -> bool:
    """Are operations closed under products? (g, 3, 3) of -1, 0 and 1, and (g, 3) whole numbers of 1/``unit``."""
    if np.abs(rotations).max() > 1:
        return False
    products = np.einsum("aij,bjk->abik", rotations, rotations)
    shifts = np.einsum("aij,bj->abi", rotations, translations) + translations[:, None]
    return bool(np.isin(_keys(products, shifts, unit), _keys(rotations, translations, unit)).all())


def _keys(rotations: np.ndarray, translations: np.ndarray, unit: int) -> np.ndarray:
    """One whole number for each operation; entries of rotations are from -3 to 3."""
    turned = (rotations + 3).reshape(*rotations.shape[:-2], 9) @ 7.0 ** np.arange(9)
    return np.rint(turned * unit**3 + translations % unit @ float(unit) ** np.arange(3)).astype(np.int64)


def check_setting(operations: Iterable[Any], names: Sequence[str], number: str, lattice: np.ndarray, name: str) -> None:
    """Symmetry that pymatgen took from names or the number of a space group must be the only one that those allow.

    Most groups have several settings: axes, origins, cells. A name often leaves the origin open, a number all of it.

    Raises:
        InputError: several settings bear the name or number and fit the cell, or none does.
    """
    from pymatgen.symmetry.groups import SpaceGroup

    wanted = {re.sub(r"[\s_]", "", text) for text in names}
    keys = ("hermann_mauguin", "hermann_mauguin_u", "universal_h_m", "short_h_m")
    entries = [x for x in SpaceGroup.SYMM_OPS if "(" not in x["universal_h_m"]]  # with it: of no table
    named = [x for x in entries if wanted & {re.sub(r"[\s_]", "", str(x[key])) for key in keys}]
    held = [x for x in (named if names else entries) if number in ("", str(x["number"]))]
    settings = {settled_operations(x["symops"]) for x in held}
    fitting = {x for x in settings if fits(np.array([operation[:9] for operation in x]).reshape(-1, 3, 3), lattice)}
    used = frozenset(_rounded(x.rotation_matrix, x.translation_vector) for x in operations)
    has_origins = any(x["universal_h_m"].endswith((":1", ":2")) for x in held) and ":" not in "".join(names)
    if fitting != {used} or has_origins:
        raise InputError(
            f"{name} gives the space group {', '.join([*names, number]).strip(', ')} without symmetry operations, "
            "which leaves its setting (axes, origin, centring) open; add _symmetry_equiv_pos_as_xyz."
        )


@lru_cache(4096)
def group_number(text: str) -> int | None:
    """Of a space group's Hermann-Mauguin symbol, number or ("Hall …") Hall symbol, where gemmi knows it.

    None for P1, too, which many programs write whatever the operations.
    """
    import gemmi

    symbol = text.removeprefix("Hall ")
    if is_p1(symbol):
        return None
    if text.isdigit():
        return int(text) or None
    if symbol == text:
        group = gemmi.find_spacegroup_by_name(text)
    else:
        try:
            group = gemmi.find_spacegroup_by_ops(gemmi.symops_from_hall(symbol))
        except RuntimeError:
            return None
    return group.number if group else None


def check_group(operations: Iterable[Any], stated: Sequence[str], name: str) -> None:
    """Operations must be those of the space group that stands beside them, in any setting.

    What gemmi does not know, be it operations or symbols, contradicts nothing.

    Raises:
        InputError: they are another group's.
    """
    try:
        import gemmi
    except ImportError:
        return
    listed = []
    for operation in {_rounded(x.rotation_matrix, x.translation_vector) for x in operations}:
        listed.append(gemmi.Op())
        listed[-1].rot = [[gemmi.Op.DEN * int(x) for x in operation[k : k + 3]] for k in (0, 3, 6)]
        listed[-1].tran = [int(x) for x in operation[9:]]
    group = gemmi.find_spacegroup_by_ops(gemmi.GroupOps(listed))
    if group and any(group_number(text) not in (None, group.number) for text in stated):
        raise InputError(
            f"{name} names the space group {', '.join(stated)} but lists the symmetry operations of {group.hm}, "
            f"{group.number}; list all of its operations, or correct the name."
        )


def settled_operations(texts: Sequence[str]) -> frozenset[tuple[float, ...]]:
    """What operations are, however they are written and sorted."""
    from pymatgen.core.operations import SymmOp

    found = [SymmOp.from_xyz_str(text) for text in texts]
    return frozenset(_rounded(x.rotation_matrix, x.translation_vector) for x in found)


def _rounded(rotation: np.ndarray, translation: np.ndarray) -> tuple[float, ...]:
    return (*np.rint(rotation).ravel().tolist(), *(np.rint(translation * 24) % 24).tolist())


def check_operations(operations: Sequence[Any], crystal: AnyCrystal, name: str) -> None:
    """Operations that were applied must keep the cell and the atoms, and leave no two atoms of a kind on one place.

    Raises:
        InputError: they do not.
    """
    from scipy.spatial import cKDTree

    rotations = np.array([x.rotation_matrix for x in operations])
    translations = np.array([x.translation_vector for x in operations])
    if len(operations) == 1 and np.array_equal(rotations[0], np.eye(3)):
        return
    if not fits(rotations, crystal.lattice):
        raise InputError(
            f"{name} has symmetry operations that do not fit its cell (other axes or another setting); correct either."
        )
    kind, compositions = np.zeros_like(crystal.numbers), tuple[Composition, ...]()
    if isinstance(crystal, MixedCrystal):
        kind, compositions = crystal.kind, crystal.compositions
    shares = np.array([1.0, *(sum(share for _, share in x) for x in compositions)])[kind]
    tree = cKDTree(_in_cell(crystal.frac_coords), boxsize=1.0)
    pairs = tree.query_pairs(_IMAGE_TOLERANCE, p=np.inf, output_type="ndarray")
    i, j = pairs[(np.diff(crystal.numbers[pairs]) == 0).ravel() & (np.diff(kind[pairs]) == 0).ravel()].T
    apart = crystal.frac_coords[i] - crystal.frac_coords[j]
    distance = np.linalg.norm((apart - np.rint(apart)) @ crystal.lattice, axis=1)
    too_near = distance[distance < np.where(shares[i] + shares[j] > 1.001, _NEAREST, _NEAREST_SPLIT)]
    if len(too_near):
        raise InputError(
            f"{name} has images of one site {too_near.min():.2g} Å apart; give its coordinates with more digits, "
            "like 0.33333, and _chemical_formula_sum."
        )
    for rotation, translation in zip(rotations, translations, strict=True):
        far, image = tree.query(_in_cell(crystal.frac_coords @ rotation.T + translation), p=np.inf)
        same = (crystal.numbers[image] == crystal.numbers) & (kind[image] == kind)
        if not (same & (far < _IMAGE_TOLERANCE)).all():
            raise InputError(f"{name} has symmetry operations that are no whole group; list all of them.")


def _in_cell(coords: np.ndarray) -> np.ndarray:
    coords = coords - np.floor(coords)
    return np.where(coords < 1.0, coords, 0.0)
