"""Which backends there are, why not, and which one a call takes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch

from ..errors import InputError

logger = logging.getLogger(__name__)

NAMES = ("reference", "cpu", "triton", "cuda")


@dataclass(frozen=True)
class BackendStatus:
    """One backend on this machine."""

    name: str
    built: bool
    """The code is part of this installation."""
    available: bool
    """It can run now."""
    reason: str
    """What it is, or why it cannot run."""


@cache
def load_core() -> tuple[object | None, str]:
    """The compiled module, or None and the reason. Torch comes first, so that both share its OpenMP runtime."""
    try:
        from .. import _core  # type: ignore[attr-defined]
    except ImportError as error:
        if "_core" in str(error) and "cannot import name" in str(error):
            return None, "the compiled kernels were not built; install a C++17 compiler and reinstall srcgcnn_fast"
        return None, f"the compiled kernels do not load: {error}"
    return _core, ""


def backends() -> dict[str, BackendStatus]:
    """Every backend by name: whether it is built, whether it can run on this machine, and why not."""
    core, problem = load_core()
    if core is None:
        cpu = BackendStatus("cpu", "do not load" in problem, False, problem)
        cuda = BackendStatus("cuda", False, False, problem)
    else:
        threads = torch.get_num_threads()
        cpu = BackendStatus("cpu", True, True, f"C++, SIMD level {core.simd_level()}, {threads} threads")  # type: ignore[attr-defined]
        built = not core.cuda.startswith("not built")  # type: ignore[attr-defined]
        why = "its kernels are not connected to the operators yet" if built else core.cuda  # type: ignore[attr-defined]
        cuda = BackendStatus("cuda", built, False, why)
    return {
        "reference": BackendStatus("reference", True, True, "plain PyTorch, any device and dtype"),
        "cpu": cpu,
        "triton": BackendStatus("triton", False, False, "not part of this version"),
        "cuda": cuda,
    }


_forced: ContextVar[str | None] = ContextVar("srcgcnn_fast_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run everything inside the ``with`` block on one backend; one that cannot run is an error.

    The environment variable ``SRCGCNN_FAST_BACKEND`` does the same for a whole process.

    Raises:
        InputError: there is no such backend, or it cannot run here.
    """
    _require(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def _require(name: str) -> None:
    known = backends()
    if name not in known:
        raise InputError(f"There is no backend {name!r}; choose one of {', '.join(known)}.")
    if not known[name].available:
        raise InputError(f"Backend {name!r} cannot run here: {known[name].reason}.")


def forced_backend() -> str | None:
    return _forced.get() or os.environ.get("SRCGCNN_FAST_BACKEND") or None


def select(h: torch.Tensor, edge_statistics_grad: bool = False) -> str:
    """The backend for a call on ``h``: the forced one, or the fastest that can take its device and dtype.

    ``edge_statistics_grad``: gradients with respect to distances are wanted through statistics of the batch.

    Raises:
        InputError: a backend is forced that cannot take this input.
    """
    forced = forced_backend()
    if forced == "reference":
        return forced
    if forced is not None:
        _require(forced)
    reason = _refusal(h.device.type, h.dtype)
    if edge_statistics_grad:
        reason = "gradients of distances through the batch norm of a training batch exist in the reference only"
    if reason is None:
        return "cpu"
    if forced is not None:
        raise InputError(f"Backend {forced!r} cannot take this input: {reason}.")
    _say_once(reason)
    return "reference"


def _refusal(device: str, dtype: torch.dtype) -> str | None:
    if device != "cpu":
        return f"tensors on {device!r} have no compiled backend in this version"
    if dtype not in (torch.float32, torch.float64):
        return f"the CPU kernels take float32 and float64, not {dtype}"
    core, problem = load_core()
    return None if core is not None else problem


@cache
def _say_once(reason: str) -> None:
    logger.warning("Falling back to the reference backend: %s.", reason)
