"""A crystal as three arrays, and the checks that every crystal passes before it becomes a graph."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError
from .elements import ELEMENT_SYMBOLS, MAX_ATOMIC_NUMBER

MIN_HEIGHT = 0.01
"""Å; a cell whose opposite faces are closer than this is called singular."""
OCCUPANCY_TOLERANCE = 1e-3
"""A site counts as full when its occupancy is within this of 1."""


class Crystal(NamedTuple):
    """An ordered periodic crystal."""

    lattice: np.ndarray
    """(3, 3) float64, rows a, b, c in Å."""
    frac_coords: np.ndarray
    """(n, 3) float64."""
    numbers: np.ndarray
    """(n,) int32, atomic numbers 1 to 100 (deuterium counts as hydrogen)."""


def checked_crystal(lattice: Any, frac_coords: Any, numbers: Any, name: str = "The crystal") -> Crystal:
    """Arrays of the right shapes and types, or one sentence that starts with ``name``.

    Raises:
        InputError: no atoms, wrong shapes, values that are not finite, a singular lattice, or an element
            outside 1 to 100.
    """
    try:
        cell = np.array(lattice, dtype=np.float64).reshape(3, 3)
        coords = np.array(frac_coords, dtype=np.float64)
        species = np.asarray(numbers)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} needs a lattice of 9 numbers, frac_coords of 3 numbers an atom and one atomic number an atom "
            f"({_one_line(error)})."
        ) from error
    if species.size == 0:
        raise InputError(f"{name} has no atoms; give at least one site.")
    if species.ndim != 1 or coords.size != 3 * len(species) or coords.ndim > 2:
        raise InputError(
            f"{name} has frac_coords of shape {coords.shape} for atomic numbers of shape {species.shape}; "
            "give (n, 3) and (n,)."
        )
    coords = coords.reshape(-1, 3)
    _check_lattice(cell, name)
    if not np.isfinite(coords).all():
        site = int(np.flatnonzero(~np.isfinite(coords).all(axis=1))[0])
        raise InputError(f"{name} has the coordinates {coords[site].tolist()} at site {site + 1}; give finite numbers.")
    return Crystal(cell, coords, _check_numbers(species, name))


def _check_lattice(cell: np.ndarray, name: str) -> None:
    (a, b, c), finite = cell.tolist(), bool(np.isfinite(cell).all())
    if not finite:
        raise InputError(f"{name} has a lattice entry that is not finite; give nine numbers in Å.")
    faces = [_cross(b, c), _cross(c, a), _cross(a, b)]
    volume = abs(sum(x * y for x, y in zip(a, faces[0], strict=True)))
    largest = max(sum(x * x for x in face) for face in faces) ** 0.5
    if not volume > MIN_HEIGHT * largest:
        raise InputError(
            f"{name} has a singular lattice (volume {volume:.3g} Å^3); give three independent vectors in Å."
        )


def _cross(u: list[float], v: list[float]) -> tuple[float, float, float]:
    return u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]


def _check_numbers(species: np.ndarray, name: str) -> np.ndarray:
    if species.dtype.kind not in "iu":
        whole = species.astype(np.float64) if species.dtype.kind == "f" else None
        if whole is None or not (np.isfinite(whole).all() and (whole == np.floor(whole)).all()):
            raise InputError(f"{name} has atomic numbers that are not whole numbers; give integers from 1 to 100.")
    if species.min() < 1 or species.max() > MAX_ATOMIC_NUMBER:
        bad = species[(species < 1) | (species > MAX_ATOMIC_NUMBER)][0]
        raise InputError(f"{name} has the unknown atomic number {bad}; only 1 to {MAX_ATOMIC_NUMBER} are known.")
    return species.astype(np.int32)


def from_pymatgen(structure: Any, name: str = "The structure") -> Crystal:
    """A pymatgen ``Structure``; oxidation states are ignored.

    Raises:
        InputError: a disordered or unknown site, a direction without periodicity, and all of
            :func:`checked_crystal`.
    """
    if not all(structure.lattice.pbc):
        raise InputError(f"{name} is not periodic in all directions (pbc {structure.lattice.pbc}); set pbc to True.")
    numbers = [_site_number(site, index, name) for index, site in enumerate(structure)]
    return checked_crystal(structure.lattice.matrix, structure.frac_coords, numbers, name)


def _site_number(site: Any, index: int, name: str) -> int:
    items = list(site.species.items())
    if len(items) != 1 or abs(items[0][1] - 1) > OCCUPANCY_TOLERANCE:
        held = site.species_string if items else "nothing"
        raise InputError(
            f"{name} is disordered (site {index + 1} holds {held}); give an ordered structure, one full atom a site."
        )
    element = getattr(items[0][0], "element", items[0][0])
    symbol = element.symbol
    if symbol not in ELEMENT_SYMBOLS and symbol not in ("D", "T"):
        raise InputError(f"{name} has the unknown element {symbol} at site {index + 1}; only H to Fm are known.")
    return int(element.Z)


def from_ase(atoms: Any, name: str = "The Atoms object") -> Crystal:
    """ASE ``Atoms``, periodic in all three directions.

    Raises:
        InputError: no cell, a direction without periodicity, and all of :func:`checked_crystal`.
    """
    cell = np.asarray(atoms.cell[:], dtype=np.float64)
    if len(atoms) and not cell.any():
        raise InputError(f"{name} has no cell; a crystal graph needs three lattice vectors.")
    if len(atoms) and not all(atoms.pbc):
        raise InputError(
            f"{name} is not periodic in all directions (pbc {np.asarray(atoms.pbc).tolist()}); "
            "set atoms.pbc = True if the images of its cell are meant."
        )
    if len(atoms):
        _check_lattice(cell, name)
    coords = np.linalg.solve(cell.T, atoms.positions.T).T if len(atoms) else np.zeros((0, 3))
    return checked_crystal(cell, coords, atoms.numbers, name)


def _one_line(error: object) -> str:
    """The reason of an exception in one line without a final full stop."""
    return " ".join(str(error).split()).rstrip(".")[:300] or type(error).__name__
