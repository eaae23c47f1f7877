"""Training on CUDA tensors, float32, in the compiled kernels of ``csrc/cuda/conv.cuh``: any number of features.

Nodes, statistics and checks are those of ``ops/triton.py``, which takes the kernels from here. Products use TF32 where
PyTorch may. Where bfloat16 is allowed, rows' products and those of given edge features are stored so, but not the
filter, whose product TF32 has more digits for.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import triton
from .cpu import Layer, Moments
from .registry import core
from .triton import _Edges, _Kernels, _precision, _storage, transposed

PROGRAMS = 264
"""Blocks that share out rows where partial sums are kept, two for each multiprocessor of an H200; a constant, so that
bits do not depend on the GPU."""
_CHUNK, _ROWS = 32, 64
"""Channels and rows of a block."""
FIELDS = (
    "distance", "term", "features", "ptr", "other", "number", "pq", "filter", "gamma1", "beta1", "weight", "bias",
    "mean1", "var1", "gamma2", "beta2", "mean2", "var2", "h", "m", "grad", "d_m", "x", "row_weight", "degree", "a",
    "c1", "c2", "count", "by_receiver", "by_sender", "product", "totals", "more_totals", "e_sum", "e_gram", "out",
    "out_m", "out_x", "out_degree", "out_gamma", "out_filter", "out_edge",
)  # fmt: skip
"""The pointers of ``DeviceConv`` in csrc/cuda/conv.h, in their order."""
SIZES = ("n_rows", "n_edges", "n_features", "F", "width", "programs", "stride", "columns", "relaxed", "half")
NUMBERS = ("dmin", "inverse_step", "eps")


def native() -> Any:
    """The compiled functions."""
    return core


_AT = {name: k for k, name in enumerate(FIELDS)}


def _call(name: str, sizes: dict[str, Any], **tensors: Tensor | None) -> None:
    """Launch a kernel; ``tensors`` under their names in FIELDS, ``sizes`` under those in SIZES and NUMBERS."""
    given, device = [0] * len(FIELDS), torch.device("cpu")
    for field, x in tensors.items():
        if x is not None:
            given[_AT[field]], device = x.data_ptr(), x.device
    whole, real = ([sizes.get(size, 0) for size in names] for names in (SIZES, NUMBERS))
    with triton.launching(device) as stream:
        native().cuda_conv(name, given, whole, tuple(map(float, real)), stream)


def _programs(n_rows: int) -> int:
    return min(PROGRAMS, -(-n_rows // _ROWS))


def _more(x: Tensor, parts: int) -> Tensor:
    """(…, parts F) -> (…, parts W): zeros up to whole chunks of channels."""
    width = x.shape[-1] // parts
    more = -width % _CHUNK
    return pad(x.unflatten(-1, (parts, width)), (0, more)).flatten(-2) if more else x


def _rows(n: int, width: int) -> dict[str, Any]:
    return {"n_rows": n, "F": width, "width": width + -width % _CHUNK, "programs": _programs(n)}


def _norm(layer: Layer) -> dict[str, Tensor]:
    return {"gamma2": layer.gamma2, "beta2": layer.beta2, "mean2": layer.mean2, "var2": layer.var2}


class _Scaled:
    """As :class:`.triton._Linear`, with rows of 4W numbers, and the filter in the order of the kernels."""

    def __init__(self, h: Tensor, layer: Layer, edges: _Edges) -> None:
        width, k = h.shape[1], edges.n_features
        wide = width + -width % _CHUNK
        self.rstd, self.of_edges = h.new_empty(2 * width), h.new_empty(k, 2 * width)
        of_rows, shift = h.new_empty(4 * wide, width), h.new_empty(4 * wide)
        self.filter = h.new_empty(wide // _CHUNK, -(-k // 8), 4, 2, 32, 4)
        _call(
            "scale_weights", {"n_features": k, "F": width, "width": wide, "eps": layer.eps1}, weight=layer.weight,
            bias=None if layer.train1 else layer.bias, mean1=layer.mean1, var1=layer.var1, out=of_rows, out_x=shift,
            out_edge=self.of_edges, out_filter=self.filter, out_gamma=self.rstd,
        )  # fmt: skip
        storage, features = _storage(), edges.graph.features
        self.pq = torch.addmm(shift.to(storage), h.to(storage), of_rows.T.to(storage))
        self.table = None if features is None else _more(features.to(storage) @ self.of_edges.to(storage), 2)


class Kernels(_Kernels):
    """The launches of a convolution, compiled."""

    @staticmethod
    def _edges(edges: _Edges, by_sender: bool = False) -> dict[str, Tensor | None]:
        graph, found = edges.graph, {"distance": edges.distance, "features": edges.graph.features}
        if by_sender:
            receiver, number, col_ptr = transposed(graph)
            return {**found, "ptr": col_ptr, "other": receiver, "number": number}
        return {**found, "ptr": graph.row_ptr, "other": graph.sender}

    @staticmethod
    def _sizes(edges: _Edges, width: int = 0, linear: Any = None, **more: Any) -> dict[str, Any]:
        found = {"n_edges": edges.n_edges, "n_features": edges.n_features, "relaxed": int(_precision() != "tf32x3")}
        found["half"] = int(linear is not None and linear.pq.dtype == torch.bfloat16)
        basis = dict(zip(NUMBERS, edges.basis, strict=False))
        return {**_rows(edges.n_rows, width), **found, **basis, **more}

    @staticmethod
    def _layer(linear: Any, layer: Layer) -> dict[str, Tensor | None]:
        """What x and y of an edge follow from."""
        given = {"pq": linear.pq, "filter": linear.filter, "term": linear.table}
        return {**given, "gamma1": layer.gamma1, "beta1": layer.beta1}

    @staticmethod
    def linear(h: Tensor, layer: Layer, edges: _Edges) -> Any:
        return _Scaled(h, layer, edges)

    @staticmethod
    def _column_sums(x: Tensor, row_weight: Tensor, **more: Tensor | None) -> Tensor:
        """(4, F) float64: see conv.h."""
        sizes = _rows(*x.shape)
        if (sender := more.get("other")) is not None:
            sizes["n_edges"] = len(sender)
        sums = x.new_empty(sizes["programs"], 4, x.shape[1])
        _call("column_sums", sizes, out=sums, x=x, row_weight=row_weight, **more)
        return sums.sum(0, dtype=torch.float64)

    @classmethod
    def statistics(cls, h: Tensor, weight: Tensor, edges: _Edges, moments: Moments) -> tuple[Tensor, Tensor]:
        (n, width), k, graph = h.shape, edges.n_features, cls._edges(edges)
        given: dict[str, Tensor | None] = {"totals": cls._column_sums(h, moments.row_weight, **graph)}
        given |= {"e_sum": moments.sum, "e_gram": moments.gram}
        rows, sizes = h.new_empty(n, 3 * width + 2 * k + 2), cls._sizes(edges, width)
        centred, mean, var = torch.empty_like(h), *(h.new_empty(2 * width) for _ in range(2))
        _call(
            "gram_rows", sizes, out=rows, out_x=centred, h=h, row_weight=moments.row_weight,
            degree=moments.in_degree, by_receiver=moments.by_receiver, by_sender=moments.by_sender, **given, **graph,
        )  # fmt: skip
        product = centred.T @ rows
        _call("edge_statistics", sizes, out=mean, out_x=var, product=product, weight=weight, **given)
        return mean, var

    @staticmethod
    def filter_correction(linear: Any, edges: _Edges, moments: Moments, c1: Tensor, c2: Tensor) -> Tensor:
        width = len(c1) // 2
        p, q = (x.unflatten(1, (2, -1))[..., :width].flatten(1) for x in linear.pq.float().chunk(2, dim=1))
        return triton._filter_correction(p, q, linear.of_edges, moments, c1, c2)

    @classmethod
    def edge_sums(cls, row_weight: Tensor, edges: _Edges) -> tuple[Tensor, Tensor, Tensor]:
        in_degree, shape = torch.empty_like(row_weight), (edges.n_rows, edges.n_features)
        by_receiver, by_sender = (row_weight.new_empty(shape) for _ in range(2))
        call = partial(_call, "edge_sum", cls._sizes(edges))
        call(out=by_receiver, **cls._edges(edges))
        call(out=by_sender, out_degree=in_degree, row_weight=row_weight, **cls._edges(edges, by_sender=True))
        return in_degree, by_receiver, by_sender

    @classmethod
    def edge_gram(cls, row_weight: Tensor, edges: _Edges) -> Tensor:
        k, sizes = edges.n_features, cls._sizes(edges)
        gram = row_weight.new_empty(sizes["programs"], k, k)
        _call("edge_gram", sizes, out=gram, row_weight=row_weight, **cls._edges(edges))
        return gram

    @classmethod
    def gate_sum(
        cls, m: Tensor | None, out: Tensor | None, h: Tensor, linear: Any, layer: Layer, edges: _Edges
    ) -> None:
        _call(
            "gate_sum", cls._sizes(edges, h.shape[1], linear, eps=layer.eps2), out_m=m, out=out, h=h, **_norm(layer),
            **cls._layer(linear, layer), **cls._edges(edges),
        )  # fmt: skip

    @classmethod
    def finish(cls, out: Tensor, h: Tensor, m: Tensor, layer: Layer, row_weight: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = (h.new_empty(h.shape[1]) for _ in range(2))
        totals = cls._column_sums(m, row_weight)
        more = cls._column_sums(m, row_weight, totals=totals)
        _call(
            "finish", {**_rows(*m.shape), "eps": layer.eps2}, out=out, out_m=mean, out_x=var, h=h, m=m,
            gamma2=layer.gamma2, beta2=layer.beta2, totals=totals, more_totals=more,
        )  # fmt: skip
        return mean, var

    @staticmethod
    def backward_messages(
        grad: Tensor, h: Tensor, m: Tensor, layer: Layer, row_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sizes, norm = {**_rows(*h.shape), "eps": layer.eps2}, _norm(layer)
        (du, dm), sums = (torch.empty_like(h) for _ in range(2)), h.new_empty(2, sizes["programs"], h.shape[1])
        given = None if layer.train2 else dm
        _call("finish_backward", sizes, out=du, out_m=given, out_x=sums, grad=grad, h=h, m=m, **norm)
        d_beta, d_gamma = sums.sum(1)
        if layer.train2:
            sizes |= {"stride": h.shape[1], "columns": h.shape[1]}
            _call(
                "correct", sizes, out=dm, grad=du, x=m, row_weight=row_weight, c1=d_beta, c2=d_gamma,
                count=row_weight.sum(), **norm,
            )  # fmt: skip
        return du, dm, d_gamma, d_beta

    @staticmethod
    def correct(d_pq: Tensor, x: Tensor, degree: Tensor, row_weight: Tensor, a: Tensor, c1: Tensor, c2: Tensor) -> None:
        sizes = {**_rows(len(x), 0), "stride": d_pq.shape[1], "columns": x.shape[1]}
        _call("correct", sizes, out=d_pq, grad=d_pq, x=x, degree=degree, row_weight=row_weight, a=a, c1=c1, c2=c2)

    @classmethod
    def backward_receivers(
        cls, d_pq: Tensor, x_rows: Tensor | None, dy: Tensor | None, dm: Tensor, linear: Any, layer: Layer,
        edges: _Edges,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        width, k, programs = dm.shape[1], edges.n_features, _programs(edges.n_rows)
        sums, d_filter = dm.new_empty(programs, 2, 2 * width), dm.new_empty(programs, k, 2 * width)
        _call(
            "backward_receivers", cls._sizes(edges, width, linear), out=d_pq, out_x=x_rows,
            out_gamma=sums, out_filter=d_filter, out_edge=dy, d_m=_more(dm, 1), **cls._layer(linear, layer),
            **cls._edges(edges),
        )  # fmt: skip
        return (*sums.sum(0), d_filter.sum(0))

    @classmethod
    def backward_senders(
        cls, d_pq: Tensor, dm: Tensor, a: Tensor, correction: tuple[Tensor | None, ...], linear: Any, layer: Layer,
        edges: _Edges,
    ) -> None:  # fmt: skip
        c1, c2, row_weight, in_degree = correction
        _call(
            "backward_senders", cls._sizes(edges, dm.shape[1], linear), out=d_pq, d_m=_more(dm, 1), a=a, c1=c1,
            c2=c2, row_weight=row_weight, degree=in_degree, **cls._layer(linear, layer),
            **cls._edges(edges, by_sender=True),
        )  # fmt: skip


edge_moments = partial(triton.edge_moments, run=Kernels)
conv = partial(triton.conv, run=Kernels)
conv_backward = partial(triton.conv_backward, run=Kernels)
