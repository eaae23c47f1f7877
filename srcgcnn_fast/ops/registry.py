"""Which backends there are, why not, and which one a call takes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from ..errors import InputError

logger = logging.getLogger(__name__)

NAMES = ("reference", "cpu", "triton", "cuda")
MOST_FEATURES = 128
"""Of the CUDA kernels for inference."""


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


def _load_core() -> tuple[Any, str]:
    """The compiled module, or None and the reason. Torch was imported first, so that both share its OpenMP runtime."""
    if find_spec("srcgcnn_fast._core") is None:
        return None, "the compiled kernels were not built; install a C++17 compiler and reinstall srcgcnn_fast"
    try:
        return import_module("srcgcnn_fast._core"), ""
    except ImportError as error:
        return None, f"the compiled kernels do not load: {error}"


core, core_problem = _load_core()
# A forced level, like a forced backend, never falls back.
_BAD_SIMD = core is None and "SRCGCNN_FAST_SIMD" in core_problem


def backends() -> dict[str, BackendStatus]:
    """Every backend by name: whether it is built, whether it can run on this machine, and why not."""
    if core is None:
        cpu = BackendStatus("cpu", "do not load" in core_problem, False, core_problem)
    else:
        threads = f"{torch.get_num_threads()} threads" if core.threads else "1 thread, built without OpenMP"
        cpu = BackendStatus("cpu", True, True, f"C++, SIMD level {core.simd_level()}, {threads}")
    built = core is not None and not core.cuda.startswith("not built")
    no_cuda = _now(cuda_problem)
    with_cuda = "compiled, float32 on CUDA tensors"
    no_triton = _now(triton_problem)
    with_triton = "float32 on CUDA tensors"
    return {
        "reference": BackendStatus("reference", True, True, "plain PyTorch, any device and dtype"),
        "cpu": cpu,
        "triton": BackendStatus("triton", True, no_triton is None, no_triton or with_triton),
        "cuda": BackendStatus("cuda", built, no_cuda is None, no_cuda or with_cuda),
    }


def _now(problem: Callable[[], str | None]) -> str | None:
    try:
        return problem()
    except RuntimeError as error:
        return f"CUDA does not start ({str(error).splitlines()[0]})"


def cuda_problem(device: int | None = None) -> str | None:
    """Why the CUDA backend cannot run on that GPU, or the current one; None if it can.

    Raises:
        RuntimeError: CUDA does not start, as in the child of a process that has used it, or on a GPU without memory.
    """
    if core is None:
        return core_problem
    if core.cuda.startswith("not built"):
        return f"the CUDA kernels were {core.cuda}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _device_problem(torch.cuda.current_device() if device is None else device)


@cache
def _device_problem(device: int) -> str | None:
    driver, built = core.cuda_versions()
    if driver // 1000 < built // 1000:
        supported, needed = (f"{x // 1000}.{x % 1000 // 10}" for x in (driver, built))
        return (
            f"the driver supports CUDA up to {supported}, but the kernels were built with {needed}; update the driver, "
            "or reinstall with an older CUDA toolkit"
        )
    with torch.cuda.device(device):
        problem = core.cuda_image_problem()
    if not problem:
        return None
    name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return (
        f"the kernels were not built for {name}, sm_{major}{minor} ({problem}); reinstall with "
        f"-C cmake.define.CMAKE_CUDA_ARCHITECTURES={major}{minor}"
    )


def triton_problem(device: int | None = None) -> str | None:
    """Why the Triton backend cannot run on that GPU, or the current one; None if it can. Raises: as cuda_problem."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _triton_problem(torch.cuda.current_device() if device is None else device)


