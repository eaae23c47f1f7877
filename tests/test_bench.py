"""The short benchmark: what it measures and writes, and that it does not report what is wrong."""

from __future__ import annotations

import json

import pytest
import torch

import srcgcnn_fast as sf
from srcgcnn_fast.bench import bench, report
from srcgcnn_fast.bench.ceilings import Ceilings, floor
from srcgcnn_fast.cli import main
from srcgcnn_fast.training.alloys import write_alloys


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(report, "_SECONDS", 0.0)


def assert_complete(out) -> dict:
    """Both pictures are there; every backend is, with both models and both kinds of work."""
    for name in ("bench.png", "roofline.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    document = json.loads((out / "bench.json").read_text())
    usable = [name for name in ("reference", "cpu") if sf.backends()[name].available]
    cases = {(row["model"], row["work"], row["backend"], row["graph"]) for row in document["rows"]}
    works = ("inference", "training step")
    expected = {(m, w, b, "same graph") for m in ("CGCNN", "SR-CGCNN") for w in works for b in usable}
    expected |= {(m, w, usable[-1], "native") for m in ("CGCNN", "SR-CGCNN") for w in works}
    assert cases == expected
    assert all(row["milliseconds"] > 0 for row in document["rows"])
    return document


def test_generated_alloys(tmp_path):
    before = torch.get_num_threads()
    table = bench(out=tmp_path, threads=1, crystals=24)
    assert torch.get_num_threads() == before
    document = assert_complete(tmp_path)
    assert len(table.splitlines()) == len(document["rows"]) + 5
    assert document["workload"].startswith("24 generated alloys")


def test_command_takes_a_file_and_a_store(tmp_path, capsys):
    source = write_alloys(tmp_path / "alloys.parquet", 20)
    sf.prepare(source, tmp_path / "store")
    for given in (source, tmp_path / "store"):
        assert main(["bench", str(given), "--out", str(tmp_path / "out"), "--threads", "1"]) == 0
        assert "20 crystals" in capsys.readouterr().out
        assert_complete(tmp_path / "out")


def test_different_numbers_are_not_reported():
    good, bad = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 1.1])
    report._gate("CGCNN", "inference", {("reference", "same graph"): good, ("cpu", "same graph"): good + 1e-6})
    for wrong in (bad, bad * torch.nan):
        with pytest.raises(report.WrongNumbersError, match=r"cpu \(native\) differ"):
            report._gate("CGCNN", "inference", {("reference", "same graph"): good, ("cpu", "native"): wrong})


def test_the_command_says_in_a_sentence_that_numbers_differ(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "_gate", lambda *found, gate=report._gate: gate(*found[:2], spoilt(found[2])))
    assert main(["bench", "--out", str(tmp_path), "--threads", "1"]) == 1
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and told.err.startswith("error: reference (same graph) and ") and not told.out
    assert "differ by" in told.err and "no time is reported" in told.err
    assert not list(tmp_path.iterdir())
    with pytest.raises(report.WrongNumbersError):
        main(["bench", "--out", str(tmp_path), "--threads", "1", "--debug"])


def spoilt(results: dict) -> dict:
    last = list(results)[-1]
    return results | {last: 1.01 * results[last]}


def test_floor_counts(make_batch):
    """12 edges per row, F = 64, 100 GFLOP/s: a product with (64, 256) and 64 gates of 18 multiply-adds per edge."""
    ceilings = Ceilings(flops=1e11, bandwidth=1e10, exponentials=1e9)
    batch = make_batch("plain")
    least = floor(batch, 64, False, ceilings)
    assert least.nodes == pytest.approx(2 * 64 * 256 / 12 / 100)
    assert least.gates == pytest.approx(64 * 36 / 100)
    assert least.memory == pytest.approx(8 / 10)
    assert least.total == least.nodes + least.gates
    assert floor(batch, 64, True, ceilings).nodes == pytest.approx(3 * least.nodes)


def test_bad_requests(tmp_path):
    with pytest.raises(sf.InputError, match="threads must be at least 1"):
        bench(out=tmp_path, threads=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(sf.InputError, match="Cannot write"):
        bench(out=tmp_path / "file" / "out", threads=1, crystals=2)
    (tmp_path / "POSCAR").write_text("nothing\n")
    with pytest.raises(sf.InputError, match="no readable crystal"):
        bench(tmp_path / "POSCAR", tmp_path / "out", threads=1)
