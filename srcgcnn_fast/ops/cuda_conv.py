"""Training on CUDA tensors, float32, in the compiled kernels of ``csrc/cuda``: any number of features.

A layer forward is one call of ``layer``, backward one of ``layer_backward`` (csrc/cuda/conv.h), each in a block of
memory of its own. Checks are those of ``ops/triton.py``. Products use TF32 where PyTorch may. Where bfloat16 is
allowed, rows' products and those of given edge features are stored so, but not the filter, whose product TF32 has
more digits for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import triton
from .cpu import Graph, Layer, Moments, Running, refuse_edge_grad
from .registry import core
from .triton import Transposed, _Edges, _precision, _storage

PROGRAMS = 264
"""Blocks that share out rows where partial sums are kept, two for each multiprocessor of an H200; a constant, so that
bits do not depend on the GPU."""
_CHUNK, _ROWS = 32, 64
"""Channels and rows of a block."""
AT_ONCE = 64 << 20
"""Bytes of the rows' products that a layer has at a time backward: beyond it, chunks of its channels go one after the
other."""
FIELDS = (
    "distance", "term", "features", "ptr", "other", "number", "pq", "filter", "gamma1", "beta1", "weight", "bias",
    "mean1", "var1", "gamma2", "beta2", "mean2", "var2", "h", "m", "grad", "d_m", "x", "row_weight", "degree", "a",
    "c1", "c2", "count", "by_receiver", "by_sender", "product", "totals", "e_sum", "e_gram", "out",
    "out_m", "out_x", "out_degree", "out_gamma", "out_filter", "out_edge", "receiver", "col_ptr", "order", "new_mean1",
    "new_var1", "new_mean2", "new_var2", "new_norm", "running_mean1", "running_var1", "running_mean2", "running_var2",
    "d_weight", "d_bias", "d_gamma1", "d_beta1", "d_gamma2", "d_beta2", "out_receiver", "out_number", "out_col_ptr",
    "out_sum", "out_gram", "space",
)  # fmt: skip
"""The pointers of ``DeviceConv`` in csrc/cuda/conv.h, in their order."""
SIZES = (
    "n_rows", "n_edges", "n_features", "F", "width", "programs", "stride", "columns", "train1", "train2", "relaxed",
    "half", "all", "m_stride", "at_once",
)  # fmt: skip
NUMBERS = ("dmin", "inverse_step", "eps", "eps1", "momentum1", "momentum2")


def native() -> Any:
    """The compiled functions."""
    return core


_AT = {name: k for k, name in enumerate(FIELDS)}
_SIZE = {name: k for k, name in enumerate(SIZES)}
_MOMENTS, _LAYER, _BACKWARD = range(3)
"""Whose space ``cuda_space`` tells."""


def _call(name: str, sizes: dict[str, Any], **tensors: Tensor | None) -> None:
    """Launch a kernel; ``tensors`` under their names in FIELDS, ``sizes`` under those in SIZES and NUMBERS."""
    device = next((x.device for x in tensors.values() if x is not None), torch.device("cpu"))
    whole, real = ([sizes.get(size, 0) for size in names] for names in (SIZES, NUMBERS))
    with triton.launching(device) as stream:
        native().cuda_conv(name, _put([0] * len(FIELDS), **tensors), whole, list(map(float, real)), stream)


def _put(pointers: list[int], **tensors: Tensor | None) -> list[int]:
    for field, x in tensors.items():
        if x is not None:
            pointers[_AT[field]] = x.data_ptr()
    return pointers


def _programs(n_rows: int) -> int:
    return min(PROGRAMS, -(-n_rows // _ROWS))


def _rows(n: int, width: int) -> dict[str, Any]:
    wide = width + -width % _CHUNK
    return {"n_rows": n, "F": width, "width": wide, "programs": _programs(n), "all": width, "m_stride": wide}


class Kept(NamedTuple):
    """What the backward of a layer needs of its forward."""

    m: Tensor
    """(N, F), the summed messages."""
    statistics: list[Tensor]
    """mean1, var1, mean2, var2 that were used."""
    product: Tensor | None
    """The Gram matrix that statistics of the batch follow from."""


class Messages(NamedTuple):
    """Those of several layers, which :func:`features` makes the rows' features from again."""

    sums: Tensor
    """(steps, N, F)"""
    norms: Tensor
    """(steps, 2, F), what scales and shifts them."""


