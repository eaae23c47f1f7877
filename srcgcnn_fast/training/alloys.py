"""A data set from real physics that needs no download: fcc alloys under effective medium theory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import InputError, require
from ..files import atomic_path

if TYPE_CHECKING:
    from ase import Atoms

ELEMENTS = ("Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au")
"""The fcc metals of effective medium theory (Jacobsen, Stoltze & Nørskov, Surf. Sci. 366, 394, 1996)."""

_FCC_PRIMITIVE = np.array([[0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]])


class Reference(NamedTuple):
    lattice_constant: float
    """Equilibrium constant of the cubic fcc cell, Å."""
    energy: float
    """Energy at that constant, eV/atom."""


def energy_per_atom(atoms: Atoms) -> float:
    """Effective-medium energy, eV/atom."""
    emt = require("ase.calculators.emt", "The demo data set", extra="io")
    calculator = emt.EMT()
    return float(calculator.get_potential_energy(atoms)) / len(atoms)


@cache
def reference(element: str) -> Reference:
    """The fcc element at its equilibrium: a parabola through five constants around the minimum, refined twice."""
    if element not in ELEMENTS:
        raise InputError(f"Effective medium theory has no {element!r} here; choose among {', '.join(ELEMENTS)}.")
    bulk = require("ase.build", "The demo data set", extra="io").bulk

    def energy(constant: float) -> float:
        return energy_per_atom(bulk(element, "fcc", a=constant))

    grid = np.linspace(3.3, 4.4, 23)
    constant = float(grid[np.argmin([energy(a) for a in grid])])
    for width in (0.05, 0.01, 0.002):
        offsets = np.linspace(-width, width, 5)
        curvature, slope, _ = np.polyfit(offsets, [energy(constant + x) for x in offsets], 2)
        constant -= slope / (2 * curvature)
    return Reference(float(constant), energy(float(constant)))


def formation_energy(atoms: Atoms) -> float:
    """Energy per atom relative to the fcc elements at their equilibrium, eV/atom."""
    return energy_per_atom(atoms) - float(np.mean([reference(s).energy for s in atoms.get_chemical_symbols()]))


def random_alloy(rng: np.random.Generator) -> Atoms:
    """An fcc derivative of 2 to 8 atoms and up to three elements, near the mean of their lattice constants.

    A third keeps the ideal sites of a cubic lattice; the others are sheared (σ 2 %) and rattled (σ up to 0.12 Å).
    """
    n_atoms = int(rng.integers(2, 9))
    supercell = _hermite_normal_form(n_atoms, rng)
    palette = rng.choice(ELEMENTS, size=int(rng.integers(1, 4)), replace=False)
    atoms = _decorate(supercell, [str(s) for s in rng.choice(palette, size=n_atoms)], rng.normal(1.0, 0.015))
    if rng.random() < 2 / 3:
        shear = rng.normal(0.0, 0.02, (3, 3))
        atoms.set_cell(atoms.cell[:] @ (np.eye(3) + (shear + shear.T) / 2), scale_atoms=True)
        atoms.positions += rng.normal(0.0, rng.uniform(0.0, 0.12), (n_atoms, 3))
    return atoms


def ordered_alloys() -> dict[str, Atoms]:
    """Textbook orderings (L1₂ A₃B, L1₀ AB) at the mean lattice constant of their elements, by name."""
    cube = np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]])  # the cubic cell in primitive vectors
    layers = np.array([[0, 0, 1], [1, -1, 0], [1, 1, -1]])  # the tetragonal one: [½ ½ 0], [-½ ½ 0], [0 0 1]
    named = {}
    for majority, minority in (("Cu", "Au"), ("Ni", "Al"), ("Ag", "Pt"), ("Pd", "Cu")):
        named[f"{majority}3{minority} (L1_2)"] = _decorate(cube, [minority, *[majority] * 3])
    for first, second in (("Cu", "Au"), ("Ni", "Pt")):
        named[f"{first}{second} (L1_0)"] = _decorate(layers, [first, second])
    return named


def write_alloys(path: str | os.PathLike[str], count: int, seed: int = 0, progress: bool = False) -> Path:
    """Write ``count`` random alloys with their formation energies (eV/atom) as a Parquet file.

    Raises:
        InputError: ``count`` is not positive, ``seed`` is negative, or ase or pandas is missing.
    """
    if count < 1:
        raise InputError(f"Cannot make {count} alloys; ask for at least one.")
    if seed < 0:
        raise InputError(f"The seed {seed} is negative; give 0 or more.")
    pandas = require("pandas", "The demo data set", extra="io")
    with atomic_path(path) as temporary:
        pandas.DataFrame(_progress(_rows(count, seed), count, progress)).to_parquet(temporary)
    return Path(path)


def _rows(count: int, seed: int) -> Iterator[dict[str, object]]:
    rng = np.random.default_rng(seed)
    for i in range(count):
        atoms = random_alloy(rng)
        yield {
            "material_id": f"alloy-{i:05d}",
            "formula": atoms.get_chemical_formula(mode="metal"),
            "lattice": atoms.cell[:].ravel(),
            "frac_coords": atoms.get_scaled_positions().ravel(),
            "atomic_numbers": atoms.numbers,
            "formation_energy_per_atom": formation_energy(atoms),
        }


def _progress(rows: Iterator[dict[str, object]], count: int, show: bool) -> Iterator[dict[str, object]]:
    if not show:
        return rows
    tqdm = require("tqdm", "A progress bar", extra="train").tqdm
    pause = 0.1 if sys.stderr.isatty() else 10  # s; a log file need not hold every step
    return iter(tqdm(rows, total=count, desc="effective-medium energies", unit=" crystals", mininterval=pause))


def _hermite_normal_form(determinant: int, rng: np.random.Generator) -> np.ndarray:
    """A random supercell of ``determinant`` primitive cells (Hart & Forcade, Phys. Rev. B 77, 224115, 2008)."""
    a = int(rng.choice([d for d in range(1, determinant + 1) if determinant % d == 0]))
    rest = determinant // a
    c = int(rng.choice([d for d in range(1, rest + 1) if rest % d == 0]))
    f = rest // c
    return np.array([[a, 0, 0], [rng.integers(c), c, 0], [rng.integers(f), rng.integers(f), f]])


def _decorate(supercell: np.ndarray, symbols: list[str], stretch: float = 1.0) -> Atoms:
    """``symbols`` on the fcc sites of ``supercell`` primitive cells, with their mean lattice constant."""
    ase = require("ase", "The demo data set", extra="io")
    build = require("ase.build", "The demo data set", extra="io")
    constant = stretch * float(np.mean([reference(s).lattice_constant for s in symbols]))
    primitive = ase.Atoms("X", cell=constant * _FCC_PRIMITIVE, pbc=True)
    atoms = build.make_supercell(primitive, supercell)
    atoms.set_chemical_symbols(symbols)
    return atoms
