"""Checkpoints of cgcnn2, in and out."""

from __future__ import annotations

import pytest
import torch

import srcgcnn_fast as sf
from srcgcnn_fast.interop import from_upstream, save_upstream_checkpoint
from srcgcnn_fast.nn import ModelMetadata

cgcnn2 = pytest.importorskip("cgcnn2.model", reason="cgcnn2 is not installed")
SIZES = {"atom_fea_len": 16, "h_fea_len": 12, "n_h": 2}


def checkpoint_of(model, **args):
    """What its ``cgcnn-tr`` saves as best_model.ckpt."""
    return {
        "epoch": 3,
        "state_dict": model.state_dict(),
        "normalizer": {"mean": torch.tensor(1.5), "std": torch.tensor(0.25)},
        "best_mse_error": 0.125,
        "args": {"task": "regression", "n_conv": 2, "device": torch.device("cpu"), "train_ratio": None} | SIZES | args,
    }


def batch_with_92(published_batch):
    _, fea, idx, rows = published_batch(dtype=torch.float32)
    return torch.rand(len(fea), 92, generator=torch.Generator().manual_seed(0)), fea, idx, rows


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_in(task, tmp_path, published_batch):
    torch.manual_seed(0)
    classification = task == "classification"
    theirs = cgcnn2.CrystalGraphConvNet(92, 41, n_conv=2, classification=classification, **SIZES)
    theirs(*batch_with_92(published_batch))  # statistics of their own
    torch.save(checkpoint_of(theirs.eval(), task=task), tmp_path / "best_model.ckpt")
    model = sf.load_model(tmp_path / "best_model.ckpt")
    batch = batch_with_92(published_batch)
    expected = theirs(*batch)[0]
    torch.testing.assert_close(model(from_upstream(*batch)), expected, rtol=1e-4, atol=1e-5)
    assert model.metadata.graph.padded
    assert (model.metadata.mean, model.metadata.std) == (((0.0,), (1.0,)) if classification else ((1.5,), (0.25,)))


def test_out(tmp_path, published_batch):
    torch.manual_seed(0)
    model = sf.CGCNN(2, 16, 12, 2).eval()
    model.metadata = ModelMetadata(mean=(1.5,), std=(0.25,))
    model.metadata.graph = type(model.metadata.graph)(padded=True)
    save_upstream_checkpoint(model, tmp_path / "model.pth.tar")
    found = torch.load(tmp_path / "model.pth.tar", weights_only=False)  # as its tools load it
    args = found["args"]
    sizes = {name: args[name] for name in ("atom_fea_len", "n_conv", "h_fea_len", "n_h")}
    theirs = cgcnn2.CrystalGraphConvNet(92, 41, classification=args["task"] == "classification", **sizes)
    theirs.load_state_dict(found["state_dict"], strict=True)
    batch = batch_with_92(published_batch)
    torch.testing.assert_close(theirs.eval()(*batch)[0], model(from_upstream(*batch)), rtol=1e-4, atol=1e-5)
    assert (float(found["normalizer"]["mean"]), float(found["normalizer"]["std"])) == (1.5, 0.25)
