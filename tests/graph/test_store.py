from __future__ import annotations

import json
import logging
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from srcgcnn_fast.errors import InputError
from srcgcnn_fast.graph import packing
from srcgcnn_fast.graph import store as store_module
from srcgcnn_fast.graph.batch import CrystalGraph, GraphBatch, collate
from srcgcnn_fast.graph.build import build_graph
from srcgcnn_fast.graph.parameters import GraphParameters
from srcgcnn_fast.graph.readers import Crystal, Record
from srcgcnn_fast.graph.store import GraphStore, StoreInfo, name_it, open_store, prepare

FIELDS = ("numbers", "weight", "sender", "distance", "row_ptr", "crystal_ptr", "atom_class")


def crystal(seed: int) -> Crystal:
    """Up to nine atoms anywhere, every third crystal with a centring translation and so a quotient of half."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 10))
    lattice = rng.uniform(3.5, 6.0) * (np.eye(3) + rng.uniform(-0.2, 0.2, (3, 3)))
    coords, numbers = rng.random((n, 3)), rng.integers(1, 101, n)
    if seed % 3 == 0:
        coords, numbers = np.concatenate([coords, coords + 0.5]), np.concatenate([numbers, numbers])
    return Crystal(lattice, coords, numbers.astype(np.int32))


def records(count: int = 12) -> list[Record]:
    made = [
        Record(f"c{i}", crystal(i), {"gap": float(i)} if i % 4 else {"gap": float(i), "e": -i}) for i in range(count)
    ]
    return [*made[:5], Record("bad", None, {}, "bad has no atoms; give one."), *made[5:]]


def graphs(count: int = 12) -> list[CrystalGraph]:
    return [build_graph(crystal(i)) for i in range(count)]


def assert_same_graph(found: CrystalGraph, expected: CrystalGraph) -> None:
    for name in ("numbers", "weight", "sender", "distance", "row_ptr", "atom_class"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)


def assert_same_batch(found: GraphBatch, expected: GraphBatch) -> None:
    for name in (*FIELDS, "atom_features", "edge_features"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype and a.is_contiguous() and torch.equal(a, b), name


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    store = prepare(records(), tmp_path / "store")
    assert listing(tmp_path) == ["store"]
    for again in (store, open_store(tmp_path / "store"), pickle.loads(pickle.dumps(store))):
        assert again.ids == [f"c{i}" for i in range(12)]
        assert again.rejected == [("bad", "bad has no atoms; give one.")]
        assert again.parameters == GraphParameters()
        assert set(again.targets) == {"gap", "e"}
        np.testing.assert_array_equal(again.targets["gap"], np.arange(12.0))
        np.testing.assert_array_equal(np.isnan(again.targets["e"]), np.arange(12) % 4 != 0)
        table = again.target_array(["e", "gap"])
        assert table.shape == (12, 2) and table.dtype == np.float64 and table[4].tolist() == [-4.0, 4.0]
        np.testing.assert_array_equal(again.target_array("gap"), table[:, 1:])
        for index, expected in enumerate(graphs()):
            assert_same_graph(again[index], expected)
        np.testing.assert_array_equal(again.row_counts, [g.n_rows for g in graphs()])
    assert (store.n_atoms, store.n_rows, store.n_edges) == tuple(
        sum(getattr(g, name) for g in graphs()) for name in ("n_atoms", "n_rows", "n_edges")
    )
    assert store.n_rows < store.n_atoms
    assert len(pickle.dumps(store)) < 500


def test_the_arrays_are_mapped_not_loaded(tmp_path: Path) -> None:
    store = prepare(records(), tmp_path / "store")
    assert isinstance(store._arrays["sender"].base, np.memmap)
    assert not store._arrays["sender"].flags.writeable


def test_parameters_are_kept(tmp_path: Path) -> None:
    parameters = GraphParameters(radius=5.0, max_neighbors=7, symmetry_tolerance=None, isolated="keep")
    store = prepare(records(), tmp_path / "store", parameters)
    assert open_store(tmp_path / "store").parameters == parameters
    expected = build_graph(crystal(3), 5.0, 7, None, isolated="keep")
    assert_same_graph(store[3], expected)
    assert store.n_rows == store.n_atoms


@pytest.mark.parametrize("on_disk", [True, False])
def test_batch_equals_collate(tmp_path: Path, on_disk: bool) -> None:
    expected = graphs(20)
    store = prepare(records(20), tmp_path / "store") if on_disk else GraphStore.from_graphs(expected)
    rng = np.random.default_rng(0)
    choices = [[0], [19], [-1, -20], [3, 3, 3], range(20), np.array([7, 2], np.int32), torch.tensor([5, 1])]
    for indices in [*choices, *(rng.integers(0, 20, rng.integers(1, 40)) for _ in range(20))]:
        chosen = [expected[int(i)] for i in indices]
        assert_same_batch(store.batch(indices), collate(chosen))


def test_batch_with_own_features_and_without_edges() -> None:
    rng = np.random.default_rng(1)
    made = []
    for n, degrees in ((2, [3, 0]), (1, [0]), (3, [1, 2, 4])):
        e = sum(degrees)
        made.append(
            CrystalGraph(
                numbers=rng.integers(1, 100, n).astype(np.int32),
                weight=np.ones(n, np.float32),
                sender=rng.integers(0, n, e).astype(np.int32),
                distance=rng.random(e),
                row_ptr=np.concatenate([[0], np.cumsum(degrees)]).astype(np.int32),
                atom_class=np.arange(n, dtype=np.int32),
                atom_features=rng.random((n, 5)).astype(np.float32),
                edge_features=rng.random((e, 4)).astype(np.float32),
            )
        )
    store = GraphStore.from_graphs(made)
    assert_same_batch(store.batch([2, 0, 1, 1]), collate([made[i] for i in (2, 0, 1, 1)]))
    assert_same_batch(store.batch([1]), collate([made[1]]))
    assert store[0].distance.dtype == np.float64
    np.testing.assert_array_equal(store[2].edge_features, made[2].edge_features)


def alike(chosen: list[int] | np.ndarray, store: GraphStore) -> None:
    """Compiled code and NumPy join the same batch, and the former does so in a thread, too."""
    at = store._checked(chosen)
    assert store._packer_of(at) is not None
    expected, more = store._gathered(at), np.random.default_rng(0).normal(size=(len(at), 3)).astype(np.float32)
    assert_same_batch(store.batch(chosen), expected)
    with torch.device("meta"):  # a default of which nobody has the memory here, as a GPU's
        started = store.packing(chosen, more, pin=False)
    assert started is not None
    found, beside = started.on(torch.device("cpu"))
    assert_same_batch(found, expected)
    np.testing.assert_array_equal(beside.numpy(), more)
    places = [getattr(found, name).data_ptr() for name in FIELDS] + [beside.data_ptr()]
    block = beside.untyped_storage()
    assert all((x - block.data_ptr()) % 128 == 0 and 0 <= x - block.data_ptr() < block.nbytes() for x in places)


@pytest.mark.skipif(packing.core is None, reason="the compiled kernels are not built")
@pytest.mark.parametrize("on_disk", [True, False])
def test_compiled_code_and_numpy_join_alike(tmp_path: Path, on_disk: bool) -> None:
    store = prepare(records(20), tmp_path / "store") if on_disk else GraphStore.from_graphs(graphs(20))
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 40, 300):
        alike(rng.integers(-20, 20, count), store)
    many = rng.integers(0, 20, 300)
    assert store.batch(many).num_edges > packing._LEAST_EDGES > store.batch([0]).num_edges  # with and without a thread
    nothing = np.zeros((300, 0), np.float32)
    started = store.packing(many, nothing, pin=False)
    expected = store.batch(many)
    del store, many
    found, beside = started.on(torch.device("cpu"))  # holds what it reads
    assert_same_batch(found, expected)
    assert beside.shape == (300, 0)


@pytest.mark.skipif(packing.core is None, reason="the compiled kernels are not built")
@pytest.mark.parametrize("change", [{"numbers": 300}, {"weight": np.float64}, {"distance": np.float64}])
def test_arrays_of_other_types_are_joined_by_numpy(change: dict) -> None:
    ((name, to),) = change.items()
    given = [
        replace(g, **{name: g.numbers + to if name == "numbers" else getattr(g, name).astype(to)}) for g in graphs()
    ]
    store = GraphStore.from_graphs(given)
    assert store._packer is None and store.packing([0], np.zeros(0, np.float32), pin=False) is None
    assert_same_batch(store.batch([2, 0, 2]), collate([given[i] for i in (2, 0, 2)]))


@pytest.mark.skipif(packing.core is None, reason="the compiled kernels are not built")
def test_arrays_with_gaps_are_joined_by_numpy() -> None:
    arrays = GraphStore.from_graphs(graphs())._arrays
    store = GraphStore(arrays | {"sender": np.repeat(arrays["sender"], 2)[::2]}, StoreInfo())
    assert store._packer is None
    assert_same_batch(store.batch([2, 0]), collate([graphs()[2], graphs()[0]]))


@pytest.mark.skipif(packing.core is None, reason="the compiled kernels are not built")
def test_a_batch_beyond_int32_is_a_sentence() -> None:
    """Before its memory is asked for."""
    e = 1 << 20
    index = np.zeros(1, np.int32)
    graph = CrystalGraph(
        index + 1,
        np.ones(1, np.float32),
        np.zeros(e, np.int32),
        np.ones(e, np.float32),
        np.array([0, e], np.int32),
        index,
    )
    store = GraphStore.from_graphs([graph])
    assert store._packer is not None
    with pytest.raises(InputError, match="2147483648 edges is beyond"):
        store.batch(np.zeros(2048, int))


def test_bad_indices(tmp_path: Path) -> None:
    store = GraphStore.from_graphs(graphs(3))
    for indices, said in (([], "no index"), ([3], "no crystal 3 in a store of 3"), ([-4], "no crystal -4")):
        with pytest.raises(InputError, match=said):
            store.batch(indices)
    for indices in ([0.5], [[0]], [True]):
        with pytest.raises(InputError, match="whole numbers in one row"):
            store.batch(indices)
    with pytest.raises(IndexError, match="There is no crystal 3"):
        store[3]
    for index in (slice(2), "quartz", 1.0):
        with pytest.raises(InputError, match=r"one crystal by its number, not by .*; GraphStore\.batch takes many"):
            store[index]
    assert len(list(store)) == 3
    with pytest.raises(InputError, match=r"has no target gap; it has none \(of what is true or false, those that"):
        store.target_array(["gap"])


def test_in_memory_store() -> None:
    store = GraphStore.from_graphs(graphs(3), ids=["a", "b", "c"], targets={"gap": [1, 2, np.nan]})
    again = pickle.loads(pickle.dumps(store))
    for held in (store, again):
        assert held.ids == ["a", "b", "c"] and held.path is None
        np.testing.assert_array_equal(held.targets["gap"], [1, 2, np.nan])
        assert_same_graph(held[1], graphs(3)[1])
    with pytest.raises(InputError, match="ids has the shape"):
        GraphStore.from_graphs(graphs(3), ids=["a"])
    with pytest.raises(InputError, match="gap has the shape"):
        GraphStore.from_graphs(graphs(3), targets={"gap": [1]})
    with pytest.raises(InputError, match="at least one graph"):
        GraphStore.from_graphs([])
    with pytest.raises(InputError, match="Graph 1 could not be built"):
        GraphStore.from_graphs([graphs(1)[0], InputError("no atoms")])


def test_chunks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare(records(30), tmp_path / "whole")
    monkeypatch.setattr(store_module, "_CHUNK_ATOMS", 7)
    seen: list[int] = []
    parts = prepare(records(30), tmp_path / "parts", progress=seen.append)
    assert seen == list(range(1, 32))
    assert parts.ids == whole.ids and parts.rejected == whole.rejected
    for name in store_module.DTYPES:
        assert (tmp_path / "whole" / f"{name}.npy").read_bytes() == (tmp_path / "parts" / f"{name}.npy").read_bytes()


def test_a_store_may_have_more_targets_than_a_process_may_have_files_open(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="no limits of open files here")
    rows = [Record(str(k), crystal(k), {f"t{j}": float(j + k) for j in range(300)}) for k in range(2)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))  # as a Mac has it
    try:
        store = prepare(rows, tmp_path / "s")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert store.targets["t299"].tolist() == [299, 300] and len(store.targets) == 300


def test_records_are_read_as_they_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_CHUNK_CRYSTALS", 4)
    alive = most = 0
    add = store_module.StoreWriter.add

    def counted(writer: object, chunk: list[Record], parameters: GraphParameters) -> None:
        nonlocal alive, most
        most, alive = max(most, alive), 0
        add(writer, chunk, parameters)

    def stream():
        nonlocal alive
        for record in records(40):
            alive += 1
            yield record

    monkeypatch.setattr(store_module.StoreWriter, "add", counted)
    assert len(prepare(stream(), tmp_path / "store")) == 40
    assert most <= 4


def test_a_crystal_without_a_graph_is_rejected_alone(tmp_path: Path) -> None:
    lonely = Record("lonely", Crystal(40 * np.eye(3), np.zeros((1, 3)), np.array([1], np.int32)), {"gap": 9.0})
    store = prepare([*records(3), lonely, Record("last", crystal(5), {"gap": 5.0})], tmp_path / "store")
    assert store.ids == ["c0", "c1", "c2", "last"]
    assert [id for id, _ in store.rejected] == ["bad", "lonely"]
    assert "neighbour" in store.rejected[1][1]
    assert store.targets["gap"].tolist() == [0.0, 1.0, 2.0, 5.0]
    assert_same_graph(store[3], build_graph(crystal(5)))


def test_nothing_usable(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="None of the 1 inputs of the input became a graph; bad has no atoms"):
        prepare([records(1)[-1]], tmp_path / "store")
    with pytest.raises(InputError, match="no structures in the input"):
        prepare([], tmp_path / "store")
    with pytest.raises(InputError, match=r"gone\.parquet does not exist"):
        prepare(tmp_path / "gone.parquet", tmp_path / "store")
    with pytest.raises(InputError, match="A text of several lines is no path"):
        prepare("data_x\n" * 1000, tmp_path / "store")
    for wrong in (6.0, {"radius": 6.0}):
        with pytest.raises(InputError, match=r"parameters is .*6\.0.*; give GraphParameters\(radius="):
            prepare(records(), tmp_path / "store", wrong)
    with pytest.raises(InputError, match="graph; c0 has no target mass; it has gap, e"):
        prepare(records(), tmp_path / "store", targets=["mass"])
    assert listing(tmp_path) == []


def test_one_of_several_targets_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No crystal of the input has a value of the target mass"):
        prepare(records(), tmp_path / "store", targets=["gap", "mass"])
    assert listing(tmp_path) == []


def test_a_failing_write_leaves_nothing_and_spares_the_old_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(records(3), tmp_path / "store")

    def broken():
        yield from records(8)
        raise RuntimeError("the disk is full")

    for path in ("store", "new"):
        with pytest.raises(RuntimeError, match="the disk is full"):
            prepare(broken(), tmp_path / path)
    monkeypatch.setattr(store_module.StoreWriter, "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(records(8), tmp_path / "store")
    assert listing(tmp_path) == ["store"]
    assert open_store(tmp_path / "store").ids == ["c0", "c1", "c2"]


def table(path: Path, count: int = 6) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = [crystal(i) for i in range(count)]
    columns = {
        "material_id": [f"c{i}" for i in range(count)],
        "lattice": [c.lattice.ravel().tolist() for c in made],
        "frac_coords": [c.frac_coords.ravel().tolist() for c in made],
        "atomic_numbers": [c.numbers.tolist() for c in made],
        "gap": [float(i) for i in range(count)],
    }
    pq.write_table(pa.table(columns), path)
    return path


def test_the_same_source_is_prepared_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    source, path = table(tmp_path / "t.parquet"), tmp_path / "store"

    def stamp(**options: object) -> int:
        prepare(source, path, **options)
        return (path / "metadata.json").stat().st_ino

    first = stamp()
    with caplog.at_level(logging.INFO, logger="srcgcnn_fast"):
        assert stamp() == first
    assert "prepared already" in caplog.text
    second = stamp(parameters=GraphParameters(max_neighbors=5))
    assert second != first and open_store(path).parameters.max_neighbors == 5
    third = stamp(targets=["gap"])
    assert third != second and stamp(targets="gap") == third
    monkeypatch.setattr(store_module, "__version__", "another")
    assert stamp(targets="gap") != third
    before = source.stat()
    table(source, 7)
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))  # a copy that keeps the time, of another size
    stamp(targets=["gap"])
    assert len(open_store(path)) == 7
    (path / "sender.npy").write_bytes(b"")
    stamp(targets=["gap"])
    assert len(open_store(path)) == 7
    assert listing(tmp_path) == ["store", "t.parquet"]


def interrupt(source: Path, path: Path, after: int, **options: object) -> None:
    def stop(done: int) -> None:
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, path, progress=stop, **options)


def assert_same_files(found: Path, expected: Path) -> None:
    for name in (*store_module.DTYPES, "targets"):
        assert (found / f"{name}.npy").read_bytes() == (expected / f"{name}.npy").read_bytes(), name
    assert (found / "rejected.jsonl").read_bytes() == (expected / "rejected.jsonl").read_bytes()
    open_store(found).verify()


@pytest.mark.parametrize("kind", ["table", "folder"])
def test_an_interrupted_preparation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    pytest.importorskip("pyarrow")
    structure = pytest.importorskip("pymatgen.core").Structure
    source = tmp_path / "source"
    if kind == "table":
        source = table(tmp_path / "source.parquet", 30)
    else:
        source.mkdir()
        for i in range(30):
            made = structure(crystal(i).lattice, crystal(i).numbers, crystal(i).frac_coords)
            (source / f"c{i:02}.cif").write_text(made.to(fmt="cif") if i % 7 else "broken")
    prepare(source, tmp_path / "whole")
    monkeypatch.setattr(store_module, "_CHUNK_CRYSTALS", 4)
    interrupt(source, tmp_path / "parts", after=14)
    partial = tmp_path / ".parts.partial"
    for name in ("sender.npy", "rejected.jsonl"):
        with (partial / name).open("ab") as file:
            file.write(b"half a chunk that a killed process had written" * 100)
    interrupt(source, tmp_path / "parts", after=25)
    seen: list[int] = []
    prepare(source, tmp_path / "parts", progress=seen.append)
    assert seen == list(range(25, 31))  # 24 inputs in whole chunks were there
    assert_same_files(tmp_path / "parts", tmp_path / "whole")
    assert not partial.exists()


def test_an_interrupted_preparation_that_is_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(store_module, "_CHUNK_CRYSTALS", 4)
    source = table(tmp_path / "source.parquet", 12)
    interrupt(source, tmp_path / "store", after=9)
    sender = tmp_path / ".store.partial" / "sender.npy"
    sender.write_bytes(sender.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"sender\.npy is cut short"):
        prepare(source, tmp_path / "store")
    assert len(prepare(source, tmp_path / "store")) == 12


def test_another_preparation_does_not_go_on_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(store_module, "_CHUNK_CRYSTALS", 4)
    source = table(tmp_path / "source.parquet", 20)
    interrupt(source, tmp_path / "store", after=14)
    seen: list[int] = []
    store = prepare(source, tmp_path / "store", GraphParameters(max_neighbors=5), progress=seen.append)
    assert seen[0] == 1 and len(store) == 20 and store.parameters.max_neighbors == 5


@pytest.mark.skipif(sys.platform == "win32", reason="needs file locks")
def test_one_process_prepares_a_store(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    source, path = table(tmp_path / "source.parquet", 5), tmp_path / "store"
    calls: list[dict[str, Any]] = [{"source": source}, {"source": records(2)}, {"source": records(2), "append": True}]

    def again(done: int) -> None:
        for call in calls[: 3 if path.exists() else 2]:
            with pytest.raises(InputError, match="is being prepared by another process; wait for it"):
                prepare(path=path, **{"parameters": GraphParameters(max_neighbors=7)} | call | changed)

    changed: dict[str, Any] = {}
    (tmp_path / ".store.lock").touch()  # of a process that was killed
    assert len(prepare(source, path, progress=again)) == 5
    changed["parameters"] = None
    calls[0]["targets"] = ["gap"]
    assert len(prepare(records(3), path, progress=again, append=True)) == 8
    assert listing(tmp_path) == ["source.parquet", "store"]


def test_an_append_takes_what_another_has_appended_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    first, second, third = (table(tmp_path / f"{name}.parquet", n) for name, n in (("a", 2), ("b", 3), ("c", 4)))
    path, alone = tmp_path / "store", store_module.alone
    prepare(first, path)

    def late(folder: Path) -> Any:
        monkeypatch.setattr(store_module, "alone", alone)
        prepare(second, path, append=True)
        return alone(folder)

    for source, size in ((third, 9), (second, 9), (third, 9)):  # those that are there are not added again
        monkeypatch.setattr(store_module, "alone", late)
        assert len(prepare(source, path, append=True)) == size
    store = prepare(records(1)[:1], path, append=True)
    assert store.ids == ["c0", "c1", "c0", "c1", "c2", "c0", "c1", "c2", "c3", "c0"]


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_a_kill_while_a_store_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: int, in_memory: bool
) -> None:
    """Before, between and after the renames: the old store is there, or the new one; no file is read again."""
    pytest.importorskip("pyarrow")
    path, source = tmp_path / "store", table(tmp_path / "t.parquet", 4)
    prepare(records(2), path)
    rename, done = os.rename, []

    def killed(source: Path, target: Path) -> None:
        if len(done) == renamed:
            raise KeyboardInterrupt
        done.append(target)
        rename(source, target)

    given = records(4)[:4] if in_memory else source
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", killed)
        prepare(given, path)
    assert path.exists() == (renamed != 1)
    store = open_store(path)
    store.verify()
    assert store.ids == ["c0", "c1", "c2", "c3"][: 4 if renamed == 2 else 2]
    assert path.exists()
    seen: list[int] = []
    again = prepare(given, path, progress=seen.append)
    again.verify()
    assert again.ids == ["c0", "c1", "c2", "c3"] and again.targets["gap"].tolist() == [0, 1, 2, 3]
    assert seen == ([1, 2, 3, 4] if in_memory else [])
    if renamed < 2 or in_memory:  # else nobody has written there again
        assert listing(tmp_path) == ["store", "t.parquet"]


def test_a_copy_of_a_store_with_such_a_name_as_temporary_files_have_is_kept(tmp_path: Path) -> None:
    prepare(records(), tmp_path / "s").verify()
    os.rename(tmp_path / "s", tmp_path / ".s.previous")
    (tmp_path / ".s.12345678" / "s").mkdir(parents=True)  # of a process that was killed
    prepare(records(), tmp_path / "s")
    assert listing(tmp_path) == [".s.previous", "s"]
    open_store(tmp_path / ".s.previous").verify()


def test_appending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(store_module, "_CHUNK_CRYSTALS", 4)
    first, second = table(tmp_path / "a.parquet", 6), table(tmp_path / "b.parquet", 9)
    path = tmp_path / "store"
    with pytest.raises(InputError, match="nothing can be appended; prepare it first"):
        prepare(first, path, append=True)
    prepare(first, path)
    with pytest.raises(InputError, match="append with the same"):
        prepare(second, path, GraphParameters(radius=6.0), append=True)
    interrupt(second, path, after=6, append=True)
    assert len(open_store(path)) == 6
    for _ in range(2):  # the second time it is there
        store = prepare(second, path, append=True)
        assert store.ids == [f"c{i}" for i in (*range(6), *range(9))]
    table(first, 7)
    with pytest.raises(InputError, match=r"a\.parquet is in .*store already and has changed since; prepare the whole"):
        prepare(first, path, append=True)
    store = prepare([*records(3), Record("last", crystal(5), {"mass": 5.0})], path, append=True)
    store.verify()
    assert len(store) == 19 and [id for id, _ in store.rejected] == ["bad"]
    for source, size in ((second, 19), (records(1)[:1], 20), (records(1)[:1], 21), (second, 21)):  # that is still known
        assert len(prepare(source, tmp_path / "store", append=True)) == size
    for start in (records(2)[:2], records(1)[:1]):  # an interrupted append does not go on beside other objects
        prepare(start, tmp_path / "objects")
        interrupt(second, tmp_path / "objects", after=6, append=True)
    for _ in range(2):
        assert len(prepare(second, tmp_path / "objects", append=True)) == 10
    assert len(prepare(second, tmp_path / "objects")) == 9
    assert np.isnan(store.targets["mass"][:18]).all() and store.targets["mass"][18] == 5.0
    assert store.targets["gap"][:15].tolist() == [*range(6), *range(9)]
    for i, seed in ((0, 0), (6, 0), (14, 8), (18, 5)):
        assert_same_graph(store[i], build_graph(crystal(seed)))


def test_appending_nothing_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    first, path = table(tmp_path / "a.parquet", 3), tmp_path / "store"
    prepare(first, path)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.cif").write_text("")
    for _ in range(2):  # and is not taken for done
        with pytest.raises(InputError, match=r"None of the 1 inputs of .*more became a graph; a\.cif is empty"):
            prepare(tmp_path / "more", path, append=True)
        assert len(open_store(path)) == 3 and not open_store(path).rejected
    with pytest.raises(InputError, match="has no target mass; it has gap"):
        prepare(first, path, append=True, targets=["mass"])


def test_a_file_below_the_folder_has_changed(tmp_path: Path) -> None:
    write = pytest.importorskip("ase.io").write
    from ase.build import bulk

    (tmp_path / "data" / "part").mkdir(parents=True)
    (tmp_path / "data" / "id_prop.csv").write_text("part/a,1\n")
    for element, number in (("Cu", 29), ("Al", 13)):
        write(tmp_path / "data" / "part" / "a.cif", bulk(element))
        store = prepare(tmp_path / "data", tmp_path / "data" / "store")
        assert store[0].numbers.tolist() == [number]
    for name in (".store.lock", "nohup.out", "notes.txt"):  # of a process that was killed, and others: no crystals
        (tmp_path / "data" / name).write_text("more")
    seen: list[int] = []
    prepare(tmp_path / "data", tmp_path / "data" / "store", progress=seen.append)
    assert not seen
    write(tmp_path / "data" / ".b.cif", bulk("Ni"))  # not read without id_prop.csv
    (tmp_path / "data" / "id_prop.csv").write_text("part/a,1\n.b,2\n")
    assert len(prepare(tmp_path / "data", tmp_path / "data" / "store")) == 2
    write(tmp_path / "data" / ".b.cif", bulk("Au"))
    assert prepare(tmp_path / "data", tmp_path / "data" / "store")[1].numbers.tolist() == [79]


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_a_link_to_a_store_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "large")
    assert len(prepare(records(3), tmp_path / "link")) == 3
    assert (tmp_path / "link").is_symlink() and len(open_store(tmp_path / "large")) == 3
    monkeypatch.chdir(tmp_path / "large")
    with pytest.raises(InputError, match="run it from another directory"):
        prepare(records(2), ".")
    assert len(open_store(".")) == 3 and listing(tmp_path) == ["large", "link"]


def test_a_store_that_is_replaced_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store"
    prepare([Record(f"c{i}", crystal(0)) for i in range(3)], path)
    read, done = store_module._read_metadata, []

    def replaced(folder: Path) -> dict:
        metadata = read(folder)
        if not done:
            done.append(folder)
            prepare([Record(f"d{i}", crystal(0)) for i in range(3)], path)  # of the same sizes
        return metadata

    monkeypatch.setattr(store_module, "_read_metadata", replaced)
    store = open_store(path)
    store.verify()
    assert list(store.ids) == ["d0", "d1", "d2"]


def test_a_pickled_store_is_no_other(tmp_path: Path) -> None:
    """As a worker process opens it, with the indices of the old one."""
    data = pickle.dumps(prepare(records(3), tmp_path / "store"))
    assert pickle.loads(data).ids == ["c0", "c1", "c2"]
    prepare(records(8)[6:], tmp_path / "store")
    with pytest.raises(InputError, match="store was replaced since it was opened; open it again"):
        pickle.loads(data)


def test_checksums_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_IDS", 2)
    names = ["a", "", "Brückmann", "超", "a"]
    store = prepare([Record(name, crystal(i)) for i, name in enumerate(names)], tmp_path / "store")
    assert store.ids == names and store.ids[-2:] == names[-2:] and store.ids != names[:4]
    for cut in (slice(0, 2), slice(1, 3), slice(0, None), slice(3, 1), slice(None, None, 2), slice(None, None, -1)):
        assert store.ids[cut] == names[cut]
    monkeypatch.setattr(type(store.ids), "_decoded", lambda *_: "one by one")
    assert list(GraphStore.from_graphs(graphs(5)).ids) == ["0", "1", "2", "3", "4"]
    store.verify()
    set_bytes(tmp_path / "store", "distance.npy", np.load(tmp_path / "store" / "distance.npy") + 1)
    with pytest.raises(InputError, match=r"damaged .distance.npy has another checksum"):
        open_store(tmp_path / "store").verify()
    metadata = tmp_path / "store" / "metadata.json"
    content = json.loads(metadata.read_text())
    content["checksums"]["distamce"] = content["checksums"].pop("distance")
    metadata.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"damaged .distamce.npy has another checksum"):
        open_store(tmp_path / "store").verify()


def test_what_a_file_manager_left_in_the_place_of_a_store(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    for _ in range(2):
        (tmp_path / "store" / ".DS_Store").write_bytes(b"icons")
        assert len(prepare(records(), tmp_path / "store")) > 0


def test_foreign_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metadata.json").write_text('{"format": "other", "version": 1}')
    (tmp_path / "file").write_text("text")
    for name in ("mine", "other", "file"):
        with pytest.raises(InputError, match=f"{name} exists and is not a store"):
            prepare(records(), tmp_path / name)
        with pytest.raises(InputError, match=f"{name} is not a store of prepared graphs"):
            open_store(tmp_path / name)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    with pytest.raises(InputError, match="gone does not exist"):
        open_store(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    assert len(prepare(records(), tmp_path / "empty")) == 12


def test_a_store_where_a_command_runs_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    prepare(records(), store)
    (store / "below").mkdir()
    for here in (store, store / "below"):
        monkeypatch.chdir(here)
        with pytest.raises(InputError, match="is where this command runs, and would be replaced"):
            prepare(records(), store)
    assert len(open_store(store)) == 12


def damage_metadata(folder: Path, **changes: object) -> None:
    metadata = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps({**metadata, **changes}))


def spoil_header(folder: Path, name: str, before: bytes, after: bytes) -> None:
    content = (folder / name).read_bytes()
    assert content.count(before) == 1 and len(before) == len(after)
    (folder / name).write_bytes(content.replace(before, after))


def set_bytes(folder: Path, name: str, value: np.ndarray) -> None:
    size = (folder / name).stat().st_size
    np.save(folder / name, value)
    assert (folder / name).stat().st_size == size


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "sender.npy").unlink(), "damaged .sender.npy is missing"),
        (
            lambda f: (f / "distance.npy").write_bytes((f / "distance.npy").read_bytes()[:-4]),
            "damaged .distance.npy is",
        ),
        (lambda f: (f / "metadata.json").write_text("{"), "is not a store"),
        (lambda f: damage_metadata(f, version=99), "has the store format 99, this package reads 3"),
        (lambda f: damage_metadata(f, crystals=1), "is damaged"),
        (lambda f: damage_metadata(f, sizes=None), "is damaged"),
        (lambda f: damage_metadata(f, parameters={"colour": 3}), "is damaged"),
        (lambda f: damage_metadata(f, targets=[["gap"], ["e"]]), "is damaged"),
        (lambda f: set_bytes(f, "row_count.npy", np.zeros(12, np.int64)), "is damaged"),
        (lambda f: set_bytes(f, "degree.npy", 0 * np.load(f / "degree.npy")), "is damaged"),
        (
            lambda f: set_bytes(f, "row_count.npy", np.load(f / "row_count.npy") + np.repeat([99, -99], 6)),
            "counts below 0",
        ),
        (lambda f: spoil_header(f, "weight.npy", b"), }", b"), ;"), r"is damaged \((Token|Syntax)Error"),
        (lambda f: spoil_header(f, "targets.npy", b"<f8", b">f8"), "targets.npy or degree.npy does not fit"),
    ],
)
def test_damaged_stores(tmp_path: Path, spoil: object, said: str) -> None:
    prepare(records(), tmp_path / "store")
    spoil(tmp_path / "store")
    with pytest.raises(InputError, match=said) as caught:
        open_store(tmp_path / "store")
    assert str(tmp_path / "store") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("id_text.npy", lambda x: x | 0x80, "an id is no text in UTF-8"),
        ("id_size.npy", lambda x: x[::-1].copy(), "an id is no text in UTF-8"),
        ("rejected.jsonl", lambda x: x[:-3], "rejected.jsonl is not as it was"),
        ("rejected.jsonl", lambda _: "", "rejected.jsonl is not as it was"),
    ],
)
def test_damaged_names_are_one_sentence_where_they_are_read(
    tmp_path: Path, name: str, damage: Callable[[Any], Any], said: str
) -> None:
    folder = tmp_path / "store"
    prepare([Record("a", crystal(0)), Record("é", crystal(1)), Record("bad", None, {}, "no.")], folder)
    if name.endswith(".npy"):
        set_bytes(folder, name, damage(np.load(folder / name)))
    else:
        (folder / name).write_text(damage((folder / name).read_text()))
    store = open_store(folder)
    of_names = [lambda: store.ids[0], lambda: store.ids[:], lambda: list(store.ids)]
    for read in of_names if name.endswith(".npy") else [lambda: store.rejected]:
        with pytest.raises(InputError, match=f"store is damaged.* .{said}.; .*prepare it again"):
            read()


def test_unwritable_parent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Cannot write"):
        prepare(records(), tmp_path / "file" / "store")


def test_a_store_that_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that was read from a file is lost."""
    pytest.importorskip("pyarrow")

    def busy(source: Path, target: Path) -> None:
        raise OSError(16, "Device or resource busy")

    source = table(tmp_path / "t.parquet", 4)
    for given in (records(), source):
        with monkeypatch.context() as patch, pytest.raises(InputError, match=r"Cannot write .*store: Device or res"):
            patch.setattr(os, "rename", busy)
            prepare(given, tmp_path / "store")
    assert listing(tmp_path) == [".store.partial", "t.parquet"]
    seen: list[int] = []
    assert len(prepare(source, tmp_path / "store", progress=seen.append)) == 4 and not seen


