"""Models of other programs: one written here after the published formula, and the programs themselves where present."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

_FILES = {"txie-93/cgcnn": "cgcnn/cgcnn/model.py", "sata-deep/SR-CGCNN": "SR-CGCNN/SR-CGCNN/cgcnn/model.py"}
_SR = {"conv_mode": "shared_recurrent", "n_recurrent_steps": 3}
PROGRAMS = {
    "written here": ("", {"n_conv": 2}),
    "txie-93/cgcnn": ("txie-93/cgcnn", {"n_conv": 2}),
    "cgcnn2": ("cgcnn2", {"n_conv": 2}),
    "SR-CGCNN, standard": ("sata-deep/SR-CGCNN", {"n_conv": 2}),
    "SR-CGCNN": ("sata-deep/SR-CGCNN", _SR),
    "SR-CGCNN, all options": (
        "sata-deep/SR-CGCNN",
        _SR | {"recurrent_layer_norm": True, "recurrent_learnable_alpha": True, "return_loop_outputs": True},
    ),
}


class ConvLayer(nn.Module):
    """The published layer's parts and signature, its formula written with index_select and einsum."""

    def __init__(self, atom_fea_len: int, nbr_fea_len: int) -> None:
        super().__init__()
        self.fc_full = nn.Linear(2 * atom_fea_len + nbr_fea_len, 2 * atom_fea_len)
        self.sigmoid, self.softplus1, self.softplus2 = nn.Sigmoid(), nn.Softplus(), nn.Softplus()
        self.bn1, self.bn2 = nn.BatchNorm1d(2 * atom_fea_len), nn.BatchNorm1d(atom_fea_len)

    def forward(self, atom_in_fea, nbr_fea, nbr_fea_idx):
        n, m = nbr_fea_idx.shape
        own, weight = atom_in_fea.shape[1], self.fc_full.weight
        z = torch.einsum("if,cf->ic", atom_in_fea, weight[:, :own])[:, None, :].expand(-1, m, -1)
        z = z + torch.einsum("imf,cf->imc", atom_in_fea[nbr_fea_idx], weight[:, own : 2 * own])
        z = z + torch.einsum("imk,ck->imc", nbr_fea, weight[:, 2 * own :]) + self.fc_full.bias
        gate, core = self.bn1(z.reshape(n * m, -1)).reshape(n, m, -1).split(own, dim=2)
        total = self.bn2((self.sigmoid(gate) * self.softplus1(core)).sum(1))
        return self.softplus2(atom_in_fea + total)


class CrystalGraphConvNet(nn.Module):
    def __init__(self, orig_atom_fea_len, nbr_fea_len, atom_fea_len=64, n_conv=3, h_fea_len=128, n_h=1) -> None:
        super().__init__()
        self.embedding = nn.Linear(orig_atom_fea_len, atom_fea_len)
        self.convs = nn.ModuleList(ConvLayer(atom_fea_len, nbr_fea_len) for _ in range(n_conv))
        self.conv_to_fc, self.fc_out = nn.Linear(atom_fea_len, h_fea_len), nn.Linear(h_fea_len, 1)

    def forward(self, atom_fea, nbr_fea, nbr_fea_idx, crystal_atom_idx):
        h = self.embedding(atom_fea)
        for layer in self.convs:
            h = layer(h, nbr_fea, nbr_fea_idx)
        crystal = self.pooling(h, crystal_atom_idx)
        return self.fc_out(softplus(self.conv_to_fc(softplus(crystal))))

    def pooling(self, atom_fea, crystal_atom_idx):
        assert sum(map(len, crystal_atom_idx)) == len(atom_fea)
        return torch.stack([atom_fea[rows].mean(0) for rows in crystal_atom_idx])


def program(name: str) -> type:
    """The class ``CrystalGraphConvNet`` of a program; skips where it is absent."""
    if not name:
        return CrystalGraphConvNet
    if name == "cgcnn2":
        return pytest.importorskip("cgcnn2.model", reason="cgcnn2 is not installed").CrystalGraphConvNet
    path = Path(os.environ.get("SRCGCNN_PEERS", "")) / _FILES[name]
    if not path.is_file():
        pytest.skip(f"SRCGCNN_PEERS does not hold {name}")
    spec = importlib.util.spec_from_file_location(f"program_{path.parts[-4].replace('-', '_')}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CrystalGraphConvNet


@pytest.fixture
def published() -> Callable[..., nn.Module]:
    """published(name, dtype=float64, **options) -> a model of that program with random parameters and statistics."""

    def make(name: str = "written here", dtype: torch.dtype = torch.float64, **options) -> nn.Module:
        where, more = PROGRAMS[name]
        torch.manual_seed(0)
        model = program(where)(20, 41, **({"atom_fea_len": 16, "h_fea_len": 12} | more | options)).to(dtype)
        with torch.no_grad():
            for key, x in [*model.named_parameters(), *model.named_buffers()]:
                if key.endswith(("running_var", "bn1.weight", "bn2.weight")):
                    x.uniform_(0.5, 1.5)
                elif key.endswith("running_mean"):
                    x.normal_()
        return model

    return make


def _batch(kind: str = "Gaussians", sizes=(5, 1, 30, 2, 12), m: int = 12, dtype=torch.float64, seed: int = 0):
    """The arguments of the published forward: crystals of random atoms, each edge within its crystal."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum(sizes)
    starts = ends - np.asarray(sizes)
    idx = np.concatenate([rng.integers(a, b, (b - a, m)) for a, b in zip(starts, ends, strict=True)])
    distance = np.sort(np.round(rng.uniform(1.5, 7.5, (ends[-1], m)), 1), axis=1)  # some distances are equal
    if kind == "padded":
        for row in range(0, ends[-1], 3):
            first = starts[np.searchsorted(ends, row, side="right")]
            idx[row, m - 4 :], distance[row, m - 4 :] = first, 9.0
    fea = np.exp(-(((distance[..., None] - 0.2 * np.arange(41)) / 0.2) ** 2))
    if kind == "any features":
        fea = rng.normal(size=fea.shape)
    rows = [torch.arange(a, b) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
    atoms = torch.from_numpy(rng.normal(size=(ends[-1], 20))).to(dtype)
    return atoms, torch.from_numpy(fea).to(dtype), torch.from_numpy(idx), rows


@pytest.fixture
def published_batch() -> Callable[..., tuple]:
    return _batch
