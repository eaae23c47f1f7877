from __future__ import annotations

import pytest
import torch

import srcgcnn_fast as sf
from srcgcnn_fast.errors import InputError

pytest.importorskip("huggingface_hub", reason="huggingface-hub is not installed")
from srcgcnn_fast.interop.hub import HubModel


def model_of(kind, **options):
    torch.manual_seed(0)
    model = kind(2, atom_fea_len=16, h_fea_len=8, **options)
    model.metadata.targets, model.metadata.units = ("band_gap",), ("eV",)
    model.metadata.mean, model.metadata.std = (1.5,), (0.25,)
    model.metadata.extra = {"data set": "alloys", "test MAE": "0.12 eV"}
    return model.eval()


@pytest.mark.parametrize("kind", [sf.CGCNN, sf.SRCGCNN])
def test_round_trip_without_a_network(kind, make_batch, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, batch = model_of(kind), make_batch("weighted")
    HubModel(model).save_pretrained(tmp_path / "there")
    HubModel(model).save_pretrained(tmp_path / "there")  # again, over it
    assert {p.name for p in (tmp_path / "there").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    wrapped = HubModel.from_pretrained(tmp_path / "there")
    assert not wrapped.training
    for again in (wrapped.model, sf.load_model(tmp_path / "there")):
        assert type(again) is kind and again.metadata == model.metadata and not again.training
        assert torch.equal(again.predict(batch), model.predict(batch))


def test_the_card_says_what_the_numbers_mean(tmp_path):
    HubModel(model_of(sf.SRCGCNN)).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for words in ("| band_gap | eV | 1.5, 0.25 |", "test MAE: 0.12 eV", "12 neighbours within 8 Å", "arXiv:2605.01304"):
        assert words in card
    HubModel(model_of(sf.CGCNN)).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "# CGCNN" in card and "arXiv:2605.01304" not in card
    (tmp_path / "README.md").write_text("mine")
    HubModel(model_of(sf.SRCGCNN)).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_from_a_cached_snapshot(tmp_path, monkeypatch):
    """The files as the Hub's client keeps them; nothing is asked of the network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--someone--a-model"
    model = model_of(sf.CGCNN)
    HubModel(model).save_pretrained(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    again = HubModel.from_pretrained("someone/a-model", cache_dir=tmp_path, local_files_only=True).model
    assert all(torch.equal(x, y) for x, y in zip(again.parameters(), model.parameters(), strict=True))


def test_a_damaged_directory_is_refused(tmp_path):
    HubModel(model_of(sf.CGCNN)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="damaged or cut short"):
        HubModel.from_pretrained(tmp_path)
