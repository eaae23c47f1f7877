from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

import srcgcnn_fast as sf
from srcgcnn_fast.errors import InputError
from srcgcnn_fast.graph import GraphParameters
from srcgcnn_fast.nn.metadata import ModelMetadata

pytest.importorskip("ase", reason="ASE is not installed")
import ase.build
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress

from srcgcnn_fast.interop.calculator import CrystalCalculator

MODELS = {
    "cgcnn": lambda: sf.CGCNN(2, 16, 8),
    "sr": lambda: sf.SRCGCNN(3, 16, 8, recurrent_layer_norm=True, recurrent_learnable_alpha=True),
    "shared norms": lambda: sf.SRCGCNN(3, 16, 8, recurrent_shared_norms=True),
}


def model(kind: str = "cgcnn", radius: float = 8.0, padded: bool = False, seed: int = 0):
    """Random weights and statistics, so that every part of a layer counts."""
    torch.manual_seed(seed)
    made = MODELS[kind]()
    for name, x in made.state_dict().items():
        if "running" in name or ("bn" in name and name.endswith("weight")):
            x.uniform_(0.5, 1.5)
        elif "bn" in name and x.is_floating_point():
            x.normal_()
    if kind == "sr":
        torch.nn.init.normal_(made.recurrent_alpha)
    graph = GraphParameters(radius=radius, padded=padded)
    made.metadata = ModelMetadata(("energy_per_atom",), ("eV/atom",), (-1.5,), (2.0,), graph)
    return made


def rattled(seed: int = 0, amplitude: float = 0.15) -> ase.Atoms:
    """A skewed cell of 8 atoms, one of them outside it."""
    rng = np.random.default_rng(seed)
    atoms = ase.build.bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    atoms.set_cell(atoms.cell.array + rng.normal(0, 0.1, (3, 3)), scale_atoms=True)
    atoms.positions += rng.normal(0, amplitude, atoms.positions.shape)
    atoms.positions[1] += 2 * atoms.cell[0] - atoms.cell[2]
    return atoms


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_energy_is_the_prediction(kind, padded):
    ours = model(kind, padded=padded).double()
    for atoms in (rattled(), ase.build.bulk("Fe"), ase.build.bulk("Si", cubic=True)):
        atoms.calc = CrystalCalculator(ours)
        expected = sf.predict(ours, [atoms])["energy_per_atom"][0]
        assert atoms.get_potential_energy() == pytest.approx(len(atoms) * expected, rel=1e-11)
        assert atoms.calc.get_property("energy_per_atom", atoms) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(("kind", "padded"), [("cgcnn", False), ("sr", True)])
