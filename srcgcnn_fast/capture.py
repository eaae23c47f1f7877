"""Small batches on a GPU as CUDA graphs, whose replay costs the CPU one launch: predictions, and steps of training."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from threading import Lock, RLock
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from .errors import InputError
from .graph.batch import GraphBatch
from .nn.norm import process_group
from .ops import cuda, fused, registry, triton

if TYPE_CHECKING:
    from .nn import CGCNN, SRCGCNN

_DEVICE = "cuda"
_MOST_GRAPHS = 32
_MOST_STEPS = 32  # each of which holds the memory of a training step
_FEWER_STEPS, _MANY_ROWS = 8, 1 << 16
"""So many at most where all of them together have more rows; few crystals vary in size more than many."""
_PADDING_DISTANCE = 1.0  # Å; any that is a distance
_FIELDS = ("numbers", "weight", "distance", "sender", "row_ptr", "crystal_ptr", "atom_features", "edge_features")
"""BatchField of csrc/cuda/pad.h."""
_TYPES = [torch.int32, torch.float32, torch.float32, torch.int32, torch.int32, torch.int32]
"""Of those that every batch has."""


_BITS = {0.0: 0, 1.0: 0x3F800000}
"""Of the weights of padding, as the kernel takes them."""


class Sizes(NamedTuple):
    """Rows, edges and crystals that a CUDA graph works on, padding included."""

    rows: int
    edges: int
    crystals: int


class CapturedModel:
    """``model.predict`` for small batches on a GPU: a CUDA graph for each size of batch, captured at its first use.

    A batch is padded with an extra crystal to the next size, 2^k or 3·2^(k-1) rows, so that a few graphs serve all
    batches; the last 32 are kept. Batches may be on the CPU, from where they go to the GPU in one copy. The model's
    weights may change in place between calls; if they are moved or replaced, make a new ``CapturedModel``. Precision,
    backend and autocast are those at the time of the capture. Threads that call it take turns.

    Args:
        model: on a CUDA device, in eval mode.

    Raises:
        InputError: the model is elsewhere, of float64, has moved since, or trains.
    """

    def __init__(self, model: CGCNN | SRCGCNN) -> None:
        self.model = model
        self.device = model.fc_out.weight.device
        if self.device.type != _DEVICE:
            raise InputError(f"A CUDA graph needs a model on a CUDA device, not on {self.device}; call model.predict.")
        if model.fc_out.weight.dtype == torch.float64:
            raise InputError("CUDA graphs take distances in float32, and the model is float64; call model.predict.")
        self._streams, self._turn = _Streams(self.device), Lock()
        weakref.finalize(self, self._streams.wait).atexit = False
        self._graphs: OrderedDict[tuple[int, ...], _Captured] = OrderedDict()
        self._parts: dict[str, Any] = model._modules
        self._address = model.fc_out.weight.data_ptr()
        self._units: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
        n = len(model.fc_out.weight)
        self._std, self._mean = (torch.empty(n, dtype=model.fc_out.weight.dtype, device=self.device) for _ in range(2))

    def __call__(self, batch: GraphBatch) -> Tensor:
        """(B, n_targets), as ``model.predict``."""
        model = self.model
        if model.training:
            raise InputError("A captured model predicts only; call model.eval() first.")
        if self._parts["fc_out"]._parameters["weight"].data_ptr() != self._address:
            raise InputError("The model has moved, and its CUDA graphs have not; make a new CapturedModel.")
        if _DEVICE == "cuda" and torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self(batch)
        with self._turn:
            stream = self._streams.follow()
            metadata, n_crystals = model.metadata, batch.crystal_ptr.numel() - 1
            if self._units != (metadata.std, metadata.mean) and not model.classification:
                self._set_units(*model._units(len(self._std)))
            atoms, edges = batch.atom_features, batch.edge_features
            key = (
                *_sizes(batch.numbers.numel(), batch.sender.numel(), n_crystals),
                -1 if atoms is None else atoms.shape[1], -1 if edges is None else edges.shape[1],
            )  # fmt: skip
            found = self._graphs.get(key)
            if found is None:
                found = self._graphs[key] = self._capture(batch)
                while len(self._graphs) > _MOST_GRAPHS:
                    self._graphs.popitem(last=False)
            else:
                self._graphs.move_to_end(key)
            found.static.fill(batch, stream)
            found.replay()
            return found.out.narrow_copy(0, 0, n_crystals)

    def _capture(self, batch: GraphBatch) -> _Captured:
        @torch.inference_mode()
        def run() -> Tensor:
            static.batch.cache.clear()
            out: Tensor = self.model(static.batch)
            return self.model.in_units(out) if self.model.classification else out * self._std + self._mean

        with _undisturbed():
            static = StaticBatch(batch, self.device)
            static.fill(batch)
            return _Captured(static, *_recorded(run, *self._streams.apart))

    def _set_units(self, std: tuple[float, ...], mean: tuple[float, ...]) -> None:
        """As the metadata have them now, where every graph reads them."""
        with torch.inference_mode():
            self._std.copy_(torch.tensor(std, dtype=torch.float64))
            self._mean.copy_(torch.tensor(mean, dtype=torch.float64))
        self._units = (tuple(std), tuple(mean))


class _Captured(NamedTuple):
    static: StaticBatch
    replay: Callable[[], None]
    out: Tensor
    """What a replay writes: a prediction for each crystal, those of the padding too."""


class _Streams:
    """Where one object warms up, where it captures, and where it was called last.

    Libraries keep memory for every stream that they have seen; what they have for that of the captures is in use by all
    of the object's graphs, so that no two of these may run at once.
    """

    def __init__(self, device: torch.device) -> None:
        is_gpu = device.type == "cuda"
        self._device, self._handle = device, triton.current_stream(device)
        self._last: Any = torch.cuda.current_stream(device) if is_gpu else None
        self.apart: list[Any] = [torch.cuda.Stream(device) for _ in range(2)] if is_gpu else []

    def follow(self) -> int:
        """The handle of the stream that is current now, which waits for that of the call before."""
        handle = triton.current_stream(self._device)
        if handle != self._handle:
            stream: Any = torch.cuda.current_stream(self._device)
            stream.wait_stream(self._last)
            self._handle, self._last = handle, stream
        return handle

    def wait(self) -> None:
        """Until nothing is under way; then the object's memory may be anybody's."""
        if self._last is not None:
            self._last.synchronize()


_capturing = RLock()
"""PyTorch captures one graph at a time in a process."""
_OTHERS_GO_ON = "thread_local"
"""Meanwhile other threads may ask CUDA for memory and for events."""


@contextmanager
def _undisturbed() -> Iterator[None]:
    """For captures, whatever the caller's modes.

    What PyTorch makes for the first graph it writes to for later ones (up to 2.10 at least), which it may not if that
    was in inference mode. Weights that autocast has converted and kept would not follow their parameters.
    """
    with _capturing, torch.inference_mode(False):  # gradients included
        keeps, collects = torch.is_autocast_cache_enabled(), gc.isenabled()
        torch.set_autocast_cache_enabled(False)
        gc.disable()  # which might find other graphs and events, whose end breaks a capture
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(keeps)
            if collects:
                gc.enable()


def _recorded(run: Callable[[], Tensor], aside: Any, stream: Any) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of ``run``, captured on ``stream``: its replay, and the tensor that this writes."""
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiles the kernels and fills the libraries' workspaces
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode=_OTHERS_GO_ON):
        out = run()
    return graph.replay, out


