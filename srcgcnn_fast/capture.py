"""Predictions of small batches on a GPU as one CUDA graph, whose replay costs the CPU one launch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .graph.batch import GraphBatch

if TYPE_CHECKING:
    from .nn import CGCNN, SRCGCNN

_MOST_GRAPHS = 32
_PADDING_DISTANCE = 1.0  # Å; any that is a distance


class Sizes(NamedTuple):
    """Rows, edges and crystals that a CUDA graph works on, padding included."""

    rows: int
    edges: int
    crystals: int


class CapturedModel:
    """``model.predict`` for small batches on a GPU: a CUDA graph for each size of batch, captured at its first use.

    A batch is padded with a crystal of its own to the next size, 2^k or 3·2^(k-1) rows, so that a few graphs serve all
    batches; the last 32 are kept. Batches may lie on the CPU, from where they go to the GPU in one copy. The model's
    weights may change in place between calls; moving or replacing them needs a new ``CapturedModel``. Precision and
    backend are those in force at the capture.

    Args:
        model: on a CUDA device, in eval mode.

    Raises:
        InputError: the model is elsewhere, or trains.
    """

    def __init__(self, model: CGCNN | SRCGCNN) -> None:
        self.model = model
        self.device = model.fc_out.weight.device
        if self.device.type != "cuda":
            raise InputError(f"A CUDA graph needs a model on a CUDA device, not on {self.device}; call model.predict.")
        self._graphs: OrderedDict[tuple[object, ...], tuple[StaticBatch, Callable[[], None], Tensor]] = OrderedDict()

    def __call__(self, batch: GraphBatch) -> Tensor:
        """(B, n_targets), as ``model.predict``."""
        if self.model.training:
            raise InputError("A captured model predicts only; call model.eval() first.")
        widths = [x if x is None else x.shape[1] for x in (batch.atom_features, batch.edge_features)]
        key = (sizes(batch), *widths)
        with torch.inference_mode(), torch.cuda.device(self.device):
            if key not in self._graphs:
                self._graphs[key] = self._capture(batch)
                while len(self._graphs) > _MOST_GRAPHS:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            static, replay, out = self._graphs[key]
            static.fill(batch)
            replay()
            return self.model.in_units(out[: batch.num_crystals])

    def _capture(self, batch: GraphBatch) -> tuple[StaticBatch, Callable[[], None], Tensor]:
        static = StaticBatch(batch, self.device)
        static.fill(batch)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles the kernels and fills the libraries' workspaces
            for _ in range(2):
                static.batch.cache.clear()
                self.model(static.batch)
        torch.cuda.current_stream().wait_stream(stream)
        static.batch.cache.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.model(static.batch)
        return static, graph.replay, out


def sizes(batch: GraphBatch) -> Sizes:
    """What ``batch`` is padded to: at least one more row and crystal, and as many edges a row."""
    rows = _next_size(batch.num_rows + 1)
    degree = max(1, -(-batch.num_edges // max(1, batch.num_rows)))
    return Sizes(rows, rows * degree, _next_size(batch.num_crystals + 1))


def _next_size(count: int) -> int:
    """The least 2^k or 3·2^(k-1) that holds ``count``."""
    power = 1 << max(0, count - 1).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power


class StaticBatch:
    """A batch of fixed sizes at a fixed address, which other batches are copied into.

    ``batch`` is on ``device``. What comes from the CPU is put together there and copied at once.
    """

    def __init__(self, like: GraphBatch, device: torch.device) -> None:
        rows, edges, crystals = sizes(like)
        shapes: dict[str, tuple[int, ...]] = {
            "numbers": (rows,), "weight": (rows,), "sender": (edges,), "distance": (edges,), "row_ptr": (rows + 1,),
            "crystal_ptr": (crystals + 1,),
        }  # fmt: skip
        for name, count in (("atom_features", rows), ("edge_features", edges)):
            if getattr(like, name) is not None:
                shapes[name] = (count, getattr(like, name).shape[1])
        self._floats = {"weight", "distance", "atom_features", "edge_features"}
        spans = {name: -(-torch.Size(shape).numel() // 32) * 32 for name, shape in shapes.items()}  # 128 bytes
        self._there = torch.zeros(sum(spans.values()), dtype=torch.int32, device=device)
        self._here = torch.zeros(self._there.shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.batch, staged = (self._views(x, shapes, spans) for x in (self._there, self._here))
        self._staged = {name: getattr(staged, name).numpy() for name in shapes}
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def _views(self, block: Tensor, shapes: dict[str, tuple[int, ...]], spans: dict[str, int]) -> GraphBatch:
        fields: dict[str, Any] = {}
        first = 0
        for name, shape in shapes.items():
            part = block[first : first + torch.Size(shape).numel()].view(shape)
            fields[name] = part.view(torch.float32) if name in self._floats else part
            first += spans[name]
        return GraphBatch(**fields, atom_class=block[:0])

    def fill(self, batch: GraphBatch) -> None:
        """Copy ``batch`` into it; what it is padded with forms a crystal of its own."""
        if batch.sender.device.type != "cpu":
            _fill(self.batch, batch)
            return
        if self._copied is not None:
            self._copied.synchronize()  # the copy before may still read what is written now
        _fill_arrays(self._staged, batch)
        self._there.copy_(self._here, non_blocking=True)
        if self._copied is not None:
            self._copied.record()


def _parts(batch: GraphBatch, rows: int) -> tuple[tuple[str, int, float], ...]:
    """Each field, how much of it is the batch's, and what the rest is in a batch of so many rows."""
    n, e, b = batch.num_rows, batch.num_edges, batch.num_crystals
    return (
        ("numbers", n, 1), ("weight", n, 1.0), ("distance", e, _PADDING_DISTANCE), ("row_ptr", n + 1, 0),
        ("crystal_ptr", b + 1, rows), ("sender", e, 0), ("atom_features", n, 0.0), ("edge_features", e, 0.0),
    )  # fmt: skip


def _fill_arrays(target: dict[str, np.ndarray], batch: GraphBatch) -> None:
    """As ``_fill``, on the CPU, where NumPy does a few numbers in a tenth of PyTorch's time."""
    n, e, total = batch.num_rows, batch.num_edges, len(target["numbers"])
    for name, count, padding in _parts(batch, total):
        if name in target:
            target[name][:count] = getattr(batch, name).detach().numpy()
            target[name][count:] = padding
    rows, edges = total - n, len(target["sender"]) - e
    ends = np.arange(1, rows + 1) * edges // rows
    target["row_ptr"][n + 1 :] = e + ends
    target["sender"][e:] = n + np.searchsorted(ends, np.arange(edges), side="right")


def _fill(target: GraphBatch, batch: GraphBatch) -> None:
    n, e, device = batch.num_rows, batch.num_edges, target.device
    rows, edges = target.num_rows - n, target.num_edges - e
    for name, count, padding in _parts(batch, target.num_rows):
        into = getattr(target, name)
        if into is not None:
            into[:count].copy_(getattr(batch, name))
            into[count:].fill_(padding)
    ends = torch.arange(1, rows + 1, device=device) * edges // rows  # edges of the padding, evenly
    target.row_ptr[n + 1 :] = (e + ends).int()
    first = torch.arange(edges, device=device)
    target.sender[e:] = (n + torch.searchsorted(ends, first, right=True)).int()  # each from its own receiver