@pytest.mark.parametrize("smoothing", [None, 0.8])
@pytest.mark.parametrize("radius", [8.0, 3.6])  # a full dozen; rows of unequal length
def test_forces_and_stress_are_the_differences(kind, padded, smoothing, radius):
    atoms = rattled()
    atoms.calc = CrystalCalculator(model(kind, radius, padded), smoothing=smoothing)
    forces, stress = atoms.get_forces(), atoms.get_stress(voigt=False)
    assert np.abs(forces).max() > 1e-3 and np.abs(stress).max() > 1e-5
    np.testing.assert_allclose(forces, calculate_numerical_forces(atoms, eps=1e-5), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(stress, calculate_numerical_stress(atoms, eps=1e-6, voigt=False), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(forces.sum(axis=0), 0, atol=1e-12)


@pytest.mark.parametrize(
    "atoms",
    [
        pytest.param(ase.build.bulk("Cu", cubic=True), id="fcc"),  # 12 neighbours at 2.55 Å, the next at 3.61
        pytest.param(ase.build.bulk("Si", cubic=True), id="diamond"),  # 4 and 12: a choice of 8 among the 12
        pytest.param(ase.build.bulk("NaCl", "rocksalt", a=5.6, cubic=True), id="rocksalt"),  # 6, 12
    ],
)
def test_symmetry_leaves_no_force(atoms):
    """A choice among equidistant neighbours does; weights that equidistant neighbours share do not."""
    own, smooth = (CrystalCalculator(model(), smoothing=s) for s in (None, 0.5))
    np.testing.assert_allclose(smooth.get_forces(atoms), 0, atol=1e-12)
    stress = smooth.get_stress(atoms)
    assert np.ptp(stress[:3]) < 1e-12 < np.abs(stress[0]) and np.abs(stress[3:]).max() < 1e-12
    if atoms.symbols[0] == "Cu":
        assert smooth.get_potential_energy(atoms) == pytest.approx(own.get_potential_energy(atoms), rel=1e-12)
        np.testing.assert_allclose(own.get_stress(atoms), stress, rtol=1e-9, atol=1e-14)
        np.testing.assert_allclose(own.get_forces(atoms), 0, atol=1e-12)
    else:
        assert np.abs(own.get_forces(atoms)).max() > 1e-3


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_smoothing_changes_nothing_in_short_rows_far_from_the_radius(kind, padded):
    atoms = ase.build.bulk("Si", cubic=True)  # 4 neighbours at 2.35 Å, the next at 3.84
    own, smooth = (CrystalCalculator(model(kind, 3.6, padded).double(), smoothing=s) for s in (None, 1.0))
    assert smooth.get_potential_energy(atoms) == pytest.approx(own.get_potential_energy(atoms), rel=1e-12)
    np.testing.assert_allclose(smooth.get_stress(atoms), own.get_stress(atoms), rtol=1e-9, atol=1e-14)


def roughest(calculator: CrystalCalculator, points: int) -> float:
    """The largest second difference of the energy along a path of 1 Å."""
    base, direction = rattled(), np.random.default_rng(1).normal(size=(8, 3))
    energies = []
    for x in np.linspace(0, 1, points):
        atoms = base.copy()
        atoms.positions += x * direction / np.linalg.norm(direction)
        atoms.calc = calculator
        energies.append(atoms.get_potential_energy())
    return float(np.abs(np.diff(energies, 2)).max())


def test_smoothing_takes_the_jumps_away():
    """Half the step leaves a jump as it is, and makes a quarter of the second difference of a smooth energy."""
    jumps, smooth = (CrystalCalculator(model(), smoothing=s) for s in (None, 0.8))
    assert roughest(jumps, 201) > 0.7 * roughest(jumps, 101)
    assert roughest(smooth, 201) < 0.3 * roughest(smooth, 101)


def test_targets_that_are_no_energy():
    ours = sf.CGCNN(1, 16, 8, n_targets=2)
    ours.metadata = ModelMetadata(("formation_energy_per_atom", "band_gap"), ("eV/atom", "eV"), (0.0, 1.0), (1.0, 2.0))
    atoms = rattled()
    both = CrystalCalculator(ours)
    expected = sf.predict(ours, [atoms]).loc[0, ["formation_energy_per_atom", "band_gap"]].to_numpy(float)
    found = [both.get_property(name, atoms) for name in ("formation_energy_per_atom", "band_gap")]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    ours.metadata.units = ("", "eV")
    none = CrystalCalculator(ours)
    assert none.get_property("band_gap", atoms) == pytest.approx(expected[1], rel=1e-5)
    for name in ("energy", "forces"):
        with pytest.raises(PropertyNotImplementedError):
            none.get_property(name, atoms)
    told = CrystalCalculator(ours, energy="formation_energy_per_atom")
    np.testing.assert_array_equal(told.get_forces(atoms), both.get_forces(atoms))
    atoms.calc = told
    of_ase = atoms.get_properties(["energy", "stress"])  # which knows of no other targets
    assert of_ase["energy"] == told.results["energy"] and "band_gap" not in of_ase
    np.testing.assert_array_equal(of_ase["stress"], told.results["stress"])


def test_the_model_is_a_copy_and_the_calculator_too():
    ours, atoms = model().train(), rattled()
    calculator = CrystalCalculator(ours, smoothing=0.5)
    assert ours.training and ours.embedding.weight.dtype == torch.float32
    expected = calculator.get_forces(atoms)
    for again in (copy.deepcopy(calculator), pickle.loads(pickle.dumps(calculator))):
        again.reset()
        np.testing.assert_array_equal(again.get_forces(atoms), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_forces_in_any_mode(mode):
    atoms = rattled()
    expected = CrystalCalculator(model()).get_forces(atoms)
    with mode():
        np.testing.assert_array_equal(CrystalCalculator(model()).get_forces(atoms), expected)


def test_after_a_failure_there_are_no_results_of_other_atoms():
    calculator, atoms = CrystalCalculator(model()), rattled()
    calculator.get_potential_energy(atoms)
    atoms.pbc = False
    for attempt in (calculator.calculate, calculator.get_potential_energy):
        with pytest.raises(InputError, match="not periodic"):
            attempt(atoms)


@pytest.mark.filterwarnings("ignore")  # torch.ao is leaving
def test_a_quantised_model_is_refused():
    quantised = torch.ao.quantization.quantize_dynamic(model(), {"conv_to_fc", "fc_out"}, dtype=torch.qint8)
    assert np.isfinite(sf.predict(quantised, [rattled()])["energy_per_atom"][0])
    with pytest.raises(InputError, match="The model is quantised"):
        CrystalCalculator(quantised)


def test_bad_input():
    two = sf.CGCNN(1, 16, 8, n_targets=2)
    two.metadata = ModelMetadata(("a", "b"), ("eV/atom", "eV/atom"), (0.0, 0.0), (1.0, 1.0))
    hidden = copy.deepcopy(two)
    hidden.metadata = ModelMetadata(("a", "free_energy"), ("eV/atom", "eV"), (0.0, 0.0), (1.0, 1.0))
    gap = model()
    gap.metadata.units = ("eV",)
    molecule = ase.build.molecule("H2O")
    lacking = model()
    lacking.element_table[11] = 0
    shorter = model()
    shorter.element_table = shorter.element_table[:11].clone()
    alone = ase.Atoms("He", cell=[30, 30, 30], pbc=True)
    for change, words in (
        (lambda: CrystalCalculator(two), "energy=NAME"),
        (lambda: CrystalCalculator(two, energy="c"), "choose one of a, b"),
        (lambda: CrystalCalculator(hidden), "free_energy has the name of what follows from the energy"),
        (lambda: CrystalCalculator(gap, energy="energy_per_atom"), "in eV, not an energy in eV/atom"),
        (lambda: CrystalCalculator(sf.CGCNN(classification=True), energy="target"), "a probability"),
        (lambda: CrystalCalculator(model(), smoothing=0.0), "between 0 and the radius of 8"),
        (lambda: CrystalCalculator(model()).get_potential_energy(molecule), "no cell"),
        (lambda: CrystalCalculator(lacking).get_potential_energy(rattled()), "Na, which the model's element table"),
        (lambda: CrystalCalculator(shorter).get_potential_energy(rattled()), "Na, which the model's element table"),
        (lambda: CrystalCalculator(model()).get_potential_energy(alone), "no neighbour within 8 Å"),
    ):
        with pytest.raises(InputError, match=words):
            change()
