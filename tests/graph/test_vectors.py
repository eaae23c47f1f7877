"""Vector instructions of the graph kernels against NumPy, also as made for a processor that cannot compress."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from srcgcnn_fast.graph import vectors


@pytest.fixture(params=["this processor", "none of its features"])
def any_processor(request, monkeypatch):
    if request.param != "this processor":
        made = vectors._Code
        monkeypatch.setattr(vectors, "_Code", lambda builder, features: made(builder, ""))


def test_points_that_are_near_are_appended_in_order(any_processor):
    append_near = vectors.append_near

    @numba.njit
    def near(xs, ys, zs, end, limit, key, index):
        m = 3
        for start in range(0, end, 8):
            m += append_near(xs, ys, zs, start, end, 0.1, -0.2, 0.3, limit, key, index, m)
        return m

    points = np.random.default_rng(0).normal(size=(3, 40))
    square = ((points - np.array([[0.1], [-0.2], [0.3]])) ** 2).sum(0)
    for end, limit in ((29, 2.0), (32, 1e9), (5, -1.0)):
        key, index = np.full(64, -1.0), np.full(64, -1, np.int32)
        m = near(*points, end, limit, key, index)
        expected = np.flatnonzero(square[:end] <= limit)
        assert index[3:m].tolist() == expected.tolist()
        assert np.allclose(key[3:m], square[expected], rtol=1e-15, atol=0)
        assert (index[:3] == -1).all()


def test_few_keys_are_sorted_stably():
    sort_few = vectors.sort_few

    @numba.njit
    def sort(key, index, sorted_key, sorted_index):
        sort_few(key, index, 2, sorted_key, sorted_index, 5)

    rng = np.random.default_rng(1)
    for count in (0, 1, 8, 13, 24):
        key, index = np.full(40, np.inf), rng.permutation(40).astype(np.int32)
        key[2 : 2 + count] = rng.integers(0, 6, count) / 3  # many are equal
        sorted_key, sorted_index = np.full(40, -1.0), np.full(40, -1, np.int32)
        sort(key, index, sorted_key, sorted_index)
        order = 2 + np.argsort(key[2:26], kind="stable")
        assert np.array_equal(sorted_key[5:29], key[order])
        assert np.array_equal(sorted_index[5:29], index[order])


def test_ranks_of_many_keys_are_those_of_a_stable_sort():
    rank_block = vectors.rank_block

    @numba.njit
    def ranks(key, blocks, rank, found):
        for block in range(blocks):
            rank_block(key, 1, block, blocks, rank)
            found[8 * block : 8 * block + 8] = rank

    key = np.random.default_rng(2).integers(0, 9, 41) / 7
    found = np.empty(40, np.int64)
    ranks(key, 5, np.empty(8, np.int64), found)
    assert np.array_equal(np.argsort(key[1:], kind="stable"), np.argsort(found))