_SETTINGS = ("momentum", "eps", "p")
"""Of norms and dropout, numbers that a graph holds."""


class CapturedTraining:
    """``model(batch)`` in training on a GPU: two CUDA graphs for each size of batch, captured at its first use.

    The outputs, (B, n_targets) or a classifier's (B, 2), have gradients like those of ``model(batch)``, so that it can
    replace the model in a training loop. A batch is padded to the next size, of which there are eight for each power of
    two, with rows of weight 0, which change only the order of some sums and the numbers that a dropout draws. Graphs of
    the last eight sizes are kept, of small batches 32; each holds the memory of a step. Batches may be on the CPU.
    Weights may change in place, by an optimiser; if the model is moved or a buffer replaced, make a new
    ``CapturedTraining``. Precision, backend and autocast are those at the time of the capture.

    Args:
        model: on a CUDA device, in training mode whenever it is called; its batch norms have a momentum, and are not
            synchronised.

    Raises:
        InputError: the model is elsewhere or does not train, its norms are others, no kernels of the GPU can take it,
            or a gradient is asked for twice, or after a later batch took the place of its own.
    """

    def __init__(self, model: CGCNN | SRCGCNN) -> None:
        self.model = model
        self.device = model.fc_out.weight.device
        if self.device.type != _DEVICE:
            raise InputError(f"A CUDA graph needs a model on a CUDA device, not on {self.device}; call the model.")
        if not fused.runs_on_gpu(model.fc_out.weight):
            raise InputError(
                "Captured training needs float32 and the kernels for GPUs, compiled or Triton's; call the model itself."
            )
        for norm in model.modules():
            if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm):
                if norm.momentum is None:
                    raise InputError("Captured training needs batch norms with a momentum; call the model itself.")
                if process_group(norm) is not None:
                    raise InputError("Captured training has batch norms of its own; call the model itself.")
        self._streams = _Streams(self.device)
        weakref.finalize(self, self._streams.wait).atexit = False
        self._graphs: OrderedDict[tuple[object, ...], _Step] = OrderedDict()

    def __call__(self, batch: GraphBatch) -> Tensor:
        """As ``model(batch)``."""
        model = self.model
        if not model.training:
            raise InputError("Captured training trains only; call model.train() first, or the model itself.")
        modules = list(model.modules())
        held = [x for module in modules for x in module._parameters.values() if x is not None]
        parameters = list({id(x): x for x in held if x.requires_grad}.values())
        if not parameters or batch.num_rows < 2 or batch.num_edges < 2:  # which a model may refuse
            alone: Tensor = model(batch.to(self.device))
            return alone
        widths = [-1 if x is None else x.shape[1] for x in (batch.atom_features, batch.edge_features)]
        addresses = tuple((x.data_ptr(), x.requires_grad) for x in held)
        settings = tuple((module.training, *map(module.__dict__.get, _SETTINGS)) for module in modules)
        key = (sizes(batch, _OF_TRAINING), *widths, addresses, settings)
        with torch.cuda.device(self.device) if _DEVICE == "cuda" else nullcontext():
            if (step := self._graphs.get(key)) is None:
                step = self._graphs[key] = self._capture(batch, parameters)
                while self._are_too_many():
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            step.static.fill(batch, self._streams.follow())
            out: Tensor = _Replayed.apply(step, batch.num_crystals, *parameters)
            return out

    def _are_too_many(self) -> bool:
        rows = sum(step.static.batch.num_rows for step in self._graphs.values())
        return len(self._graphs) > (_FEWER_STEPS if rows > _MANY_ROWS else _MOST_STEPS)

    def _capture(self, batch: GraphBatch, parameters: Sequence[Tensor]) -> _Step:
        names = {id(x): name for name, x in self.model.named_parameters()}

        def run() -> tuple[Tensor, list[Tensor]]:
            """The outputs, and what they follow from.

            Not the parameters: whatever of an earlier step is still held, a loss for instance, holds their nodes of the
            autograd graph, which belong to that step's stream, and a capture must not reach for this one.
            """
            static.batch.cache.clear()
            own = {names[id(x)]: x.detach().requires_grad_() for x in parameters}
            return functional_call(self.model, own, (static.batch,)), list(own.values())

        with _undisturbed():
            static = StaticBatch(batch, self.device, _OF_TRAINING, weight=0.0)
            static.fill(batch)
            moving = [(x, x.clone()) for x in self.model.buffers()]
            try:
                recorded = _recorded_training(run, *self._streams.apart)
            finally:
                triton.forget(static.batch.sender)  # that of the warm-up: a replay makes its own
                with torch.no_grad():
                    for x, before in moving:
                        x.copy_(before)
        return _Step(static, *recorded)


