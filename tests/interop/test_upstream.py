from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from srcgcnn_fast.errors import InputError
from srcgcnn_fast.graph import CrystalGraph, collate, element_features
from srcgcnn_fast.interop import expand_quotient, from_pyg, from_upstream, load_upstream_checkpoint, to_pyg, to_upstream
from srcgcnn_fast.nn import CGCNN

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())


def golden_input(case):
    mu = 0.2 * np.arange(41)
    nbr_fea = np.exp(-(((case["distance"][..., None] - mu) / 0.2) ** 2))
    ends = np.cumsum(case["sizes"]).tolist()
    rows = [torch.arange(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    idx = torch.from_numpy(case["nbr_fea_idx"]).long()
    return torch.from_numpy(case["atom_fea"]).float(), torch.from_numpy(nbr_fea).float(), idx, rows


@pytest.mark.parametrize("name", sorted(CASES))
def test_published_batch_and_checkpoint_give_the_published_output(name, tmp_path):
    case = np.load(GOLDEN / f"{name}.npz")
    kwargs = CASES[name]["kwargs"]
    args = {k: v for k, v in kwargs.items() if k != "classification"}
    args["task"] = "classification" if kwargs.get("classification") else "regression"
    state = {k.removeprefix("state/"): torch.from_numpy(case[k]) for k in case.files if k.startswith("state/")}
    torch.save({"state_dict": state, "args": args, "normalizer": {"mean": 0.0, "std": 1.0}}, tmp_path / "x.pth.tar")
    model = load_upstream_checkpoint(tmp_path / "x.pth.tar")
    with torch.no_grad():
        out = model(from_upstream(*golden_input(case)))
    np.testing.assert_allclose(out.numpy(), case["f64/eval_out"], rtol=0, atol=2e-5)


def model_of(**options):
    torch.manual_seed(0)
    return CGCNN(n_conv=2, atom_fea_len=8, h_fea_len=6, **options).double().eval()


def test_upstream_round_trip():
    given = golden_input(np.load(GOLDEN / "cgcnn_f64_pad.npz"))
    atom_fea, nbr_fea, nbr_fea_idx, rows = to_upstream(from_upstream(*given))
    assert torch.equal(atom_fea, given[0]) and torch.equal(nbr_fea, given[1]) and torch.equal(nbr_fea_idx, given[2])
    assert len(rows) == len(given[3]) and all(torch.equal(a, b) for a, b in zip(rows, given[3], strict=True))


def test_rows_of_a_crystal_need_not_be_contiguous():
    atom_fea, nbr_fea, idx, rows = golden_input(np.load(GOLDEN / "cgcnn_f16.npz"))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(atom_fea)))
    rank = torch.argsort(order)
    mixed = from_upstream(atom_fea[order], nbr_fea[order], rank[idx][order], [rank[r] for r in rows])
    plain = from_upstream(atom_fea, nbr_fea, idx, rows)
    for name in ("sender", "row_ptr", "crystal_ptr", "atom_features", "edge_features"):
        assert torch.equal(getattr(mixed, name), getattr(plain, name)), name


def test_to_upstream_builds_features_from_numbers_and_distances():
    graph = CrystalGraph(
        numbers=np.array([11, 17], np.int32),
        weight=np.ones(2, np.float32),
        sender=np.array([1, 1, 0, 0], np.int32),
        distance=np.array([2.8, 3.0, 2.8, 3.0], np.float32),
        row_ptr=np.array([0, 2, 4], np.int32),
        atom_class=np.arange(2, dtype=np.int32),
    )
    atom_fea, nbr_fea, idx, rows = to_upstream(collate([graph, graph]))
    assert np.array_equal(atom_fea.numpy(), element_features()[[11, 17, 11, 17]])
    assert idx.tolist() == [[1, 1], [0, 0], [3, 3], [2, 2]] and [r.tolist() for r in rows] == [[0, 1], [2, 3]]
    assert nbr_fea.shape == (4, 2, 41) and nbr_fea.dtype == torch.float32
    expected = np.exp(-(((np.float64(np.float32(2.8)) - 0.2 * np.arange(41)) / 0.2) ** 2))
    np.testing.assert_allclose(nbr_fea[0, 0].numpy(), expected, atol=1e-7)


def test_rows_of_different_length_have_no_published_form(make_batch):
    with pytest.raises(InputError, match="padded=True"):
        to_upstream(make_batch("ragged"))


@pytest.mark.parametrize("kind", ["plain", "weighted", "ragged", "isolated", "no edges"])
def test_expanding_the_quotient_keeps_the_output(kind, make_batch):
    batch = make_batch(kind)
    full = expand_quotient(batch)
    assert full.num_rows == len(batch.atom_class) == int(batch.weight.sum()) and bool((full.weight == 1).all())
    assert full.row_ptr[-1] == full.num_edges and full.crystal_ptr[-1] == full.num_rows
    model = model_of()
    with torch.no_grad():
        torch.testing.assert_close(model(full), model(batch), rtol=1e-10, atol=1e-12)


