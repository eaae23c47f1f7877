"""From a crystal to a graph: readers, neighbours, symmetry quotient, batches, the store of prepared graphs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "CrystalGraph": "batch",
    "GraphBatch": "batch",
    "collate": "batch",
    "GraphParameters": "parameters",
    "build_graph": "build",
    "build_graphs": "build",
    "Crystal": "readers",
    "Record": "readers",
    "as_crystal": "readers",
    "read_inputs": "readers",
    "GraphStore": "store",
    "open_store": "store",
    "prepare": "store",
    "ELEMENT_SYMBOLS": "elements",
    "element_features": "elements",
    "neighbor_list": "neighbors",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from .batch import CrystalGraph as CrystalGraph
    from .batch import GraphBatch as GraphBatch
    from .batch import collate as collate
    from .build import build_graph as build_graph
    from .build import build_graphs as build_graphs
    from .elements import ELEMENT_SYMBOLS as ELEMENT_SYMBOLS
    from .elements import element_features as element_features
    from .neighbors import neighbor_list as neighbor_list
    from .parameters import GraphParameters as GraphParameters
    from .readers import Crystal as Crystal
    from .readers import Record as Record
    from .readers import as_crystal as as_crystal
    from .readers import read_inputs as read_inputs
    from .store import GraphStore as GraphStore
    from .store import open_store as open_store
    from .store import prepare as prepare


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