def test_others_may_read_a_store_that_may_read_its_neighbours(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "neighbour").mkdir()
    for given in (records(2), table(tmp_path / "t.parquet", 2)):
        prepare(given, tmp_path / "store")
        assert (tmp_path / "store").stat().st_mode == (tmp_path / "neighbour").stat().st_mode


def test_loader_workers_share_a_store(tmp_path: Path) -> None:
    store = prepare(records(), tmp_path / "store")
    loader = torch.utils.data.DataLoader(
        [0, 1], num_workers=1, collate_fn=store.batch, batch_size=2, multiprocessing_context="spawn"
    )
    (batch,) = loader
    assert_same_batch(batch, store.batch([0, 1]))


def test_materials_project_sample(data_dir: Path, tmp_path: Path) -> None:
    store = prepare(data_dir / "mp" / "small_1500.parquet", tmp_path / "store")
    assert len(store) == 1500 and not store.rejected
    assert set(store.targets) == {"formation_energy_per_atom", "band_gap"}
    assert store.n_atoms / store.n_rows > 2.3
    chosen = np.random.default_rng(0).choice(1500, 300, replace=False)
    assert_same_batch(store.batch(chosen), collate([store[i] for i in chosen]))
    assert int(store.batch(chosen).weight.sum()) == store.batch(chosen).atom_class.shape[0]


@pytest.mark.parametrize(
    ("id", "reason", "says"),
    [
        ("a", "a.cif is empty.", "a.cif is empty."),
        ("a", "The lattice is bad.", "a: The lattice is bad."),
        ("1", "1 of 6 atoms has no neighbour.", "1: 1 of 6 atoms has no neighbour."),
    ],
)
def test_a_rejected_input_is_named_once(id: str, reason: str, says: str) -> None:
    assert name_it(id, reason) == says
