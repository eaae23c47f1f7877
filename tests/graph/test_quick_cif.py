"""gemmi's fast reader: whatever it accepts is what pymatgen and its checks make of the same file."""

from __future__ import annotations

import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest

from srcgcnn_fast.graph.cif import read_carefully
from srcgcnn_fast.graph.quick_cif import read_quickly

pytest.importorskip("gemmi")
Structure = pytest.importorskip("pymatgen.core").Structure

ROCK_SALT = """data_made
_chemical_formula_sum 'Cl Na'
_cell_formula_units_Z 4
_cell_length_a 5.64(1)
_cell_length_b 5.64
_cell_length_c 5.64
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'F made'
loop_
_symmetry_equiv_pos_as_xyz
x,y,z
x,y+1/2,z+1/2
x+1/2,y,z+1/2
x+1/2,y+1/2,z
-x,-y,-z
-x,-y+1/2,-z+1/2
-x+1/2,-y,-z+1/2
-x+1/2,-y+1/2,-z
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
{sites}
"""
SITES = "Cl1 Cl1- 0.5 0.5 0.5 1\nNa1 Na1+ 0 0 0 1.0"


def assert_same(path: Path) -> bool:
    """Whether the fast reader accepts the file; if so, atom by atom what pymatgen reads."""
    quick = read_quickly(path)
    if quick is None:
        return False
    careful = read_carefully(path)
    assert np.array_equal(quick.numbers, careful.numbers), path.name
    difference = quick.frac_coords - careful.frac_coords
    assert np.abs(difference - np.rint(difference)).max() < 1e-8, path.name
    assert np.allclose(quick.lattice, careful.lattice, rtol=0, atol=1e-9), path.name
    return True


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_symmetry_charges_and_uncertainties(tmp_path: Path) -> None:
    path = write(tmp_path / "x.cif", ROCK_SALT.format(sites=SITES))
    assert assert_same(path)
    quick = read_quickly(path)
    assert quick is not None and sorted(quick.numbers.tolist()) == [11] * 4 + [17] * 4


@pytest.mark.parametrize(
    "sites",
    [
        SITES.replace("1.0", "0.9"),
        SITES.replace("1.0", "?"),
        SITES.replace("Na1+", "Xx"),
        SITES.replace("Na1+", "Wat"),
        SITES.replace("0 0 0", "0 0 ."),
        SITES.replace("0 0 0", "0 nan 0"),
        SITES.replace("0 0 0", "0 1_0 0"),
        SITES.replace("0 0 0", "0.00003 0 0"),  # one atom or two on the centre of inversion
        SITES.replace("0 0 0", "0.1 0 0"),  # 8 of them: not the formula
        SITES + "\nNa2 Na1+ 0.5 0.5 0 1",  # the same orbit twice
        SITES + "\nK1 K 0.5 0.5 0.50001 1",
    ],
)
def test_doubt_is_left_to_pymatgen(tmp_path: Path, sites: str) -> None:
    assert read_quickly(write(tmp_path / "x.cif", ROCK_SALT.format(sites=sites))) is None


def test_structures_without_a_formula_or_with_a_twin_are_left_to_pymatgen(tmp_path: Path) -> None:
    text = ROCK_SALT.format(sites=SITES)
    for changed in (text.replace("'Cl Na'", "?"), text + text.replace("made", "two"), text.replace("-x,-y,-z\n", "")):
        assert read_quickly(write(tmp_path / "x.cif", changed)) is None


