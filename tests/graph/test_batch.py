"""Batches: offsets, moves, what they refuse."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

import srcgcnn_fast as sf


def graph(n: int, seed: int = 0) -> sf.CrystalGraph:
    rng = np.random.default_rng(seed)
    return sf.CrystalGraph(
        numbers=rng.integers(1, 90, n).astype(np.int32),
        weight=np.ones(n, np.float32),
        sender=rng.integers(0, n, 2 * n).astype(np.int32),
        distance=rng.uniform(1, 8, 2 * n),
        row_ptr=np.arange(0, 2 * n + 1, 2, dtype=np.int32),
        atom_class=np.arange(n, dtype=np.int32),
    )


def test_any_iterable_of_graphs():
    parts = [graph(3, 1), graph(1, 2)]
    for given, count in ((iter(parts), 2), (tuple(parts), 2), (parts[0], 1)):
        assert sf.collate(given).num_crystals == count
    with pytest.raises(sf.InputError, match=r"Graph 1 could not be built \(no atoms\); leave it out"):
        sf.collate([parts[0], sf.InputError("no atoms")])
    with pytest.raises(sf.InputError, match="Item 0 is a ndarray, no CrystalGraph"):
        sf.collate([np.eye(3)])


def test_offsets():
    parts = [graph(3, 1), graph(1, 2), graph(4, 3)]
    batch = sf.collate(parts)
    assert (batch.num_rows, batch.num_edges, batch.num_crystals) == (8, 16, 3)
    assert batch.crystal_ptr.tolist() == [0, 3, 4, 8]
    assert batch.row_ptr.tolist() == list(range(0, 17, 2))
    assert batch.sender[6:8].tolist() == [3, 3]
    assert batch.atom_crystal.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert batch.receiver.tolist() == [i // 2 for i in range(16)]
    assert batch.sender.dtype == batch.row_ptr.dtype == batch.atom_class.dtype == torch.int32
    assert batch.distance.dtype == torch.float32
    assert sf.collate(parts, torch.float64).distance.dtype == torch.float64


def test_to_converts_floating_point_only():
    batch = sf.collate([graph(3)]).to(dtype=torch.float64)
    assert batch.distance.dtype == batch.weight.dtype == torch.float64
    assert batch.sender.dtype == torch.int32


def test_refusals():
    with pytest.raises(sf.InputError, match="at least one"):
        sf.collate([])
    with pytest.raises(sf.InputError, match="1 of 2 graphs carry atom_features"):
        sf.collate([graph(2), replace(graph(2), atom_features=np.ones((2, 5), np.float32))])
    for field in ("sender", "numbers"):  # as many edges or rows as a pointer of int32 does not count
        with pytest.raises(sf.InputError, match=r"beyond 2\^31 - 1; use smaller batches"):
            sf.collate([replace(graph(1), **{field: np.broadcast_to(np.int32(0), 2**30)})] * 2)


OTHER = {
    "distance": lambda x: x * 0.5,
    "weight": lambda x: x + torch.arange(len(x)),
    "sender": lambda x: torch.cat([x[:10].flip(0), x[10:]]),
    "row_ptr": lambda x: x + (torch.arange(len(x)) == 1).int(),
    "crystal_ptr": lambda x: x[[0, -1, -1]],
    "edge_features": lambda x: x * 0.5,
}


@pytest.mark.parametrize("how", ["exchanged", "written to", "replaced"])
@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("training", [False, True])
def test_what_follows_from_a_graph_follows_its_changes(training, name, how):
    torch.manual_seed(0)
    model = sf.CGCNN(2, 8, 8, nbr_fea_len=5, step=2.0).train(training)
    batch = sf.collate([graph(5, 1), graph(4, 2)])
    batch.edge_features = torch.rand(18, 5) if name == "edge_features" else None

    def results(batch):
        return torch.cat([model(batch), model.features(batch)], dim=1)

    before, receiver = results(batch), batch.receiver
    assert batch.receiver is receiver
    other = OTHER[name](getattr(batch, name))
    if how == "exchanged":
        setattr(batch, name, other)
    elif how == "written to":
        getattr(batch, name).copy_(other)
    else:
        batch = replace(batch, **{name: other})
    found, expected = results(batch), results(replace(batch, cache={}))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert not torch.allclose(found, before)


def test_tensors_of_inference_mode_count_no_changes():
    with torch.inference_mode():
        batch = sf.collate([graph(5, 1)])
        assert batch.receiver.tolist() == [i // 2 for i in range(10)]
        batch.row_ptr[1] += 1
        assert batch.receiver.tolist()[:3] == [0, 0, 0]


def test_copies_leave_out_what_follows_from_the_graph():
    batch = sf.collate([graph(5, 1)])
    assert len(batch.receiver) and batch.cache
    for twin in (copy.deepcopy(batch), copy.copy(batch), pickle.loads(pickle.dumps(batch))):
        assert torch.equal(twin.distance, batch.distance) and not twin.cache
    assert batch.cache
