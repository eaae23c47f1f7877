"""The Triton backend: the operators of ``ops/cpu.py`` for CUDA tensors, float32, without a compiler.

Checks shapes, types and devices, never values: nothing here waits for the GPU. An index that leaves its array makes
its rows NaN. Products of rows go through ``torch.mm``; everything along edges through ``ops/triton_kernels.py``. Sums
over receivers run in the order of the edges, sums over senders through a transposed index, so that no result depends on
the order in which programs ran. ``ops/precision.py`` says when products use TF32 and storage bfloat16.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cache, wraps
from types import ModuleType
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from ..errors import InputError
from . import precision
from .cpu import STILL, Graph, Layer, Moments, Running, counted, refuse_edge_grad
from .reference import Dense

OLDEST = (3, 3)
WINDOW = 9  # Gaussians in reach of a distance; those left out are below 2e-9
_PROGRAMS = 528  # that share out rows where partial sums are kept; a constant, so that bits do not depend on the GPU

_MOST_ONES = 2**24
"""Numbers 0 and 1 of ``sum_by_species`` at a time."""


class Tile(NamedTuple):
    """What one program of a kernel takes at a time."""

    rows: int
    degree: int
    """Edges of a row; 4 serves 12 neighbours without waste."""
    channels: int
    """At most; never more than the power of two that holds F."""
    warps: int
    by_dot: bool = False
    """Form r from all Gaussians by ``tl.dot``, not from the WINDOW in reach; rows * degree must be 16 or more."""


# Chosen from registers and spills (tests/ops/test_triton_ahead_of_time.py), not from measurements; ``benchmarks/gpu``
# tries others. backward_rows and edge_gram multiply rows * degree edges at a time, which must be 16 or more.
TILES = {
    "gate_sum": Tile(2, 4, 64, 4),
    "backward_rows": Tile(4, 4, 32, 4),
    "backward_senders": Tile(2, 4, 64, 4),
    "neighbor_sum": Tile(4, 4, 64, 4),
    "edge_sum": Tile(4, 4, 64, 4),
    "edge_gram": Tile(4, 4, 64, 4),
    "edge_statistics": Tile(16, 0, 64, 4),
    "filter_gradient": Tile(32, 0, 64, 4),
    "flat": Tile(16, 0, 64, 4),
}


def problem() -> str | None:
    """Why Triton cannot serve here, whatever the GPU; None if it can."""
    try:
        import triton
    except ImportError as error:
        return f"Triton does not load ({error}); install it with `pip install 'triton>=3.3'`"
    found = triton.__version__
    if tuple(int(x) for x in found.split("+")[0].split(".")[:2]) < OLDEST:
        return f"Triton {found} is too old: 3.3 or newer is needed (torch 2.7 brings it), or use_backend('reference')"
    return None


@cache
def kernels() -> ModuleType:
    """The kernels, imported once, at the first use."""
    reason = problem()
    if reason is not None:
        raise InputError(f"The Triton backend cannot run: {reason}.")
    from . import triton_kernels

    return triton_kernels


def _check(name: str, x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    good = x is not None and x.dtype == dtype and tuple(x.shape) == shape and x.device == device
    if x is None or not good or not x.is_contiguous() or x.is_neg():
        view = ", a negated view (call resolve_neg())" if x is not None and x.is_neg() else ""
        found = "None" if x is None else f"{x.dtype} {tuple(x.shape)} on {x.device}{view}"
        raise InputError(f"{name} must be a contiguous {dtype} tensor of shape {shape} on {device}, not {found}.")


def _precision() -> str:
    """How tl.dot multiplies float32: three TF32 products, which keep float32's digits, or one where PyTorch may."""
    if torch.version.hip is not None:
        return "ieee"
    return "tf32" if precision.tf32_is_allowed() else "tf32x3"


def _storage() -> torch.dtype:
    """Of rows and edge terms."""
    return torch.bfloat16 if precision.bfloat16_is_allowed() else torch.float32


