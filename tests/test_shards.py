"""Shards of Parquet files: one row for each input, whatever happens to a worker."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import srcgcnn_fast as sf
from srcgcnn_fast import shards
from srcgcnn_fast.cli import main
from srcgcnn_fast.errors import InputError
from srcgcnn_fast.graph.store import join_stores

pandas = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")


def table(rows: int, seed: int = 0):
    """Rows of random crystals; every seventh is wrong in a way of its own."""
    rng = np.random.default_rng(seed)
    made = []
    for k in range(rows):
        n = int(rng.integers(2, 6))
        numbers = rng.integers(1, 101, n)
        if k % 7 == 3:
            numbers[0] = 0 if k % 2 else 101
        lattice = (np.eye(3) * rng.uniform(4, 6)).ravel()
        made.append((f"c{k}", lattice.tolist(), rng.random(3 * n).tolist(), numbers.tolist(), float(k)))
    return pandas.DataFrame(made, columns=["material_id", "lattice", "frac_coords", "atomic_numbers", "gap"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files of 40, 1 and 30 rows, the first in row groups of 7."""
    target = tmp_path / "in"
    target.mkdir()
    whole = table(71)
    whole[:40].to_parquet(target / "a.parquet", row_group_size=7)
    whole[40:41].to_parquet(target / "b.parquet")
    whole[41:].to_parquet(target / "c.parquet")
    return target


def model() -> sf.CGCNN:
    torch.manual_seed(0)
    made = sf.CGCNN(n_conv=1, atom_fea_len=8, h_fea_len=8).eval()
    made.metadata.targets = ("gap",)
    return made


def in_this_process(monkeypatch: pytest.MonkeyPatch, after: int | None = None) -> list[int]:
    """Work off the shards here instead of in workers; KeyboardInterrupt ``after`` so many. Returns those done."""
    done: list[int] = []

    def run(kind, arguments, given, workers) -> None:
        worker = kind(*arguments)
        for shard in given:
            if after is not None and len(done) == after:
                raise KeyboardInterrupt
            worker(shard._asdict())
            done.append(shard.number)

    monkeypatch.setattr(shards, "_run", run)
    monkeypatch.setattr(shards, "_one_thread", lambda: None)
    return done


def result(out: Path):
    parts = sorted(out.glob("*.parquet"))
    return pandas.concat([pandas.read_parquet(part) for part in parts], ignore_index=True)


def assert_is_prediction(found, source: Path) -> None:
    expected = pandas.concat([sf.predict(model(), x) for x in sorted(source.glob("*.parquet"))], ignore_index=True)
    assert list(found["id"]) == list(expected["id"]) == [f"c{k}" for k in range(71)]
    np.testing.assert_allclose(found["gap"], expected["gap"], rtol=0, atol=1e-6)
    assert found["error"].fillna("").tolist() == expected["error"].fillna("").tolist()
    assert found["error"].dtype == "string"
    assert int(found["error"].notna().sum()) == 10


def test_a_folder_names_its_rows_as_its_shards_do(folder: Path) -> None:
    whole = pandas.concat([pandas.read_parquet(path) for path in sorted(folder.iterdir())])
    assert [r.id for r in sf.graph.read_inputs(folder)] == list(whole["material_id"])  # that of the one row, too
    for path in sorted(folder.iterdir()):
        pandas.read_parquet(path).drop(columns="material_id").to_parquet(path)
    names = [f"a-{k}" for k in range(40)] + ["b-0"] + [f"c-{k}" for k in range(30)]
    assert [r.id for r in sf.graph.read_inputs(folder)] == names
    assert [r.id for path in sorted(folder.iterdir()) for r in sf.graph.read_inputs(path)] == names
    assert [r.id for shard in shards._shards(folder, 9) for r in shard.records(())] == names
    assert [r.id for r in sf.graph.read_inputs([folder / "b.parquet"])] == ["b-0"]
    assert [r.id for r in sf.graph.read_inputs({"mine": folder / "b.parquet"})] == ["mine"]


def test_rows_of_a_shard(folder: Path) -> None:
    made = shards._shards(folder, 9)
    assert [(s.first, s.rows) for s in made[:5]] == [(0, 9), (9, 9), (18, 9), (27, 9), (36, 4)]
    read = [record.id for shard in made for record in shard.records(())]
    assert read == [f"c{k}" for k in range(71)]


def test_an_interrupted_prediction_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    first = in_this_process(monkeypatch, after=3)
    with pytest.raises(KeyboardInterrupt):
        sf.predict_shards(model(), folder, out, rows=9)
    second = in_this_process(monkeypatch)
    assert sf.predict_shards(model(), folder, out, rows=9) == 71
    assert first == [0, 1, 2] and second == [3, 4, 5, 6, 7, 8, 9]
    assert_is_prediction(result(out), folder)
    assert in_this_process(monkeypatch) == [] and sf.predict_shards(model(), folder, out, rows=9) == 71
    assert len(pandas.read_parquet(out)) == 71  # as one data set
    others = sf.CGCNN(1, 8, 8, step=0.3), model()  # the same weights, to other distances and elements
    others[0].load_state_dict(model().state_dict())
    others[0].metadata.targets = ("gap",)
    others[1].element_table = 2 * others[1].element_table
    for other, rows in ((model(), 10), (others[0], 9), (others[1], 9)):
        with pytest.raises(InputError, match="result of another call"):
            sf.predict_shards(other, folder, out, rows=rows)
    with pytest.raises(InputError, match="holds something else"):
        sf.predict_shards(model(), folder, folder, rows=9)


