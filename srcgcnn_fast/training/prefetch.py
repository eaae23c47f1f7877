"""Batches that are on the device when they are asked for, and how long somebody waited for them."""

from __future__ import annotations

import atexit
import os
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from ..graph.batch import GraphBatch

T = TypeVar("T")
Item = tuple[GraphBatch, torch.Tensor, torch.Tensor]
"""A batch of B crystals, its targets (B, T) float32 and, on the CPU, its indices in the store (B,) int64."""


class Batches(DataLoader[Item]):
    """Whole batches; ``waited`` adds up the seconds for which their consumer stood still.

    With a CUDA ``device`` they come there in one copy, and the next one is put together while the consumer has the one
    before: by a thread of the kernels, or by worker processes. No Python runs beside the consumer's, which would wait
    for it at every operation of PyTorch. Otherwise batches stay on the CPU.
    """

    device = torch.device("cpu")
    waited = 0.0

    def __iter__(self) -> Iterator[Item]:  # type: ignore[override]
        # Not before a batch is wanted: Lightning asks for an iterator before it says what the device is.
        yield from self._timed(self._on_device() if self.device.type == "cuda" else super().__iter__())

    def _get_iterator(self) -> Any:
        """As always; worker processes, which SIGTERM does not end (``data.py``), end with the program that holds it."""
        batches = super()._get_iterator()
        if self.num_workers:
            atexit.register(_end_workers, weakref.ref(batches), os.getpid())
        return batches

    def _timed(self, batches: Iterator[Item]) -> Iterator[Item]:
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def _on_device(self) -> Iterator[Item]:
        begun: Iterator[Callable[[], Item]]
        if self.num_workers:
            begun = (partial(moved, item, self.device) for item in super().__iter__())
        else:
            begun = (self.dataset.begin(indices, self.device) for indices in self.sampler)  # type: ignore[attr-defined]
        finish = next(begun, None)
        while finish is not None:
            item = finish()
            finish = next(begun, None)
            yield item


def _end_workers(iterator: weakref.ref[Any], owner: int) -> None:
    if os.getpid() == owner and (batches := iterator()) is not None:  # not in a process that was forked from it
        batches._shutdown_workers()


def unchanged(item: T) -> T:
    """The collation of items that are batches already."""
    return item


def moved(item: Item, device: torch.device) -> Item:
    graphs, target, index = item
    if device.type == "cuda":  # from pinned memory, so that nobody waits
        graphs, target = graphs.pin_memory(), target.pin_memory()
    return graphs.to(device, non_blocking=True), target.to(device, non_blocking=True), index
