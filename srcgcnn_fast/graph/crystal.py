"""A crystal as three arrays, and the checks that every crystal passes before it becomes a graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError, one_line
from .elements import ELEMENT_SYMBOLS, MAX_ATOMIC_NUMBER, element_features
from .parameters import check_policy

MIN_HEIGHT = 0.01
"""Å; a cell whose opposite faces are closer than this is called singular."""
OCCUPANCY_TOLERANCE = 1e-3
"""A site counts as full when its occupancy is within this of 1."""
_SYMBOLS = {*ELEMENT_SYMBOLS[1:], "D", "T"}


class Crystal(NamedTuple):
    """An ordered periodic crystal."""

    lattice: np.ndarray
    """(3, 3) float64, rows a, b, c in Å."""
    frac_coords: np.ndarray
    """(n, 3) float64."""
    numbers: np.ndarray
    """(n,) int32, atomic numbers 1 to 100 (deuterium counts as hydrogen)."""


Composition = tuple[tuple[int, float], ...]
"""What a site holds: (atomic number, occupancy), by atomic number; the rest is vacant."""


class MixedCrystal(NamedTuple):
    """A periodic crystal with sites that are not one full atom."""

    lattice: np.ndarray
    """(3, 3) float64, rows a, b, c in Å."""
    frac_coords: np.ndarray
    """(n, 3) float64."""
    numbers: np.ndarray
    """(n,) int32, the element with the largest share of each site."""
    kind: np.ndarray
    """(n,) int32, 0 for one full atom, k for ``compositions[k - 1]``."""
    compositions: tuple[Composition, ...]
    """Those that occur, in order."""
    reason: str
    """The sentence for whoever wants no disorder."""

    def majority(self) -> Crystal:
        """Each site as its most abundant species; sites that are vacant rather than anything else are left out.

        Raises:
            InputError: no site is left.
        """
        taken = [
            True,
            *(_share(x) >= 1 - sum(share for _, share in x) - OCCUPANCY_TOLERANCE for x in self.compositions),
        ]
        kept = np.array(taken)[self.kind]
        if not kept.any():
            raise InputError(f"{self.reason.partition(' is disordered')[0]} has only sites that are mostly vacant.")
        return Crystal(self.lattice, self.frac_coords[kept], self.numbers[kept])

    def content(self) -> Counter[int]:
        """Atoms of each element in the cell, fractions included."""
        held: Counter[int] = Counter(self.numbers[self.kind == 0].tolist())
        for k, composition in enumerate(self.compositions, start=1):
            for number, share in composition:
                held[number] += share * int((self.kind == k).sum())  # type: ignore[assignment]
        return held


AnyCrystal = Crystal | MixedCrystal


def settled(crystal: AnyCrystal, disorder: str) -> AnyCrystal:
    """The crystal under a policy for disorder: "error", "majority" or "average".

    Raises:
        InputError: it is disordered and the policy is "error", or nothing is left of it.
    """
    check_policy(disorder)
    if isinstance(crystal, Crystal) or disorder == "average":
        return crystal
    if disorder == "error":
        raise InputError(crystal.reason)
    return crystal.majority()


def mixed_features(numbers: np.ndarray, kind: np.ndarray, compositions: Sequence[Composition]) -> np.ndarray:
    """(n, 92) float32: the element vector of each site, or the sum of those that it holds, weighted by occupancy."""
    table = element_features()
    features = table[numbers]
    for k, composition in enumerate(compositions, start=1):
        features[kind == k] = sum(np.float32(share) * table[number] for number, share in composition)
    return features


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
            f"({one_line(error)})."
        ) from error
    if species.size == 0:
        raise InputError(f"{name} has no atoms; give at least one site.")
    if species.ndim != 1 or coords.shape not in ((len(species), 3), (3 * len(species),)):
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


def from_pymatgen(structure: Any, name: str = "The structure") -> AnyCrystal:
    """A pymatgen ``Structure``; oxidation states are ignored.

    Raises:
        InputError: an unknown or empty site, a direction without periodicity, and all of :func:`checked_crystal`.
    """
    if not all(structure.lattice.pbc):
        raise InputError(f"{name} is not periodic in all directions (pbc {structure.lattice.pbc}); set pbc to True.")
    held = [_composition(site, index, name) for index, site in enumerate(structure)]
    numbers = [x[0][0] if len(x) == 1 else max(x, key=lambda pair: (pair[1], -pair[0]))[0] for x in held]
    crystal = checked_crystal(structure.lattice.matrix, structure.frac_coords, numbers, name)
    mixed = [len(x) > 1 or abs(x[0][1] - 1) > OCCUPANCY_TOLERANCE for x in held]
    if not any(mixed):
        return crystal
    kinds = sorted({x for x, is_mixed in zip(held, mixed, strict=True) if is_mixed})
    kind = [kinds.index(x) + 1 if is_mixed else 0 for x, is_mixed in zip(held, mixed, strict=True)]
    first = mixed.index(True)
    reason = (
        f"{name} is disordered (site {first + 1} holds {structure[first].species_string}); give an ordered structure, "
        'one full atom a site, or disorder="average" or "majority" (--disorder average).'
    )
    return MixedCrystal(*crystal, np.array(kind, dtype=np.int32), tuple(kinds), reason)


def _composition(site: Any, index: int, name: str) -> Composition:
    held: dict[int, float] = {}
    for species, share in site.species.items():  # which may be ions, and have what their elements have
        if (symbol := species.symbol) not in _SYMBOLS:
            raise InputError(f"{name} has the unknown element {symbol} at site {index + 1}; only H to Fm are known.")
        held[species.Z] = held.get(species.Z, 0) + share
    shares = tuple((number, round(float(share), 6)) for number, share in sorted(held.items()) if share > 0)
    if not shares:
        raise InputError(f"{name} is disordered (site {index + 1} holds nothing); remove the site.")
    return shares


def _share(composition: Composition) -> float:
    return max(share for _, share in composition)


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
    occupancy = atoms.info.get("occupancy")  # ASE keeps the most abundant species of a site in a file as its atom
    for held in occupancy.values() if isinstance(occupancy, Mapping) else ():
        shares = held.values() if isinstance(held, Mapping) else ()  # "?" of a file stays so
        if [x for x in shares if not isinstance(x, str) and not abs(x - 1) <= OCCUPANCY_TOLERANCE]:
            mixture = ", ".join(f"{symbol}:{share}" for symbol, share in held.items())
            raise InputError(
                f"{name} is disordered (atoms.info['occupancy'] has {mixture}); give the file that ASE read, or delete "
                "that entry if its atoms are meant as they are."
            )
    coords = np.linalg.solve(cell.T, atoms.positions.T).T if len(atoms) else np.zeros((0, 3))
    return checked_crystal(cell, coords, atoms.numbers, name)