def test_settings_of_the_graphs_are_handed_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in folder.iterdir():
        path.unlink()
    lone = [("far", (30 * np.eye(3)).ravel().tolist(), [0.0, 0.0, 0.0], [8])]
    columns = ["material_id", "lattice", "frac_coords", "atomic_numbers"]
    pandas.DataFrame(lone, columns=columns).to_parquet(folder / "a.parquet")
    in_this_process(monkeypatch)
    for isolated in (None, "keep"):
        out = tmp_path / str(isolated)
        assert sf.predict_shards(model(), folder, out, isolated=isolated) == 1
        expected = sf.predict(model(), folder / "a.parquet", isolated=isolated)
        assert result(out)["error"].isna().tolist() == expected["error"].isna().tolist() == [isolated == "keep"]


def test_a_store_of_shards_is_that_of_the_whole(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "whole.parquet"
    table(71).to_parquet(whole, row_group_size=20)
    in_this_process(monkeypatch, after=2)
    with pytest.raises(KeyboardInterrupt):
        sf.prepare_shards(whole, tmp_path / "s", rows=9)
    in_this_process(monkeypatch)
    found, expected = sf.prepare_shards(whole, tmp_path / "s", rows=9), sf.prepare(whole, tmp_path / "t")
    found.verify()
    assert list(found.ids) == list(expected.ids) and found.rejected == expected.rejected and len(found.rejected) == 10
    assert np.array_equal(found.targets["gap"], expected.targets["gap"])
    a, b = found.batch(np.arange(len(found))), expected.batch(np.arange(len(expected)))
    for name in ("numbers", "weight", "sender", "distance", "row_ptr", "crystal_ptr", "atom_class"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert not (tmp_path / "s.parts").exists()


def test_an_end_while_the_parts_are_removed_is_no_end_of_the_call(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(monkeypatch)
    remove = shutil.rmtree

    def interrupted(path: Path, **options: bool) -> None:
        if plan := list(path.rglob("_shards.json")):
            plan[0].unlink()
            raise KeyboardInterrupt
        remove(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sf.prepare_shards(folder, tmp_path / "s", rows=9)
    assert len(sf.prepare_shards(folder, tmp_path / "s", rows=9)) == 61
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in", "s"]


def test_a_model_in_bfloat16_is_told_from_another(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(monkeypatch)
    assert sf.predict_shards(model().bfloat16(), folder, tmp_path / "out") == 71
    with pytest.raises(InputError, match="result of another call"):
        sf.predict_shards(model(), folder, tmp_path / "out")


def spoilt(folder: Path, kind: str) -> None:
    """A file of the folder, as an interrupted copy, a bad disk or another program leave it."""
    file = folder / "a.parquet"
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "lattice":
        pandas.read_parquet(file).drop(columns="lattice").to_parquet(file)
    else:
        column = pytest.importorskip("pyarrow.parquet").read_metadata(file).row_group(2).column(2)
        data, first = bytearray(file.read_bytes()), column.dictionary_page_offset or column.data_page_offset
        data[first : first + column.total_compressed_size] = b"\xff" * column.total_compressed_size
        file.write_bytes(data)


@pytest.mark.parametrize(("kind", "rows"), [("cut", 32), ("lattice", 32), ("page", 71)])
def test_a_damaged_file_costs_what_it_costs_without_shards(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, rows: int
) -> None:
    """The row group that cannot be read, or one row where the file cannot; the rest goes on."""
    spoilt(folder, kind)
    in_this_process(monkeypatch)
    assert sf.predict_shards(model(), folder, tmp_path / "out", rows=9) == rows
    found, expected = result(tmp_path / "out"), sf.predict(model(), folder)
    assert list(found["id"]) == list(expected["id"])
    assert found["error"].fillna("").tolist() == expected["error"].fillna("").tolist()
    assert found["gap"].notna().sum() == {"page": 55}.get(kind, 27)
    store, whole = sf.prepare_shards(folder, tmp_path / "s", rows=9), sf.prepare(folder, tmp_path / "t")
    assert list(store.ids) == list(whole.ids) == list(found["id"][found["error"].isna()])
    assert store.rejected == whole.rejected and len(store.rejected) == found["error"].notna().sum()
    if kind != "page":
        with pytest.raises(InputError, match=r"a\.parquet"):
            sf.predict_shards(model(), folder / "a.parquet", tmp_path / "o")


def test_shards_without_a_target_or_a_crystal_are_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(monkeypatch)
    for name in "abc":
        read = pandas.read_parquet(folder / f"{name}.parquet")
        read["e"] = 1.0 if name == "c" else np.nan
        if name == "b":
            read["atomic_numbers"] = [[0, 0]]
        read.to_parquet(folder / f"{name}.parquet")
    store = sf.prepare_shards(folder, tmp_path / "s", targets=["e", "gap"], rows=9)
    whole = sf.prepare(folder, tmp_path / "t", targets=["e", "gap"])
    assert list(store.ids) == list(whole.ids) and store.rejected == whole.rejected and len(store) == 60
    assert list(store.targets) == ["e", "gap"] and int(np.isfinite(store.targets["e"]).sum()) == 26
    with pytest.raises(InputError, match=r"None of the 3 inputs .* became a graph; a.*no target mass; it has gap, e"):
        sf.prepare_shards(folder, tmp_path / "u", targets="mass", rows=9)


def test_joined_stores_keep_targets_apart(tmp_path: Path) -> None:
    first = sf.prepare([(np.eye(3) * 4, [[0, 0, 0]], [11])], tmp_path / "a")
    table(2).rename(columns={"gap": "energy"}).to_parquet(tmp_path / "x.parquet")
    second = sf.prepare(tmp_path / "x.parquet", tmp_path / "b")
    both = join_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert len(both) == len(first) + len(second) == 3
    np.testing.assert_array_equal(both.targets["energy"], [np.nan, 0.0, 1.0])
    sf.prepare([(np.eye(3) * 4, [[0, 0, 0]], [11])], tmp_path / "d", sf.GraphParameters(radius=6.0))
    with pytest.raises(InputError, match="hold different graphs"):
        join_stores([tmp_path / "a", tmp_path / "d"], tmp_path / "e")


def test_bad_calls(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_this_process(monkeypatch)
    with pytest.raises(InputError, match="does not exist"):
        sf.predict_shards(model(), tmp_path / "no.parquet", tmp_path / "o")
    with pytest.raises(InputError, match="holds no rows"):
        sf.predict_shards(model(), tmp_path, tmp_path / "o")
    with pytest.raises(InputError, match="at least 1"):
        sf.predict_shards(model(), folder, tmp_path / "o", rows=0)
    (tmp_path / "a.xyz").write_text("0\n\n")
    with pytest.raises(InputError, match=r"a\.xyz is not a Parquet file"):
        sf.predict_shards(model(), tmp_path / "a.xyz", tmp_path / "o")
    (folder / "of.parquet").mkdir()  # as other programs leave them; read_inputs takes no such files either
    (folder / "._a.parquet").write_bytes(b"")
    assert {Path(shard.source).name for shard in shards._shards(folder, 9)} == {"a.parquet", "b.parquet", "c.parquet"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="mine exists and is not a store"):
        sf.prepare_shards(folder, tmp_path / "mine")
    assert not (tmp_path / "mine.parts").exists()
    bad = table(7)
    bad["atomic_numbers"] = [[0] * len(x) for x in bad["atomic_numbers"]]
    bad.to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(InputError, match="None of the 7 inputs"):
        sf.prepare_shards(tmp_path / "bad.parquet", tmp_path / "p")


def test_without_ray(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match=r"needs ray.*srcgcnn_fast\[ray\]"):
        sf.predict_shards(model(), folder, tmp_path / "o")


@pytest.mark.slow
def test_a_worker_is_killed_in_the_middle(folder: Path, tmp_path: Path) -> None:
    """Two workers of a cluster on this machine; one is killed when the first shards are there."""
    pytest.importorskip("ray", reason="Ray is not installed (srcgcnn_fast[ray])")
    psutil = pytest.importorskip("psutil")
    out, killed = tmp_path / "out", []

    def kill() -> None:
        while not list(out.glob("*.parquet")):
            time.sleep(0.01)
        for process in psutil.Process().children(recursive=True):
            if "MapWorker" in " ".join(process.cmdline()) and not killed:
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)

    watcher = threading.Thread(target=kill, daemon=True)
    watcher.start()
    assert sf.predict_shards(model(), folder, out, rows=1) == 71
    watcher.join(5)
    assert killed
    assert_is_prediction(result(out), folder)


@pytest.mark.slow
def test_command_line_in_a_cluster_that_runs(folder: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed (srcgcnn_fast[ray])")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        sf.save_model(model(), tmp_path / "model")
        arguments = [str(tmp_path / "model"), str(folder), "--out", str(tmp_path / "cli"), "--ray", "2"]
        assert main(["predict", *arguments]) == 0
        assert_is_prediction(result(tmp_path / "cli"), folder)
        assert main(["prepare", str(folder), str(tmp_path / "s"), "--ray", "2"]) == 0
        assert len(sf.open_store(tmp_path / "s")) == 61
        assert ray.is_initialized()  # not ours to end
    finally:
        ray.shutdown()
