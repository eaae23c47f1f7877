"""Splits from files, folds, and the folds of matbench."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from srcgcnn_fast import SRCGCNN, InputError
from srcgcnn_fast.graph import GraphStore
from srcgcnn_fast.training import (
    Evaluation,
    GraphDataModule,
    Recipe,
    Split,
    cross_validate,
    k_folds,
    matbench_folds,
    read_split,
    train_ensemble,
)
from srcgcnn_fast.training.several import CrossValidation

PARTS = {"train": range(0, 100), "val": range(100, 120), "test": range(120, 150)}


def table(store: GraphStore) -> pd.DataFrame:
    """The first 150 crystals, in another order than the store's, and one that is not there."""
    rows = [(store.ids[i], part) for part, indices in PARTS.items() for i in indices]
    return pd.DataFrame([*rows[::-1], ("absent", "test")], columns=["id", "split"])


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_file_of_a_spreadsheet_begins_with_a_mark(alloys, tmp_path, kind):
    frame, path = table(alloys), tmp_path / f"split.{kind}"
    parts = {part: frame["id"][frame["split"] == part].tolist() for part in PARTS}
    path.write_text(frame.to_csv(index=False) if kind == "csv" else json.dumps(parts), encoding="utf-8-sig")
    for part, indices in PARTS.items():
        assert getattr(read_split(path, alloys), part).tolist() == list(indices)


@pytest.mark.parametrize("kind", ["csv", "parquet", "index", "json"])
def test_a_file_gives_the_ids_of_each_part(alloys, tmp_path, kind, caplog):
    path, frame = tmp_path / f"split.{kind.replace('index', 'parquet')}", table(alloys)
    if kind == "csv":
        frame.rename(columns={"split": "fold", "id": "material_id"}).to_csv(path, index=False)
    elif kind in ("parquet", "index"):
        frame = pd.concat([frame, pd.DataFrame({"id": [alloys.ids[155]], "split": [None]})])
        frame["material_id"], frame["id"] = frame["id"], "as a data set calls its crystals by the former"
        frame = frame.rename(columns={"split": "fold"})
        (frame.set_index("material_id") if kind == "index" else frame).to_parquet(path)
    else:
        path.write_text(json.dumps({part: [alloys.ids[i] for i in indices] for part, indices in PARTS.items()}))
    with caplog.at_level(logging.WARNING):
        split = read_split(path, alloys, column="fold")
    for part, indices in PARTS.items():
        assert getattr(split, part).tolist() == list(indices)
    assert "10 of 160 crystals are in no part" in caplog.text
    assert ("1 ids" in caplog.text) is (kind != "json")


def test_the_table_of_all_folds_is_made_fold_by_fold(tmp_path, monkeypatch):
    folds = [
        Evaluation(
            ["a", "b"], ("gap", "energy"), np.array([[1.0, 2.0], [3.0, np.nan]]) + k, np.eye(2), {"mae_scaled": 1.0}
        )
        for k in range(2)
    ]
    calls, stack = [], np.stack
    monkeypatch.setattr(np, "stack", lambda *given, **options: calls.append(given) or stack(*given, **options))
    text = CrossValidation(folds, tmp_path).write().read_text()
    assert text.splitlines() == [
        "id,fold,gap,gap_predicted,energy,energy_predicted",
        "a,0,1.0,1.0,2.0,0.0", "b,0,3.0,0.0,nan,1.0", "a,1,2.0,1.0,3.0,0.0", "b,1,4.0,0.0,nan,1.0",
    ]  # fmt: skip
    assert len(calls) == len(folds)


