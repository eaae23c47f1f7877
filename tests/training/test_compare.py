"""The comparison: same crystals, same order, the paper's sizes, every file."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from srcgcnn_fast import InputError, predict
from srcgcnn_fast.graph import GraphStore
from srcgcnn_fast.training import compare
from srcgcnn_fast.training.alloys import write_alloys
from srcgcnn_fast.training.compare import FILES, _markdown
from srcgcnn_fast.training.demo import cache_directory, demo


@pytest.fixture(scope="module")
def comparison(alloys, tmp_path_factory):
    return compare(alloys, "energy", out_dir=tmp_path_factory.mktemp("compare"), epochs=2, unit="eV/atom")


def test_sizes_are_the_papers(comparison):
    assert comparison.cgcnn.conv_parameters == 66_432
    assert comparison.sr_cgcnn.conv_parameters == 22_912
    assert comparison.ratios["conv_parameters"] == pytest.approx(0.345, abs=5e-4)
    assert comparison.ratios["mae"] == pytest.approx(comparison.sr_cgcnn.mae / comparison.cgcnn.mae)


def test_every_file_is_written(comparison):
    for name in FILES:
        assert (comparison.out_dir / name).stat().st_size > 0
    for name in ("parity.png", "learning_curves.png"):
        assert (comparison.out_dir / name).read_bytes().startswith(b"\x89PNG")
    table = comparison.table()
    assert table in (comparison.out_dir / "compare.md").read_text()
    assert "66,432" in table and "22,912" in table and "0.345" in table and "MAE (eV/atom)" in table
    report = json.loads((comparison.out_dir / "compare.json").read_text())
    assert report["models"]["SR-CGCNN"]["mae"] == comparison.sr_cgcnn.mae
    assert report["crystals"] == {"train": 128, "val": 16, "test": 16}
    assert not list(comparison.out_dir.glob(".*"))  # no temporary files
    settings, machine = {**report["settings"], "precision": "tf32"}, {**report["machine"], "threads": 3}
    for gpu, says in ((None, "; 3 CPU thread(s), float32. Seconds"), ("H200", "; H200, tf32. Seconds")):
        assert says in _markdown(comparison, {**report, "settings": settings, "machine": {**machine, "gpu": gpu}})


def test_both_were_scored_on_the_same_crystals(comparison):
    first, second = (c.evaluation for c in comparison.contestants)
    assert first.ids == second.ids
    assert np.array_equal(first.target, second.target)
    assert not np.array_equal(first.predicted, second.predicted)
    assert comparison.mean_predictor_mae > 0


def test_only_the_model_differs_between_the_runs(comparison):
    runs = [json.loads((comparison.out_dir / name / "run.json").read_text()) for name in ("cgcnn", "sr_cgcnn")]
    assert {key for key in runs[0] if runs[0][key] != runs[1][key]} == {"model", "hyperparameters"}


def test_repeating_gives_the_same_errors(alloys, comparison, tmp_path):
    again = compare(alloys, "energy", out_dir=tmp_path, epochs=2, unit="eV/atom")
    assert [c.mae for c in again.contestants] == [c.mae for c in comparison.contestants]


def test_without_a_test_part_the_validation_part_is_scored(alloys, tmp_path):
    result = compare(alloys, "energy", out_dir=tmp_path, epochs=1, split=(0.9, 0.1, 0.0))
    assert result.part == "val" and len(result.cgcnn.evaluation.ids) == 16


def test_the_record_of_one_scored_crystal_is_json(alloys, tmp_path):
    compare(alloys, "energy", out_dir=tmp_path, epochs=1, split=(0.8, 0.19, 0.005))
    read = json.loads((tmp_path / "compare.json").read_text(), parse_constant=pytest.fail)  # NaN is none to others
    assert read["crystals"]["test"] == 1 and read["models"]["CGCNN"]["r2"] is None


def test_seed_and_mean_are_those_of_the_runs(alloys, tmp_path):
    result = compare(alloys, "energy", out_dir=tmp_path, epochs=1, seed=3)
    for contestant, name in zip(result.contestants, ("cgcnn", "sr_cgcnn"), strict=True):
        run = json.loads((tmp_path / name / "run.json").read_text())
        assert run["seed"] == run["data_seed"] == 3
        errors = np.abs(contestant.evaluation.target - run["target_mean"])
        assert result.mean_predictor_mae == pytest.approx(errors.mean(), rel=1e-6)


def test_a_directory_that_is_no_run_is_not_removed(alloys, tmp_path):
    (tmp_path / "sr_cgcnn").mkdir()
    (tmp_path / "sr_cgcnn" / "main.py").write_text("mine")
    with pytest.raises(InputError, match="sr_cgcnn holds other files than a run"):
        compare(alloys, "energy", out_dir=tmp_path, epochs=1)
    assert (tmp_path / "sr_cgcnn" / "main.py").read_text() == "mine" and not (tmp_path / "cgcnn").exists()
    (tmp_path / "cgcnn").write_text("mine")
    with pytest.raises(InputError, match="cgcnn is a file, not a run"):
        compare(alloys, "energy", out_dir=tmp_path, epochs=1)


def test_no_table_stays_beside_other_runs(alloys, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for name in (*FILES, "notes.md"):
        (tmp_path / name).write_text("of an earlier comparison")
    monkeypatch.setattr(sys.modules["srcgcnn_fast.training.compare"], "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(alloys, "energy", out_dir=tmp_path, epochs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.md"]


def test_too_few_crystals_are_refused(alloys, tmp_path):
    few = GraphStore.from_graphs([alloys[i] for i in range(12)], targets={"energy": alloys.targets["energy"][:12]})
    with pytest.raises(InputError, match="Only 12 crystals"):
        compare(few, "energy", out_dir=tmp_path)
    with pytest.raises(InputError, match="compare takes one target, by its name"):
        compare(few, ["energy"], out_dir=tmp_path)


def test_a_file_is_prepared_once(tmp_path):
    source = write_alloys(tmp_path / "alloys.parquet", 30)
    options = {"out_dir": tmp_path / "out", "epochs": 1, "split": (0.6, 0.2, 0.2)}
    compare(source, "formation_energy_per_atom", **options)
    prepared = tmp_path / "out" / "graphs" / "metadata.json"
    time = prepared.stat().st_mtime_ns
    numbers = {"seed": np.int64(0), "split": np.array([0.6, 0.2, 0.2]), "batch_size": np.int64(64)}
    result = compare(source, "formation_energy_per_atom", **options | numbers)  # replaces its own runs
    assert prepared.stat().st_mtime_ns == time
    assert result.unit == "eV/atom"


def test_demo_tells_what_it_did(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = demo(tmp_path / "demo", crystals=60, epochs=2)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert "66,432" in report and "Cu3Au (L1_2)" in report and str(tmp_path / "demo") in report
    table = predict(tmp_path / "demo" / "sr_cgcnn" / "model", tmp_path / "demo" / "alloys.parquet")
    assert len(table) == 60 and table["error"].isna().all()


def test_the_demo_stays_out_of_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_directory() == tmp_path / "srcgcnn_fast"
