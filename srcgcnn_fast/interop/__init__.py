"""Other programs: their models accelerated, published checkpoints, published batches, PyTorch Geometric."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "CGConv": "geometric",
    "accelerate": "switch",
    "acceleration": "switch",
    "difference": "switch",
    "restore": "switch",
    "load_upstream_checkpoint": "checkpoints",
    "save_upstream_checkpoint": "checkpoints",
    "expand_quotient": "upstream",
    "from_pyg": "upstream",
    "from_upstream": "upstream",
    "to_pyg": "upstream",
    "to_upstream": "upstream",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from .checkpoints import load_upstream_checkpoint as load_upstream_checkpoint
    from .checkpoints import save_upstream_checkpoint as save_upstream_checkpoint
    from .geometric import CGConv as CGConv
    from .switch import accelerate as accelerate
    from .switch import acceleration as acceleration
    from .switch import difference as difference
    from .switch import restore as restore
    from .upstream import expand_quotient as expand_quotient
    from .upstream import from_pyg as from_pyg
    from .upstream import from_upstream as from_upstream
    from .upstream import to_pyg as to_pyg
    from .upstream import to_upstream as to_upstream


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
