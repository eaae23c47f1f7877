"""How exactly a GPU computes: float32, or less by choice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import InputError

NAMES = ("float32", "tf32", "bfloat16")

_bfloat16 = False


@contextmanager
def use_precision(name: str) -> Iterator[None]:
    """Compute on GPUs, inside the ``with`` block and in all threads, as exactly as ``name`` says.

    * ``"float32"``: float32's digits everywhere.
    * ``"tf32"``: matrix products multiply 10-bit mantissas, as under ``torch.backends.cuda.matmul.allow_tf32``, which
      this sets for the block (so the head and everything else of PyTorch follows).
    * ``"bfloat16"``: as "tf32", and what the kernels along edges read, rows' products and the filter's weights and
      products, is stored in bfloat16. Features between the steps, sums, statistics and gradients stay float32, and so
      does the arithmetic along edges.

    Without it, convolutions follow PyTorch's flag. It permits, and does not demand: the CPU and the reference backend
    keep float32. A backward pass follows what is in force when it runs.

    Raises:
        InputError: there is no such precision.
    """
    global _bfloat16
    if name not in NAMES:
        raise InputError(f"There is no precision {name!r}; choose one of {', '.join(NAMES)}.")
    before = _bfloat16, tf32_is_allowed()
    _bfloat16 = name == "bfloat16"
    _allow_tf32(name != "float32")
    try:
        yield
    finally:
        _bfloat16 = before[0]
        _allow_tf32(before[1])


def bfloat16_is_allowed() -> bool:
    """May rows and edge terms be stored in bfloat16?"""
    return _bfloat16


def tf32_is_allowed() -> bool:
    """May products use TF32?"""
    matmul = torch.backends.cuda.matmul
    try:
        return bool(matmul.allow_tf32)
    except RuntimeError:  # set through the newer name, which the older one then refuses to read
        return bool(matmul.fp32_precision == "tf32")


def _allow_tf32(allowed: bool) -> None:
    matmul = torch.backends.cuda.matmul
    try:
        _ = matmul.allow_tf32
        matmul.allow_tf32 = allowed
    except RuntimeError:
        matmul.fp32_precision = "tf32" if allowed else "ieee"