def test_an_atom_that_has_itself_alone_as_a_neighbor():
    """One crystal of one row, whose least and greatest index are the same."""
    fea, nbr_fea, idx = torch.rand(1, 92), torch.rand(1, 4, 41), torch.zeros(1, 4, dtype=torch.long)
    batch = from_upstream(fea, nbr_fea, idx, [torch.tensor([0])])
    assert batch.sender.tolist() == [0] * 4 and torch.equal(batch.edge_features, nbr_fea[0])
    data = SimpleNamespace(x=fea, edge_index=torch.zeros(2, 4, dtype=torch.long), edge_attr=nbr_fea[0])
    assert torch.equal(from_pyg(data).edge_features, nbr_fea[0])


@pytest.mark.parametrize("kind", ["plain", "weighted", "ragged"])
def test_pyg_round_trip(kind, make_batch):
    batch = make_batch(kind)
    data = SimpleNamespace(**to_pyg(batch))
    again, full = from_pyg(to_pyg(batch)), expand_quotient(batch)
    for name in ("numbers", "sender", "distance", "row_ptr", "crystal_ptr", "weight"):
        assert torch.equal(getattr(again, name), getattr(full, name)), name
    shuffled = torch.randperm(full.num_edges, generator=torch.Generator().manual_seed(0))
    data.edge_index, data.edge_weight = data.edge_index[:, shuffled], data.edge_weight[shuffled]
    model, sorted_again = model_of(), from_pyg(data)
    assert bool(((sorted_again.receiver * 100 + sorted_again.distance).diff() >= 0).all())
    with torch.no_grad():
        torch.testing.assert_close(model(sorted_again), model(batch), rtol=1e-10, atol=1e-12)


def test_pyg_features_in_place_of_numbers_and_distances(make_batch):
    batch = from_upstream(*golden_input(np.load(GOLDEN / "cgcnn_f16.npz")))
    again = from_pyg(SimpleNamespace(**to_pyg(batch)))
    assert torch.equal(again.atom_features, batch.atom_features)
    given = SimpleNamespace(**to_pyg(batch) | {"x": batch.atom_features.double() / 3})
    assert torch.equal(from_pyg(given).atom_features, given.x)  # to the last bit
    given.x = given.x[:, :5]
    with pytest.raises(InputError, match="5 features an atom, and the model takes 92"):
        model_of()(from_pyg(given))
    model = model_of()
    for narrow in (torch.nn.Linear(5, 8), torch.nn.Sequential(torch.nn.Linear(5, 8))):
        model.embedding = narrow.double()  # which decides what it takes
        assert model(from_pyg(given)).shape == (batch.num_crystals, 1)
    model = model_of()
    with torch.no_grad():
        torch.testing.assert_close(model(again), model(batch), rtol=1e-10, atol=1e-12)
    one = to_pyg(make_batch("one crystal"))
    column = SimpleNamespace(z=one["z"], edge_index=one["edge_index"], edge_attr=one["edge_weight"][:, None])
    assert torch.equal(from_pyg(column).distance, one["edge_weight"]) and from_pyg(column).num_crystals == 1


def test_upstream_tuples_that_contradict_themselves():
    atom_fea, nbr_fea, idx, rows = golden_input(np.load(GOLDEN / "cgcnn_f16.npz"))
    between = idx.clone()
    between[0, 0] = rows[-1][0]
    for bad in (
        (atom_fea[1:], nbr_fea, idx, rows),
        (atom_fea, nbr_fea, between, rows),
        (atom_fea, nbr_fea[:, 1:], idx, rows),
        (atom_fea, nbr_fea, idx + 1, rows),
        (atom_fea, nbr_fea, idx + len(atom_fea), rows),
        (atom_fea, nbr_fea, idx - 1, rows),
        (atom_fea, nbr_fea, idx, rows[1:]),
        (atom_fea, nbr_fea, idx, [*rows[:2], rows[2] * 0, *rows[3:]]),
        (atom_fea, nbr_fea, idx, [*rows, torch.arange(0)]),
        (atom_fea, nbr_fea, idx, []),
    ):
        with pytest.raises(InputError):
            from_upstream(*bad)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"edge_index": None}, "edge_index"),
        ({"z": None}, "neither z"),
        ({"edge_weight": None}, "neither edge_weight"),
        ({"edge_index": torch.tensor([[0, 5], [1, 0]])}, "edge_index"),
        ({"edge_index": torch.tensor([[0, 1, 2], [1, 0, 3]])}, "edges"),
        ({"edge_index": torch.tensor([[0, 2], [1, 0]])}, "two crystals"),
        ({"z": torch.tensor([1, 0, 1, 1])}, "atomic numbers"),
        ({"z": torch.tensor([1, 101, 1, 1])}, "atomic numbers"),
        ({"batch": torch.tensor([0, 1, 0, 1])}, "rising"),
        ({"batch": torch.tensor([0, 0, 2, 2])}, "skips"),
        ({"batch": torch.tensor([0, 0])}, "batch"),
    ],
)
def test_pyg_data_that_contradicts_itself(change, word):
    fields = {
        "z": torch.tensor([1, 1, 8, 8]),
        "edge_index": torch.tensor([[0, 2], [1, 3]]),
        "edge_weight": torch.tensor([1.0, 2.0]),
        "batch": torch.tensor([0, 0, 1, 1]),
    }
    assert from_pyg(SimpleNamespace(**fields)).num_crystals == 2
    with pytest.raises(InputError, match=word):
        from_pyg(SimpleNamespace(**(fields | change)))
