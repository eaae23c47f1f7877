"""Other programs, brought by the person who measures; none of their code is here.

SRCGCNN_PEERS names a directory with clones of the published programs: ``cgcnn`` (txie-93/cgcnn) and ``SR-CGCNN``
(sata-deep/SR-CGCNN). What is absent is reported as absent.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from srcgcnn_fast import CGCNN
from srcgcnn_fast.graph import GraphBatch
from srcgcnn_fast.interop.upstream import to_upstream

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


def published_model(model: torch.nn.Module) -> torch.nn.Module | None:
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
    if clean:
        nbr_fea = torch.where(nbr_fea < 1e-30, 0.0, nbr_fea)
    return atom_fea, nbr_fea, nbr_fea_idx, crystal_atom_idx