def test_of_a_data_set_that_is_the_split_file_two_columns_are_read(alloys, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    frame = table(alloys)
    frame["lattice"] = [np.random.default_rng(0).normal(size=9)] * len(frame)
    frame.to_parquet(tmp_path / "s.parquet", compression="gzip")
    whole = read_split(tmp_path / "s.parquet", alloys)
    column = parquet.read_metadata(tmp_path / "s.parquet").row_group(0).column(2)
    data = bytearray((tmp_path / "s.parquet").read_bytes())
    middle = column.dictionary_page_offset + column.total_compressed_size // 2
    data[middle : middle + 16] = bytes(16)
    (tmp_path / "s.parquet").write_bytes(data)
    with pytest.raises(OSError):  # which may concern the page or its header
        pd.read_parquet(tmp_path / "s.parquet")
    split = read_split(tmp_path / "s.parquet", alloys)
    assert all(np.array_equal(a, b) for a, b in zip(split, whole, strict=True))


def test_crystals_without_a_target_leave_the_parts(alloys, tmp_path):
    table(alloys).to_csv(tmp_path / "s.csv", index=False)
    split = read_split(tmp_path / "s.csv", alloys, ["volume"])
    assert split.train.tolist() == [i for i in range(100) if i % 10]
    assert len(GraphDataModule(alloys, "volume", split=split).parts["test"].indices) == 27


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("id,split\n0,training\n", "'training'; the parts are"), ("id,split\n0,train\n0,test\n", "name it once"),
        ("id,part\n0,train\n", "columns id, part"), ("id,split\nnobody,train\n", "No id of"), ("", "columns"),
    ],
)  # fmt: skip
def test_a_bad_split_file_is_a_sentence(alloys, tmp_path, text, says):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(InputError, match=says):
        read_split(tmp_path / "s.csv", alloys)
    with pytest.raises(InputError, match="no split file"):
        read_split(tmp_path / "none.csv", alloys)
    (tmp_path / "s.json").write_text("[1, 2")
    with pytest.raises(InputError, match="not a split file"):
        read_split(tmp_path / "s.json", alloys)
    (tmp_path / "s.csv").write_text('id,split\n0,"train\n' + 20000 * "1,train\n")  # a quotation mark too many
    with pytest.raises(InputError, match="not a split file"):
        read_split(tmp_path / "s.csv", alloys)
    twins = GraphStore.from_graphs([alloys[0], alloys[1]], ids=["0", "0"])
    (tmp_path / "good.csv").write_text("id,split\n0,train\n")
    with pytest.raises(InputError, match="share an id"):
        read_split(tmp_path / "good.csv", twins)


@pytest.mark.parametrize("k", [2, 5, 7])
def test_folds_hold_every_crystal_out_once(k):
    indices = np.arange(3, 106)
    labels = (np.arange(103) % 4 == 0).astype(float)
    for given in (None, labels):
        folds = k_folds(indices, k, seed=1, val=0.2, labels=given)
        assert sorted(np.concatenate([fold.test for fold in folds])) == indices.tolist()
        for fold in folds:
            assert sorted(np.concatenate(fold)) == indices.tolist()
            held = 0.2 * (103 - len(fold.test))
            if given is None:
                assert len(fold.val) == round(held)
            else:
                assert abs(len(fold.val) - held) <= 1
                assert abs(labels[fold.test - 3].sum() - labels.sum() / k) <= 1
                assert abs(labels[fold.val - 3].sum() - held * labels.mean()) <= 1
    rare = k_folds(indices, k, val=0.1, labels=np.arange(103) % 26 == 0)  # 4 of 103: yet the area under ROC needs one
    assert all(1 <= (fold.val % 26 == 3).sum() < (np.concatenate(fold[:2]) % 26 == 3).sum() for fold in rare)
    again, other = k_folds(indices, k, seed=1, val=0.2), k_folds(indices, k, seed=2, val=0.2)
    assert np.array_equal(again[0].test, k_folds(indices, k, seed=1, val=0.2)[0].test)
    assert not np.array_equal(again[0].test, other[0].test)
    with pytest.raises(InputError, match=r"103 crystals cannot be cut into 104 folds; ask for 2 to 103\."):
        k_folds(indices, 104)
    with pytest.raises(InputError, match=r"into 1 folds; ask for 2 to 103\."):
        k_folds(indices, 1)
    with pytest.raises(InputError, match=r"1 crystals cannot be cut into 2 folds; give more crystals\."):
        k_folds(indices[:1], 2)


def empty_store(alloys: GraphStore, ids: list[str]) -> GraphStore:
    return GraphStore.from_graphs([alloys[0]] * len(ids), ids=ids)


def test_the_folds_of_matbench_are_the_published_ones(alloys):
    pytest.importorskip("sklearn")
    store = empty_store(alloys, [f"mb-jdft2d-{i:03d}" for i in range(636, 0, -1)])
    folds = matbench_folds(store, "matbench_jdft2d", val=0.25)
    # First test crystals of each fold in matbench_v0.1_validation.json.
    published = [
        (128, [12, 14, 27, 31, 32]),
        (127, [3, 5, 7, 19, 20]),
        (127, [4, 8, 18, 35, 36]),
        (127, [9, 10, 11, 17, 21]),
        (127, [1, 2, 6, 13, 15]),
    ]
    for fold, (size, first) in zip(folds, published, strict=True):
        names = sorted(store.ids[i] for i in fold.test)
        assert (len(names), [int(name[-3:]) for name in names[:5]]) == (size, first)
        assert len(fold.val) == round(0.25 * (636 - size)) and len(np.unique(np.concatenate(fold))) == 636
    with pytest.raises(InputError, match="lacks 1 crystals of matbench_jdft2d"):
        matbench_folds(empty_store(alloys, [f"mb-jdft2d-{i:03d}" for i in range(1, 636)]), "matbench_jdft2d")
    with pytest.raises(InputError, match="matbench_mp_is_metal need the package matbench"):
        matbench_folds(store, "matbench_mp_is_metal")