class _Step:
    """A captured forward and backward pass."""

    def __init__(
        self,
        static: StaticBatch,
        forward: Callable[[], None],
        out: Tensor,
        backward: Callable[[], None],
        upstream: Tensor,
        gradients: Sequence[Tensor | None],
    ) -> None:
        self.static, self.forward, self.out = static, forward, out
        self.backward, self.upstream, self.gradients = backward, upstream, gradients
        self.passes = 0


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: _Step, n_crystals: int, *parameters: Tensor) -> Tensor:
        step.forward()
        step.passes += 1
        ctx.step, ctx.passes, ctx.n_crystals = step, step.passes, n_crystals
        return step.out.narrow_copy(0, 0, n_crystals)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        step = ctx.step
        if step.passes != ctx.passes:
            raise InputError(
                "The CUDA graph has lost what this gradient follows from; call backward once, before the next batch."
            )
        step.passes += 1  # its memory serves the backward pass, too
        step.upstream.zero_()
        step.upstream[: ctx.n_crystals].copy_(grad)
        step.backward()
        found = iter(torch._foreach_mul([x for x in step.gradients if x is not None], 1.0))  # which no replay writes
        return None, None, *(None if x is None else next(found) for x in step.gradients)


def _recorded_training(
    run: Callable[[], tuple[Tensor, Sequence[Tensor]]], aside: Any, stream: Any
) -> tuple[Callable[[], None], Tensor, Callable[[], None], Tensor, Sequence[Tensor | None]]:
    """CUDA graphs of ``run`` and of its backward pass: replays, and the tensors that these read and write."""
    random = torch.cuda.get_rng_state()
    aside.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(aside):
            for _ in range(2):
                out, leaves = run()
                torch.autograd.grad(out, leaves, torch.zeros_like(out), allow_unused=True)
    finally:
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.set_rng_state(random)  # so that a dropout does not depend on when its graph was captured
    upstream = torch.zeros_like(out)
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with triton.captured_together():
        with torch.cuda.graph(first, stream=stream, capture_error_mode=_OTHERS_GO_ON):
            out, leaves = run()
        with torch.cuda.graph(second, pool=first.pool(), stream=stream, capture_error_mode=_OTHERS_GO_ON):
            gradients = torch.autograd.grad(out, leaves, upstream, allow_unused=True)
    return first.replay, out.detach(), second.replay, upstream, gradients


