"""From files to graphs beside other programs, in one process, round by round.

SRCGCNN_PEERS=… SRCGCNN_TEST_DATA=… pytest benchmarks/test_graphs.py --benchmark-enable --record graphs-cpu
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections import deque
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import graph_peers as peers
import measure
import numpy as np
import pytest
import workload

import srcgcnn_fast as sf
from srcgcnn_fast.graph import GraphParameters
from srcgcnn_fast.graph.build import build_packed
from srcgcnn_fast.graph.neighbors import search
from srcgcnn_fast.graph.store import open_store, prepare
from srcgcnn_fast.graph.symmetry import build

FULL = GraphParameters(symmetry_tolerance=None, isolated="keep")
NATIVE = GraphParameters(isolated="keep")
CIFS, LOADED = 2000, 60
"""Files of the folder, and how many of them the published loader reads in a round."""


def versions() -> str:
    found = []
    for name in ("vesin", "pymatgen", "matscipy", "gemmi", "numba"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} absent")
    return ", ".join(found)


@contextmanager
def one_core():
    """This process on a single core, one thread."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        with measure.threads(1):
            yield
    finally:
        os.sched_setaffinity(0, before)


def packed(crystals):
    lattices, frac_coords, numbers = zip(*crystals, strict=True)
    ptr = np.concatenate([[0], np.cumsum([len(n) for n in numbers])])
    return np.stack(lattices), np.concatenate(frac_coords), np.concatenate(numbers), ptr


def check(crystals, arrays, found) -> None:
    """No number from what is wrong: the sorted distances of every atom, of each peer and ours."""
    ours = build_packed(*arrays, FULL)
    assert not ours.errors
    for b, crystal in enumerate(crystals[:32]):
        graph = ours.graph(b, np.float64)
        for name, run in found.items():
            receiver, _, _, distance = peers.best(run(crystal), len(crystal[2]))
            assert np.array_equal(np.bincount(receiver, minlength=graph.n_rows), np.diff(graph.row_ptr)), name
            assert np.abs(distance - graph.distance).max() < 1e-4, name
            assert np.abs(np.sort(distance) - np.sort(graph.distance)).max() < 2e-6, name


@pytest.mark.parametrize("crystals", [2048])
def test_small_cells(benchmark, record, crystals):
    population = [c for c in workload.draw(8000) if 5 <= len(c[2]) <= 24]
    chosen = population[:crystals]
    arrays = packed(chosen)
    found = peers.present()
    with one_core():
        check(chosen, arrays, found)
        runs = {
            "ours, packed, full graph": lambda: build_packed(*arrays, FULL),
            "ours, packed, quotient": lambda: build_packed(*arrays, NATIVE),
            "ours, list of crystals, quotient": lambda: sf.build_graphs(chosen, isolated="keep"),
        }
        for name, run in found.items():
            # what they find is not kept: memory that has to come from the system makes them slower
            runs[f"{name}, raw"] = lambda run=run: deque((run(c) for c in chosen), 0)
            runs[f"{name} + best 12"] = lambda run=run: deque((peers.best(run(c), len(c[2])) for c in chosen), 0)
        seconds = measure.alternate(runs)
        benchmark.pedantic(runs["ours, packed, quotient"], rounds=3)
    took = measure.medians(seconds)
    benchmark.extra_info.update({"seconds": took, "rounds": seconds})
    note = (
        f"{crystals} crystals of 5 to 24 atoms ({arrays[3][-1]} atoms), radius 8 Å, 12 neighbours; one core, medians "
        "of 10 alternating rounds. Raw: all pairs within 8 Å, one call a crystal. Best 12: NumPy's argsort of packed "
        f"keys on them. How many times longer than ours: {', '.join(list(runs)[:3])}. {versions()}."
    )
    for name, value in took.items():
        row = {"program": name, "µs a crystal": 1e6 * value / crystals, "crystals/s": crystals / value}
        row |= {f"/ {ours.removeprefix('ours, ')}": value / took[ours] for ours in list(runs)[:3]}
        record("graph building, small cells, one core", row, note)


