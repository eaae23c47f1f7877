"""Graphs of a store joined to a batch by compiled code, which does not hold Python's lock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..ops.registry import core
from .batch import GraphBatch

_FIELDS = ("numbers", "weight", "row_ptr", "crystal_ptr", "sender", "distance", "atom_class")
"""Of a batch, in the order of ``Joined`` in csrc/cpu/kernels.h."""
_FLOATS = ("weight", "distance", "more")
_TYPES: dict[str, Any] = {
    "numbers": np.uint8, "weight": np.float32, "degree": np.int32, "sender": np.int32, "distance": np.float32,
    "atom_class": np.int32,
}  # fmt: skip
"""Of a store, in the order of ``Stored``."""
_ALIGNMENT = 32
"""Each array begins at a multiple of so many numbers, 128 bytes."""

_LEAST_EDGES = 1 << 13
"""Of a batch that has a thread of its own, whose start takes as long as the work on so many."""


class Packer:
    """The arrays of a store, to be joined.

    Args:
        arrays: those of a graph, one after the other.
        first: "row", "edge" and "atom" -> (n + 1,) int64, where each graph begins, ascending.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], first: Mapping[str, np.ndarray]) -> None:
        self.held = [first[kind] for kind in ("row", "edge", "atom")] + [arrays[name] for name in _TYPES]
        self.addresses = [x.ctypes.data for x in self.held]

    @staticmethod
    def takes(arrays: Mapping[str, np.ndarray]) -> bool:
        """Are the kernels there, and the arrays of the types of a store on disk?"""
        whole = all(arrays[name].dtype == kind and arrays[name].flags.c_contiguous for name, kind in _TYPES.items())
        return core is not None and whole


class Packing:
    """Some graphs of a store on their way into one block of memory.

    Args:
        packer: the store.
        chosen: (B,) int64, from 0 to n - 1.
        more: float32 numbers that go along.
        pin: take memory that a GPU can copy from.

    Raises:
        InputError: the batch exceeds int32.
    """

    def __init__(self, packer: Packer, chosen: np.ndarray, more: np.ndarray, pin: bool = False) -> None:
        count, address = len(chosen), chosen.ctypes.data
        rows, edges, atoms = core.graph_sizes(packer.addresses, address, count)
        check_sizes(rows, edges)
        self._edges, self._shape = edges, more.shape
        self._spans: list[int] = []  # numbers of each array, and of nothing after it
        begins, end = [], 0
        for length in (rows, rows, rows + 1, count + 1, edges, edges, atoms, more.size):
            begins.append(end)
            self._spans += length, -length % _ALIGNMENT
            end += length + self._spans[-1]
        self._block = torch.empty(end, dtype=torch.int32, device="cpu", pin_memory=pin)
        first = self._block.data_ptr()
        places = [first + 4 * begin for begin in begins[:-1]]
        self._work = core.Packing(places, packer.addresses, address, count, (self._block, packer, chosen))
        if more.size:
            self._block.numpy()[begins[-1] : begins[-1] + more.size] = more.reshape(-1).view(np.int32)

    def start(self) -> Packing:
        """In a thread of its own, unless that would take longer to begin than the work."""
        if self._edges >= _LEAST_EDGES:
            self._work.start()
        return self

    def here(self) -> GraphBatch:
        """The batch, joined now; its arrays have nothing in common but their memory."""
        self._work.finish()
        block, first, parts = self._block.numpy(), 0, []
        for length, gap in zip(self._spans[::2], self._spans[1::2], strict=True):
            parts.append(block[first : first + length])
            first += length + gap
        floats = (x.view(np.float32) if name in _FLOATS else x for name, x in zip(_FIELDS, parts, strict=False))
        return _batch([torch.from_numpy(x) for x in floats])

    def on(self, device: torch.device) -> tuple[GraphBatch, Tensor]:
        """What was started, on ``device``, and what went along; in one copy that nobody waits for."""
        self._work.finish()
        *parts, more = self._block.to(device, non_blocking=True).split(self._spans)[::2]
        floats = (x.view(torch.float32) if name in _FLOATS else x for name, x in zip(_FIELDS, parts, strict=True))
        return _batch(list(floats)), more.view(torch.float32).view(self._shape)


def check_sizes(rows: int, edges: int) -> None:
    """Refuse a batch whose indices int32 does not hold."""
    if max(rows, edges) > np.iinfo(np.int32).max:
        raise InputError(f"A batch of {edges} edges is beyond 2^31 - 1; use smaller batches.")


def _batch(parts: Sequence[Tensor]) -> GraphBatch:
    fields: dict[str, Any] = dict(zip(_FIELDS, parts, strict=True))
    return GraphBatch(**fields)
