"""Splits, orders and batches follow from a seed; what has no target stays out."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srcgcnn_fast import InputError
from srcgcnn_fast.graph import GraphStore, collate, prepare
from srcgcnn_fast.training import GraphDataModule, Split, k_folds, random_split
from srcgcnn_fast.training import data as data_module
from srcgcnn_fast.training.alloys import write_alloys
from srcgcnn_fast.training.data import EpochSampler


def test_split_is_disjoint_complete_and_seeded():
    parts = random_split(np.arange(5, 105), (0.8, 0.1, 0.1), seed=3)
    assert [len(p) for p in parts] == [80, 10, 10]
    assert sorted(np.concatenate(parts)) == list(range(5, 105))
    again, other = (random_split(np.arange(5, 105), (0.8, 0.1, 0.1), seed) for seed in (3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not np.array_equal(parts.train, other.train)


def test_each_part_of_a_small_set_that_is_asked_for_has_a_crystal():
    def sizes(n: int, *fractions: float) -> list[int]:
        parts = random_split(np.arange(n), fractions, 0)
        order = np.random.default_rng(0).permutation(n)
        assert np.array_equal(np.concatenate(parts), order[: sum(map(len, parts))])
        return [len(part) for part in parts]

    found = [sizes(n, 0.8, 0.1, 0.1) for n in range(3, 13)]
    small = [[2, 1, 0], [2, 1, 1], [3, 1, 1], [4, 1, 1], [5, 1, 1]]  # two are trained on
    assert found == [*small, [6, 1, 1], [7, 1, 1], [8, 1, 1], [9, 1, 1], [10, 1, 1]]
    for n in range(13, 200):
        cuts = np.rint(np.cumsum((0.8, 0.1, 0.1)) * n).astype(int).tolist()
        assert sizes(n, 0.8, 0.1, 0.1) == [cuts[0], cuts[1] - cuts[0], cuts[2] - cuts[1]]
    assert [sizes(5, 1, 0, 0), sizes(5, 0.9, 0, 0.1), sizes(4, 0.1, 0.1, 0.1)] == [[5, 0, 0], [4, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("fractions", [(0.8, 0.2), (0.8, 0.3, 0.1), (1.1, -0.1, 0.0), (0.8, float("nan"), 0.1)])
def test_bad_fractions_are_refused(fractions):
    with pytest.raises(InputError, match="fractions"):
        random_split(np.arange(10), fractions, 0)


@pytest.mark.parametrize("indices", [10, np.arange(10) > 4], ids=["a number", "a mask"])
@pytest.mark.parametrize("cut", [lambda x: random_split(x, (0.8, 0.1, 0.1), 0), lambda x: k_folds(x, 2)])
def test_only_a_list_of_indices_is_cut(cut, indices):
    with pytest.raises(InputError, match=r"a list of indices, not an array of .*np\.arange of a number of crystals\."):
        cut(indices)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 60), min_size=2, max_size=70),
    budget=st.integers(1, 300),
    by_rows=st.booleans(),
    shuffle=st.booleans(),
    buckets=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_batches_partition_the_set(rows, budget, by_rows, shuffle, buckets, epoch):
    counts = np.array(rows)
    indices = np.arange(len(rows))
    size = {"batch_rows": budget} if by_rows else {"batch_size": budget}
    sampler = EpochSampler(indices, counts, shuffle=shuffle, length_buckets=buckets, seed=1, **size)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(np.concatenate(batches)) == list(range(len(rows)))
    if by_rows:
        assert min(map(len, batches)) >= 2
        assert all(counts[b].sum() <= budget + 2 * max(rows) or len(b) <= 3 for b in batches)
    elif budget > 1:
        assert max(map(len, batches)) <= budget + shuffle
        assert not shuffle or min(map(len, batches)) >= 2


@pytest.mark.parametrize("size", ["batch_size", "batch_rows"])
def test_a_batch_of_any_size_is_all_crystals(size):
    (batch,) = EpochSampler(np.arange(3), np.ones(3, int), shuffle=True, **{size: 10**20})
    assert sorted(batch) == [0, 1, 2]


def test_order_depends_on_seed_and_epoch_alone(alloys):
    def order(seed: int, epoch: int) -> np.ndarray:
        sampler = EpochSampler(np.arange(50), np.ones(50, int), batch_size=8, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return np.concatenate(list(sampler))

    assert np.array_equal(order(0, 2), order(0, 2))
    assert not np.array_equal(order(0, 2), order(0, 3))
    assert not np.array_equal(order(0, 2), order(1, 2))
    assert GraphDataModule(alloys, "energy").loader("train", shuffle=True).sampler.epoch == 0


def test_buckets_hold_crystals_of_similar_size():
    rows = np.random.default_rng(0).integers(1, 200, 6400)

    def batches(length_buckets: bool, epoch: int = 0) -> list[np.ndarray]:
        sampler = EpochSampler(
            np.arange(6400), rows, batch_size=32, shuffle=True, length_buckets=length_buckets, seed=3
        )
        sampler.set_epoch(epoch)
        return list(sampler)

    def spread(of: list[np.ndarray]) -> float:
        return float(np.mean([np.ptp(rows[batch]) for batch in of]))

    plain, bucketed = batches(False), batches(True)
    assert spread(bucketed) < spread(plain) / 8
    assert [batch.tolist() for batch in bucketed] == [batch.tolist() for batch in batches(True)]
    assert {tuple(b) for b in map(sorted, bucketed)} != {tuple(b) for b in map(sorted, batches(True, 1))}
    sizes = [rows[batch].mean() for batch in bucketed]  # large ones do not come at the end of each run
    assert abs(np.corrcoef(sizes[:-1], sizes[1:])[0, 1]) < 0.2


def test_items_are_the_store_crystals(alloys):
    data = GraphDataModule(alloys, ["energy", "high"], batch_size=16)
    for graphs, target, index in data.train_dataloader():
        expected = collate([alloys[i] for i in index.tolist()])
        for name in ("numbers", "weight", "sender", "distance", "row_ptr", "crystal_ptr"):
            assert torch.equal(getattr(graphs, name), getattr(expected, name)), name
        assert target.dtype == torch.float32 and target.shape == (len(index), 2)
        assert np.allclose(target[:, 0], alloys.targets["energy"][index], atol=1e-7)
    assert data.ids("val") == [alloys.ids[i] for i in data.parts["val"].indices]


def test_two_modules_yield_identical_batches(alloys):
    first, second = (GraphDataModule(alloys, "energy", batch_size=32, seed=7) for _ in range(2))
    for (a, ta, ia), (b, tb, ib) in zip(first.train_dataloader(), second.train_dataloader(), strict=True):
        assert torch.equal(ia, ib) and torch.equal(ta, tb) and torch.equal(a.distance, b.distance)


def test_workers_yield_the_same_batches(alloys):
    alone, helped = (GraphDataModule(alloys, "energy", batch_size=40, num_workers=n) for n in (0, 2))
    for (a, ta, _), (b, tb, _) in zip(alone.train_dataloader(), helped.train_dataloader(), strict=True):
        assert torch.equal(ta, tb) and torch.equal(a.sender, b.sender)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Python's own way is taken")
@pytest.mark.parametrize(("chosen", "name"), [(None, "ForkProcess"), ("forkserver", "Process")])
def test_workers_are_forks_whatever_pythons_default_is_unless_the_program_has_chosen(alloys, monkeypatch, chosen, name):
    context = multiprocessing.context._default_context
    monkeypatch.setattr(context, "_default_context", multiprocessing.get_context("forkserver"))  # that of Python 3.14
    monkeypatch.setattr(context, "_actual_context", None)
    if chosen is not None:
        multiprocessing.set_start_method(chosen)
    before = set(multiprocessing.active_children())
    batches = iter(GraphDataModule(alloys, "energy", batch_size=40, num_workers=1).train_dataloader())
    next(batches)
    assert [type(child).__name__ for child in {*multiprocessing.active_children()} - before] == [name]


@pytest.mark.parametrize("forks", [False, True] if hasattr(os, "fork") else [False])
def test_workers_end_with_the_program_that_began_them(alloys, tmp_path, forks):
    """Which has not come to their end; not with a process that was forked from it."""
    (tmp_path / "store.pickle").write_bytes(pickle.dumps(alloys))
    program = """
