"""Fast and exact crystal graph networks: CGCNN and SR-CGCNN on one fused kernel.

Importing this package is cheap; a public name loads its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "CGCNN": "nn",
    "SRCGCNN": "nn",
    "GatedConv": "nn",
    "ModelMetadata": "nn",
    "CrystalGraph": "graph",
    "GraphBatch": "graph",
    "GraphParameters": "graph",
    "build_graph": "graph",
    "build_graphs": "graph",
    "collate": "graph",
    "prepare": "graph",
    "open_store": "graph",
    "accelerate": "interop",
    "load_model": "serialization",
    "save_model": "serialization",
    "predict": "prediction",
    "predict_shards": "shards",
    "prepare_shards": "shards",
    "CapturedModel": "capture",
    "CapturedTraining": "capture",
    "backends": "ops.registry",
    "use_backend": "ops.registry",
    "use_precision": "ops.precision",
    "InputError": "errors",
}
_MODULES = ("functional", "nn", "graph", "interop", "training", "errors")

__all__ = [*sorted(_HOME), "__version__", "functional"]

if TYPE_CHECKING:
    from . import functional as functional
    from .capture import CapturedModel as CapturedModel
    from .capture import CapturedTraining as CapturedTraining
    from .errors import InputError as InputError
    from .graph import CrystalGraph as CrystalGraph
    from .graph import GraphBatch as GraphBatch
    from .graph import GraphParameters as GraphParameters
    from .graph import build_graph as build_graph
    from .graph import build_graphs as build_graphs
    from .graph import collate as collate
    from .graph import open_store as open_store
    from .graph import prepare as prepare
    from .interop import accelerate as accelerate
    from .nn import CGCNN as CGCNN
    from .nn import SRCGCNN as SRCGCNN
    from .nn import GatedConv as GatedConv
    from .nn import ModelMetadata as ModelMetadata
    from .ops.precision import use_precision as use_precision
    from .ops.registry import backends as backends
    from .ops.registry import use_backend as use_backend
    from .prediction import predict as predict
    from .serialization import load_model as load_model
    from .serialization import save_model as save_model
    from .shards import predict_shards as predict_shards
    from .shards import prepare_shards as prepare_shards


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    elif name in _MODULES:
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
