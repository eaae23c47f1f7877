"""How exactly a GPU computes: float32, or less by choice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import InputError

NAMES = ("float32", "tf32", "bfloat16")

_bfloat16 = False


@contextmanager
def use_precision(name: str) -> Iterator[None]:
    """Set the precision of computations on GPUs, inside the ``with`` block and in all threads.

    * ``"float32"``: float32's digits everywhere.
    * ``"tf32"``: matrix products multiply 10-bit mantissas, as under ``torch.backends.cuda.matmul.allow_tf32``, which
      this sets for the block (so the head and everything else of PyTorch follows).
    * ``"bfloat16"``: as "tf32", and what the kernels along edges read, rows' products and the filter's weights and
      products, is stored in bfloat16. Features between the steps, sums, statistics and gradients stay float32, and so
      does the arithmetic along edges.

    Without it, convolutions follow PyTorch's flag. It permits lower precision but does not force it: the CPU and the
    reference backend keep float32. A backward pass uses the precision that is set when it runs.

    Raises:
        InputError: there is no such precision.
    """
    global _bfloat16
    if name not in NAMES:
        raise InputError(f"There is no precision {name!r}; choose one of {', '.join(NAMES)}.")
    before, _bfloat16 = _bfloat16, name == "bfloat16"
    try:
        with _tf32(name != "float32"):
            yield
    finally:
        _bfloat16 = before


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


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Allow it on GPUs, or not, through the older name of PyTorch's setting where that can be read.

    Which raises an error as soon as older and newer names (``fp32_precision``, of PyTorch 2.9) disagree.
    """
    gpu: Any = torch.backends.cuda.matmul
    cpu: Any = getattr(torch.backends.mkldnn, "matmul", None)
    before = [(x, x.fp32_precision) for x in (gpu, cpu) if hasattr(x, "fp32_precision")]
    try:
        name = torch.get_float32_matmul_precision()
    except RuntimeError:
        name = ""
    if name:
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        for place, _ in before[1:]:
            place.fp32_precision = "ieee"  # which the older name also sets
    else:
        gpu.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        if name:
            torch.set_float32_matmul_precision(name)
        for place, value in before:
            place.fp32_precision = "none"  # as the setting for everything
            if place.fp32_precision != value:
                place.fp32_precision = value