class Call:
    """A graph with its moments, checked, for several layers of F features, forward or backward.

    Raises:
        InputError: a shape, type or device is wrong.
    """

    def __init__(self, graph: Graph, moments: Moments, like: Tensor, n_features: int) -> None:
        edges = _Edges(graph, n_features, like.dtype, like.device)
        self.graph, self.edges, self.width, self.like = graph, edges, like.shape[1], like
        sizes = {
            **_rows(edges.n_rows, self.width), "n_edges": edges.n_edges, "n_features": n_features,
            "relaxed": _precision() != "tf32x3", "half": _storage() == torch.bfloat16, "at_once": AT_ONCE,
        }  # fmt: skip
        self.sizes = [int(sizes.get(name, 0)) for name in SIZES]
        row_weight, in_degree, by_receiver, by_sender, e_sum, e_gram = moments
        triton._check("row_weight", row_weight, (edges.n_rows,), like.dtype, like.device)
        self.pointers = _put(
            [0] * len(FIELDS), distance=edges.distance, features=graph.features, ptr=graph.row_ptr, other=graph.sender,
            row_weight=row_weight, degree=in_degree, by_receiver=by_receiver, by_sender=by_sender, e_sum=e_sum,
            e_gram=e_gram,
        )  # fmt: skip
        self.space: dict[tuple[int, bool, bool], int] = {}

    def check(self, layer: Layer, **rows: Tensor) -> None:
        edges, width, like = self.edges, self.width, self.like
        for name, x in rows.items():
            triton._check(name, x, (edges.n_rows, width), like.dtype, like.device)
        triton._check_layer(layer, width, edges.n_features, like.device)

    def run(self, name: str, which: int, trains: tuple[bool, bool], pointers: list[int], stream: int) -> None:
        """The function ``name`` in a space of its own."""
        sizes, key = self.sizes.copy(), (which, *trains)
        sizes[_SIZE["train1"]], sizes[_SIZE["train2"]] = map(int, trains)
        if key not in self.space:
            self.space[key] = native().cuda_space(pointers, sizes, which)
        space = self.like.new_empty(-(-self.space[key] // 4))
        pointers[_AT["space"]] = space.data_ptr()
        native().cuda_conv(name, pointers, sizes, self.numbers, stream)

    def _given(self, h: Tensor, layer: Layer, running: Running | None = None) -> list[int]:
        weight, bias, gamma1, beta1, gamma2, beta2, mean1, var1, mean2, var2 = layer[:10]
        momentum1, momentum2 = (0.0, 0.0) if running is None else running[4:]
        self.numbers = [*map(float, self.edges.basis), layer.eps2, layer.eps1, momentum1, momentum2]
        return _put(
            self.pointers.copy(), h=h, weight=weight, bias=bias, gamma1=gamma1, beta1=beta1, gamma2=gamma2,
            beta2=beta2, mean1=mean1, var1=var1, mean2=mean2, var2=var2,
        )  # fmt: skip

    def forward(
        self,
        h: Tensor,
        layer: Layer,
        stream: int,
        into: tuple[Tensor, Tensor, Tensor | None],
        running: Running | None = None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """What its backward needs: statistics and product of :class:`Kept`.

        ``into``: where softplus(h + bn2(m)), (N, F), goes, which may be h itself, m, and, if they are kept, the
        norm's scale and shift (2, F).
        """
        width, k, product = self.width, self.edges.n_features, None
        out, m, norm = into
        trains = (layer.train1,) * 2 + (layer.train2,) * 2
        used = [torch.empty_like(x) if new else x.clone() for x, new in zip(layer[6:10], trains, strict=True)]
        if layer.train1:
            product = h.new_empty(width, 3 * width + 2 * k + 2)
        pointers = _put(
            self._given(h, layer, running), out=out, out_m=m, product=product, new_mean1=used[0], new_var1=used[1],
            new_mean2=used[2], new_var2=used[3], new_norm=norm,
        )  # fmt: skip
        if running is not None:
            _put(
                pointers, running_mean1=running.mean1, running_var1=running.var1, running_mean2=running.mean2,
                running_var2=running.var2,
            )  # fmt: skip
        self.run("layer", _LAYER, layer[12:], pointers, stream)
        return used, product

    def by_sender(self) -> None:
        """The backward goes through the edges by sender, too."""
        self.transposed = transposed(self.graph)  # held, as nobody else may hold it
        _put(self.pointers, **dict(zip(("receiver", "number", "col_ptr"), self.transposed, strict=True)))

    def backward(
        self, grad: Tensor, h: Tensor, layer: Layer, kept: Kept, edge_grad: bool, stream: int, out: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Gradients of h, weight, bias, gamma1, beta1, gamma2, beta2, and at y of the edges, (E, 2F), or ().

        ``out``: where the first of them goes; it may be ``grad`` itself.
        """
        mean1, var1, mean2, var2 = kept.statistics
        layer = layer._replace(mean1=mean1, var1=var1, mean2=mean2, var2=var2)
        like = (layer.weight, layer.gamma1, layer.gamma1, layer.beta1, layer.gamma2, layer.beta2)
        found = [torch.empty_like(h) if out is None else out, *(torch.empty_like(x) for x in like)]
        dy = h.new_empty(self.edges.n_edges, 2 * self.width) if edge_grad else None
        names = ("out", "d_weight", "d_bias", "d_gamma1", "d_beta1", "d_gamma2", "d_beta2")
        pointers = _put(
            self._given(h, layer), grad=grad, m=kept.m, product=kept.product, out_edge=dy,
            **dict(zip(names, found, strict=True)),
        )  # fmt: skip
        self.run("layer_backward", _BACKWARD, layer[12:], pointers, stream)
        return (*found, h.new_empty(0) if dy is None else dy)


@triton.without_autocast
def edge_gradient(dy: Tensor, layer: Layer, var1: Tensor, graph: Graph) -> Tensor:
    """Gradient of the features (E, K), or of the distances (E,), from that at y."""
    a = layer.gamma1 * torch.rsqrt(var1 + layer.eps1)
    return triton._edge_gradient(dy.mul_(a), layer, graph, dy.shape[1] // 2)


def _transpose(sender: Tensor, row_ptr: Tensor) -> Transposed:
    n, e = row_ptr.shape[0] - 1, sender.shape[0]
    by_sender, order = torch.sort(sender, stable=True)
    receiver, number, col_ptr = torch.empty_like(sender), torch.empty_like(sender), torch.empty_like(row_ptr)
    _call(
        "transpose", {"n_rows": n, "n_edges": e}, ptr=row_ptr, other=by_sender, order=order, out_receiver=receiver,
        out_number=number, out_col_ptr=col_ptr,
    )  # fmt: skip
    return Transposed(receiver, number, col_ptr)


def transposed(graph: Graph) -> Transposed:
    """As ``triton.transposed``."""
    return triton.transposed(graph, _transpose)


def features(h: Tensor, species: Tensor | None, messages: Messages, steps: int) -> Tensor:
    """(N, F): rows of h, or of a table h (U, F) those that ``species`` (N,) names, after so many layers."""
    n, width = messages.sums.shape[1:]
    if species is not None:
        triton._check("species", species, (n,), torch.int32, h.device)
    out = h.new_empty(n, width)
    sizes = {**_rows(n, width), "n_edges": len(h), "columns": steps}
    _call("features", sizes, h=h, other=species, m=messages.sums, a=messages.norms, out=out)
    return out


def lookup(table: Tensor, species: Tensor) -> Tensor:
    """(N, F): of a table (U, F) the row that ``species`` (N,) names; NaN where it has no such row."""
    out = table.new_empty(len(species), table.shape[1])
    _call("features", {**_rows(*out.shape), "n_edges": len(table)}, h=table, other=species, out=out)
    return out


def sum_by_species(x: Tensor, species: Tensor, count: int) -> Tensor:
    """As ``triton.sum_by_species``; ``species`` beyond the table have no part in it."""
    n, width = x.shape
    programs = min(_programs(n), max(8, 4 * n // max(1, count)))  # each of which has a table of its own
    if n == 0:
        return x.new_zeros(count, width)
    out, parts = x.new_empty(count, width), x.new_empty(programs, count, width)
    sizes = {"n_rows": n, "n_edges": count, "F": width, "programs": programs}
    _call("table_sums", sizes, grad=x, other=species, out=out, out_x=parts)
    return out


def crystal_mean(h: Tensor, row_weight: Tensor, crystal_ptr: Tensor) -> Tensor:
    """(N, F) -> (B, F): the weighted mean over the rows of each crystal; 0 where it has none."""
    n, width, device = *h.shape, h.device
    for name, x, size, dtype in (("weight", row_weight, n, h.dtype), ("crystal_ptr", crystal_ptr, None, torch.int32)):
        triton._check(name, x, (len(x) if size is None else size,), dtype, device)
    out = h.new_empty(len(crystal_ptr) - 1, width)
    sizes = {"n_rows": len(out), "n_edges": n, "F": width}
    _call("mean", sizes, x=h, row_weight=row_weight, ptr=crystal_ptr, out=out)
    return out


def crystal_mean_backward(grad: Tensor, row_weight: Tensor, crystal_ptr: Tensor) -> Tensor:
    """(B, F) -> (N, F): its gradient."""
    (b, width), n = grad.shape, len(row_weight)
    out = grad.new_empty(n, width) if b else grad.new_full((n, width), float("nan"))  # rows of no crystal
    _call(
        "mean_backward", {"n_rows": b, "n_edges": n, "F": width}, grad=grad, row_weight=row_weight, ptr=crystal_ptr,
        out=out,
    )  # fmt: skip
    return out


def edge_moments(row_weight: Tensor, graph: Graph, n_features: int) -> tuple[Tensor, ...]:
    """As ``cpu.edge_moments``."""
    n, k = row_weight.shape[0], n_features
    in_degree, total, gram = (
        torch.empty_like(row_weight), *(row_weight.new_empty(*s, dtype=torch.float64) for s in ((3, k), (k, k)))
    )  # fmt: skip
    by_receiver, by_sender = row_weight.new_empty(n, k), row_weight.new_empty(n, k)
    run = Call(graph, Moments(row_weight, None, None, None, None, None), row_weight[:, None], k)
    if n == 0:
        return in_degree, by_receiver, by_sender, total.zero_()[0], gram.zero_()
    run.by_sender()
    pointers = _put(
        run.pointers.copy(), out=by_receiver, out_x=by_sender, out_degree=in_degree, out_sum=total, out_gram=gram
    )
    run.numbers = [*map(float, run.edges.basis), 0.0, 0.0, 0.0, 0.0]
    with triton.launching(row_weight.device) as stream:
        run.run("edge_moments", _MOMENTS, (False, False), pointers, stream)
    return in_degree, by_receiver, by_sender, total[0], gram


def conv(
    h: Tensor, layer: Layer, graph: Graph, moments: Moments, species: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``cpu.conv``."""
    h = triton._of_rows(h, species)
    run = Call(graph, moments, h, layer.weight.shape[1] - 2 * h.shape[1])
    run.check(layer, h=h)
    if h.shape[0] == 0:
        return torch.empty_like(h), torch.empty_like(h), *(x.clone() for x in layer[6:10])  # type: ignore[return-value]
    out, m = torch.empty_like(h), torch.empty_like(h)
    with triton.launching(h.device) as stream:
        (mean1, var1, mean2, var2), _ = run.forward(h, layer, stream, (out, m, None))
    return out, m, mean1, var1, mean2, var2


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
    table, h = h, triton._of_rows(h, species)
    run = Call(graph, moments, h, layer.weight.shape[1] - 2 * h.shape[1])
    run.check(layer, h=h, grad=grad, m=m)
    if edge_grad:
        refuse_edge_grad([layer])
    if h.shape[0] == 0:
        nothing = [torch.zeros_like(x) for x in (table, layer.weight, *[layer.gamma1] * 3, *[layer.gamma2] * 2)]
        return (*nothing, torch.zeros_like(graph.distance if graph.features is None else graph.features))
    run.by_sender()
    with triton.launching(h.device) as stream:
        dh, *found, dy = run.backward(grad, h, layer, Kept(m, list(layer[6:10]), None), edge_grad, stream)
    if species is not None:  # sorted first, so that the sums have an order
        dh = torch.zeros_like(table).index_put_((species.long(),), dh, accumulate=True)
    return (dh, *found, edge_gradient(dy, layer, layer.var1, graph) if edge_grad else dy)