_OF_TRAINING = 8
"""Sizes for each power of two, as every row of padding costs; of predictions, which launches bound, two."""


def sizes(batch: GraphBatch, parts: int = 2) -> Sizes:
    """What ``batch`` is padded to: at least one more row and crystal, and as many edges a row."""
    return _sizes(batch.num_rows, batch.num_edges, batch.num_crystals, parts)


@lru_cache(4096)
def _sizes(n_rows: int, n_edges: int, n_crystals: int, parts: int = 2) -> Sizes:
    degree = max(1, -(-n_edges // max(1, n_rows)))
    rows = _next_size(n_rows + max(1, -(-(n_rows * degree - n_edges) // (4 * degree))), parts)  # else one has all edges
    return Sizes(rows, rows * degree, _next_size(n_crystals + 1, parts))


def _next_size(count: int, parts: int = 2) -> int:
    """The least 2^k that holds ``count``, or a number of as many ``parts`` of its upper half; 2: 3·2^(k-1)."""
    power = 1 << max(0, count - 1).bit_length()
    part = power // (2 * parts)
    return power if part == 0 else -(-count // part) * part


class StaticBatch:
    """A batch of fixed sizes at a fixed address, which other batches are copied into.

    ``weight``: of the rows that it is padded with. ``batch`` is on ``device``. What comes from the CPU is put together
    there and copied at once. With the compiled kernels either way is one call, of csrc/cuda/pad.h.
    """

    def __init__(self, like: GraphBatch, device: torch.device, parts: int = 2, weight: float = 1.0) -> None:
        rows, edges, crystals = self._sizes = sizes(like, parts)
        self._weight = weight
        shapes: dict[str, tuple[int, ...]] = {
            "numbers": (rows,), "weight": (rows,), "sender": (edges,), "distance": (edges,), "row_ptr": (rows + 1,),
            "crystal_ptr": (crystals + 1,),
        }  # fmt: skip
        self._widths = [0, 0]
        for k, (name, count) in enumerate((("atom_features", rows), ("edge_features", edges))):
            if (features := getattr(like, name)) is not None:
                self._widths[k] = features.shape[1]
                shapes[name] = (count, features.shape[1])
        self._floats = {"weight", "distance", "atom_features", "edge_features"}
        spans = {name: -(-torch.Size(shape).numel() // 32) * 32 for name, shape in shapes.items()}  # 128 bytes
        self._there = torch.zeros(sum(spans.values()), dtype=torch.int32, device=device)
        self._here = torch.zeros(self._there.shape, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
        self.batch, staged = (self._views(x, shapes, spans) for x in (self._there, self._here))
        self._staged = {name: getattr(staged, name).numpy() for name in shapes}
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        if self._copied is not None:
            self._copied.record()
            weakref.finalize(self, self._copied.synchronize).atexit = False  # before anybody else has its pinned memory
        self._kernels, self._device = _kernels(device), device
        fields = ([getattr(x, name) for name in _FIELDS] for x in (self.batch, staged))
        self._on_device, self._on_cpu = ([0 if x is None else x.data_ptr() for x in some] for some in fields)
        event = 0 if self._copied is None else self._copied.cuda_event
        self._way = (self._there.data_ptr(), self._here.data_ptr(), self._there.nbytes, event)

    def _views(self, block: Tensor, shapes: dict[str, tuple[int, ...]], spans: dict[str, int]) -> GraphBatch:
        fields: dict[str, Any] = {}
        first = 0
        for name, shape in shapes.items():
            part = block[first : first + torch.Size(shape).numel()].view(shape)
            fields[name] = part.view(torch.float32) if name in self._floats else part
            first += spans[name]
        return GraphBatch(**fields, atom_class=block[:0])

    def fill(self, batch: GraphBatch, stream: int | None = None) -> None:
        """Copy ``batch`` into it; what it is padded with forms a crystal of its own. ``stream``: the current one's."""
        if self._kernels is not None and (source := self._addresses(batch)) is not None:
            addresses, counts, is_on_cpu = source
            stream = triton.current_stream(self._device) if stream is None else stream
            if is_on_cpu:
                self._kernels.cuda_send(addresses, self._on_cpu, counts, *self._way, stream)
            else:
                self._kernels.cuda_pad(addresses, self._on_device, counts, stream)
            return
        with torch.inference_mode():
            if batch.sender.device.type != "cpu":
                _fill(self.batch, batch, self._weight)
                return
            if self._copied is not None:
                self._copied.synchronize()  # the copy before may still read what is written now
            _fill_arrays(self._staged, batch, self._weight)
            self._there.copy_(self._here, non_blocking=True)
            if self._copied is not None:
                self._copied.record()

    def _addresses(self, batch: GraphBatch) -> tuple[list[int], list[int], bool] | None:
        """Those of its fields, its sizes, and whether it is on the CPU; None if the kernels cannot read it as it is."""
        fields = [batch.numbers, batch.weight, batch.distance, batch.sender, batch.row_ptr, batch.crystal_ptr]
        n, e, b = fields[0].numel(), fields[3].numel(), fields[5].numel() - 1
        rows, edges, crystals = self._sizes
        counts, types = [n, n, e, e, n + 1, b + 1], _TYPES
        features = (batch.atom_features, batch.edge_features)
        if features[0] is not None or features[1] is not None:
            given = [(x, count * width) for x, count, width in zip(features, (n, e), self._widths, strict=True)]
            fields += [x for x, _ in given if x is not None]
            counts += [count for x, count in given if x is not None]
            types = types + [torch.float32] * (len(fields) - len(types))
        where = fields[3].get_device()
        fits = n < rows and e <= edges and b < crystals and (where < 0 or where == self._there.get_device())
        are_there = list(map(Tensor.get_device, fields)) == [where] * len(fields)
        are_whole = list(map(Tensor.numel, fields)) == counts and all(map(Tensor.is_contiguous, fields))
        if not (fits and are_there and are_whole and [x.dtype for x in fields] == types):
            return None
        addresses = list(map(Tensor.data_ptr, fields[:6]))
        addresses += [0 if x is None else x.data_ptr() for x in features]
        return addresses, [n, e, b, rows, edges, crystals, *self._widths, _BITS[self._weight]], where < 0


def _kernels(device: torch.device) -> Any:
    """The compiled functions; None where Triton or the reference computes."""
    is_cuda = device.type == "cuda" and registry.forced_backend() in (None, "cuda")
    return cuda.native() if is_cuda and registry.cuda_problem(device.index) is None else None


def _parts(batch: GraphBatch, rows: int, weight: float) -> tuple[tuple[str, int, float], ...]:
    """Each field, how much of it is the batch's, and what the rest is in a batch of so many rows."""
    n, e, b = batch.num_rows, batch.num_edges, batch.num_crystals
    return (
        ("numbers", n, 1), ("weight", n, weight), ("distance", e, _PADDING_DISTANCE), ("row_ptr", n + 1, 0),
        ("crystal_ptr", b + 1, rows), ("sender", e, 0), ("atom_features", n, 0.0), ("edge_features", e, 0.0),
    )  # fmt: skip


def _fill_arrays(target: dict[str, np.ndarray], batch: GraphBatch, weight: float = 1.0) -> None:
    """As ``_fill``, on the CPU, where NumPy does a few numbers in a tenth of PyTorch's time."""
    n, e, total = batch.num_rows, batch.num_edges, len(target["numbers"])
    for name, count, padding in _parts(batch, total, weight):
        if name in target:
            target[name][:count] = getattr(batch, name).detach().numpy()
            target[name][count:] = padding
    rows, edges = total - n, len(target["sender"]) - e
    row = np.arange(1, rows + 1)
    ends = row * (edges // rows) + np.minimum(row, edges % rows)
    target["row_ptr"][n + 1 :] = e + ends
    target["sender"][e:] = n + np.searchsorted(ends, np.arange(edges), side="right")


def _fill(target: GraphBatch, batch: GraphBatch, weight: float = 1.0) -> None:
    n, e, device = batch.num_rows, batch.num_edges, target.device
    rows, edges = target.num_rows - n, target.num_edges - e
    for name, count, padding in _parts(batch, target.num_rows, weight):
        into = getattr(target, name)
        if into is not None:
            into[:count].copy_(getattr(batch, name))
            into[count:].fill_(padding)
    row = torch.arange(1, rows + 1, device=device)
    ends = row * (edges // rows) + row.clamp(max=edges % rows)  # edges of the padding, evenly
    target.row_ptr[n + 1 :] = (e + ends).int()
    first = torch.arange(edges, device=device)
    target.sender[e:] = (n + torch.searchsorted(ends, first, right=True)).int()  # each from its own receiver