def test_doubtful_symmetry_is_left_to_pymatgen(tmp_path: Path) -> None:
    text = ROCK_SALT.format(sites="Na1 Na 0.1 0.2 0.3 1\nCl1 Cl 0.6 0.7 0.8 1").replace("units_Z 4", "units_Z ?")
    assert assert_same(write(tmp_path / "x.cif", text))
    tag, p1 = "_symmetry_equiv_pos_as_xyz", text[: text.index("loop_")] + text[text.index("loop_\n_atom") :]
    assert assert_same(write(tmp_path / "x.cif", p1.replace("'F made'", "'P 1'")))
    assert assert_same(write(tmp_path / "x.cif", text.replace("'F made'", "'F -1'\n_symmetry_Int_Tables_number 2")))
    for changed in (
        text.replace("'F made'", "'F m -3 m'"),
        text.replace(tag, "_symmetry_equiv.pos_as_xyz").replace("'F made'", "?"),
        text.replace(tag, "_space_group_symop.magn_operation_xyz").replace("'F made'", "?"),
        text.replace("_b 5.64", "_b 5.94").replace("-x,-y,-z\n", "y,-x,z\n"),  # does not fit the cell
        text.replace("-x,-y,-z\n", ""),  # no group, and nothing that contradicts the content
        p1.replace("name_H-M", "name_H-M_ref"),
        "data_global\n_space_group_IT_number 225\n" + p1.replace("'F made'", "?"),
        p1.replace("'F made'", "?\n_cell_modulation_dimension 1"),
        p1.replace("'F made'", "?").replace("_occupancy", "_calc_flag").replace("1\n", "dum\n"),
        p1.replace("'F made'", "?").replace("_occupancy", "_attached_hydrogens"),
        p1.replace("'F made'", "?").replace("_occupancy", "_disorder_group").replace("0.8 1", "0.8 2"),
        text.replace("0.6 0.7 0.8", "0.1 0.2 0.3005"),  # an orbit upon another
        p1.replace("'F made'", "?").replace("0.1 0.2 0.3", "0.12345 0 0").replace("0.6 0.7 0.8", "0.12346 0 0"),
    ):
        assert changed not in (text, p1) and read_quickly(write(tmp_path / "x.cif", changed)) is None


def test_memory_of_a_large_cell_with_symmetry(tmp_path: Path) -> None:
    grid = np.stack(np.meshgrid(*[np.arange(12)] * 3, indexing="ij"), -1).reshape(-1, 3)
    coords = (grid + np.random.default_rng(0).uniform(0.1, 0.4, grid.shape)) / 12
    sites = "\n".join(f"C{i} C {x:.6f} {y:.6f} {z:.6f} 1" for i, (x, y, z) in enumerate(coords))
    head = ROCK_SALT[: ROCK_SALT.index("x,y+1/2")].replace("'Cl Na'", "C") + "-x,-y,-z\n"
    text = head.replace("5.64", "30").replace("units_Z 4", "units_Z ?") + ROCK_SALT[ROCK_SALT.index("loop_\n_atom") :]
    path = write(tmp_path / "x.cif", text.format(sites=sites))
    tracemalloc.start()
    crystal = read_quickly(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert crystal is not None and len(crystal.numbers) == 2 * len(grid)
    assert peak < 20e6  # bytes; all pairs at once took 431 MB


def test_hard_cases(data_dir: Path) -> None:
    large = "large_cell__MIL-101-primitive.cif"  # pymatgen takes a minute
    accepted = [assert_same(path) for path in sorted((data_dir / "hard_cases").glob("*.cif")) if path.name != large]
    assert sum(accepted) > 30
    mil = read_quickly(data_dir / "hard_cases" / large)
    assert mil is not None and len(mil.numbers) == 3604


def test_upstream_sample(data_dir: Path) -> None:
    assert sum([assert_same(path) for path in (data_dir / "upstream" / "cif").glob("*.cif")]) >= 9


def materials_project(data_dir: Path, every: int) -> list:
    pd = pytest.importorskip("pandas")
    rows = pd.read_parquet(data_dir / "mp" / "test.parquet").iloc[::every]
    columns = zip(rows["lattice"], rows["atomic_numbers"], rows["frac_coords"], strict=True)
    return [Structure(np.reshape(a, (3, 3)), z, np.reshape(f, (-1, 3))) for a, z, f in columns]


def check_materials_project(data_dir: Path, tmp_path: Path, every: int) -> None:
    from pymatgen.io.cif import CifWriter

    made = materials_project(data_dir, every)
    for structure in made:
        assert assert_same(write(tmp_path / "p1.cif", str(CifWriter(structure))))
    accepted = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for structure in made:
            accepted += assert_same(write(tmp_path / "symmetry.cif", str(CifWriter(structure, symprec=0.01))))
    assert accepted > 0.95 * len(made)


def test_materials_project(data_dir: Path, tmp_path: Path) -> None:
    check_materials_project(data_dir, tmp_path, every=50)


@pytest.mark.slow
def test_materials_project_whole(data_dir: Path, tmp_path: Path) -> None:
    check_materials_project(data_dir, tmp_path, every=1)