def test_cost_of_the_quotient(benchmark, record):
    arrays = packed([c for c in workload.draw(8000) if 5 <= len(c[2]) <= 24][:512])
    lattices, frac_coords, numbers, ptr = arrays[0], arrays[1], arrays[2].astype(np.int32), arrays[3].astype(np.int64)
    with one_core():
        runs = {
            "neighbour search": lambda: search(lattices, frac_coords, ptr, 8.0, 12, 1e-5, False),
            "graphs": lambda: build(lattices, frac_coords, numbers, ptr, 8.0, 12, 1e-5, True, False, True),
        }
        seconds = measure.alternate(runs)
        benchmark.pedantic(runs["graphs"], rounds=3)
    took = measure.medians(seconds)
    search_alone, whole = (1e6 * value / 512 for value in took.values())
    row = {"neighbour search, µs a crystal": search_alone, "choice and quotient, µs a crystal": whole - search_alone}
    row["ratio"] = (whole - search_alone) / search_alone
    note = "512 such crystals, one core: the search alone, and what the kernel that makes graphs takes beyond that."
    record("what the quotient costs", row, note)


def rattled(atoms: int, seed: int = 0):
    """A low-symmetry solid of about ordinary density: a rattled rock-salt block with vacancies of no order."""
    rng = np.random.default_rng(seed)
    side = int(np.ceil((atoms / 2) ** (1 / 3) * 1.02)) * 2
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)
    kept = np.sort(rng.permutation(len(grid))[:atoms])
    lattice = np.diag([2.4, 2.45, 2.5]) * side * (atoms / len(grid)) ** (1 / 3) + rng.normal(size=(3, 3)) * 0.1
    frac = (grid[kept] + rng.normal(size=(atoms, 3)) * 0.05) / side
    return lattice, frac, np.where(grid[kept].sum(1) % 2, 17, 11)


@pytest.mark.parametrize(("atoms", "cells"), [(500, 16), (5000, 4)])
def test_large_cells(benchmark, record, atoms, cells):
    crystals = [rattled(atoms, seed) for seed in range(cells)]
    arrays, alone = packed(crystals), packed(crystals[:1])
    found = peers.present()
    with one_core():
        check(crystals[:1], alone, found)
        runs = {"ours, ms": lambda: build_packed(*arrays, FULL)}
        # each cell's pairs are let go before the next: memory that has to come from the system makes them slower
        runs |= {f"{name}, raw, ms": lambda run=run: deque(map(run, crystals), 0) for name, run in found.items()}
        runs["ours, one cell alone, ms"] = lambda: build_packed(*alone, FULL)
        seconds = measure.alternate(runs)
        benchmark.pedantic(runs["ours, ms"], rounds=3)
    took = {name: 1e3 * value / cells for name, value in measure.medians(seconds).items()}
    single = cells * took.pop("ours, one cell alone, ms")
    row = {"atoms": atoms, "cells": cells, "ours, ms": took["ours, ms"]}
    row |= {name: f"{ms:.3g} ({ms / took['ours, ms']:.3g})" for name, ms in took.items() if name != "ours, ms"}
    row["ours, one cell alone, ms"] = single
    note = (
        "Rattled blocks without symmetry, no two alike, radius 8 Å; one core, medians of 10 alternating rounds. "
        "Ours is the graph of the 12 nearest, all cells in one call, the others' the raw list, one call a cell. Times "
        "are of one cell; behind them: how many times longer than ours. Alone: after others have used the caches."
    )
    record("graph building, large cells, one core", row, note)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """mp/test as CIF files that pymatgen wrote, with id_prop.csv and the published element vectors."""
    pd = pytest.importorskip("pandas")
    structure = pytest.importorskip("pymatgen.core").Structure
    data = os.environ.get("SRCGCNN_TEST_DATA")
    if not data:
        pytest.skip("SRCGCNN_TEST_DATA does not name the directory of test data")
    target = tmp_path_factory.mktemp("cifs")
    rows = pd.read_parquet(Path(data) / "mp" / "test.parquet").iloc[:CIFS]
    with (target / "id_prop.csv").open("w", newline="") as file:
        for row in rows.itertuples():
            made = structure(np.reshape(row.lattice, (3, 3)), row.atomic_numbers, np.reshape(row.frac_coords, (-1, 3)))
            made.to(filename=str(target / f"{row.material_id}.cif"))
            csv.writer(file).writerow([row.material_id, row.formation_energy_per_atom])
    from srcgcnn_fast.graph import element_features

    vectors = {n: element_features()[n].astype(int).tolist() for n in range(1, 101)}
    (target / "atom_init.json").write_text(json.dumps(vectors))
    return target


