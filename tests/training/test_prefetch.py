"""Batches prepared ahead by a thread, and the time for which training waited; tests/gpu has the streams."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from srcgcnn_fast import SRCGCNN, InputError
from srcgcnn_fast.training import GraphDataModule, Recipe, fit
from srcgcnn_fast.training.prefetch import ahead


def test_items_come_in_order_from_one_thread_and_one_ahead():
    threads, done = set(), []

    def work(k: int) -> int:
        threads.add(threading.get_ident())
        done.append(k)
        return 10 * k

    found = []
    for item in ahead(iter(range(1, 6)), work):
        time.sleep(0.02)
        found.append((item, len(done)))
    assert found == [(10, 2), (20, 3), (30, 4), (40, 5), (50, 5)]
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_an_error_of_the_thread_arrives_where_the_item_was_wanted():
    def work(k: int) -> int:
        if k == 2:
            raise InputError("No.")
        return k

    items = ahead(iter([1, 2, 3]), work)
    assert next(items) == 1
    with pytest.raises(InputError, match="No"):
        next(items)


def test_a_consumer_that_stops_leaves_no_thread():
    before = threading.active_count()
    items = ahead(itertools.count(1), lambda k: k)
    assert list(itertools.islice(items, 3)) == [1, 2, 3]
    items.close()
    assert threading.active_count() == before


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
    slow = fit(SRCGCNN(atom_fea_len=8), data, tmp_path / "slow", Recipe(epochs=1), accelerator="cpu")
    batches = len(data.loader("train"))
    row = slow.history[0]
    assert 0.9 * 0.05 * batches <= row["data_wait"] * row["seconds"] <= row["seconds"]
    assert quick.history[0]["data_wait"] * quick.history[0]["seconds"] < 0.05 * batches
