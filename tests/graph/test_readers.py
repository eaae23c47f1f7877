from __future__ import annotations

import bz2
import csv
import gzip
import json
import math
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from srcgcnn_fast.errors import InputError, one_line
from srcgcnn_fast.graph import pool as pool_module
from srcgcnn_fast.graph import prepare
from srcgcnn_fast.graph import readers as readers_module
from srcgcnn_fast.graph.cif import parse_formula
from srcgcnn_fast.graph.elements import element_features
from srcgcnn_fast.graph.readers import Crystal, Record, as_crystal, read_inputs

Structure = pytest.importorskip("pymatgen.core").Structure
Atoms = pytest.importorskip("ase").Atoms

CELL = np.array([[4.1, 0.0, 0.0], [0.3, 4.7, 0.0], [0.1, -0.2, 5.3]])
COORDS = np.array([[0.0, 0.01, 0.02], [0.5, 0.55, 0.45], [0.25, 0.7, 0.1]])
NUMBERS = np.array([38, 22, 8])

CIF = """data_made
_cell_length_a 4.2
_cell_length_b 4.2
_cell_length_c 4.2
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'P 1'
{items}loop_
_symmetry_equiv_pos_as_xyz
{operations}
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
{sites}
"""
CSCL = "Cs1 Cs 0 0 0 1\nCl1 Cl 0.5 0.5 0.5 1"


def cif(sites: str = CSCL, items: str = "", operations: str = "'x, y, z'") -> str:
    return CIF.format(sites=sites, items=items and items + "\n", operations=operations)


GENERAL = "Cs1 Cs .1 .2 .3 1"
THREEFOLD = "x,y,z\n-y,x-y,z\n-x+y,-x,z"
LABELS = cif("{} 0 0 0 1\nCl1 .5 .5 .5 1").replace("_atom_site_type_symbol\n", "")
UNLOOPED = "".join(f"{tag}\n" for tag in ("_atom_site_label K", *(f"_atom_site_fract_{x} 0.5" for x in "xyz")))
WITHOUT_OPERATIONS = cif().replace("loop_\n_symmetry_equiv_pos_as_xyz\n'x, y, z'\n", "")


UNNAMED = WITHOUT_OPERATIONS.replace("'P 1'", "?")
BY_NAME = WITHOUT_OPERATIONS.replace(CSCL, GENERAL)
MANY = "\n".join(f"X{i} {'N' if i < 99 else 'C'} {i // 20 / 10} {i % 20 / 20} 0 1" for i in range(199))
IN_DOUBT = cif(operations="'x, y, z'\n'-x, -y, -z'")
"""Symmetry without a formula to compare with: gemmi leaves it to pymatgen."""


def structure() -> Structure:
    return Structure(CELL, NUMBERS, COORDS)


def crystals(source: object, **options: object) -> list[Crystal | None]:
    return [record.crystal for record in read_inputs(source, **options)]


def assert_same(found: Crystal | None, tolerance: float = 1e-9) -> None:
    """Equal to the made crystal, whatever the order of the atoms and the orientation of the cell."""
    assert found is not None
    assert found.lattice.dtype == found.frac_coords.dtype == np.float64
    assert found.numbers.dtype == np.int32
    order = np.argsort(-found.numbers)
    np.testing.assert_array_equal(found.numbers[order], NUMBERS)
    np.testing.assert_allclose(found.lattice @ found.lattice.T, CELL @ CELL.T, atol=10 * tolerance)
    np.testing.assert_allclose(found.frac_coords[order], COORDS, atol=tolerance)


def only_error(source: object, **options: object) -> str:
    (record,) = read_inputs(source, **options)
    assert record.crystal is None
    assert record.error
    assert "\n" not in record.error
    return record.error


# ---- formats


def test_objects_and_arrays() -> None:
    atoms = Atoms(numbers=NUMBERS, cell=CELL, scaled_positions=COORDS, pbc=True)
    arrays = (CELL, COORDS, NUMBERS)
    for value in (structure(), atoms, arrays, Crystal(*arrays), structure().as_dict(), (CELL.ravel(), COORDS, NUMBERS)):
        assert_same(as_crystal(value))
        assert_same(crystals(value)[0])
    assert [record.id for record in read_inputs([structure(), atoms])] == ["0", "1"]
    assert [record.id for record in read_inputs({"a": structure(), "b": arrays})] == ["a", "b"]
    assert_same(crystals(iter([atoms]))[0])


def test_oxidation_states_and_deuterium(tmp_path: Path) -> None:
    decorated = Structure(CELL, ["Sr2+", "Ti4+", "O2-"], COORDS)
    assert_same(as_crystal(decorated))
    assert as_crystal(Structure(CELL, ["D", "D+", "O"], COORDS)).numbers.tolist() == [1, 1, 8]
    lattice = 'Lattice="4 0 0 0 4 0 0 0 4"'
    text = f"2\n{lattice} D=1\nD 0 0 0\nO 1 1 1\n1\n{lattice} Properties=pos:R:3:species:S:1\n0 0 0 D\n"
    (tmp_path / "x.xyz").write_text(text)
    first, second = read_inputs(tmp_path / "x.xyz")
    assert (first.crystal.numbers.tolist(), first.targets, second.crystal.numbers.tolist()) == ([1, 8], {"D": 1.0}, [1])


@pytest.mark.parametrize("name", ["made.cif", "made.cif.gz", "POSCAR", "CONTCAR_1", "made.vasp", "made.json"])
def test_single_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    made = structure()
    formats = {"cif": "cif", "gz": "cif", "json": "json"}
    text = made.to(fmt=formats.get(name.rsplit(".", 1)[-1], "poscar"))
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    (record,) = read_inputs(path)
    assert record.error is None
    assert record.id == {"POSCAR": "POSCAR", "CONTCAR_1": "CONTCAR_1"}.get(name, "made")
    assert_same(record.crystal, 1e-7)
    assert_same(as_crystal(str(path)), 1e-7)


def test_ase_database(tmp_path: Path) -> None:
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.db import connect

    atoms = Atoms(numbers=NUMBERS, cell=CELL, scaled_positions=COORDS, pbc=True)
    atoms.calc = SinglePointCalculator(atoms, energy=-3.0)
    with connect(tmp_path / "made.db") as database:
        database.write(atoms, gap=1.5, material_id="mp-1", note="text")
        database.write(Atoms("H", pbc=True))
        database.write(atoms)
    first, second, third = read_inputs(tmp_path / "made.db")
    assert_same(first.crystal)
    assert (first.id, first.targets) == ("mp-1", {"gap": 1.5, "energy": -3.0})
    assert second.error is not None and "made-2 (made.db) has no cell" in second.error
    assert third.id == "made-3" and third.targets == {"energy": -3.0}
    (tmp_path / "bad.db").write_text("words " * 100)
    assert "bad.db is not an ASE database" in only_error(tmp_path / "bad.db")
    with connect(tmp_path / "none.db"):
        pass
    assert "none.db is not an ASE database" in only_error(tmp_path / "none.db")
    with connect(tmp_path / "none.db") as rows:
        del rows[rows.write(Atoms("H"))]
    assert "none.db has no rows" in only_error(tmp_path / "none.db")


