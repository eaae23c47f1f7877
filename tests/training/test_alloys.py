"""The demo's data are physics: references, signs, invariances."""

from __future__ import annotations

import numpy as np
import pytest
from ase.build import bulk
from ase.neighborlist import neighbor_list

from srcgcnn_fast import InputError
from srcgcnn_fast.graph import read_inputs
from srcgcnn_fast.training import alloys

# Å: the Wigner-Seitz radii s0 of Jacobsen, Stoltze & Nørskov 1996 times (16π/3)^⅓.
CONSTANTS = {"Al": 3.99, "Ni": 3.49, "Cu": 3.59, "Pd": 3.88, "Ag": 4.06, "Pt": 3.92, "Au": 4.06}


@pytest.mark.parametrize("element", alloys.ELEMENTS)
def test_elements_are_the_zero_of_energy(element):
    reference = alloys.reference(element)
    assert reference.lattice_constant == pytest.approx(CONSTANTS[element], abs=0.01)
    ideal = bulk(element, "fcc", a=reference.lattice_constant)
    assert alloys.formation_energy(ideal) == pytest.approx(0.0, abs=1e-12)
    for stretch in (0.99, 1.01):  # a minimum: every strain costs energy
        assert alloys.formation_energy(bulk(element, "fcc", a=stretch * reference.lattice_constant)) > 1e-4


def test_unknown_element_is_named():
    with pytest.raises(InputError, match="Fe"):
        alloys.reference("Fe")


def test_energy_does_not_depend_on_the_order_of_atoms_or_on_the_cell():
    atoms = alloys.random_alloy(np.random.default_rng(3))
    energy = alloys.formation_energy(atoms)
    assert alloys.formation_energy(atoms[::-1]) == pytest.approx(energy, abs=1e-10)
    assert alloys.formation_energy(atoms.repeat((2, 1, 1))) == pytest.approx(energy, abs=1e-10)


def test_random_alloys_are_sane_and_repeatable():
    rng = np.random.default_rng(0)
    made = [alloys.random_alloy(rng) for _ in range(60)]
    energies = np.array([alloys.formation_energy(a) for a in made])
    assert np.all(np.abs(energies) < 1.0) and energies.std() > 0.02
    assert {len(a) for a in made} <= set(range(2, 9))
    assert all(len(neighbor_list("d", a, 1.9)) == 0 for a in made)
    again = alloys.random_alloy(np.random.default_rng(0))
    assert np.array_equal(again.positions, made[0].positions)


def test_supercells_have_their_determinant():
    rng = np.random.default_rng(1)
    for n in range(1, 9):
        for _ in range(5):
            assert round(np.linalg.det(alloys._hermite_normal_form(n, rng))) == n


def test_ordered_alloys_have_the_symmetry_of_their_names():
    from srcgcnn_fast import build_graph

    for name, atoms in alloys.ordered_alloys().items():
        assert build_graph(atoms).n_rows == 2, name  # two kinds of sites
        lengths, angles = atoms.cell.cellpar()[:3], atoms.cell.cellpar()[3:]
        assert np.allclose(angles, 90)
        assert np.ptp(lengths) == pytest.approx(0, abs=1e-9) if "L1_2" in name else np.ptp(lengths) > 0.5


def test_written_alloys_read_back(tmp_path):
    path = alloys.write_alloys(tmp_path / "alloys.parquet", 12, seed=5)
    records = list(read_inputs(path))
    rng = np.random.default_rng(5)
    for record in records:
        atoms = alloys.random_alloy(rng)
        assert record.error is None
        assert np.array_equal(record.crystal.numbers, atoms.numbers)
        assert record.targets["formation_energy_per_atom"] == pytest.approx(alloys.formation_energy(atoms), abs=1e-12)
    assert len(records) == 12
    with pytest.raises(InputError, match="at least one"):
        alloys.write_alloys(tmp_path / "none.parquet", 0)