import os, pickle, sys
from srcgcnn_fast.training import GraphDataModule
alloys = pickle.load(open("store.pickle", "rb"))
batches = iter(GraphDataModule(alloys, "energy", batch_size=5, num_workers=2).train_dataloader())
next(batches)
if len(sys.argv) > 1:
    if not (child := os.fork()):
        sys.exit()
    os.waitpid(child, 0)
    print(sum(1 for _ in zip(range(10), batches)))
"""
    command = [sys.executable, "-c", program, *["fork"] * forks]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "10\n" if forks else ""), done.stderr


def test_crystals_without_target_are_left_out_and_counted(alloys, caplog):
    with caplog.at_level(logging.WARNING):
        data = GraphDataModule(alloys, "volume", batch_size=16)
    assert "16 of 160 crystals have no volume" in caplog.text
    assert sum(len(part.indices) for part in data.parts.values()) == 144
    assert all(np.isfinite(data.target_values(part)).all() for part in data.parts)
    energy = np.where(np.arange(160) % 4, alloys.targets["energy"], [np.inf, -np.inf] * 80)
    endless = GraphStore.from_graphs(list(alloys), targets={"energy": energy, "volume": alloys.targets["volume"]})
    parts = GraphDataModule(endless, ["energy", "volume"]).parts
    assert all(not np.isinf(dataset.targets[indices]).any() for dataset, indices in parts.values())


def test_explicit_indices_and_separate_stores(alloys):
    split = Split(np.arange(100), np.arange(100, 130), np.arange(130, 160))
    data = GraphDataModule(alloys, "energy", split=split)
    assert np.array_equal(data.parts["test"].indices, split.test)
    for lists in (Split([3, 1], [2], []), ([3, 1], np.array([2]), [])):
        parts = GraphDataModule(alloys, "energy", split=lists).parts
        assert [part.indices.tolist() for part in parts.values()] == [[3, 1], [2], []]
    apart = GraphDataModule(alloys, "energy", val_store=alloys)
    assert [len(apart.parts[p].indices) for p in ("train", "val", "test")] == [160, 160, 0]


def test_a_fingerprint_of_graphs_is_of_all_that_they_hold(alloys):
    graphs = [alloys[i] for i in range(8)]
    wide = [np.ones((len(graph.distance), 3), np.float32) for graph in graphs]
    changed = {
        "as it is": lambda graph, k: {},
        "elements": lambda graph, k: {"numbers": graph.numbers + 1},
        "distances": lambda graph, k: {"distance": graph.distance + np.float32(1e-3)},
        "vectors": lambda graph, k: {"atom_features": np.ones((graph.n_rows, 92), np.float32)},
        "edges": lambda graph, k: {"edge_features": wide[k]},
        "other edges": lambda graph, k: {"edge_features": 2 * wide[k]},
    }
    found = set()
    for change in changed.values():
        some = [dataclasses.replace(graph, **change(graph, k)) for k, graph in enumerate(graphs)]
        store = GraphStore.from_graphs(some, targets={"energy": np.arange(8.0)})
        found.add(GraphDataModule(store, "energy", split=Split([0, 1, 2], [3], [4, 5, 6, 7])).graph_fingerprint())
    assert len(found) == len(changed)


def test_a_store_may_be_its_path(tmp_path):
    store = prepare(write_alloys(tmp_path / "a.parquet", 20), tmp_path / "store")
    by_path = GraphDataModule(
        tmp_path / "store", "formation_energy_per_atom", val_store=str(tmp_path / "store"), test_store=store
    )
    assert (
        by_path.fingerprint()
        == GraphDataModule(store, "formation_energy_per_atom", val_store=store, test_store=store).fingerprint()
    )


def test_what_is_trained_on_and_scored_too_is_counted(alloys, caplog):
    with caplog.at_level(logging.WARNING):
        GraphDataModule(alloys, "energy", split=Split(np.arange(100), np.arange(93, 130), np.arange(130, 160)))
        assert "7 val crystals are also trained on" in caplog.text and "test crystals" not in caplog.text
        caplog.clear()
        some = [alloys[i] for i in (*range(5), *range(104, 4, -1))]  # others may have the same ids
        other = GraphStore.from_graphs(some, targets={"energy": np.zeros(len(some))})
        GraphDataModule(alloys, "energy", val_store=other, test_store=alloys)
        assert "5 val crystals are also trained on" in caplog.text
        assert "160 test crystals are also trained on" in caplog.text
        caplog.clear()
        other_elements = dataclasses.replace(some[3], numbers=some[3].numbers + 1)
        twice = [*some[:60], some[2], other_elements]  # two of one id, one of them with the graph of the first
        ids = [*map(str, range(60)), "2", "3"]
        other = GraphStore.from_graphs(twice, ids=ids, targets={"energy": np.zeros(62)})
        GraphDataModule(other, "energy", split=Split(np.arange(50), np.arange(49, 62), np.arange(60, 62)))
    assert "2 val crystals are also trained on" in caplog.text
    assert "1 test crystals are also trained on" in caplog.text


def test_crystals_of_one_id_are_compared_many_at_a_time(alloys, caplog, monkeypatch):
    """As the frames of a trajectory are, of which there may be millions."""
    graphs = [alloys[i] for i in range(60)]
    monkeypatch.setattr(GraphStore, "__getitem__", lambda store, index: pytest.fail("one by one"))
    sizes, original = [], GraphStore.batch
    monkeypatch.setattr(GraphStore, "batch", lambda store, some: sizes.append(len(some)) or original(store, some))
    monkeypatch.setattr(data_module, "_HASHED", 16)
    store = GraphStore.from_graphs([*graphs, *graphs[:10]], ids=["a"] * 70, targets={"energy": np.zeros(70)})
    with caplog.at_level(logging.WARNING):
        GraphDataModule(store, "energy", split=Split(np.arange(50), np.arange(55, 65), []))
    assert "5 val crystals are also trained on" in caplog.text and max(sizes) == 16


def test_bad_requests_are_sentences(alloys):
    with pytest.raises(InputError, match=r"no target mass.*energy"):
        GraphDataModule(alloys, "mass")
    with pytest.raises(InputError, match="without a validation store"):
        GraphDataModule(alloys, "energy", test_store=alloys)
    with pytest.raises(InputError, match="without a target"):
        GraphDataModule(alloys, "volume", split=Split(np.arange(20), np.arange(20, 30), np.arange(30, 40)))
    with pytest.raises(InputError, match="leave the store"):
        GraphDataModule(alloys, "energy", split=Split(np.arange(20), np.arange(150, 161), np.arange(0)))
    with pytest.raises(InputError, match="leave the store"):
        GraphDataModule(alloys, "energy", split=Split(np.arange(20), [-1, 30], []))
    mask = np.arange(160) < 100
    for wrong, kind in ((mask, "bool"), (np.arange(100.0), "float64"), (np.arange(100)[:, None], "int64")):
        with pytest.raises(InputError, match=rf"list of indices, not an array of {kind}.*np\.flatnonzero"):
            GraphDataModule(alloys, "energy", split=Split(wrong, np.arange(100, 160), []))
    with pytest.raises(InputError, match="no target to learn; name at least one"):
        GraphDataModule(alloys, [])
    with pytest.raises(InputError, match="A NoneType is no store; give one that prepare made, or its path"):
        GraphDataModule(None, "energy")
    for stores in (["nowhere"], [alloys, "nowhere"], [alloys, alloys, ""]):
        with pytest.raises(InputError, match="store"):
            GraphDataModule(stores[0], "energy", **dict(zip(("val_store", "test_store"), stores[1:], strict=False)))
    with pytest.raises(InputError, match="100000 workers are too many for this machine; give at most"):
        GraphDataModule(alloys, "energy", num_workers=100_000)
    with pytest.raises(InputError, match="energy, high, energy name one twice"):
        GraphDataModule(alloys, ["energy", "high", "energy"])
    for names in (["energy", "energy_std"], ["high", "energy", "high_predicted"], ["id"]):
        with pytest.raises(InputError, match=f"targets {', '.join(names)} clash in tables of predictions"):
            GraphDataModule(alloys, names)
    energy = alloys.target_array(["energy"])[:, 0]
    scaled = GraphStore.from_graphs(list(alloys), targets={"energy": energy, "scaled": energy})
    with pytest.raises(InputError, match="none may be named scaled"):
        GraphDataModule(scaled, ["energy", "scaled"])
    GraphDataModule(scaled, "scaled")
    for wrong in ({"seed": -1}, {"seed": 1.5}, {"seed": None}, {"num_workers": -1}):
        with pytest.raises(InputError, match="must be whole numbers of 0 or more"):
            GraphDataModule(alloys, "energy", **wrong)
    with pytest.raises(InputError, match="has no target None; it has energy, high, volume"):
        GraphDataModule(alloys, None)
    with pytest.raises(InputError, match="at least 2 crystals"):
        GraphDataModule(alloys, "energy", split=(1.0, 0.0, 0.0))
    for wrong in ({"batch_size": 0}, {"batch_size": 64.0}, {"batch_rows": "64"}):
        with pytest.raises(InputError, match="give a whole number of at least 1"):
            GraphDataModule(alloys, "energy", **wrong)
    data = GraphDataModule(alloys, "energy", length_buckets=np.True_)
    assert data.length_buckets is True  # as run.json takes it
    for ask in (data.loader, data.ids, data.target_values):
        with pytest.raises(InputError, match="There is no part 'validation'; choose among train, val, test"):
            ask("validation")


def test_one_unit_is_not_its_letters(alloys):
    assert GraphDataModule(alloys, "energy", units="eV").units == ("eV",)