@pytest.mark.parametrize("n", [0, 3, 4, 7])
def test_rows_of_an_ase_database_are_read_some_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    from ase.db import connect, core

    with connect(tmp_path / "t.db") as database:
        for k in range(8):
            database.write(Atoms("Cu", cell=CELL, pbc=True), gap=float(k))
        database.delete([2, *range(n + 1 + (n > 0), 9)])
    limits, select = [], core.Database.select
    monkeypatch.setattr(readers_module, "_ROWS", 2)
    monkeypatch.setattr(
        core.Database,
        "select",
        lambda *given, **options: limits.append(options.get("limit")) or select(*given, **options),
    )
    records = list(read_inputs(tmp_path / "t.db"))
    numbers = [k for k in range(1, n + 2) if k != 2]
    assert limits == [2] * (n // 2 + 1)
    if n:
        assert [(r.id, r.targets) for r in records] == [(f"t-{k}", {"gap": k - 1.0}) for k in numbers]
    else:
        assert records[0].id == "t" and "has no rows" in records[0].error


@pytest.mark.parametrize("form", ["%s", ' {\n"entries" : %s }\n'])
def test_entries_of_a_json_list_are_read_one_at_a_time(tmp_path: Path, form: str) -> None:
    structure = Structure(CELL, [38, 22, 8] * 9, np.random.default_rng(0).random((27, 3))).as_dict()
    text = form % json.dumps([{"structure": structure, "gap": float(k)} for k in range(200)])
    (tmp_path / "t.json").write_text(text)
    tracemalloc.start()
    try:
        assert [r.targets for r in read_inputs(tmp_path / "t.json")] == [{"gap": float(k)} for k in range(200)]
        assert tracemalloc.get_traced_memory()[1] < 3 * len(text)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    ["[", "[1,", "[1 2]", "[1,]", "[,]", "[] 1", "[1]]", '[{"a": 1}', "[1", "]", "[" * 10**5]
    + [f'{{"entries": {x}' for x in ("[1", "[1]", "[1]] }", "[]}}", "[],}")],
)
def test_a_list_that_is_not_json_is_one_row(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises((ValueError, RecursionError)) as caught:
        json.loads(text)
    assert f"t.json is not a JSON file ({one_line(caught.value)[:60]}" in only_error(tmp_path / "t.json")


@pytest.mark.parametrize("text", ["[]", " [\n] ", "null", "3", '{"entries": []}', '{"a": 1, "entries": []}'])
def test_a_json_file_without_structures(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.json").write_text(text)
    assert "t.json holds no structures" in only_error(tmp_path / "t.json")


def test_matbench_table(tmp_path: Path) -> None:
    rows = [
        [structure().as_dict(), 0.5],
        [Structure(CELL, ["Sr2+", "D", "O2-"], COORDS).as_dict(), 1.5],
        ["Fe2O3", 2.0],
    ]
    table = {"index": ["mb-1", "mb-2", "mb-3"], "columns": ["structure", "e_form"], "data": rows}
    (tmp_path / "matbench.json.gz").write_bytes(gzip.compress(json.dumps(table).encode()))
    first, second, third = read_inputs(tmp_path / "matbench.json.gz")
    assert_same(first.crystal)
    assert (first.id, first.targets) == ("mb-1", {"e_form": 0.5})
    assert second.crystal is not None and second.crystal.numbers.tolist() == [38, 1, 8]
    assert third.error is not None and "mb-3" in third.error
    table = {"columns": ["structure"], "data": rows[:1], "index": [7]}
    (tmp_path / "m.json").write_text(json.dumps(table))
    assert [record.id for record in read_inputs(tmp_path / "m.json")] == ["m-7"]


def test_extended_xyz(tmp_path: Path) -> None:
    from ase.io import write

    atoms = Atoms(numbers=NUMBERS, cell=CELL, scaled_positions=COORDS, pbc=True, info={"gap": 1.5, "note": "x"})
    write(tmp_path / "one.extxyz", atoms)
    second = atoms.copy()
    second.info = {"material_id": "named", "gap": 2.5}
    write(tmp_path / "two.xyz", [atoms, second], format="extxyz")
    (one,) = read_inputs(tmp_path / "one.extxyz")
    assert (one.id, one.targets) == ("one", {"gap": 1.5})
    assert_same(one.crystal, 1e-7)
    two = list(read_inputs(tmp_path / "two.xyz", targets=["gap"]))
    assert [(r.id, r.targets) for r in two] == [("two-0", {"gap": 1.5}), ("named", {"gap": 2.5})]
    with pytest.raises(InputError, match=r"two\.xyz holds 2 structures"):
        as_crystal(tmp_path / "two.xyz")
    assert "two-0 has no target energy; it has gap" in next(read_inputs(tmp_path / "two.xyz", targets=["energy"])).error


def test_extended_xyz_of_frames_that_ase_would_leave_out(tmp_path: Path) -> None:
    frame = '1\nLattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3\nNa 0 0 0\n'
    (tmp_path / "x@1.extxyz").write_text(frame * 3 + "\n")
    assert [record.error for record in read_inputs(tmp_path / "x@1.extxyz")] == [None] * 3
    (tmp_path / "y.extxyz").write_text(frame + "\n" + frame)
    first, second = read_inputs(tmp_path / "y.extxyz")
    assert first.error is None and "y.extxyz has a blank line after frame 1" in second.error


def test_ids_of_extended_xyz_stay_as_they_are_written(tmp_path: Path) -> None:
    frame = '1\nLattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3 note="a \\" id=3" {}\nNa 0 0 0\n'
    ids = ["001", "1_2", "12", "7e3", "T", "mp-5", '"0 1"', "'02'", '"a\\"b"']
    unnamed = ["material_id", 'material_id=""', "y=1"]
    text = "".join(frame.format(x) for x in [*(f"y=1 material_id={x}" for x in ids), *unnamed, "id = 08"])
    (tmp_path / "x.extxyz").write_text(text)
    found = [record.id for record in read_inputs(tmp_path / "x.extxyz")]
    assert found == ["001", "1_2", "12", "7e3", "T", "mp-5", "0 1", "02", 'a"b', "x-9", "x-10", "x-11", "08"]


def test_extended_xyz_with_a_broken_frame(tmp_path: Path) -> None:
    from ase.io import write

    atoms = Atoms(numbers=NUMBERS, cell=CELL, scaled_positions=COORDS, pbc=True)
    write(tmp_path / "x.extxyz", [atoms, atoms])
    text = (tmp_path / "x.extxyz").read_text()
    (tmp_path / "x.extxyz").write_text(text.replace("Ti", "Xx", 1) + text + "three\nLattice=\n" + text)
    records = list(read_inputs(tmp_path / "x.extxyz"))
    assert [(r.id, r.error is None) for r in records] == [(f"x-{k}", k in (1, 2, 3)) for k in range(5)]
    assert "Frame 1 of x.extxyz cannot be read (KeyError: 'Xx')" in records[0].error
    assert "x.extxyz cannot be read from frame 5 on (its first line 'three' is no number" in records[4].error


@pytest.mark.parametrize("count", ["20231105123456", "9" * 40, "4", "-1", "1.0"])
def test_extended_xyz_with_a_wrong_number_of_atoms(tmp_path: Path, count: str) -> None:
    """ASE would read as many lines."""
    frame = '1\nLattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3\nNa 0 0 0\n'
    (tmp_path / "x.xyz").write_text(frame + count + frame[1:])
    good, bad = read_inputs(tmp_path / "x.xyz")
    assert good.error is None and "x.xyz cannot be read from frame 2 on (" in bad.error


@pytest.mark.parametrize(("suffix", "packed"), [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress)])
def test_json_collections(tmp_path: Path, suffix: str, packed: Callable[[bytes], bytes]) -> None:
    made = structure().as_dict()
    computed = {"@class": "ComputedStructureEntry", "structure": made, "energy": -8.0, "entry_id": None}
    alexandria = computed | {"data": {"mat_id": "agm001", "e_form": -2.5, "energy": 0.0, "spg": "P1"}}
    forms = {
        "list": ([made, made], ["list-0", "list-1"], {}),
        "dict": ({"a": made, "b": made}, ["a", "b"], {}),
        "rows": ([{"id": "q", "structure": made, "gap": 1, "flag": True}], ["q"], {"gap": 1.0}),
        "entry": ({"material_id": "mp-1", "structure": made, "gap": 1.5, "x": None}, ["mp-1"], {"gap": 1.5}),
        "unnamed": ({"structure": made, "energy": -1.0, "data": {}}, ["unnamed"], {"energy": -1.0}),
        "ids": ({"structure": made, "other": made}, ["structure", "other"], {}),
        "computed": (computed | {"entry_id": "mp-3-GGA", "data": None}, ["mp-3-GGA"], {"energy": -8.0}),
        "alexandria": ({"entries": [alexandria]}, ["agm001"], {"energy": -8.0, "e_form": -2.5}),
        "entries": ({"entries": [made], "more": 1}, ["entries-0"], {}),
        "text": ([{"material_id": "mp-1", "structure": json.dumps(made), "gap": 2.5}], ["mp-1"], {"gap": 2.5}),
    }
    for name, (content, ids, targets) in forms.items():
        text = json.dumps(content).encode()
        path = tmp_path / f"{name}.json{suffix}"
        path.write_bytes(packed(text))
        records = list(read_inputs(path))
        assert [r.id for r in records] == ids
        for record in records:
            assert record.targets == targets
            assert_same(record.crystal)


def parquet(path: Path, **columns: list[object]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    base: dict[str, list[object]] = {
        "material_id": ["mp-1", "mp-2"],
        "lattice": [CELL.ravel().tolist()] * 2,
        "frac_coords": [COORDS.ravel().tolist()] * 2,
        "atomic_numbers": [NUMBERS.tolist()] * 2,
    }
    pq.write_table(pa.table({**base, **columns}), path)
    return path


def test_parquet(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", gap=[1.0, None], energy=[3, 4], formula=["a", "b"], flag=[True, False])
    records = list(read_inputs(path))
    assert [r.id for r in records] == ["mp-1", "mp-2"]
    assert records[0].targets == {"gap": 1.0, "energy": 3.0}
    assert math.isnan(records[1].targets["gap"])
    assert_same(records[1].crystal)
    for targets in (["energy"], "energy"):
        assert [r.targets for r in read_inputs(path, targets=targets)] == [{"energy": 3.0}, {"energy": 4.0}]
    assert [r.targets for r in read_inputs(path, targets=())] == [{}, {}]
    with pytest.raises(InputError, match=r"t\.parquet has no target mass; it has gap, energy"):
        read_inputs(path, targets=["mass"])


def test_a_parquet_file_in_a_folder_is_read_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, original = [], readers_module._parquet_record
    monkeypatch.setattr(readers_module, "_parquet_record", lambda *given: rows.append(given) or original(*given))
    pd.concat([pd.read_parquet(parquet(tmp_path / "t.parquet"))] * 5).to_parquet(tmp_path / "t.parquet")
    for skip in (0, 4):
        rows.clear()
        assert next(read_inputs(tmp_path, skip=skip)).id == "mp-1"
        assert len(rows) <= skip + 2
    assert len(list(read_inputs(tmp_path, skip=4))) == 6


def test_a_row_group_is_read_in_parts(tmp_path: Path) -> None:
    pa, parquet = (pytest.importorskip(name, reason="pyarrow is missing") for name in ("pyarrow", "pyarrow.parquet"))
    coords = np.random.default_rng(0).random((30_000, 81))  # which no compression makes smaller
    row = {"lattice": [CELL.ravel()], "atomic_numbers": [np.repeat(NUMBERS, 9)]}
    table = pa.table({**{name: value * len(coords) for name, value in row.items()}, "frac_coords": list(coords)})
    parquet.write_table(table, tmp_path / "t.parquet")
    assert parquet.read_metadata(tmp_path / "t.parquet").num_row_groups == 1
    del table
    before = pa.total_allocated_bytes()
    records = read_inputs(tmp_path / "t.parquet")
    assert next(records).error is None
    assert pa.total_allocated_bytes() - before < 0.5 * coords.nbytes


def test_any_bytes_are_an_id_of_a_parquet_file(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is missing")
    ends = pa.py_buffer(np.array([0, 4, 8], np.int32).tobytes())
    ids = pa.StringArray.from_buffers(2, ends, pa.py_buffer(b"mp-1caf\xe9"))
    for column in (ids, ids.cast("large_string"), ids.dictionary_encode(), ids.cast("binary")):
        records = list(read_inputs(parquet(tmp_path / "t.parquet", material_id=column)))
        assert [(r.id, r.error) for r in records] == [("mp-1", None), (r"caf\xe9", None)]


@pytest.mark.parametrize("given", [["id"], ["id", "material_id"], []])
def test_the_id_of_a_row_or_an_entry(tmp_path: Path, given: list[str]) -> None:
    """material_id, else id, else after the file; in every kind of file."""
    names = {"material_id": ["mp-1", "mp-2"], "id": [7, 8]}
    named = {name: names[name] for name in given}
    path = parquet(tmp_path / "t.parquet")
    pd.read_parquet(path).drop(columns="material_id").assign(**named).to_parquet(path)
    made = structure().as_dict()
    entries = [{"structure": made} | {name: ids[k] for name, ids in named.items()} for k in range(2)]
    (tmp_path / "t.json").write_text(json.dumps(entries))
    expected = [str(x) for x in names[given[-1]]] if given else ["t-0", "t-1"]
    if len(given) == 2:  # a row without the first has the second
        table = pd.read_parquet(path)
        table.loc[1, "material_id"] = entries[1]["material_id"] = None
        table.to_parquet(path)
        (tmp_path / "t.json").write_text(json.dumps(entries))
        expected[1] = "8"
    for file in ("t.parquet", "t.json"):
        records = list(read_inputs(tmp_path / file))
        assert [(r.id, r.error, r.targets) for r in records] == [(name, None, {}) for name in expected]


def test_a_database_that_is_not_of_ase_stays_as_it_is(tmp_path: Path) -> None:
    import sqlite3

    pytest.importorskip("ase", reason="ASE is not installed")
    (tmp_path / "x.cif").write_text(cif())
    (tmp_path / "empty.db").write_bytes(b"")
    with sqlite3.connect(tmp_path / "a study #1.db") as other:
        other.execute("CREATE TABLE studies (x)")
    other.close()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    study, empty, good = read_inputs(tmp_path)
    assert good.error is None and {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    for record in (study, empty):
        assert "is not an ASE database (it has no table of systems); write it again" in record.error


@pytest.mark.parametrize(
    ("change", "errors"),
    [
        ("UPDATE information SET value = '3' WHERE name = 'version'", ["is not an ASE database"]),
        ("UPDATE systems SET constraints = '[{\"name\": \"NoSuch\", \"kwargs\": {}}]' WHERE id = 2",
         [None, "cannot be read (", None]),
        ("UPDATE systems SET key_value_pairs = '{' WHERE id = 2", [None, "cannot be read from row 2 on ("]),
        ("UPDATE systems SET positions = x'00' WHERE id = 2", [None, "cannot be read"]),
    ],
)  # fmt: skip
def test_what_is_wrong_in_an_ase_database_stops_nothing_else(tmp_path: Path, change: str, errors: list) -> None:
    import sqlite3

    build = pytest.importorskip("ase.build", reason="ASE is not installed")
    from ase.db import connect

    (tmp_path / "x.cif").write_text(cif())
    with connect(tmp_path / "a.db") as rows:
        for _ in range(3):
            rows.write(build.bulk("Cu"), gap=1.0)
    with sqlite3.connect(tmp_path / "a.db") as database:
        database.execute(change)
    database.close()
    *found, good = read_inputs(tmp_path)
    assert good.error is None
    for record, says in zip(found, errors, strict=False):
        assert (record.error is None) if says is None else (says in record.error)
    assert len(found) >= len(errors)


@pytest.mark.parametrize("flags", ["F F F", "T T T", "T F T", ".TRUE. .FALSE. .true."])
def test_flags_of_a_poscar_without_elements_are_no_elements(tmp_path: Path, flags: str) -> None:
    atoms = "".join(f"{x} {x} {x} {flags}\n" for x in (0, 0.3, 0.6))
    (tmp_path / "POSCAR").write_text(f"c\n1.0\n4 0 0\n0 5 0\n0 0 6\n1 2\nDirect\n{atoms}")
    (record,) = read_inputs(tmp_path / "POSCAR")
    assert "POSCAR does not name its elements; add the line" in record.error


def test_extended_xyz_in_utf_16_and_columns_of_one_name(tmp_path: Path) -> None:
    from ase.io import write

    atoms = Atoms(numbers=NUMBERS, cell=CELL, scaled_positions=COORDS, pbc=True)
    write(tmp_path / "a.xyz", [atoms, atoms], format="extxyz")
    (tmp_path / "a.xyz").write_text((tmp_path / "a.xyz").read_text(), encoding="utf-16")
    assert [record.error for record in read_inputs(tmp_path / "a.xyz")] == [None, None]
    pa, parquet = (pytest.importorskip(name, reason="pyarrow is missing") for name in ("pyarrow", "pyarrow.parquet"))
    row = [[CELL.ravel()], [COORDS.ravel()], [NUMBERS], [1.0], [2.0]]
    names = ["lattice", "frac_coords", "atomic_numbers", "gap", "gap"]
    parquet.write_table(pa.table([pa.array(x) for x in row], names=names), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"t\.parquet has several columns 'gap'; give each its own name"):
        read_inputs(tmp_path / "t.parquet")


def test_the_row_numbers_of_pandas_are_no_target(tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas", reason="pandas is missing")
    row = {"lattice": CELL.ravel().tolist(), "frac_coords": COORDS.ravel().tolist(), "atomic_numbers": NUMBERS}
    row["gap"] = 1.0
    pd.DataFrame([row, row], index=[4, 2]).to_parquet(tmp_path / "t.parquet")
    assert [record.targets for record in read_inputs(tmp_path / "t.parquet")] == [{"gap": 1.0}] * 2


def test_records_of_the_caller_stay_as_they_are() -> None:
    given = [Record("a", Crystal(CELL, COORDS, NUMBERS), {"gap": 1.0, "energy": 2.0})]
    for name in ("gap", "energy", "gap"):
        (record,) = read_inputs(given, targets=[name])
        assert list(record.targets) == [name] and record.error is None
    assert given[0].targets == {"gap": 1.0, "energy": 2.0}


def test_tables_of_pandas_and_numbers_beyond_all_floats() -> None:
    pd = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pd.DataFrame({"lattice": [CELL.ravel()], "frac_coords": [COORDS.ravel()], "atomic_numbers": [NUMBERS]})
    with pytest.raises(InputError, match=r'A DataFrame is not read.* frame\.to_dict\("records"\) where there is'):
        read_inputs(frame)
    rows = pd.DataFrame({"id": ["a", "b"], "structure": [structure()] * 2, "gap": [0.5, 2.0]}).to_dict("records")
    assert [(x.id, x.targets, x.error) for x in read_inputs(rows)] == [
        ("a", {"gap": 0.5}, None),
        ("b", {"gap": 2.0}, None),
    ]
    with pytest.raises(InputError, match="The Series object is not a crystal"):
        as_crystal(frame.iloc[0])
    entry = {"structure": structure().as_dict(), "huge": 10**400, "gap": 1}
    assert [record.targets for record in read_inputs([entry])] == [{"gap": 1.0}]


def test_long_integers_of_a_parquet_file_are_the_nearest_numbers(tmp_path: Path) -> None:
    stamp = 1700000000000000001  # in nanoseconds
    records = list(read_inputs(parquet(tmp_path / "t.parquet", gap=[1.0, 2.0], stamp=[stamp, 2])))
    assert [r.targets["stamp"] for r in records] == [float(stamp), 2.0]


def test_a_quotation_mark_alone_is_found(tmp_path: Path) -> None:
    for rows in (3, 30_000):  # more than the csv module takes for one cell
        (tmp_path / "id_prop.csv").write_text('id,gap\na,1\nb,"2\n' + "c,3\n" * rows)
        with pytest.raises(InputError, match=r"quotation mark .* in line 3 or the next; take it out") as caught:
            read_inputs(tmp_path)
        assert len(str(caught.value)) < 300


def test_parquet_rows_with_errors(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "t.parquet",
        lattice=[None, CELL.ravel().tolist()],
        frac_coords=[COORDS.ravel().tolist(), [0.0] * 8],
    )
    first, second = read_inputs(path)
    assert "mp-1 (row 1 of t.parquet) has no lattice" in first.error
    assert "mp-2 (row 2 of t.parquet) has frac_coords" in second.error
    bad = parquet(tmp_path / "u.parquet", gap=[math.inf, 1.0], atomic_numbers=[NUMBERS.tolist(), [1, 2, 101]])
    first, second = read_inputs(bad)
    assert "mp-1 (row 1 of u.parquet) has the gap inf" in first.error
    assert "unknown atomic number 101" in second.error
    (tmp_path / "v.parquet").write_text("no table")
    with pytest.raises(InputError, match=r"v\.parquet is not a Parquet file"):
        read_inputs(tmp_path / "v.parquet")


# ---- folders


def test_a_column_of_text_is_no_target(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    row = {"lattice": [CELL.ravel()], "frac_coords": [COORDS.ravel()], "atomic_numbers": [NUMBERS], "gap": ["wide"]}
    pandas.DataFrame(row).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"t\.parquet has the column gap of type \w+, .* give numbers"):
        read_inputs(tmp_path / "t.parquet", targets=["gap"])
    (record,) = read_inputs(tmp_path / "t.parquet")
    assert record.targets == {} and record.error is None


def test_true_and_false_are_a_target_by_name(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    row = {"lattice": [CELL.ravel()], "frac_coords": [COORDS.ravel()], "atomic_numbers": [NUMBERS]}
    row = {name: value * 2 for name, value in row.items()} | {"is_metal": [True, False]}
    pandas.DataFrame(row).to_parquet(tmp_path / "t.parquet")
    table = {"columns": ["structure", "is_metal"], "data": [[structure().as_dict(), x] for x in (True, False)]}
    (tmp_path / "m.json").write_text(json.dumps(table))
    for name in ("t.parquet", "m.json"):
        found = [record.targets for record in read_inputs(tmp_path / name, targets=["is_metal"])]
        assert found == [{"is_metal": 1.0}, {"is_metal": 0.0}]
        assert all(isinstance(x, float) for targets in found for x in targets.values())
        assert [record.targets for record in read_inputs([tmp_path / name], targets=["is_metal"])] == found
        assert [record.targets for record in read_inputs(tmp_path / name)] == [{}, {}]


def test_targets_of_a_parquet_file_are_the_same_in_a_folder_or_a_list(tmp_path: Path) -> None:
    """What is true, false or blank, and infinite numbers elsewhere; of a file without the target as of a shard."""
    folder = tmp_path / "in"
    folder.mkdir()
    columns = {"gap": [1.0, 2.0], "flag": [True, None], "mass": [math.inf, 1.0]}
    path = parquet(folder / "t.parquet", **columns)
    for wanted in (["flag"], ["gap"], ["gap", "flag"], None, ()):
        alone = [(r.id, repr(r.targets), r.error) for r in read_inputs(path, targets=wanted)]
        assert alone[0][2] is None or wanted is None
        for source in (folder, [path]):
            assert [(r.id, repr(r.targets), r.error) for r in read_inputs(source, targets=wanted)] == alone
    parquet(folder / "u.parquet", gap=[3.0, 4.0])
    assert [r.error for r in read_inputs(folder, targets=["gap", "flag"])] == [None] * 4
    *_, last = records = list(read_inputs(folder, targets=["flag"]))
    assert (len(records), last.id, last.error) == (3, "u", "u.parquet has no target flag; it has gap.")


def test_damaged_files_are_rows(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.cif").write_text(cif())
    zipped = bytearray(gzip.compress(cif().encode()))
    zipped[30] ^= 0xFF
    for name in ("b.cif.gz", "c.json.gz", "POSCAR.gz"):
        (tmp_path / name).write_bytes(zipped)
    row = {"lattice": [CELL.ravel()], "frac_coords": [COORDS.ravel()], "atomic_numbers": [NUMBERS]}
    table = pa.table({**{name: value * 2500 for name, value in row.items()}, "gap": np.arange(2500.0)})
    parquet.write_table(table, tmp_path / "d.parquet", row_group_size=1024, compression="gzip", use_dictionary=False)
    data = bytearray((tmp_path / "d.parquet").read_bytes())
    column = parquet.read_metadata(tmp_path / "d.parquet").row_group(1).column(0)
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle : middle + 16] = bytes(16)
    (tmp_path / "d.parquet").write_bytes(data)
    records = list(read_inputs(tmp_path))
    assert {r.id for r in records if r.error is None and r.id[:2] != "d-"} == {"a"}
    lost = range(1024, 2048)
    assert [r.id for r in records if r.error] == ["POSCAR", "b", "c", *(f"d-{k}" for k in lost)]
    assert all(f"Row {k + 1} of d.parquet cannot be read (" in records[k - 2500].error for k in lost)
    assert all("-3 while decompressing" in r.error for r in records if r.error and r.id[:2] != "d-")
    assert [r.id for r in records if r.crystal is not None] == ["a", *(f"d-{k}" for k in range(2500) if k not in lost)]
    for skip in (0, 500, 1024, 1500, 2048, 2100, 2500):
        rest = list(read_inputs(tmp_path / "d.parquet", skip=skip))
        assert [(r.id, r.error is None) for r in rest] == [(f"d-{k}", k not in lost) for k in range(skip, 2500)]
        assert all(r.targets == {"gap": float(r.id[2:])} for r in rest if r.error is None)


def test_nested_lists_in_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    row = {"lattice": [CELL.tolist()], "frac_coords": [COORDS.tolist()], "atomic_numbers": [NUMBERS.tolist()]}
    parquet.write_table(pa.table(row), tmp_path / "t.parquet")
    assert_same(*crystals(tmp_path / "t.parquet"))


def test_a_folder_among_paths_and_an_empty_id(tmp_path: Path) -> None:
    (first,) = read_inputs([tmp_path])
    assert first.error == f"{tmp_path} is no file; give the path of a structure file."
    (tmp_path / "a.json").write_text(json.dumps([{"structure": structure().as_dict(), "id": None}] * 2))
    assert [record.id for record in read_inputs(tmp_path / "a.json")] == ["a-0", "a-1"]


def test_folder_as_upstream_writes_it(tmp_path: Path) -> None:
    (tmp_path / "a.cif").write_text(cif())
    (tmp_path / "c.cif").write_text(cif())
    (tmp_path / "atom_init.json").write_text("{}")
    (tmp_path / "id_prop.csv").write_text("c,1.5\na,1e-3\n\nmissing,2\n")
    c, a, missing = read_inputs(tmp_path)
    assert (c.id, c.targets, len(c.crystal.numbers)) == ("c", {"target": 1.5}, 2)
    assert (a.id, a.targets) == ("a", {"target": 1e-3})
    assert "missing (row 4 of id_prop.csv) has no structure file" in missing.error
    with pytest.raises(InputError, match=r"id_prop\.csv has no target gap; it has target"):
        read_inputs(tmp_path, targets=["gap"])


def test_atom_init_is_no_structure(tmp_path: Path, caplog) -> None:
    (tmp_path / "a.cif").write_text(cif())
    built_in = {str(n): element_features()[n].astype(int).tolist() for n in range(1, 101)}
    other = {**built_in, "8": [0] * 92}
    path = tmp_path / "atom_init.json"
    for labelled in (False, True):
        if labelled:
            (tmp_path / "id_prop.csv").write_text("a,1\natom_init,2\n")
        for text, warns in (
            (json.dumps(built_in), 0), (json.dumps(other), 1), ('{"8": [1, 2]}', 1), ("[" * 100_000, 1), ("[]", 1),
            ('{"8": null}', 1), ("\0", 1),
        ):  # fmt: skip
            path.write_text(text)
            caplog.clear()
            records = list(read_inputs(tmp_path))
            assert [r.id for r in records if r.error is None] == ["a"]
            assert len(records) == 1 + labelled
            assert len(caplog.records) == warns
            for record in caplog.records:
                assert record.levelname == "WARNING" and str(path) in record.message
                assert "not read" in record.message and "element_table" in record.message


def test_a_store_is_no_folder_of_structures(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.cif").write_text(cif())
    prepare(tmp_path / "in", tmp_path / "store")
    with pytest.raises(InputError, match="is a store of prepared graphs"):
        read_inputs(tmp_path / "store")


def test_folder_with_named_targets(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.cif").write_text(cif())
    (tmp_path / "id_prop.csv").write_text("\ufeffid,gap,energy\na,1,\nb,much,3\n", encoding="utf-8")
    a, b = read_inputs(tmp_path)
    assert a.targets["gap"] == 1.0
    assert math.isnan(a.targets["energy"])
    assert "b (row 3 of id_prop.csv) has the gap 'much'" in b.error
    assert [r.error for r in read_inputs(tmp_path, targets=["energy"])] == [None, None]
    assert [r.error for r in read_inputs(tmp_path, targets=())] == [None, None]


def test_any_file_name_is_an_id(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.cif")).write_text(cif())
    except OSError:
        pytest.skip("names of files are UTF-8 here")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe8.cif")).write_text("")
    (tmp_path / "ü.cif").write_text(cif())
    (tmp_path / "half.json").write_text(json.dumps({"\ud800": structure().as_dict(), "b": structure().as_dict()}))
    records = list(read_inputs(tmp_path))
    assert [r.id for r in records] == [r"caf\xe9", r"\ud800", "b", "ü", r"\xe8"]
    assert [r.error for r in records] == [None] * 4 + [
        r"\xe8.cif is empty; give a CIF file with a cell and atom sites."
    ]
    store = prepare(tmp_path, tmp_path / "store")
    assert list(store.ids) == [r"caf\xe9", r"\ud800", "b", "ü"]


def test_json_of_ase_is_named(tmp_path: Path) -> None:
    pytest.importorskip("ase.io").write(tmp_path / "ase.json", pytest.importorskip("ase.build").bulk("Cu"))
    assert only_error(tmp_path / "ase.json") == "ase.json is an ASE database in JSON; write it as *.extxyz or *.db."


@pytest.mark.parametrize("orient", ["columns", "index", "records", "split"])
@pytest.mark.parametrize("column", ["structure", "initial_structure", "computed_structure_entry"])
def test_tables_that_pandas_writes(tmp_path: Path, orient: str, column: str) -> None:
    made = structure().as_dict()
    held = {"structure": made, "energy": -8.0, "entry_id": "e", "data": {}} if column.endswith("entry") else made
    targets = {"e_form": 0.5} | ({"energy": -8.0} if column.endswith("entry") else {})
    frame = pd.DataFrame({"material_id": ["wbm-1", "wbm-2"], column: [held, None], "e_form": [0.5, 1.5]})
    frame.to_json(tmp_path / "wbm.json.bz2", orient=orient)
    good, bad = read_inputs(tmp_path / "wbm.json.bz2")
    assert (good.id, good.targets) == ("wbm-1", targets)
    assert_same(good.crystal)
    assert bad.id == "wbm-2" and bad.error.startswith("wbm-2 is not a crystal;")
    unnamed = frame.drop(columns="material_id")
    unnamed.to_json(tmp_path / "t.json", orient=orient)
    unnamed.set_index(pd.Index(["a", "b"])).to_json(tmp_path / "u.json", orient=orient)
    ids = {"index": ["0", "1", "a", "b"], "records": ["t-0", "t-1", "u-0", "u-1"]}.get(orient, ["t-0", "t-1", "a", "b"])
    if column.endswith("entry"):
        ids = ["e" if k % 2 == 0 else id for k, id in enumerate(ids)]
    assert [r.id for name in "tu" for r in read_inputs(tmp_path / f"{name}.json")] == ids


def test_structures_by_names_of_columns(tmp_path: Path) -> None:
    held = structure().as_dict()
    (tmp_path / "texts.json").write_text(json.dumps({"structure": {"0": json.dumps(held)}, "gap": {"0": 1}}))
    (tmp_path / "names.json").write_text(json.dumps({"structure": {"structure": held}, "b": {"structure": held}}))
    (tmp_path / "two.json").write_text(json.dumps({"initial_structure": held, "structure": held}))
    said = [(r.id, r.targets, r.error) for r in read_inputs(tmp_path)]
    named = [("structure", {}, None), ("b", {}, None)]
    assert said == [*named, ("texts-0", {"gap": 1.0}, None), ("initial_structure", {}, None), ("structure", {}, None)]


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("mpid,gap\na,1\n", "a row of names begins with id, not with 'mpid'"),
        (",id,gap\n0,a,1\n", r"its first column has no name; leave that out \(index=False in pandas\)"),
        ("id;gap\na;1\n", "it has no comma, which separates id and target"),
        ("a,1\n", "it has target"),
        ("id,e\n", "it has e"),
    ],
)
def test_a_target_whose_name_is_not_read_as_one(tmp_path: Path, text: str, hint: str) -> None:
    (tmp_path / "a.cif").write_text(cif())
    (tmp_path / "id_prop.csv").write_text(text)
    with pytest.raises(InputError, match=f"has no target gap; {hint}"):
        list(read_inputs(tmp_path, targets=["gap"]))


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ("a;1\nb;2\n", ["(row 1 of id_prop.csv) has no comma", "b;2 (row 2 of id_prop.csv) has no comma"]),
        ("a\t1\nb,2\n", ["has no comma; separate id and target by one", None]),
        ("id,gap\na,1,5\nb,2,\n", ["a (row 2 of id_prop.csv) has 3 cells where there are 2 columns", None]),
        ("a,-1,25\nb,-2,5\n", ["a (row 1 of id_prop.csv) has 3 cells where there are 2 columns", "b (row 2 of"]),
        ("a,1,5\nb,2\n", ["has 3 cells where there are 2 columns", None]),
        ("a,1,\nb,2,,\n", [None, None]),
        ("a,1_000\nb,1e3\n", ["a (row 1 of id_prop.csv) has the target '1_000'", None]),
        ("a;1,5\nb,2\n", ["has the comma within a number; separate id and target by one, and write numbers", None]),
        ("mpid,gap\na,1\n", ["if it holds names: a row of names begins with id, not with 'mpid'", None]),
        (",id,gap\n0,a,1\n", ["its first column has no name; leave that out (index=False in pandas)", "0 (row 2 of"]),
    ],
)
def test_a_table_that_means_something_else(tmp_path: Path, text: str, errors: list[str | None]) -> None:
    for name in "ab":
        (tmp_path / f"{name}.cif").write_text(cif())
    (tmp_path / "id_prop.csv").write_text(text)
    for record, said in zip(read_inputs(tmp_path), errors, strict=True):
        assert (record.error is None) if said is None else (said in record.error)
        assert len(record.targets) == 1 or said is not None
    (tmp_path / "id_prop.csv").write_text("id,gap,gap\na,1,2\n")
    with pytest.raises(InputError, match=r"has 2 columns 'gap'; give each target its own name"):
        read_inputs(tmp_path)


def test_windows_writes_utf_16(tmp_path: Path) -> None:
    (tmp_path / "a.cif").write_text(cif(), encoding="utf-16")
    (tmp_path / "id_prop.csv").write_text("a,1.5\n", encoding="utf-16")
    (record,) = read_inputs(tmp_path)
    assert (record.id, record.targets, len(record.crystal.numbers)) == ("a", {"target": 1.5}, 2)


def test_folder_without_table(tmp_path: Path) -> None:
    (tmp_path / "b.cif").write_text(cif())
    (tmp_path / "a.vasp").write_text(structure().to(fmt="poscar"))
    (tmp_path / "c.json").write_text(json.dumps([structure().as_dict()] * 2))
    (tmp_path / "notes.txt").write_text("")
    assert [(r.id, r.error) for r in read_inputs(tmp_path)] == [("a", None), ("b", None), ("c-0", None), ("c-1", None)]
    (tmp_path / "c.json").unlink()
    with pytest.raises(InputError, match=r"has no id_prop\.csv and so no target gap"):
        read_inputs(tmp_path, targets=["gap"])


def test_missing_and_empty_sources(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.cif does not exist"):
        read_inputs(tmp_path / "nowhere.cif")
    with pytest.raises(InputError, match="has no structure files; put there CIF"):
        read_inputs(tmp_path)
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="files; folders in it are not read, so give a dictionary name -> path of CIF"):
        read_inputs(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(InputError, match=r"notes\.txt is of no known kind"):
        read_inputs(tmp_path / "notes.txt")
    (tmp_path / "id_prop.csv").write_text("\n")
    with pytest.raises(InputError, match=r"id_prop\.csv is empty"):
        read_inputs(tmp_path)
    with pytest.raises(InputError, match="A int holds no crystals"):
        read_inputs(3)
    text = "data_x\n" * 1000  # longer than any path
    for read in (read_inputs, as_crystal):
        with pytest.raises(InputError, match=r"^A text of several lines is no path; .* Structure\.from_str\(…\)\.$"):
            read(text)
    (record,) = read_inputs([text])
    assert record.id == "0" and record.error.startswith("A text of several lines is no path")
    (tmp_path / "two\nlines.cif").write_text(cif())
    assert len(as_crystal(tmp_path / "two\nlines.cif").numbers) == 2


def test_one_bad_input_leaves_the_others(tmp_path: Path) -> None:
    good = tmp_path / "good.cif"
    good.write_text(cif())
    (tmp_path / "bad.cif").write_text("data_x\n")
    formula = structure().composition  # a mapping that takes no other key than elements
    inputs = [structure(), good, tmp_path / "bad.cif", tmp_path / "gone.cif", "plain.txt", 7, None, (1, 2, 3), formula]
    records = list(read_inputs([*inputs, {"structure": formula, "id": 9}, structure()]))
    assert [r.id for r in records] == ["0", "good", "bad", "gone", "plain.txt", "5", "6", "7", "8", "9", "10"]
    assert [r.crystal is not None for r in records] == [True, True] + [False] * 8 + [True]
    for record, said in zip(records[2:], ["bad.cif", "gone.cif", "plain.txt", *"56789"], strict=False):
        assert said in record.error
    for bad in (formula, {"structure": formula}):
        assert not any(record.crystal for record in read_inputs(bad))
    kept = Record("kept", None, {}, "why not")
    assert list(read_inputs([kept, kept])) == [kept, kept]


def test_targets_of_objects() -> None:
    atoms = Atoms(numbers=NUMBERS, cell=CELL, scaled_positions=COORDS, pbc=True, info={"gap": 1.5})
    assert next(read_inputs([atoms], targets=["gap"])).targets == {"gap": 1.5}
    rows = [{"id": "x", "structure": structure(), "gap": 2.0}]
    assert [(r.id, r.targets, r.error) for r in read_inputs(rows)] == [("x", {"gap": 2.0}, None)]
    for made in (structure(), structure().as_dict()):
        entry = {"id": "x", "structure": made, "gap": 2.0}
        assert [(r.id, r.targets, r.error) for r in read_inputs(entry)] == [("x", {"gap": 2.0}, None)]
        several = {"structure": made, "b": {"structure": made, "id": "x"}, "c": Atoms(), "d": "d.cif"}
        assert [r.id for r in read_inputs(several)] == list(several)
    assert [r.id for r in read_inputs({"k": Record("x")})] == ["k"]
    assert "0 has no target gap; it has none" in only_error([structure()], targets=["gap"])


# ---- bad crystals


@pytest.mark.parametrize(
    ("lattice", "coords", "numbers", "said"),
    [
        (CELL, COORDS * math.nan, NUMBERS, "coordinates"),
        (CELL, np.full((3, 3), math.inf), NUMBERS, "give finite numbers"),
        (CELL * math.nan, COORDS, NUMBERS, "lattice entry that is not finite"),
        (CELL * [[1], [1], [0]], COORDS, NUMBERS, "singular lattice"),
        (CELL * [[1], [1], [0.001]], COORDS, NUMBERS, "singular lattice"),
        (np.stack([CELL[0], CELL[1], CELL[0] + CELL[1]]), COORDS, NUMBERS, "singular lattice"),
        (CELL, COORDS, [38, 22, 0], "unknown atomic number 0"),
        (CELL, COORDS, [38, 22, 101], "unknown atomic number 101"),
        (CELL, COORDS, [38, 22, 8.5], "not whole numbers"),
        (CELL, COORDS, ["Sr", "Ti", "O"], "not whole numbers"),
        (CELL, COORDS[:2], NUMBERS, "frac_coords of shape"),
        (CELL, np.zeros((0, 3)), [], "no atoms"),
    ],
)
def test_bad_arrays(lattice: object, coords: object, numbers: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        as_crystal((lattice, coords, numbers))
    assert said in only_error([Crystal(lattice, coords, numbers)])
    assert "Structure 0" in only_error([Crystal(lattice, coords, numbers)])


def test_a_flat_lattice_is_refused_in_any_orientation() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        turn, sheared = np.linalg.qr(rng.normal(size=(3, 3)))[0], np.tril(rng.uniform(-1, 1, (3, 3)), -1)
        for height, is_flat in ((0.009, True), (0.011, False)):
            cell = rng.permutation((sheared + np.diag([5.0, 4.0, height])) @ turn)
            if is_flat:
                with pytest.raises(InputError, match="singular lattice"):
                    as_crystal((cell, COORDS, NUMBERS))
            else:
                assert np.array_equal(as_crystal((cell, COORDS, NUMBERS)).lattice, cell)


def test_bad_objects() -> None:
    assert "is disordered (site 1 holds" in only_error(Structure(CELL, [{"Sr": 0.5}, "Ti", "O"], COORDS))
    assert "is disordered" in only_error(Structure(CELL, [{"Sr": 0.5, "Ba": 0.5}, "Ti", "O"], COORDS))
    assert "unknown element Xx" in only_error(Structure(CELL, ["Xx", "Ti", "O"], COORDS))
    assert "unknown element Md" in only_error(Structure(CELL, ["Md", "Ti", "O"], COORDS))
    assert "has no cell" in only_error(Atoms("H2O", positions=np.eye(3)))
    assert "set atoms.pbc = True" in only_error(Atoms("H2O", positions=np.eye(3), cell=CELL, pbc=[1, 1, 0]))
    assert "singular lattice" in only_error(Atoms("H2O", positions=np.eye(3), cell=[4, 4, 0], pbc=True))
    assert "has no atoms" in only_error(Atoms(cell=CELL, pbc=True))
    mixed = Atoms("NaCl", cell=CELL, pbc=True, info={"occupancy": {"0": {"Na": 1.0}, "1": {"Cl": 0.7, "Br": 0.3}}})
    assert "has Cl:0.7, Br:0.3" in only_error(mixed)
    mixed.info["occupancy"]["1"] = {"Cl": "?"}
    assert as_crystal(mixed).numbers.tolist() == [11, 17]
    assert "shape (3, 2)" in only_error((CELL, COORDS[:2].T, NUMBERS[:2]))
    with pytest.raises(InputError, match="The list object is not a crystal"):
        as_crystal([])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "bad.cif is empty"),
        ("words\n", "no atom sites"),
        (cif(sites=""), "no atoms"),
        (cif("Xx1 Xx 0 0 0 1"), "unknown element Xx"),
        (cif("Cs1 Cs nan 0 0 1"), "coordinate 'nan'"),
        (cif("Cs1 Cs ? 0 0 1"), "coordinate '?'"),
        (cif("Cs1 Cs . . . 1"), "coordinate '.'"),
        (cif("Cs1 Cs 0 0 0 0.5"), "is disordered (site 1 holds"),
        (cif("Cs1 Cs 0 0 0 0.5\nRb1 Rb 0 0 0 0.5"), "is disordered"),
        (cif("Cs1 Cs 0 0 0 1.2"), "occupancy 1.2 above 1"),
        (cif("Cs1 Cs 0 0 0 full"), "occupancy 'full'"),
        (cif("K1 K .5 0 0 1\nCs1 Cs 0 0 0 1\nCl1 Cl 0 1 -.00005 ?"), "Two atoms are on one site: Cs1, Cl1 of bad.cif"),
        (cif("Cs1 Cs .1 0 0 .6\nCl1 Cl -.1 0 0 .6", operations="x,y,z\n-x,y,z"), "Cs1, Cl1 of bad.cif, whose occu"),
        (cif().replace("_cell_length_a 4.2", "_cell_length_a ?"), "no usable cell (_cell_length_a is ?)"),
        (cif().replace("_cell_angle_gamma 90\n", ""), "no usable cell (_cell_angle_gamma is missing)"),
        (cif().replace("_cell_angle_gamma 90", "_cell_angle_gamma 180"), "angles between 0 and 180"),
        (cif().replace("_cell_angle_gamma 90", "_cell_angle_gamma -90"), "_cell_angle_gamma is -90"),
        (cif().replace("_cell_length_a 4.2", "_cell_length_a 0"), "lengths are above 0 Å"),
        (cif().replace("_cell_length_a 4.2", "_cell_length_a -4.2(1)"), "_cell_length_a is -4.2(1)"),
        (cif() + cif().replace("data_made", "data_two"), "has 2 structures (made, two); split it"),
        (cif() + cif(), "has 2 structures"),
        (cif(items="_chemical_formula_sum 'Cs Cl2'"), "contradicts itself"),
        (cif(items="_chemical_formula_sum 'Rb Cl'"), "contradicts itself"),
        (cif(items="_chemical_formula_sum CsBr"), "its formula says CsBr;"),
        (cif(items="_chemical_formula_sum 'Cs Cl'\n_cell_formula_units_Z 4"), "contradicts itself"),
        (cif(MANY, items="_chemical_formula_sum 'C101 N99'\n_cell_formula_units_Z 1"), "C100 N99 in the cell"),
        (cif(MANY, items="_chemical_formula_sum 'C N'"), "C100 N99 in the cell"),
        (cif(items="_chemical_formula_sum 'Cs Cl H4'"), "0 of 4 of Cs Cl H4 are listed"),
        (cif(CSCL + "\nH1 H .2 .3 .4 1", "_chemical_formula_sum 'Cs Cl D4'"), "1 of 4 of Cs Cl D4 are listed"),
        (cif(operations="unreadable"), "has the symmetry operation 'unreadable'"),
        (cif(operations="?"), "has the symmetry operation '?'"),
        (WITHOUT_OPERATIONS.replace("'P 1'", "'P b c n w'"), "gives the space group P b c n w but no symmetry"),
        ("\x00\xff" * 100, "no atom sites"),
        (cif("Cs1 Cs 0 0 \x960.1 1"), "coordinate '~0.1'"),
        (cif(GENERAL, operations="x,y,z\n\x96x,\x96y,\x96z"), "symmetry operation '~x,~y,~z'"),
        (cif(GENERAL, operations="x,y,z\n-1*x,y,z"), "symmetry operation '-1*x,y,z'"),
        (cif(GENERAL, operations="x,y,z\nx+1/4+1/4,y,z"), "symmetry operation 'x+1/4+1/4,y,z'"),
        (cif(GENERAL, operations="x,y,z\n-x,-y,z\n-x,-y,-z"), "no whole group"),
        (cif(GENERAL, operations="-x,-y,-z"), "no whole group"),
        (cif(GENERAL, "loop_ _space_group_symop_operation_xyz x,y,z -x,-y,-z"), "two lists of symmetry operations"),
        (IN_DOUBT + "loop_ _space_group_symop_operation_xyz x,y,z x,-y,-z", "two lists of symmetry operations"),
        (cif(GENERAL, operations=THREEFOLD), "do not fit its cell"),
        (
            IN_DOUBT.replace("'P 1'", "'F m -3 m'"),
            "names the space group F m -3 m but lists the symmetry operations of P",
        ),
        (
            IN_DOUBT.replace("'P 1'", "?\n_space_group_IT_number 225"),
            "space group 225 but lists the symmetry operations",
        ),
        (IN_DOUBT.replace("'P 1'", "?\n_space_group_name_Hall '-F 4 2 3'"), "Hall -F 4 2 3 but lists the symmetry"),
        (cif("Cs1 Cs .333 .667 .3 1", operations=THREEFOLD).replace("gamma 90", "gamma 120"), "0.0042 Å apart"),
        (cif("Cs1 Cs .333 .667 .3 .4", operations=THREEFOLD).replace("gamma 90", "gamma 120"), "0.0042 Å apart"),
        (cif("Cs1 Cs 0 0 0 1\nCl1 Cl .5 .5 .5 -1"), "occupancy -1 below 0"),
        (cif(CSCL.replace("Cs1 Cs", "O1 H2O")), "type symbol 'H2O'"),
        (cif(CSCL.replace("Cs1 Cs", "O1 PO4")), "type symbol 'PO4'"),
        (cif(CSCL.replace("Cs1 Cs", "M1 Vac")), "type symbol 'Vac'"),
        (cif(CSCL.replace("Cs1 Cs", "Cs1 ?")), "type symbol '?'"),
        (LABELS.format("OH1"), "label 'OH1'"),
        (LABELS.format("CO1"), "label 'CO1'"),
        (LABELS.format("Va1"), "label 'Va1'"),
        (cif(items="_cell_modulation_dimension 1"), "modulated"),
        (
            cif(CSCL.replace("0 1", "0 1 d") + " dum").replace("occupancy", "occupancy _atom_site_calc_flag"),
            "dummy sites",
        ),
        (
            cif(CSCL.replace("0 1", "0 1 1") + " 2").replace("occupancy", "occupancy _atom_site_disorder_group"),
            "groups 1, 2",
        ),
        (cif("Nb,Zr '0.8Nb + 0.2Zr' 0 0 0 1", operations="x,y,z\n-x,-y,-z"), "mixes elements"),
        (cif() + cif()[cif().index("loop_\n_atom_site") :].replace("Cs", "Rb"), "_atom_site_label more than once"),
        (cif(GENERAL, items="_atom_site_moment_label Cs1", operations="x,y,z\n-x,-y,-z"), "no magnetic symmetry"),
        (WITHOUT_OPERATIONS[: WITHOUT_OPERATIONS.index("loop_")] + UNLOOPED, "outside of a loop"),
        (cif(items="_symmetry_Int_Tables_number 221"), "lists x, y, z alone for the space group P 1, 221"),
        (cif(items="_chemical_formula_sum CsCl").replace("'P 1'", "'F m -3 m'"), "alone for the space group F m -3 m;"),
        (cif(items="_space_group_name_Hall '-P 4 2 3'").replace("'P 1'", "?"), "alone for the space group Hall -P 4 2"),
        (
            BY_NAME.replace("'P 1'", "?\n_space_group_name_Hall 'C 4 2'\n_space_group_IT_number 89"),
            "leaves its setting",
        ),
        (BY_NAME.replace("'P 1'", "'F d -3 m'"), "leaves its setting"),
        (BY_NAME.replace("'P 1'", "'R -3 m'"), "leaves its setting"),
        (BY_NAME.replace("'P 1'", "?\n_symmetry_Int_Tables_number 62"), "leaves its setting"),
        (BY_NAME.replace("'P 1'", "'B m a b'\n_symmetry_Int_Tables_number 64"), "leaves its setting"),
        (WITHOUT_OPERATIONS.replace("H-M 'P 1'", "H-M_ref 'F m -3 m'"), "gives the space group F m -3 m but"),
        ("data_a _space_group_name_Hall '-P 1'\n" + UNNAMED, "gives the space group -P 1 but"),
        (f"data_a loop_ _space_group_symop_operation_xyz x,y,z -x,-y,-z\n{UNNAMED}", "_operation_xyz but"),
    ],
)
def test_bad_cif(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.cif"
    path.write_text(text, encoding="latin-1")
    message = only_error(path)
    assert said in message
    assert "bad.cif" in message


@pytest.mark.parametrize(
    "text",
    [
        cif(),
        WITHOUT_OPERATIONS,
        UNNAMED,
        cif(items="_space_group_name_Hall 'P 1'").replace("H-M 'P 1'", "H-M ?").replace(" 1\n", " 1.0(2)\n"),
        cif().replace("data_made", "data_global\n_journal_year 1999\ndata_made"),
        cif() + "loop_\n_geom_bond_distance\n_geom_bond_atom_site_label_1\n",
        cif() + "loop_\n_geom_bond_distance\n\n# end\nloop_\n_other\n1\n2\n",
        cif(items="_note\n;\nloop_\n_tag\ndata_inside a text field\n;"),
        cif(items="_chemical_formula_sum 'Cs1 Cl1'\n_cell_formula_units_Z 1"),
        cif(items="_chemical_formula_sum 'Cl Cs'"),
        cif(items="_chemical_formula_sum ?"),
        cif(items="_author 'Br\xfcck'"),
        cif("Cs1 Cs+ 0 0 0 1.0(2)\nCl1 Cl- 0.5(1) .5 5e-1 ?"),
        cif("Cs1 Cs 0 0 0 1.0005\nCl1 Cl .5 .5 .5 ."),
        cif("Cs1 Cs 0 0 0 .5005\nCs2 Cs 0 0 0 .5\nCl1 Cl .5 .5 .5 1"),
        cif(sites="Cs1 Cs 0 0 0 1\nCl1 Cl 0.5 0.5 0.5 1", operations="'x, y, z'\n'-x, -y, -z'"),
        WITHOUT_OPERATIONS.replace("'P 1'", "'P m -3 m'"),
        cif(items="_chemical_formula_sum 'Cs Cl'\n_cell_formula_units_Z 1").replace("'P 1'", "'P m -3 m'"),
        cif(items="_chemical_formula_sum CsCl").replace("'P 1'", "Pm-3m").replace("occupancy", "symmetry_multiplicity"),
        cif(CSCL.replace("Cs1 Cs", "CS1 CS")).replace("'P 1'", "'p 1'"),
        WITHOUT_OPERATIONS.replace("'P 1'", "?\n_symmetry_Int_Tables_number 221"),
        IN_DOUBT.replace("'P 1'", "P-1\n_symmetry_Int_Tables_number 2\n_space_group_name_Hall '-P 1'"),
        IN_DOUBT + "loop_ _space_group_symop_operation_xyz '-X, -Y, -Z' +x,y+1,z",
        IN_DOUBT.replace("'P 1'", "'P made'\n_symmetry_Int_Tables_number 0"),
        IN_DOUBT.replace("'P 1'", "'F m -3 m'\n_chemical_formula_sum 'Cl Cs'\n_cell_formula_units_Z 1"),
    ],
)
def test_good_cif(tmp_path: Path, text: str) -> None:
    path = tmp_path / "good.cif"
    path.write_text(text, encoding="latin-1")
    (record,) = read_inputs(path)
    assert record.error is None
    order = np.argsort(-record.crystal.numbers)
    assert record.crystal.numbers[order].tolist() == [55, 17]
    np.testing.assert_allclose(record.crystal.frac_coords[order], [[0, 0, 0], [0.5, 0.5, 0.5]], atol=1e-9)
    np.testing.assert_allclose(record.crystal.lattice, 4.2 * np.eye(3), atol=1e-9)


@pytest.mark.parametrize("formula", ["", "_chemical_formula_sum Cs2"])
def test_tags_in_any_spelling(tmp_path: Path, formula: str) -> None:
    path = tmp_path / "x.cif"
    text = cif(GENERAL, formula, "x,y,z\n-x,-y,-z")
    for tag in ("_Symmetry_Equiv_Pos_As_XYZ", "_symmetry_equiv.pos_as_xyz", "_space_group_symop.operation_xyz"):
        path.write_text(text.replace("_symmetry_equiv_pos_as_xyz", tag))
        np.testing.assert_allclose(np.sort(as_crystal(path).frac_coords[:, 0]), [0.1, 0.9])
    numbered = text.replace("x,y,z\n", "1 x,y,z\n").replace("-x,-y,-z", "2 -x,-y,-z")
    for tag in ("_symmetry_equiv_pos_as_xyz", "_symmetry_equiv.pos_as_xyz"):
        tags = f"_symmetry_equiv_pos_site_id {tag}"
        path.write_text(numbered.replace("_symmetry_equiv_pos_as_xyz", tags).replace("'P 1'", "?"))
        np.testing.assert_allclose(np.sort(as_crystal(path).frac_coords[:, 0]), [0.1, 0.9])
    path.write_text(text.replace("loop_", "LOOP_", 1).replace("data_", "DATA_"))
    np.testing.assert_allclose(np.sort(as_crystal(path).frac_coords[:, 0]), [0.1, 0.9])
    path.write_text(cif("Cs1 Cs 0 0 0 0.5").replace("site_occupancy", "site_Occupancy"))
    assert "is disordered" in only_error(path)


def test_cif_writer_counts_the_whole_cell(tmp_path: Path) -> None:
    made = structure() * (2, 1, 1)
    (tmp_path / "x.cif").write_text(made.to(fmt="cif"))
    assert "_cell_formula_units_Z   2" in (tmp_path / "x.cif").read_text()
    assert len(as_crystal(tmp_path / "x.cif").numbers) == 6


def test_coordinates_near_a_third_stay_as_written_without_symmetry(tmp_path: Path) -> None:
    (tmp_path / "p1.cif").write_text(cif("Cs1 Cs 0.33332 0 0 1"))
    (tmp_path / "sym.cif").write_text(cif("Cs1 Cs 0.33332 0 0 1", operations="'x, y, z'\n'x, -y, -z'"))
    assert as_crystal(tmp_path / "p1.cif").frac_coords[0, 0] == 0.33332
    assert as_crystal(tmp_path / "sym.cif").frac_coords[0, 0] == pytest.approx(1 / 3, abs=1e-12)


def test_formulas_with_and_without_blanks() -> None:
    assert (
        parse_formula("Na2SO4") == parse_formula(" O4 S Na2 ") == parse_formula("Na2 S.5O4S0.5") == {11: 2, 16: 1, 8: 4}
    )
    assert parse_formula("D2O") == parse_formula("H2 O") and parse_formula("CoO") == parse_formula("Co O")
    for text in ("CO", "CO2", "Na2(SO4)", "NaXx", "Na 2", "na Cl", "Na+ Cl-", "?", "", "NaCl*H2O", "Na1.5.5.5Cl."):
        assert parse_formula(text) == {}


def test_rounded_translations_of_operations_are_fractions(tmp_path: Path) -> None:
    operations = "1 x,y,z\n2 '-y, x-y, Z+0.3333'\n3 -x+y,-x,.667+z"
    text = cif(GENERAL, operations=operations).replace(
        "_symmetry_equiv", "_symmetry_equiv_pos_site_id\n_symmetry_equiv"
    )
    (tmp_path / "x.cif").write_text(text.replace("gamma 90", "gamma 120"))
    heights = np.sort(as_crystal(tmp_path / "x.cif").frac_coords[:, 2])
    np.testing.assert_allclose(heights, [0.3, 0.3 + 1 / 3, 0.3 + 2 / 3], rtol=0, atol=1e-12)


def test_images_of_a_rounded_special_position_are_one_atom(tmp_path: Path) -> None:
    sites, operations = "Cs1 Cs 0.4999 0 0 1\nCl1 Cl 0 0.5 0.5 1", "'x, y, z'\n'-x, y, z'"
    formula = "_chemical_formula_sum 'Cs Cl'\n_cell_formula_units_Z 1"
    (tmp_path / "x.cif").write_text(cif(sites, formula, operations))
    assert sorted(as_crystal(tmp_path / "x.cif").numbers.tolist()) == [17, 55]
    (tmp_path / "y.cif").write_text(cif(sites.replace("0.4999", "0.4"), formula, operations))
    assert "y.cif contradicts itself" in only_error(tmp_path / "y.cif")


def test_other_bad_files(tmp_path: Path) -> None:
    bad = {
        "e.json": ("", "e.json is not a JSON file"),
        "f.json": ("{", "f.json is not a JSON file"),
        "lines.json": ('{"a": 1}\n{"a": 2}\n', "(Extra data: line 2 column 1 (char 9)); write its lines as one list."),
        "g.json": ("3", "g.json holds no structures"),
        "h.json": ("[]", "h.json holds no structures"),
        "i.json": ('{"a": 3}', "a (i.json) is not a pymatgen Structure dictionary"),
        "j.json": ('{"sites": []}', "j (j.json) has no lattice"),
        "k.json": ('{"sites": [{}], "lattice": {}}', "k (k.json) is not a pymatgen Structure"),
        "l.json.gz": ("not gzip", "l.json.gz is not a JSON file"),
        "e.vasp": ("", "e.vasp is empty"),
        "f.vasp": ("a\nb\n", "f.vasp is not a POSCAR file"),
        "e.extxyz": ("", "e.extxyz"),
        "f.extxyz": ("1\nno lattice\nH 0 0 0\n", "f (f.extxyz) has no cell"),
    }
    for name, (text, said) in bad.items():
        (tmp_path / name).write_text(text)
        assert said in only_error(tmp_path / name), name


def test_poscar_of_a_volume_and_with_wrong_counts(tmp_path: Path) -> None:
    lines = structure().to(fmt="poscar").splitlines()
    lines[1] = f"{-8 * structure().volume}"
    (tmp_path / "direct.vasp").write_text("\n".join(lines))
    lines[7:] = ["Cartesian", *(" ".join(map(str, site.coords)) for site in structure())]
    (tmp_path / "cartesian.vasp").write_text("\n".join(lines))
    for name in ("direct.vasp", "cartesian.vasp"):
        found = as_crystal(tmp_path / name)
        np.testing.assert_allclose(found.lattice, 2 * CELL, atol=1e-5)
        np.testing.assert_allclose(found.frac_coords, COORDS, atol=1e-5)
    for comment in ("# of each", "! of each"):
        (tmp_path / "comment.vasp").write_text("\n".join([*lines[:6], f"{lines[6]} {comment}", *lines[7:]]))
        np.testing.assert_allclose(as_crystal(tmp_path / "comment.vasp").frac_coords, COORDS, atol=1e-5)
    several = [*lines[:5], "Sr", "Ti O", "1", "1 50000000", *lines[7:]]  # as VASP writes more than 20 groups
    for wrong in (several, [*lines[:6], "1 1 50000000", *lines[7:]], [*lines[:5], "1 1 50000000", *lines[7:]]):
        (tmp_path / "counts.vasp").write_text("\n".join(wrong))
        assert f"counts.vasp has {len(wrong)} lines for 50000002 atoms" in only_error(tmp_path / "counts.vasp")
    lines[5] += " Xe"
    (tmp_path / "counts.vasp").write_text("\n".join(lines))
    assert "has 4 elements and 3 numbers of atoms" in only_error(tmp_path / "counts.vasp")


def test_poscar_without_element_names(tmp_path: Path) -> None:
    lines = structure().to(fmt="poscar").splitlines()
    lines[0] = "made"
    del lines[5]
    path = tmp_path / "POSCAR"
    path.write_text("\n".join(" ".join(line.split()[:3]) for line in lines) + "\n")
    assert "POSCAR does not name its elements" in only_error(path)


# ---- child processes


def test_many_cif_files_in_order(tmp_path: Path) -> None:
    for i in range(70):
        (tmp_path / f"{i:03}.cif").write_text(cif() if i % 7 else "broken")
    records = list(read_inputs(tmp_path))
    assert [r.id for r in records] == [f"{i:03}" for i in range(70)]
    assert [r.crystal is None for r in records] == [i % 7 == 0 for i in range(70)]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_a_file_that_never_ends_costs_its_time_limit(tmp_path: Path) -> None:
    good, stuck = tmp_path / "good.cif", tmp_path / "stuck.cif"
    good.write_text(cif())
    os.mkfifo(stuck)
    pool = pool_module.CifPool(timeout=1.0, workers=1)
    try:
        start = time.monotonic()
        before, never, after = [pool.submit([path]) for path in (good, stuck, good)]
        assert isinstance(before.result()[0], Crystal)
        assert "stuck.cif took longer than 1 s to read" in never.result()[0]
        assert isinstance(after.result()[0], Crystal)
        assert [type(x) for x in pool.submit([good, stuck, good, good]).result()] == [Crystal, str, Crystal, Crystal]
        assert time.monotonic() - start < 40
    finally:
        pool.close()


_KILLED = """
import os, signal, sys, time
from pathlib import Path
from srcgcnn_fast.graph import pool as module
module._GRACE = 0.5
pool = module.CifPool(timeout=1.0, workers=1)
pool.submit([Path(sys.argv[1])])
while not pool._started or pool._started[0]._deadline == float("inf"):
    time.sleep(0.01)
print(pool._started[0].process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks a process up where Linux has it")
def test_a_reader_of_a_file_that_never_ends_does_not_outlive_a_killed_process_for_ever(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "stuck.cif")
    run = subprocess.run([sys.executable, "-c", _KILLED, tmp_path / "stuck.cif"], capture_output=True, text=True)
    status = Path(f"/proc/{int(run.stdout)}/stat")
    end = time.monotonic() + 30
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end, "it is there still"
        time.sleep(0.05)


def test_files_of_the_working_directory_and_what_is_printed_at_the_start_do_not_reach_a_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("random", "copy", "pymatgen", "calendar"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("print('hello', end='', flush=True)\n")
    (tmp_path / "x.cif").write_text(cif())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    pool = pool_module.CifPool(timeout=30.0, workers=1)
    try:
        assert isinstance(pool.submit([tmp_path / "x.cif"]).result()[0], Crystal)
    finally:
        pool.close()


def test_a_reader_that_dies_is_an_error_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_SERVE", r"import sys; sys.stdout.buffer.write(b'\0ready\n')")
    (tmp_path / "x.cif").write_text(cif())
    pool = pool_module.CifPool(timeout=10.0, workers=1)
    try:
        assert "x.cif ended the process that read it" in pool.submit([tmp_path / "x.cif"]).result()[0]
    finally:
        pool.close()


@pytest.mark.skipif(sys.platform != "linux", reason="memory limits of a process are Linux's")
def test_a_file_beyond_the_memory_limit_is_an_error_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a site, which pymatgen reads, and that needs more than 60 MiB; a file that gemmi reads does not."""
    for name, occupancy in (("a", "1"), ("b", "0.5"), ("c", "1")):
        (tmp_path / f"{name}.cif").write_text(cif(f"Cs1 Cs 0 0 0 {occupancy}"))
    monkeypatch.setattr(pool_module, "MEMORY_LIMIT", 60 * 2**20)
    first, second, third = read_inputs(tmp_path, disorder="average")
    assert first.error is None and third.error is None
    assert second.crystal is None and second.error is not None
    assert second.error.startswith("b.cif ") and ("memory" in second.error or "ended the process" in second.error)
    monkeypatch.undo()
    assert all(record.error is None for record in read_inputs(tmp_path, disorder="average"))


def test_a_reader_left_early_leaves_no_process(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.cif").write_text(IN_DOUBT)
    started = []
    original = pool_module._Worker.__init__

    def record(worker: pool_module._Worker, timeout: float) -> None:
        original(worker, timeout)
        started.append(worker)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_module._Worker, "__init__", record)
        records = read_inputs(tmp_path)
        next(records)
        records.close()
    assert started
    assert not any(worker.alive for worker in started)


# ---- the hard cases

HALF_THE_CELL = "large_cell__P24Ru4H252C296S24N16.cif"  # C 2/c without its centring: 4 of 8 formula units
REJECTED = {
    HALF_THE_CELL: "contradicts itself",
    "multi_block__MultiStructure.cif": "split it",
    "malformed_derived__unknown_element_Xx.cif": "unknown element Xx",
    "species__cif_implicit_hydrogens_cod_1011130.cif": "hydrogen",
    "species__Senegalite_implicit_hydrogen.cif": "hydrogen",
}
SOUND_BUT_FOR_AN_EMPTY_LOOP = {
    "malformed__mp-23155_empty_geom_bond_loop.cif": 1,
    "malformed__mp-623782_empty_geom_bond_loop.cif": 8,
    "malformed__CsCl-manual-oxi-ref.mcif.cif": 2,
}


@pytest.fixture(scope="module")
def hard_cases(request: pytest.FixtureRequest) -> tuple[list[dict[str, str]], dict[str, Record]]:
    folder = Path(request.getfixturevalue("data_dir")) / "hard_cases"
    with (folder / "MANIFEST.csv").open(newline="") as file:
        manifest = list(csv.DictReader(file))
    paths = [folder / row["file"] for row in manifest]
    return manifest, dict(zip([p.name for p in paths], read_inputs(paths, timeout=10), strict=True))


def test_hard_cases(hard_cases: tuple[list[dict[str, str]], dict[str, Record]]) -> None:
    manifest, records = hard_cases
    assert len(records) == len(manifest) == 58
    for row in manifest:
        name = row["file"]
        record = records[name]
        assert (record.crystal is None) == (record.error is not None), name
        if record.error is not None:
            assert name in record.error
            assert "\n" not in record.error
        if name in REJECTED:
            assert record.error is not None and REJECTED[name] in record.error, name
        elif name in SOUND_BUT_FOR_AN_EMPTY_LOOP:
            assert record.crystal is not None and len(record.crystal.numbers) == SOUND_BUT_FOR_AN_EMPTY_LOOP[name]
        elif row["parse"] != "ok" or row["ordered"] != "True":
            assert record.error is not None, name
        else:
            assert record.crystal is not None, record.error
            assert len(record.crystal.numbers) == int(float(row["n_sites"])), name


def test_upstream_sample(data_dir: Path) -> None:
    records = list(read_inputs(data_dir / "upstream" / "cif"))
    assert len(records) == 10
    assert all(r.error is None and list(r.targets) == ["target"] for r in records)


def test_an_empty_path_is_not_the_current_folder():
    with pytest.raises(InputError, match="an empty text"):
        list(read_inputs(""))


@pytest.mark.parametrize(
    ("said", "told"),
    [("no\n  such   file.", "no such file"), ("", "ValueError"), ("ab " * 500, "ab " * 133 + "a …")],
)
def test_the_words_of_others_are_one_line(said, told):
    assert one_line(ValueError(said)) == told
