"""Batches prepared ahead, and the time for which training waited; tests/gpu has the device."""

from __future__ import annotations

import threading
import time
import types
from dataclasses import fields

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from srcgcnn_fast import SRCGCNN, InputError
from srcgcnn_fast.graph import packing
from srcgcnn_fast.training import GraphDataModule, Recipe, fit
from srcgcnn_fast.training.data import GraphDataset, Split
from srcgcnn_fast.training.module import TrainingModule
from srcgcnn_fast.training.prefetch import Batches, Item

CPU = torch.device("cpu")


def on_device(data: GraphDataModule) -> list[Item]:
    """What a GPU's batches are, on the CPU."""
    return list(data.loader("train", shuffle=True)._on_device())


def same(found: list[Item], expected: list[Item]) -> bool:
    values = [
        [*(x for f in fields(g) if isinstance(x := getattr(g, f.name), torch.Tensor)), *rest]
        for part in (found, expected)
        for g, *rest in part
    ]
    pairs = zip(values[: len(found)], values[len(found) :], strict=True)
    return all(
        a.dtype == b.dtype and torch.equal(a.nan_to_num(9), b.nan_to_num(9))
        for x, y in pairs
        for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("target", ["energy", ["energy", "volume"]])
@pytest.mark.parametrize("size", [7, 120])
@pytest.mark.compiled
def test_batches_for_a_device_are_the_loaders(alloys, monkeypatch, size, target):
    """One by one in the loader's order, a last short one included; of 120 crystals a thread puts them together."""
    monkeypatch.setattr(packing, "_LEAST_EDGES", 3000)
    assert alloys.batch(range(120)).num_edges > 3000 > alloys.batch(range(7)).num_edges
    data = GraphDataModule(alloys, target, batch_size=size)
    expected = list(data.loader("train", shuffle=True))
    found = on_device(data)
    assert len(found) == len(expected) > 1 and same(found, expected)
    for graphs, target, _ in found:  # in one copy
        assert graphs.sender.untyped_storage().data_ptr() == target.untyped_storage().data_ptr()


def test_batches_that_numpy_joins_go_to_a_device_too(alloys, monkeypatch):
    data = GraphDataModule(alloys, "energy", batch_size=7)
    expected = list(data.loader("train", shuffle=True))
    monkeypatch.setattr(alloys, "_packer", None)
    assert same(on_device(data), expected)


def test_workers_batches_go_to_a_device(alloys):
    data = GraphDataModule(alloys, "energy", batch_size=60)
    expected = list(data.loader("train", shuffle=True))
    data.num_workers = 1
    assert same(on_device(data), expected)


def test_the_next_batch_is_begun_before_one_is_used(alloys, monkeypatch):
    """And no thread of Python's does it, which would hold up the consumer's operations."""
    begun, begin = [], GraphDataset.begin
    monkeypatch.setattr(GraphDataset, "begin", lambda *a: (begun.append(threading.get_ident()), begin(*a))[1])
    loader = GraphDataModule(alloys, "energy", batch_size=16).loader("train")
    counts = [len(begun) for _ in loader._on_device()]
    assert counts == [*range(2, len(loader) + 1), len(loader)]
    assert set(begun) == {threading.get_ident()}


def test_training_and_validation_take_their_batches_on_the_device_from_the_first_on(alloys, monkeypatch):
    """Whatever device Lightning names says that it is a GPU; the batches stay here."""
    seen: list[int] = []
    gpu = types.SimpleNamespace(type="cuda")
    place = property(lambda self: vars(self).get("place", CPU), lambda self, _: vars(self).update(place=gpu))
    monkeypatch.setattr(Batches, "device", place)
    monkeypatch.setattr(Batches, "_on_device", lambda self: (seen.append(len(self)), DataLoader.__iter__(self))[1])
    data = GraphDataModule(alloys, "energy", batch_size=40)
    module = TrainingModule(SRCGCNN(atom_fea_len=8), data, Recipe(epochs=2))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", enable_model_summary=False, num_sanity_val_steps=0, **options)
    trainer.fit(module, data)
    assert seen == [len(data.loader("train", shuffle=True)), len(data.loader("val"))] * 2


def test_an_error_arrives(alloys, monkeypatch):
    take = type(alloys).packing
    monkeypatch.setattr(type(alloys), "packing", lambda s, i, *a, **k: take(s, [10**6] if 3 in i else i, *a, **k))
    data = GraphDataModule(
        alloys, "energy", batch_size=16, split=Split(np.arange(128), np.arange(128, 160), np.arange(0))
    )
    loader, found = data.loader("train"), []
    with pytest.raises(InputError, match="no crystal 1000000"):
        found += loader._on_device()
    assert len(found) < len(loader)


def test_waiting_is_counted_and_computing_is_not(alloys, monkeypatch):
    take = type(alloys).batch
    monkeypatch.setattr(type(alloys), "batch", lambda *a: (time.sleep(0.03), take(*a))[1])
    batches = GraphDataModule(alloys, "energy", batch_size=40).loader("train")
    for _ in batches:
        time.sleep(0.1)
    assert 0.03 * len(batches) <= batches.waited < 0.1 * len(batches)


def test_the_log_says_how_long_training_waited(alloys, tmp_path, monkeypatch):
    store = alloys
    take = type(store).batch

    def late(self, indices):
        time.sleep(0.05)
        return take(self, indices)

    data = GraphDataModule(store, "energy", batch_size=20)
    quick = fit(SRCGCNN(atom_fea_len=8), data, tmp_path / "quick", Recipe(epochs=1), accelerator="cpu")
    monkeypatch.setattr(type(store), "batch", late)
    slow = fit(SRCGCNN(atom_fea_len=8), data, tmp_path / "slow", Recipe(epochs=2), accelerator="cpu")
    batches = len(data.loader("train"))
    for row in slow.history:
        assert 0.9 * 0.05 * batches <= row["data_wait"] * row["seconds"] <= row["seconds"]
    assert quick.history[0]["data_wait"] * quick.history[0]["seconds"] < 0.05 * batches