# What torch.compiler.assume_constant_result sets, which imports all of torch._dynamo.
triton_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]
cuda_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _triton_problem(device: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8 and torch.version.hip is None:
        return f"Triton needs a GPU of compute capability 8.0 or newer, and this one has {major}.{minor}"
    from . import triton  # which imports this module

    return triton.problem()


_forced: str | None = None  # a plain global, which torch.compile can guard


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run everything inside the ``with`` block, in all threads, on one backend; one that cannot run is an error.

    The environment variable ``SRCGCNN_FAST_BACKEND`` does the same for a whole process.

    Raises:
        InputError: there is no such backend, or it cannot run here.
    """
    global _forced
    _require(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _require(name: str, device: int | None = None) -> None:
    if name not in NAMES:
        raise InputError(f"There is no backend {name!r}; choose one of {', '.join(NAMES)}.")
    on_gpu = {"cuda": cuda_problem, "triton": triton_problem}.get(name)
    problem = on_gpu(device) if on_gpu else core_problem if name == "cpu" else None
    if problem:
        raise InputError(f"Backend {name!r} cannot run here: {problem}.")


def forced_backend() -> str | None:
    """The name that :func:`use_backend` or the environment forces, whether or not there is such a backend."""
    return _forced or os.environ.get("SRCGCNN_FAST_BACKEND") or None


def select(
    h: torch.Tensor, edge_statistics_grad: bool = False, inference: bool = False, width: int | None = None
) -> str:
    """The backend for a call on ``h``: the forced one, or the fastest that can take its device and dtype.

    ``edge_statistics_grad``: gradients with respect to distances are wanted through statistics of the batch.
    ``inference``: no gradients are wanted, and no statistics of the batch.
    ``width``: F, where it is not the columns of ``h``.

    Raises:
        InputError: a backend is forced that cannot take this input, or a SIMD level that is none of this processor.
    """
    forced = forced_backend()
    if _BAD_SIMD:
        raise InputError(f"{core_problem}.")
    if forced == "reference":
        return forced
    if forced not in (None, "cpu"):
        _require(forced, h.device.index)  # type: ignore[arg-type]
    device = h.device.type
    name = {"cpu": "cpu", "cuda": "triton"}.get(device, "reference")
    no_cuda = None
    if device == "cuda" and forced in (None, "cuda"):
        no_cuda = _cuda_refusal(h, inference, width)
        name = "cuda" if no_cuda is None or forced else name
    reason = no_cuda if name == "cuda" else _refusal(h)
    if is_transformed():
        reason = "torch.func transforms and forward-mode derivatives go through the reference"
    elif edge_statistics_grad:
        reason = "gradients of distances through the batch norm of a training batch exist in the reference only"
    if forced not in (None, name):
        reason = f"it does not take tensors on {device!r}"
    if reason is None:
        if device == "cuda" and name == "triton" and forced is None:
            _say_once(str(no_cuda), "Triton")
        return name
    if forced is not None:
        raise InputError(f"Backend {forced!r} cannot take this input: {reason}.")
    _say_once(reason)
    return "reference"


def refuse_tracing() -> None:
    """A trace sees no kernels, and would hold what they computed.

    Raises:
        InputError: ``torch.jit.trace`` is at work, or the older ONNX exporter, which calls it.
    """
    if torch._C._get_tracing_state() is not None:
        raise InputError(
            "torch.jit.trace and the older ONNX exporter would keep this batch's numbers as constants; use "
            "torch.export or torch.compile."
        )


def is_transformed() -> bool:
    """Is this a call inside vmap, jvp …? The compiled operators would have no tangent there, or run row by row."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._functorch.peek_interpreter_stack()) or torch.autograd.forward_ad._current_level >= 0


def _refusal(h: torch.Tensor) -> str | None:
    device, dtype = h.device.type, h.dtype
    if device == "cuda":
        no_type = None if dtype == torch.float32 else f"the Triton kernels take float32, not {dtype}"
        return triton_problem(h.device.index) or no_type
    if device != "cpu":
        return f"tensors on {device!r} have no compiled backend in this version"
    if dtype not in (torch.float32, torch.float64):
        return f"the CPU kernels take float32 and float64, not {dtype}"
    return core_problem or None


def _cuda_refusal(h: torch.Tensor, inference: bool, width: int | None = None) -> str | None:
    if h.dtype != torch.float32:
        return f"the CUDA kernels take float32, not {h.dtype}"
    if inference and (features := width or h.shape[1]) > MOST_FEATURES:
        return f"the CUDA kernels take up to {MOST_FEATURES} features in inference, not {features}"
    return cuda_problem(h.device.index)


def trains_compiled(h: torch.Tensor) -> bool:
    """Do the CUDA kernels take a call on ``h`` with gradients or statistics of the batch? Else Triton's take it."""
    return forced_backend() in (None, "cuda") and _cuda_refusal(h, inference=False) is None


def _say_once(reason: str, instead: str = "reference") -> None:
    if not torch.compiler.is_compiling():
        _log(reason, instead)


@cache
def _log(reason: str, instead: str) -> None:
    logger.warning("Falling back to the %s backend: %s.", instead, reason)
