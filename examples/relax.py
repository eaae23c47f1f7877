"""A model trained on alloys as an ASE calculator: it relaxes the cell of an alloy that it has not seen.

python examples/relax.py        (needs srcgcnn_fast[sklearn]; half a minute)
"""

from __future__ import annotations

import logging

import numpy as np
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS

from srcgcnn_fast.interop.calculator import CrystalCalculator
from srcgcnn_fast.interop.estimator import CrystalRegressor
from srcgcnn_fast.training.alloys import energy_per_atom, formation_energy, ordered_alloys, random_alloy


def main() -> None:
    logging.disable(logging.WARNING)
    rng = np.random.default_rng(0)
    alloys = []
    for _ in range(500):
        alloy = random_alloy(rng)
        alloy.set_cell(alloy.cell * rng.uniform(0.96, 1.06), scale_atoms=True)  # so that it sees cells of many sizes
        alloys.append(alloy)
    regressor = CrystalRegressor("cgcnn", n_conv=2, atom_fea_len=32, h_fea_len=32, epochs=30, lr=0.01, batch_size=64)
    regressor.fit(alloys, [formation_energy(alloy) for alloy in alloys])
    regressor.model_.metadata.units = ("eV/atom",)

    atoms = ordered_alloys()["Cu3Au (L1_2)"]
    atoms.set_cell(1.05 * atoms.cell, scale_atoms=True)
    atoms.rattle(0.05, seed=0)
    start, before = energy_per_atom(atoms), atoms.cell.lengths().mean()
    atoms.calc = CrystalCalculator(regressor.model_, smoothing=0.5)
    predicted = atoms.get_potential_energy()
    BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=0.02, steps=100)
    print(f"predicted: {predicted:.3f} -> {atoms.get_potential_energy():.3f} eV")
    print(f"effective medium theory: {4 * start:.3f} -> {4 * energy_per_atom(atoms):.3f} eV")
    print(f"cell: {before:.3f} -> {atoms.cell.lengths().mean():.3f} Å")


if __name__ == "__main__":
    main()