@contextlib.contextmanager
def launching(device: torch.device) -> Iterator[int]:
    """Where launches go that work on tensors of ``device``: makes it the thread's current one, and gives its stream."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        yield current_stream(device)
        return
    with torch.cuda.device(device):
        yield current_stream(device)


def current_stream(device: torch.device) -> int:
    """Its handle, 0 where there are none; what PyTorch's own compiled code asks for, in a tenth of a Stream's time."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def _blocks(n: int, size: int) -> int:
    return -(-n // size)


class _Launch:
    """A kernel with its tile and its grid: programs over ``n`` rows, and over the blocks of each of ``columns``.

    ``share``: at most _PROGRAMS programs share out the rows. ``each``: a program for each of them. ``columns`` name the
    constants with the blocks' sizes; ``beside``: so many more columns, in blocks of their own.
    """

    def __init__(
        self, name: str, n: int, share: bool = False, square: bool = False, each: bool = False, beside: int = 0,
        **columns: int,
    ) -> None:  # fmt: skip
        rows, degree, channels, warps, _ = TILES.get(name, TILES["flat"])
        self.programs = n if each else min(_PROGRAMS, _blocks(n, rows)) if share else _blocks(n, rows)
        self.options: dict[str, Any] = {"ROWS": rows, "num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
        if degree:
            self.options["DEG"] = degree
        grid = [self.programs]
        for block, width in columns.items():
            size = min(channels if block == "BF" else 64, max(16, 1 << (width - 1).bit_length()))
            self.options[block] = size
            grid += [_blocks(width, size) + _blocks(beside, size)] * (1 + square)
        self.kernel = getattr(kernels(), name)[tuple(grid)]

    def __call__(self, *arguments: Any, **more: Any) -> None:
        device = next(x.device for x in arguments if isinstance(x, Tensor))
        with launching(device):  # Triton takes the current device's current stream itself
            self.kernel(*arguments, **self.options, **more)


class Transposed(NamedTuple):
    """The edges sorted by sender."""

    receiver: Tensor
    """(E,) int32, the row that each of them ends in."""
    edge: Tensor
    """(E,) int32, their numbers; a sender's edges keep their order."""
    col_ptr: Tensor
    """(N + 1,) int32, edges of each sender."""


_transposed: dict[int, tuple[Any, Any, tuple[int, int], Transposed]] = {}
_of_step: dict[tuple[int, int], tuple[Tensor, Tensor, Transposed]] | None = None


@contextlib.contextmanager
def captured_together() -> Iterator[None]:
    """CUDA graphs captured inside are replayed one after the other, on the same edges: the first makes their index."""
    global _of_step
    _of_step = {}
    try:
        yield
    finally:
        _of_step = None


def transposed(graph: Graph, build: Callable[[Tensor, Tensor], Transposed] | None = None) -> Transposed:
    """The transposed index of a graph, kept as long as its ``sender`` lives unchanged; ``build``: who makes it.

    While a CUDA graph is captured it is built anew, as part of that graph: a replay may bring other edges. So it is for
    tensors of inference mode, which do not tell whether they were written to.
    """
    sender, row_ptr, build = graph.sender, graph.row_ptr, build or _transpose
    if sender.is_inference() or row_ptr.is_inference():
        return build(sender, row_ptr)
    if sender.is_cuda and torch.cuda.is_current_stream_capturing():
        if _of_step is None:
            return build(sender, row_ptr)
        edges = id(sender), id(row_ptr)
        if edges not in _of_step:
            _of_step[edges] = sender, row_ptr, build(sender, row_ptr)
        return _of_step[edges][2]
    key, version = id(sender), (sender._version, row_ptr._version)
    found = _transposed.get(key)
    if found is None or found[0]() is not sender or found[1]() is not row_ptr or found[2] != version:
        alive = weakref.ref(sender, lambda _: _transposed.pop(key, None))
        found = _transposed[key] = alive, weakref.ref(row_ptr), version, build(sender, row_ptr)
    return found[3]


def forget(sender: Tensor) -> None:
    """Nobody will ask for the transposed index of these edges again, though they live on."""
    _transposed.pop(id(sender), None)


def _transpose(sender: Tensor, row_ptr: Tensor) -> Transposed:
    n_rows = row_ptr.shape[0] - 1
    by_sender, edge = torch.sort(sender, stable=True)
    bounds = torch.arange(n_rows + 1, dtype=torch.int32, device=sender.device)
    col_ptr = torch.searchsorted(by_sender, bounds, out_int32=True)
    receiver = torch.searchsorted(row_ptr[1:].contiguous(), edge.to(torch.int32), right=True, out_int32=True)
    return Transposed(receiver, edge.to(torch.int32), col_ptr)


class _Edges:
    """A graph, checked, as the kernels take it."""

    def __init__(self, graph: Graph, n_features: int, dtype: torch.dtype, device: torch.device) -> None:
        if dtype != torch.float32:
            raise InputError(f"The Triton kernels take float32, not {dtype}.")
        if graph.step <= 0:
            raise InputError(f"The Gaussians' step must be positive, not {graph.step}.")
        self.n_rows, self.n_edges = counted("row_ptr", graph.row_ptr), graph.sender.shape[0]
        counted("crystal_ptr", graph.crystal_ptr)
        _check("sender", graph.sender, (self.n_edges,), torch.int32, device)
        _check("row_ptr", graph.row_ptr, (self.n_rows + 1,), torch.int32, device)
        if graph.features is None:
            _check("distance", graph.distance, (self.n_edges,), dtype, device)
        else:
            _check("edge_features", graph.features, (self.n_edges, n_features), dtype, device)
        self.graph = graph
        self.n_features = n_features
        self.distance = graph.distance if graph.features is None else None
        self.basis = (float(graph.dmin), 1.0 / float(graph.step))

    @property
    def degree(self) -> Tensor:
        return self.graph.row_ptr.diff().to(torch.float32)


def edge_shells(
    distance: Tensor, sender: Tensor, row_ptr: Tensor, crystal_ptr: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``cpu.edge_shells``; the kernels here do not need it."""
    n_edges = sender.shape[0]
    edge_ptr = row_ptr[crystal_ptr.long()].long()
    crystal = torch.searchsorted(edge_ptr[1:], torch.arange(n_edges, device=sender.device), right=True)
    order = torch.argsort(distance, stable=True)
    order = order[torch.argsort(crystal[order], stable=True)]
    sorted_distance, sorted_crystal = distance[order], crystal[order]
    new = torch.ones(n_edges, dtype=torch.bool, device=sender.device)
    new[1:] = (sorted_distance[1:] != sorted_distance[:-1]) | (sorted_crystal[1:] != sorted_crystal[:-1])
    before = torch.nn.functional.pad(new.cumsum(0), (1, 0))  # shells before each place of the sorted edges
    shell = before[1:] - 1 - before[edge_ptr][sorted_crystal]
    shell_of = torch.empty_like(sender)
    shell_of[order] = shell.to(torch.int32)
    shell_distance = torch.zeros_like(distance)
    shell_distance[edge_ptr[sorted_crystal] + shell] = sorted_distance
    return shell_of, shell_distance, before[edge_ptr].diff().to(torch.int32)


def _edge_sums(row_weight: Tensor, edges: _Edges) -> tuple[Tensor, Tensor, Tensor]:
    """in_degree, by_receiver and by_sender of :class:`.cpu.Moments`."""
    graph, n, k = edges.graph, edges.n_rows, edges.n_features
    in_degree = torch.empty_like(row_weight)
    by_receiver, by_sender = (row_weight.new_empty(n, k) for _ in range(2))
    launch, given = _Launch("edge_sum", n, BK=k), (graph.features, edges.distance, row_weight)
    sizes = (n, edges.n_edges, *edges.basis)
    launch(by_receiver, None, *given, None, None, graph.row_ptr, *sizes, K=k)
    launch(by_sender, in_degree, *given, *transposed(graph), *sizes, K=k)
    return in_degree, by_receiver, by_sender


def _edge_gram(row_weight: Tensor, edges: _Edges) -> Tensor:
    """Parts of sum_ij w_i e_ij^T e_ij, (parts, K, K)."""
    graph, n, k = edges.graph, edges.n_rows, edges.n_features
    launch = _Launch("edge_gram", n, share=True, square=True, BK=k)
    gram = row_weight.new_empty(launch.programs, k, k)
    given = (graph.features, edges.distance, row_weight, graph.row_ptr)
    launch(gram, *given, n, edges.n_edges, *edges.basis, K=k, PRECISION=_precision())
    return gram


def _gate_sum(m: Tensor | None, out: Tensor | None, h: Tensor, linear: _Linear, layer: Layer, edges: _Edges) -> None:
    """Summed messages into ``m``, what follows from them into ``out``, each (N, F); one of them may be None."""
    n, width = h.shape
    scale, shift = (linear.scale2, linear.shift2) if out is not None else (None, None)
    _Launch("gate_sum", n, BF=width)(
        m, out, linear.pq, h, linear.of_edges, linear.table, layer.gamma1, layer.beta1, scale, shift,
        edges.distance, edges.graph.sender, edges.graph.row_ptr, n, edges.n_edges, *edges.basis,
        **_filter("gate_sum", width, edges),
    )  # fmt: skip


def _finish_with_statistics(
    out: Tensor, h: Tensor, m: Tensor, layer: Layer, row_weight: Tensor, used: _Used, atoms: Tensor, running: Running
) -> None:
    """out = softplus(h + bn2(m)) with the statistics of m over the rows, which go into ``used``."""
    n, width = h.shape
    sums = _Launch("message_sums", n, share=True, BF=width)
    parts, norm = h.new_empty(sums.programs, 4, width), h.new_empty(2, width)
    sums(parts, m, row_weight, n, F=width)
    _Launch("message_statistics", 1, BF=width)(
        used.mean2, used.var2, running.mean2, running.var2, norm[0], norm[1], atoms, parts, layer.gamma2, layer.beta2,
        layer.eps2, running.momentum2, sums.programs, F=width,
    )  # fmt: skip
    _Launch("finish", n, BF=width)(out, h, m, norm[0], norm[1], n, F=width)


def _backward_messages(
    grad: Tensor, h: Tensor, m: Tensor, layer: Layer, row_weight: Tensor, linear: _Linear, atoms: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients at h + bn2(m) and at m, (N, F), and of gamma2 and beta2. ``atoms``, their number: of the batch."""
    n, width = h.shape
    launch = _Launch("backward_finish", n, share=True, BF=width)
    du, parts = torch.empty_like(h), h.new_empty(launch.programs, 2, width)
    launch(du, parts, grad, h, m, linear.scale2, linear.shift2, layer.mean2, linear.rstd2, n, F=width)
    d_beta, d_gamma, c1, c2 = _norm_gradients(parts[:, 0], parts[:, 1], atoms)
    if c1 is None:
        return du, du * linear.scale2, d_gamma, d_beta
    dm = torch.empty_like(h)
    _Launch("correct_rows", n, BF=width)(
        dm, du, m, None, row_weight, linear.scale2, c1, c2, layer.mean2, linear.rstd2, n, STRIDE=width, C=width
    )
    return du, dm, d_gamma, d_beta


def _norm_gradients(
    of_beta: Tensor, of_gamma: Tensor, count: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of a norm's shift and scale from their parts, (parts, C), and, of statistics over ``count`` values,
    both divided by it."""
    size = of_beta.shape[1]
    d_beta, d_gamma = (of_beta.new_empty(size) for _ in range(2))
    c1, c2 = (None, None) if count is None else of_beta.new_empty(2, size)
    _Launch("norm_gradients", 1, BF=size)(
        d_beta, d_gamma, c1, c2, of_beta, of_gamma, count, len(of_beta), len(of_gamma), C=size,
        STRIDE=of_gamma.stride(0),
    )  # fmt: skip
    return d_beta, d_gamma, c1, c2


def _correct_rows(
    d_pq: Tensor, x: Tensor, row_ptr: Tensor, row_weight: Tensor, a: Tensor, c1: Tensor, c2: Tensor
) -> None:
    """d <- a (d - w (edges c1 + c2 x)), d the first half of ``d_pq`` (N, 4F)."""
    n, columns = x.shape
    _Launch("correct_rows", n, BF=columns)(
        d_pq, d_pq, x, row_ptr, row_weight, a, c1, c2, None, None, n, STRIDE=2 * columns, C=columns
    )


def _backward_receivers(
    d_pq: Tensor, x_rows: Tensor | None, dy: Tensor | None, dm: Tensor, linear: _Linear, layer: Layer, edges: _Edges
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_j dy into the first half of ``d_pq`` (N, 4F), sum_j x into ``x_rows`` (N, 2F), dy itself (E, 2F).

    Returns the sum of dy, (1, 2F), parts of that of dy x, (parts, 2F), and the sum of e dy, (K, 2F).
    """
    (n, width), k, graph = dm.shape, edges.n_features, edges.graph
    launch = _Launch("backward_rows", n, share=True, BF=width, BK=k)
    d_gamma, d_filter = (dm.new_empty(launch.programs, *shape) for shape in ((2 * width,), (k, 2 * width)))
    launch(
        d_pq, x_rows, d_gamma, d_filter, dy, linear.pq, dm, linear.of_edges, linear.table, graph.features,
        layer.gamma1, layer.beta1, edges.distance, graph.sender, graph.row_ptr, n, edges.n_edges, *edges.basis,
        **_filter("backward_rows", width, edges),
    )  # fmt: skip
    return d_pq[:, : 2 * width].sum(0, keepdim=True), d_gamma, d_filter.sum(0)


def _backward_senders(
    d_pq: Tensor, dm: Tensor, a: Tensor, correction: tuple[Tensor | None, ...], linear: _Linear, layer: Layer,
    edges: _Edges,
) -> None:  # fmt: skip
    """a (sum_i dy - in_degree c1 - c2 sum_i w_i x) into the second half of ``d_pq`` (N, 4F).

    ``correction``: c1, c2, the rows' weights and in_degree, or None four times.
    """
    n, width = dm.shape
    _Launch("backward_senders", n, BF=width)(
        d_pq, linear.pq, dm, linear.of_edges, linear.table, layer.gamma1, layer.beta1, a, *correction,
        edges.distance, *transposed(edges.graph), n, edges.n_edges, *edges.basis,
        **_filter("backward_senders", width, edges),
    )  # fmt: skip


def edge_moments(row_weight: Tensor, graph: Graph, n_features: int) -> tuple[Tensor, ...]:
    """As ``cpu.edge_moments``."""
    edges = _Edges(graph, n_features, row_weight.dtype, row_weight.device)
    n, k = edges.n_rows, n_features
    _check("row_weight", row_weight, (n,), row_weight.dtype, row_weight.device)
    if n == 0:
        zero = row_weight.new_zeros(k, k, dtype=torch.float64)
        return torch.empty_like(row_weight), *(row_weight.new_empty(n, k) for _ in range(2)), zero[0], zero
    in_degree, by_receiver, by_sender = _edge_sums(row_weight, edges)
    gram = _edge_gram(row_weight, edges).sum(0, dtype=torch.float64)
    return in_degree, by_receiver, by_sender, by_receiver.double().T @ row_weight.double(), gram


def _checked(graph: Graph, layers: Sequence[Layer], **rows: Tensor) -> _Edges:
    """The edges of a call on layers and ``rows``, each (N, F) and named, all of them checked."""
    h = next(iter(rows.values()))
    width = h.shape[1]
    edges = _Edges(graph, layers[0].weight.shape[1] - 2 * width, h.dtype, h.device)
    for name, x in rows.items():
        _check(name, x, (edges.n_rows, width), h.dtype, h.device)
    for layer in layers:
        _check_layer(layer, width, edges.n_features, h.device)
    return edges


def _check_layer(layer: Layer, width: int, n_features: int, device: torch.device) -> None:
    dtype = torch.float32
    _check("weight", layer.weight, (2 * width, 2 * width + n_features), dtype, device)
    for name, x in zip(Layer._fields[1:10], layer[1:10], strict=True):
        if x is not None or name != "bias":
            _check(name, x, (width if name.endswith("2") else 2 * width,), dtype, device)


class _Used(NamedTuple):
    """The statistics that a layer's norms used."""

    mean1: Tensor
    var1: Tensor
    mean2: Tensor
    var2: Tensor


class _Gram(NamedTuple):
    """Centred second moments of [h_i, h_j, e_ij] over the edges, without those of e_ij alone, and the edges' number."""

    upper: Tensor
    """(F, 2F + K), of h_i with all three."""
    lower: Tensor
    """(F, F + K), of h_j with the other two."""
    edges: Tensor
    """(1,) float64, how many"""

    @classmethod
    def empty(cls, like: Tensor, n_features: int) -> _Gram:
        width = like.shape[1]
        upper, lower = (like.new_empty(width, k * width + n_features) for k in (2, 1))
        return cls(upper, lower, like.new_empty(1, dtype=torch.float64))


def _second_moments(gram: _Gram, h: Tensor, edges: _Edges, moments: Moments) -> Tensor:
    """Fill ``gram``, whose blocks are sums over rows; means of the rows at either end of the edges, (2, F) float64."""
    (n, width), k, graph = h.shape, edges.n_features, edges.graph
    weights, ends = (moments.row_weight, moments.in_degree), (graph.row_ptr, n, edges.n_edges)
    launch = _Launch("neighbor_sum", n, share=True, BF=width)
    neighbors, sums = torch.empty_like(h), h.new_empty(launch.programs, 2 * width + 1)
    launch(neighbors, sums, h, graph.sender, *weights, *ends, F=width)
    means = h.new_empty(2, width, dtype=torch.float64)
    _Launch("edge_means", 1, BF=width)(means, gram.edges, h, sums, launch.programs, F=width)
    receiving, sending = torch.empty_like(h), torch.empty_like(h)
    receivers, senders = (h.new_empty(n, size) for size in (2 * width + k, width + k))
    _Launch("centred_rows", n, beside=k, BF=width)(
        receiving, sending, receivers, senders, h, neighbors, moments.by_receiver, moments.by_sender, means,
        moments.sum, gram.edges, *weights, *ends, F=width, K=k,
    )  # fmt: skip
    torch.mm(receiving.T, receivers, out=gram.upper)
    torch.mm(sending.T, senders, out=gram.lower)
    return means


def _edge_statistics(
    gram: _Gram, h: Tensor, layer: Layer, edges: _Edges, moments: Moments, used: _Used, running: Running
) -> None:
    """Mean and biased variance of z = [h_i, h_j, e_ij] W^T over the edges into ``used``, without a pass over z."""
    means, width = _second_moments(gram, h, edges, moments), h.shape[1]
    _Launch("edge_statistics", 2 * width, each=True)(
        used.mean1, used.var1, running.mean1, running.var1, *gram[:2], moments.gram, moments.sum, gram.edges, means,
        layer.weight, layer.bias, running.momentum1, F=width, K=edges.n_features, BF=64,
    )  # fmt: skip


class _Linear:
    """x_ij = (z_ij - mean) / std as p_i + q_j + r_ij: [p, q] by rows, what gives r, and what the norms amount to."""

    def __init__(self, h: Tensor, layer: Layer, edges: _Edges, storage: torch.dtype, out: Tensor | None = None) -> None:
        width, k = h.shape[1], edges.n_features
        of_rows, of_edges = (h.new_empty(*x) for x in ((width, 4 * width), (k, 2 * width)))
        vectors = h.new_empty(11 * width)
        shift, self.rstd1, self.a1, *second = vectors.split([4 * width, *[2 * width] * 2, *[width] * 3])
        self.scale2, self.shift2, self.rstd2 = second
        _Launch("order_layer", 2 * width, BF=2 * width + k)(
            of_rows, of_edges, shift, self.rstd1, self.a1, *second, layer.weight,
            None if layer.train1 else layer.bias, layer.mean1, layer.var1, layer.gamma1, layer.mean2, layer.var2,
            layer.gamma2, layer.beta2, layer.eps1, layer.eps2, F=width, K=k,
        )  # fmt: skip
        self.of_edges = of_edges.to(storage)
        self.pq = torch.addmm(shift.to(storage), h.to(storage), of_rows.to(storage), out=out)
        features = edges.graph.features
        self.table = None if features is None else features.to(storage) @ self.of_edges


def _filter(name: str, width: int, edges: _Edges) -> dict[str, Any]:
    """How a kernel forms r."""
    window = 0 if TILES[name].by_dot else min(WINDOW, edges.n_features)
    return {"F": width, "K": edges.n_features, "WINDOW": window, "PRECISION": _precision()}


def _of_rows(h: Tensor, species: Tensor | None) -> Tensor:
    """(N, F): ``h``, or of a table (U, F) the row that each row of the graph names; an index outside gives NaN."""
    if species is None:
        return h
    known = (species >= 0) & (species < h.shape[0])
    return torch.where(known[:, None], h[species.long() * known], float("nan"))


_F = TypeVar("_F", bound=Callable[..., Any])


def without_autocast(function: _F) -> _F:
    """``function``, whose products would be of halves in a backward pass under autocast."""

    @wraps(function)
    def run(x: Tensor, *arguments: Any) -> Any:
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return function(x, *arguments)
        with torch.autocast(device, enabled=False):
            return function(x, *arguments)

    return cast(_F, run)


@without_autocast
def sum_by_species(x: Tensor, species: Tensor, count: int) -> Tensor:
    """(N, F) -> (count, F): the sum of the rows of each species, with the same bits in every run.

    As products with 0 and 1, since PyTorch adds rows by an index with atomics on a GPU: in ``index_add``, in the
    gradient of ``index_select``, and, since torch 2.11, in that of ``embedding`` where many rows share one.
    """
    numbers, total = torch.arange(count, device=x.device), x.new_zeros(count, x.shape[1])
    for some, which in zip(*(y.split(_MOST_ONES // max(1, count) + 1) for y in (x, species)), strict=True):
        total = torch.addmm(total, (which == numbers[:, None]).to(x.dtype), some)
    return total


class _Kept:
    """What :func:`convs_backward` needs of the forward, in one block, in float32.

    ``features`` (T - 1, N, F) between the layers, their ``messages`` (T, N, F), and of each its :class:`_Gram` and how
    many atoms it saw.
    """

    def __init__(self, like: Tensor, n_rows: int, steps: int, n_features: int, block: Tensor | None = None) -> None:
        width = like.shape[1]
        of_gram = [width * (2 * width + n_features), width * (width + n_features)]
        sizes = [4 * steps, *of_gram * steps, (steps - 1) * n_rows * width, steps * n_rows * width]
        self.block = like.new_empty(sum(sizes)) if block is None else block
        counts, *grams, features, messages = self.block.split(sizes)
        self.features, self.messages = features.view(-1, n_rows, width), messages.view(-1, n_rows, width)
        self.counts = counts.view(torch.float64).view(steps, 2, 1)
        self.grams = [
            _Gram(upper.view(width, -1), lower.view(width, -1), self.counts[t, 0])
            for t, (upper, lower) in enumerate(zip(grams[::2], grams[1::2], strict=True))
        ]


def _layer(
    out: Tensor, m: Tensor, used: _Used, gram: _Gram | None, atoms: Tensor, h: Tensor, layer: Layer, edges: _Edges,
    moments: Moments, running: Running = STILL,
) -> None:  # fmt: skip
    """One convolution: features, summed messages and statistics into the first arguments."""
    if layer.train1:
        assert gram is not None
        _edge_statistics(gram, h, layer, edges, moments, used, running)
    for name, x, trains in zip(_Used._fields, used, (layer.train1,) * 2 + (layer.train2,) * 2, strict=True):
        if not trains:
            x.copy_(getattr(layer, name))
    layer = layer._replace(mean1=used.mean1, var1=used.var1)
    linear = _Linear(h, layer, edges, _storage())
    _gate_sum(m, None if layer.train2 else out, h, linear, layer, edges)
    if layer.train2:
        _finish_with_statistics(out, h, m, layer, moments.row_weight, used, atoms, running)


def conv(
    h: Tensor,
    layer: Layer,
    graph: Graph,
    moments: Moments,
    species: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``cpu.conv``."""
    h = _of_rows(h, species)
    n, edges = h.shape[0], _checked(graph, [layer], h=h)
    _check("row_weight", moments.row_weight, (n,), h.dtype, h.device)
    out, m = torch.empty_like(h), torch.empty_like(h)
    if n == 0:
        return out, m, *(x.clone() for x in layer[6:10])  # type: ignore[return-value]
    used = _Used(*map(torch.empty_like, layer[6:10]))
    gram = _Gram.empty(h, edges.n_features) if layer.train1 else None
    _layer(out, m, used, gram, h.new_empty(1, dtype=torch.float64), h, layer, edges, moments)
    return out, m, *used


def convs(
    h: Tensor,
    layers: Sequence[Layer],
    graph: Graph,
    moments: Moments,
    species: Tensor | None = None,
    running: Sequence[Running] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``cpu.convs``."""
    h = _of_rows(h, species)
    (n, width), steps, edges = h.shape, len(layers), _checked(graph, layers, h=h)
    _check("row_weight", moments.row_weight, (n,), h.dtype, h.device)
    kept, statistics = _Kept(h, n, steps, edges.n_features), h.new_empty(steps, 6 * width)
    for t, layer in enumerate(layers):
        out = kept.features[t] if t < steps - 1 else torch.empty_like(h)
        used = _Used(*statistics[t].split(_sizes_of(width)))
        moves = STILL if running is None else running[t]
        _layer(out, kept.messages[t], used, kept.grams[t], kept.counts[t, 1], h, layer, edges, moments, moves)
        h = out
    return h, statistics, kept.block


def _sizes_of(width: int) -> list[int]:
    return [2 * width, 2 * width, width, width]


def _edge_gradient(dz: Tensor, layer: Layer, graph: Graph, width: int) -> Tensor:
    """Gradient of the features (E, K), or of the distances (E,), from that at z."""
    de = dz @ layer.weight[:, 2 * width :]
    if graph.features is not None:
        return de
    k = torch.arange(de.shape[1], device=de.device, dtype=de.dtype)
    x = (graph.distance[:, None] - graph.dmin) / graph.step - k
    return (de * torch.exp(-(x**2)) * x).sum(1).mul_(-2 / graph.step)


@without_autocast
def conv_backward(
    grad: Tensor,
    h: Tensor,
    m: Tensor,
    layer: Layer,
    graph: Graph,
    moments: Moments,
    edge_grad: bool,
    species: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """As ``cpu.conv_backward``."""
    table, h = h, _of_rows(h, species)
    n, edges = h.shape[0], _checked(graph, [layer], h=h, grad=grad, m=m)
    _check("row_weight", moments.row_weight, (n,), h.dtype, h.device)
    if edge_grad:
        refuse_edge_grad([layer])
    if n == 0:
        nothing = [torch.zeros_like(x) for x in (table, layer.weight, *[layer.gamma1] * 3, *[layer.gamma2] * 2)]
        return (*nothing, torch.zeros_like(graph.distance if graph.features is None else graph.features))
    gram = None
    if layer.train1:
        gram = _Gram.empty(h, edges.n_features)
        _second_moments(gram, h, edges, moments)
    atoms = moments.row_weight.sum() if layer.train2 else None
    dh, gradients, d_edge = _layer_backward(grad, h, m, gram, atoms, layer, edges, moments, edge_grad)
    if species is not None:
        dh = sum_by_species(dh, species, len(table))
    return dh, *gradients, h.new_empty(0) if d_edge is None else d_edge


@without_autocast
def convs_backward(
    grad: Tensor,
    h: Tensor,
    statistics: Tensor,
    block: Tensor,
    layers: Sequence[Layer],
    graph: Graph,
    moments: Moments,
    edge_grad: bool,
    species: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """As ``cpu.convs_backward``."""
    table, h = h, _of_rows(h, species)
    (n, width), steps, edges = h.shape, len(layers), _checked(graph, layers, h=h, grad=grad)
    _check("row_weight", moments.row_weight, (n,), h.dtype, h.device)
    if edge_grad:
        refuse_edge_grad(layers)
    kept, d_edge = _Kept(h, n, steps, edges.n_features, block), None
    gradients: list[Tensor] = []
    for t in reversed(range(steps)):
        used = dict(zip(_Used._fields, statistics[t].split(_sizes_of(width)), strict=True))
        layer, x = layers[t]._replace(**used), kept.features[t - 1] if t else h
        atoms = kept.counts[t, 1] if layer.train2 else None
        grad, of_layer, edge = _layer_backward(
            grad, x, kept.messages[t], kept.grams[t], atoms, layer, edges, moments, edge_grad
        )
        gradients = of_layer + gradients
        if edge is not None:
            d_edge = edge if d_edge is None else d_edge + edge
    return grad if species is None else sum_by_species(grad, species, len(table)), gradients, d_edge


def _layer_backward(
    grad: Tensor, h: Tensor, m: Tensor, gram: _Gram | None, atoms: Tensor | None, layer: Layer, edges: _Edges,
    moments: Moments, edge_grad: bool,
) -> tuple[Tensor, list[Tensor], Tensor | None]:  # fmt: skip
    """Gradients of h; of weight, bias, gamma1, beta1, gamma2, beta2; and of the edges."""
    (n, width), k, graph = h.shape, edges.n_features, edges.graph
    linear, weight, count = _Linear(h, layer, edges, _storage()), layer.weight, None
    d_pq = h.new_empty(n, 4 * width)
    x_rows = h.new_empty(n, 2 * width) if layer.train1 else None
    dy = h.new_empty(edges.n_edges, 2 * width) if edge_grad else None
    du, dm, d_gamma2, d_beta2 = _backward_messages(grad, h, m, layer, moments.row_weight, linear, atoms)
    of_beta1, of_gamma1, d_filter = _backward_receivers(d_pq, x_rows, dy, dm, linear, layer, edges)
    correction: tuple[Tensor | None, ...] = (None,) * 4
    of_batch: tuple[Tensor | None, ...] = (None,) * 5
    if layer.train1:
        assert gram is not None
        count, of_batch = gram.edges, (*gram[:2], moments.gram, moments.sum, gram.edges)
    d_beta1, d_gamma1, c1, c2 = _norm_gradients(of_beta1, of_gamma1, count)
    d_weight = torch.empty_like(weight)
    _Launch("filter_gradient", 2 * width, each=True, BK=k)(
        d_weight, d_filter, *of_batch, weight, linear.rstd1, linear.a1, c1, c2, F=width, K=k
    )
    if x_rows is not None:
        assert c1 is not None and c2 is not None
        correction = c1, c2, moments.row_weight, moments.in_degree
        _correct_rows(d_pq, x_rows, graph.row_ptr, moments.row_weight, linear.a1, c1, c2)
    else:
        d_pq[:, : 2 * width] *= linear.a1
    del x_rows
    _backward_senders(d_pq, dm, linear.a1, correction, linear, layer, edges)
    dh = torch.addmm(du, d_pq, torch.cat([weight[:, :width], weight[:, width : 2 * width]]))
    for half, columns in enumerate((d_pq[:, : 2 * width], d_pq[:, 2 * width :])):
        torch.mm(columns.T, h, out=d_weight[:, half * width : (half + 1) * width])
    d_bias = torch.zeros_like(d_beta1) if layer.train1 else d_beta1 * linear.a1
    d_edge = None if dy is None else _edge_gradient(dy.mul_(linear.a1), layer, graph, width)
    return dh, [d_weight, d_bias, d_gamma1, d_beta1, d_gamma2, d_beta2], d_edge


def stack(h: Tensor, layers: Sequence[Layer], graph: Graph, species: Tensor | None = None) -> Tensor:
    """As ``cpu.stack``."""
    h = _of_rows(h, species)
    (n, width), edges = h.shape, _checked(graph, layers, h=h)
    if n == 0 or not layers:
        return h.clone()
    pq = h.new_empty(n, 4 * width, dtype=_storage())
    buffers = [torch.empty_like(h) for _ in range(min(2, len(layers)))]
    for t, layer in enumerate(layers):
        linear = _Linear(h, layer, edges, pq.dtype, out=pq)
        h, old = buffers[t % len(buffers)], h
        _gate_sum(None, h, old, linear, layer, edges)
    return h


def network(
    h: Tensor,
    species: Tensor | None,
    embedding: Dense | None,
    layers: Sequence[Layer],
    graph: Graph,
    row_weight: Tensor,
    readout_layers: Sequence[Dense],
) -> Tensor:
    """As ``cuda.network``, part by part: a program that was traced for the compiled kernels runs without them, too."""
    if embedding is not None:
        h = torch.nn.functional.linear(h, *embedding)
    h, rows, ends = stack(h, layers, graph, species), torch.arange(len(row_weight), device=h.device), graph.crystal_ptr

    def sums(x: Tensor) -> Tensor:  # in the order of the rows, in double: equal rows round alike
        how: dict[str, Any] = {"mode": "sum", "per_sample_weights": row_weight.double(), "include_last_offset": True}
        return torch.nn.functional.embedding_bag(rows, x.double(), ends.long(), **how)

    atoms = sums(torch.ones_like(row_weight)[:, None])
    x = (sums(h) / atoms.where(atoms > 0, 1)).to(h.dtype)
    for layer in readout_layers:
        x = torch.nn.functional.linear(torch.nn.functional.softplus(x), *layer)
    return x
