"""Batches that are on the device when they are asked for, and how long somebody waited for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch.utils.data import DataLoader

from ..graph.batch import GraphBatch

T = TypeVar("T")
Item = tuple[GraphBatch, torch.Tensor, torch.Tensor]
"""A batch of B crystals, its targets (B, T) float32 and its indices in the store (B,) int64."""


class Batches(DataLoader[Item]):
    """Whole batches; ``waited`` adds up the seconds for which their consumer stood still.

    With a CUDA ``device`` a thread takes the next batch, pins it and copies it on a stream of its own, while the batch
    before is computed on. Otherwise batches stay on the CPU.
    """

    device = torch.device("cpu")
    waited = 0.0

    def __iter__(self) -> Iterator[Item]:  # type: ignore[override]
        batches: Iterator[Item] = super().__iter__()
        return self._timed(_on_cuda(batches, self.device) if self.device.type == "cuda" else batches)

    def _timed(self, batches: Iterator[Item]) -> Iterator[Item]:
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch


def ahead(items: Iterator[T], work: Callable[[T], T]) -> Iterator[T]:
    """``work(item)`` of every item in order, the next one in a thread while the one before is in use."""

    def following() -> T | None:
        item = next(items, None)
        return None if item is None else work(item)

    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(following)
        while (item := waiting.result()) is not None:
            waiting = thread.submit(following)
            yield item


def _on_cuda(batches: Iterator[Item], device: torch.device) -> Iterator[Item]:
    stream = torch.cuda.Stream(device)
    copied: list[torch.cuda.Event] = []

    def move(item: Item) -> Item:
        with torch.cuda.stream(stream):  # the allocator gives its memory to this stream
            moved = _map(item, lambda x: x.pin_memory().to(device, non_blocking=True))
            copied.append(stream.record_event())
        return moved

    for item in ahead(batches, move):
        torch.cuda.current_stream(device).wait_event(copied.pop(0))
        _map(item, lambda x: _used_on(x, torch.cuda.current_stream(device)))
        yield item


def _used_on(x: torch.Tensor, stream: torch.cuda.Stream) -> torch.Tensor:
    x.record_stream(stream)  # its memory must not be used again before that stream is done with it
    return x


def _map(item: Item, function: Callable[[torch.Tensor], torch.Tensor]) -> Item:
    graphs, target, index = item
    mapped: GraphBatch = graphs._map(function)
    return mapped, function(target), function(index)