def test_folder_of_cif_files(benchmark, record, folder, tmp_path):
    loader = peers.published_loader(folder)
    assert loader is not None, "SRCGCNN_PEERS lacks the published program"
    loaded = iter(range(len(loader)))

    def ours():
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        store = prepare(folder, tmp_path / "store")
        assert len(store) == CIFS and not store.rejected

    def ours_on_one_core():
        with one_core():
            ours()

    def published():
        with one_core():
            for _ in range(LOADED):  # it keeps what it has read, so files that are new to it
                loader[next(loaded)]

    with measure.threads(2):
        runs = {"one core": ours_on_one_core, "two processes": ours, "published loader": published}
        seconds = measure.alternate(runs, rounds=8, warm_up=1)
        benchmark.pedantic(ours, rounds=1)
    took = measure.medians(seconds)
    each = {name: value / (LOADED if name == "published loader" else CIFS) for name, value in took.items()}
    benchmark.extra_info.update({"seconds": took, "rounds": seconds})
    row = {f"{name}, µs a crystal": 1e6 * value for name, value in each.items()}
    row |= {f"faster, {name}": each["published loader"] / each[name] for name in ("one core", "two processes")}
    note = (
        f"{CIFS} CIF files (P1, written by pymatgen) read, made graphs with the quotient and written as a store; file "
        f"system cache warm, the second process started and ended within the time. The published loader on one core, "
        f"{LOADED} other files of the folder in each round, nothing written. Medians of 8 rounds. {versions()}."
    )
    record("a folder of CIF files to a store", row, note)


def test_batches_and_memory(benchmark, record, tmp_path):
    data = os.environ.get("SRCGCNN_TEST_DATA")
    if not data:
        pytest.skip("SRCGCNN_TEST_DATA does not name the directory of test data")
    with one_core():
        source = Path(data) / "mp" / "train.parquet"
        once = measure.alternate({"prepare": lambda: prepare(source, tmp_path / "s")}, rounds=1, warm_up=0)
        store = open_store(tmp_path / "s")
        order = np.random.default_rng(0).permutation(len(store))
        parts = [order[k : k + 256] for k in range(0, len(order) - 255, 256)]
        runs = {"epoch": lambda: [store.batch(part) for part in parts], "open": lambda: open_store(tmp_path / "s")}
        took = measure.medians(measure.alternate(runs, rounds=10, warm_up=1))
        benchmark.pedantic(runs["epoch"], rounds=3)
    size = sum(file.stat().st_size for file in (tmp_path / "s").iterdir())
    row = {"crystals": len(store), "prepared from Parquet, µs a crystal": 1e6 * once["prepare"][0] / len(store)}
    row |= {"bytes a crystal": size / len(store), "bytes an edge, all in": size / store.n_edges}
    row |= {"opened, ms": 1e3 * took["open"], "batches of 256, crystals/s": 256 * len(parts) / took["epoch"]}
    if sys.platform == "linux":
        script = Path(__file__).with_name("resident.py")
        command = [sys.executable, str(script), str(tmp_path / "s")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-2000:]
        row |= json.loads(result.stdout.splitlines()[-1])
    note = (
        "mp/train; one core, medians of 10 epochs of batches of 256 crystals in random order. Resident memory: the "
        "most during one epoch of SR-CGCNN training on all of them (Lightning, 2 threads, batches of 256) less that of "
        "a process that imported torch and ran one operator."
    )
    record("the store", row, note)