def test_the_package_matbench_has_the_word(alloys, monkeypatch):
    package, metadata = ModuleType("matbench"), ModuleType("matbench.metadata")
    folds = {f"fold_{k}": {"train": [], "test": [f"mb-x-{i}" for i in range(k, 10, 2)]} for k in range(2)}
    metadata.mbv01_validation = SimpleNamespace(splits={"matbench_x": folds})
    monkeypatch.setitem(sys.modules, "matbench", package)
    monkeypatch.setitem(sys.modules, "matbench.metadata", metadata)
    found = matbench_folds(empty_store(alloys, [f"mb-x-{i}" for i in range(10)]), "matbench_x")
    assert [fold.test.tolist() for fold in found] == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
    store = empty_store(alloys, [f"mb-x-{i}" for i in range(10)])
    held = {tuple(fold.val) for seed in range(20) for fold in matbench_folds(store, "matbench_x", seed, 0.4)[:1]}
    assert len(held) > 5  # of ten pairs that validate the first fold, by the seed


def test_cross_validation_predicts_each_crystal_by_the_model_that_did_not_see_it(alloys, tmp_path):
    def build(data):
        return SRCGCNN(n_recurrent_steps=1, atom_fea_len=8, h_fea_len=8)

    folds = k_folds(np.arange(60), 3)
    options = {"recipe": Recipe(epochs=1), "seed": 3, "accelerator": "cpu"}
    make_data = lambda split: GraphDataModule(alloys, "energy", split=split, batch_size=16)  # noqa: E731
    found = cross_validate(build, make_data, folds, tmp_path, **options)
    frame = pd.read_csv(tmp_path / "predictions.csv", dtype={"id": str})
    assert sorted(frame["id"], key=int) == [str(i) for i in range(60)]
    for k, fold in enumerate(folds):
        assert sorted(int(i) for i in frame[frame["fold"] == k]["id"]) == fold.test.tolist()
    error = (frame["energy"] - frame["energy_predicted"]).abs().groupby(frame["fold"]).mean()
    scores = pd.read_csv(tmp_path / "folds.csv")
    assert scores["mae"].to_numpy() == pytest.approx(error.to_numpy(), rel=1e-6)
    assert found.scores["mae"] == pytest.approx((error.mean(), error.std()), rel=1e-6)
    with pytest.raises(InputError, match="already holds a run"):
        cross_validate(build, make_data, folds, tmp_path, **options)
    (tmp_path / "fold_1" / "last.ckpt").unlink()  # stopped in its first epoch
    shutil.rmtree(tmp_path / "fold_2")  # not begun
    torch.manual_seed(99)
    resumed = cross_validate(build, make_data, folds, tmp_path, resume=True, **options)
    assert resumed.scores == found.scores


def test_a_fold_that_cannot_train_is_found_before_the_first_is_trained(alloys, tmp_path):
    low = np.flatnonzero(alloys.targets["high"] == 0)
    folds = [Split(np.arange(80), np.arange(80, 120), np.arange(120, 160)), Split(np.arange(80), low[-9:], low[-9:])]
    make_data = lambda split: GraphDataModule(alloys, "high", split=split)  # noqa: E731
    with pytest.raises(InputError, match="one class only"):
        cross_validate(lambda _: SRCGCNN(1, 8, 8, classification=True), make_data, folds, tmp_path / "cv")
    folds[1] = Split(np.arange(80), np.arange(80, 120), np.arange(0))
    with pytest.raises(InputError, match="has no test crystals"):
        cross_validate(lambda _: SRCGCNN(1, 8, 8, classification=True), make_data, folds, tmp_path / "cv")
    assert not (tmp_path / "cv").exists()


def test_what_makes_no_model_for_each_run_is_refused(alloys, tmp_path):
    made, data = SRCGCNN(1, 8, 8), GraphDataModule(alloys, "energy")
    make_data = lambda split: GraphDataModule(alloys, "energy", split=split)  # noqa: E731
    faults = {
        "build is a SRCGCNN; give a function that": made,
        "build is a type": SRCGCNN,
        "build cannot be called with the data": lambda: made,
        "gives the same model": lambda data: made,
    }
    for fault, build in faults.items():
        with pytest.raises(InputError, match=fault):
            cross_validate(build, make_data, k_folds(np.arange(60), 3), tmp_path / "run")
        with pytest.raises(InputError, match=fault):
            train_ensemble(build, data, tmp_path / "run")
    with pytest.raises(InputError, match="no folds to train on; k_folds makes them"):
        cross_validate(lambda data: SRCGCNN(1, 8, 8), make_data, [], tmp_path / "run")
    assert not (tmp_path / "run").exists()
