"""Other programs, brought by the person who measures; none of their code is here.

SRCGCNN_PEERS names a directory with clones of the published programs: ``cgcnn`` (txie-93/cgcnn) and ``SR-CGCNN``
(sata-deep/SR-CGCNN). PyTorch Geometric is taken where it is installed. What is absent is reported as absent.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from srcgcnn_fast import CGCNN
from srcgcnn_fast.graph import GraphBatch
from srcgcnn_fast.interop.upstream import to_pyg, to_upstream

_MODEL_FILES = {"CGCNN": "cgcnn/cgcnn/model.py", "SR-CGCNN": "SR-CGCNN/SR-CGCNN/cgcnn/model.py"}


@cache
def published_module(kind: str) -> ModuleType | None:
    """The published program's own model file, or None where it is absent."""
    path = Path(os.environ.get("SRCGCNN_PEERS", "")) / _MODEL_FILES[kind]
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location(f"published_{kind.replace('-', '_')}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published_model(model: nn.Module) -> nn.Module | None:
    """The published program's model with the weights of ours."""
    kind = "CGCNN" if isinstance(model, CGCNN) else "SR-CGCNN"
    module = published_module(kind)
    if module is None:
        return None
    p = model.hyperparameters
    shared = {"atom_fea_len": p["atom_fea_len"], "h_fea_len": p["h_fea_len"], "n_h": p["n_h"]}
    if kind == "CGCNN":
        peer = module.CrystalGraphConvNet(p["orig_atom_fea_len"], p["nbr_fea_len"], n_conv=p["n_conv"], **shared)
    else:
        shared |= {"conv_mode": "shared_recurrent", "n_recurrent_steps": p["n_recurrent_steps"]}
        peer = module.CrystalGraphConvNet(p["orig_atom_fea_len"], p["nbr_fea_len"], **shared)
    peer.load_state_dict(model.state_dict(), strict=True)
    return peer


def published_input(batch: GraphBatch, clean: bool) -> tuple[Any, ...]:
    """The published programs' input; ``clean`` removes the denormal Gaussians of far edges that slow them down."""
    atom_fea, nbr_fea, nbr_fea_idx, crystal_atom_idx = to_upstream(batch)
    return atom_fea, without_denormals(nbr_fea) if clean else nbr_fea, nbr_fea_idx, crystal_atom_idx


def without_denormals(x: Tensor) -> Tensor:
    return torch.where(x < 1e-30, 0.0, x)


def denormals_per_edge(batch: GraphBatch) -> float:
    """Denormal float32 numbers among the features of an edge, as the published loaders make them."""
    nbr_fea = to_upstream(batch)[1]
    small = (nbr_fea > 0) & (nbr_fea < torch.finfo(torch.float32).tiny)
    return float(small.sum()) / batch_edges(nbr_fea)


def batch_edges(nbr_fea: Tensor) -> int:
    return nbr_fea.shape[0] * nbr_fea.shape[1]


def segment_mean(h: Tensor, segments: tuple[Tensor, Tensor]) -> Tensor:
    """Mean of the rows of each crystal; ``segments``: crystal of each row (N,), rows of each crystal (B, 1)."""
    crystal, count = segments
    return h.new_zeros(count.shape[0], h.shape[1]).index_add(0, crystal, h) / count


def segments(batch: GraphBatch) -> tuple[Tensor, Tensor]:
    """Second argument of :func:`segment_mean` for a batch with one row per atom."""
    return batch.atom_crystal.clone(), batch.crystal_ptr.diff()[:, None].float()


def with_segment_mean(peer: nn.Module) -> nn.Module:
    """The published model with one operator in place of its loop over crystals, which a compiler would unroll."""
    peer.pooling = segment_mean
    return peer


class GeometricModel(nn.Module):
    """Our embedding, pooling and head around PyTorch Geometric's CGConv layers, which have a single batch norm.

    Its SR form applies one CGConv in every step, with a batch norm per step.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        from torch_geometric.nn import CGConv

        p = model.hyperparameters
        width, self.is_shared = p["atom_fea_len"], not isinstance(model, CGCNN)
        steps = p["n_recurrent_steps"] if self.is_shared else p["n_conv"]
        distinct = 1 if self.is_shared else steps
        self.convs = nn.ModuleList(
            CGConv(width, p["nbr_fea_len"], batch_norm=not self.is_shared) for _ in range(distinct)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(steps if self.is_shared else 0))
        self.embedding, self.conv_to_fc, self.fc_out = model.embedding, model.conv_to_fc, model.fc_out
        self.steps = steps

    def forward(self, atom_fea: Tensor, edge_index: Tensor, nbr_fea: Tensor, crystal: Tensor, count: Tensor) -> Tensor:
        h = self.embedding(atom_fea)
        for t in range(self.steps):
            if self.is_shared:
                h = h + self.norms[t](self.convs[0](h, edge_index, nbr_fea) - h)
            else:
                h = self.convs[t](h, edge_index, nbr_fea)
        return self.head(h, crystal, count)

    def head(self, h: Tensor, crystal: Tensor, count: Tensor) -> Tensor:
        pooled = segment_mean(h, (crystal, count))
        return self.fc_out(softplus(self.conv_to_fc(softplus(pooled))))

    def by_hand(self, atom_fea: Tensor, edge_index: Tensor, nbr_fea: Tensor, crystal: Tensor, count: Tensor) -> Tensor:
        """The same numbers in eval mode from CGConv's formula: the gate of its layers without PyTorch Geometric."""
        sender, receiver = edge_index
        h = self.embedding(atom_fea)
        for t in range(self.steps):
            conv = self.convs[0 if self.is_shared else t]
            norm = self.norms[t] if self.is_shared else conv.bn
            z = torch.cat([h[receiver], h[sender], nbr_fea], dim=1)
            m = torch.zeros_like(h).index_add(0, receiver, conv.lin_f(z).sigmoid() * softplus(conv.lin_s(z)))
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            h = h + (m - norm.running_mean) * scale + norm.bias
        return self.head(h, crystal, count)


def geometric_is_installed() -> bool:
    return importlib.util.find_spec("torch_geometric") is not None


def geometric_input(batch: GraphBatch) -> tuple[Tensor, ...]:
    """What :class:`GeometricModel` takes, of a batch with one row per atom; features without denormals."""
    atom_fea, nbr_fea, _, _ = published_input(batch, clean=True)
    return atom_fea, to_pyg(batch)["edge_index"], nbr_fea.flatten(0, 1), *segments(batch)
