"""Training on CUDA tensors, float32, in the compiled kernels of ``csrc/cuda/conv.cuh``: any number of features.

Nodes, statistics and checks are those of ``ops/triton.py``, which takes the kernels from here. Products use TF32 where
PyTorch may; storage is float32 also where bfloat16 is allowed.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import triton
from .cpu import Layer
from .registry import core
from .triton import _Edges, _finish, _Kernels, _Linear, _precision, transposed

PROGRAMS = 264
"""Blocks that share out rows where partial sums are kept, two for each multiprocessor of an H200; a constant, so that
bits do not depend on the GPU."""
_CHUNK, _ROWS = 32, 64
"""Channels and rows of a block."""
FIELDS = (
    "distance", "term", "features", "ptr", "other", "number", "pq", "filter", "gamma1", "beta1", "scale2", "shift2",
    "mean2", "rstd2", "h", "m", "grad", "d_m", "x", "row_weight", "degree", "a", "c1", "c2", "out", "out_m", "out_x",
    "out_degree", "out_gamma", "out_filter", "out_edge",
)  # fmt: skip
"""The pointers of ``DeviceConv`` in csrc/cuda/conv.h, in their order."""
SIZES = ("n_rows", "n_edges", "n_features", "F", "width", "programs", "stride", "columns", "relaxed")


def native() -> Any:
    """The compiled functions."""
    return core


def _call(name: str, sizes: dict[str, int], basis: tuple[float, float] = (0.0, 1.0), **tensors: Tensor | None) -> None:
    """Launch a kernel; ``tensors`` under their names in FIELDS."""
    assert not tensors.keys() - set(FIELDS) and not sizes.keys() - set(SIZES)
    device = next(x.device for x in tensors.values() if x is not None)
    given = [0 if (x := tensors.get(field)) is None else x.data_ptr() for field in FIELDS]
    # a launch goes to the current device of the thread, which need not be the tensors'
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        native().cuda_conv(name, given, [sizes.get(size, 0) for size in SIZES], basis, stream)


def _programs(n_rows: int) -> int:
    return min(PROGRAMS, -(-n_rows // _ROWS))


def _more(x: Tensor, parts: int) -> Tensor:
    """(…, parts F) -> (…, parts W): zeros up to whole chunks of channels."""
    width = x.shape[-1] // parts
    more = -width % _CHUNK
    return pad(x.unflatten(-1, (parts, width)), (0, more)).flatten(-2) if more else x


def _filter(of_edges: Tensor) -> Tensor:
    """w_e (K, 2F) in the order in which the lanes of a product read it: csrc/cuda/conv.cuh, ``Values``.

    Lane 4 g + t has of step s Gaussians 8 s + t and 4 later, of column g of tile n (four of the filter, four of the
    core) channel 16 (n / 2) + 4 (g / 2) + 2 (n % 2) + g % 2 of the chunk.
    """
    wide = _more(of_edges, 2)
    x = pad(wide, (0, 0, 0, -len(wide) % 8)).reshape(-1, 2, 4, 2, wide.shape[1] // (2 * _CHUNK), 2, 4, 2, 2)
    # step, pair, t, half, chunk, n / 2, g / 2, n % 2, g % 2
    return x.permute(4, 0, 3, 5, 7, 6, 8, 2, 1).contiguous()


class Kernels(_Kernels):
    """The launches of a convolution, compiled."""

    @staticmethod
    def storage() -> torch.dtype:
        return torch.float32

    @staticmethod
    def _edges(edges: _Edges, by_sender: bool = False) -> dict[str, Tensor | None]:
        graph, found = edges.graph, {"distance": edges.distance, "features": edges.graph.features}
        if by_sender:
            receiver, number, col_ptr = transposed(graph)
            return {**found, "ptr": col_ptr, "other": receiver, "number": number}
        return {**found, "ptr": graph.row_ptr, "other": graph.sender}

    @staticmethod
    def _sizes(edges: _Edges, width: int = 0, **more: int) -> dict[str, int]:
        found = {"n_rows": edges.n_rows, "n_edges": edges.n_edges, "n_features": edges.n_features, "F": width}
        relaxed = int(_precision() != "tf32x3")
        return {**found, "width": width + -width % _CHUNK, "relaxed": relaxed, **more}

    @staticmethod
    def _layer(linear: _Linear, layer: Layer) -> dict[str, Tensor | None]:
        """What x and y of an edge follow from."""
        if linear.prepared is None:
            table = None if linear.table is None else _more(linear.table, 2)
            weights = _filter(linear.of_edges) if table is None else None
            linear.prepared = {"pq": _more(linear.pq, 4), "filter": weights, "term": table}
        return {**linear.prepared, "gamma1": layer.gamma1, "beta1": layer.beta1}

    @classmethod
    def neighbor_sum(cls, h: Tensor, edges: _Edges) -> Tensor:
        out = torch.empty_like(h)
        _call("neighbor_sum", cls._sizes(edges, h.shape[1]), edges.basis, out=out, h=h, **cls._edges(edges))
        return out

    @classmethod
    def edge_sums(cls, row_weight: Tensor, edges: _Edges) -> tuple[Tensor, Tensor, Tensor]:
        in_degree, shape = torch.empty_like(row_weight), (edges.n_rows, edges.n_features)
        by_receiver, by_sender = (row_weight.new_empty(shape) for _ in range(2))
        call = partial(_call, "edge_sum", cls._sizes(edges), edges.basis)
        call(out=by_receiver, **cls._edges(edges))
        call(out=by_sender, out_degree=in_degree, row_weight=row_weight, **cls._edges(edges, by_sender=True))
        return in_degree, by_receiver, by_sender

    @classmethod
    def edge_gram(cls, row_weight: Tensor, edges: _Edges) -> Tensor:
        programs, k = _programs(edges.n_rows), edges.n_features
        gram = row_weight.new_empty(programs, k, k)
        sizes = cls._sizes(edges, programs=programs)
        _call("edge_gram", sizes, edges.basis, out=gram, row_weight=row_weight, **cls._edges(edges))
        return gram

    @classmethod
    def gate_sum(
        cls, m: Tensor | None, out: Tensor | None, h: Tensor, linear: _Linear, layer: Layer, edges: _Edges
    ) -> None:
        scale, shift, _ = _finish(layer) if out is not None else (None, None, None)
        _call(
            "gate_sum", cls._sizes(edges, h.shape[1]), edges.basis, out_m=m, out=out, h=h, scale2=scale, shift2=shift,
            **cls._layer(linear, layer), **cls._edges(edges),
        )  # fmt: skip

    @staticmethod
    def finish(out: Tensor, h: Tensor, m: Tensor, layer: Layer) -> None:
        scale, shift, _ = _finish(layer)
        _call("finish", {"n_rows": len(h), "F": h.shape[1]}, out=out, h=h, m=m, scale2=scale, shift2=shift)

    @staticmethod
    def finish_backward(grad: Tensor, h: Tensor, m: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
        n, width = h.shape
        scale, shift, rstd = _finish(layer)
        sizes = {"n_rows": n, "F": width, "width": width + -width % _CHUNK, "programs": _programs(n)}
        du, sums = torch.empty_like(h), h.new_empty(2, sizes["programs"], width)
        _call(
            "finish_backward", sizes, out=du, out_x=sums, grad=grad, h=h, m=m, scale2=scale, shift2=shift,
            mean2=layer.mean2, rstd2=rstd,
        )  # fmt: skip
        return du, sums

    @staticmethod
    def correct(
        out: Tensor, d: Tensor, x: Tensor, degree: Tensor | None, row_weight: Tensor, a: Tensor, c1: Tensor, c2: Tensor,
        mean: Tensor | None = None, rstd: Tensor | None = None,
    ) -> None:  # fmt: skip
        n, columns = x.shape
        _call(
            "correct", {"n_rows": n, "stride": d.shape[1], "columns": columns}, out=out, grad=d, x=x, degree=degree,
            row_weight=row_weight, a=a, c1=c1, c2=c2, mean2=mean, rstd2=rstd,
        )  # fmt: skip

    @classmethod
    def backward_receivers(
        cls, d_pq: Tensor, x_rows: Tensor | None, dy: Tensor | None, dm: Tensor, linear: _Linear, layer: Layer,
        edges: _Edges,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        width, k, programs = dm.shape[1], edges.n_features, _programs(edges.n_rows)
        d_gamma, d_filter = dm.new_empty(programs, 2 * width), dm.new_empty(programs, k, 2 * width)
        _call(
            "backward_receivers", cls._sizes(edges, width, programs=programs), edges.basis, out=d_pq, out_x=x_rows,
            out_gamma=d_gamma, out_filter=d_filter, out_edge=dy, d_m=_more(dm, 1), **cls._layer(linear, layer),
            **cls._edges(edges),
        )  # fmt: skip
        return d_gamma, d_filter

    @classmethod
    def backward_senders(
        cls, d_pq: Tensor, dm: Tensor, a: Tensor, correction: tuple[Tensor | None, ...], linear: _Linear, layer: Layer,
        edges: _Edges,
    ) -> None:  # fmt: skip
        c1, c2, row_weight, in_degree = correction
        _call(
            "backward_senders", cls._sizes(edges, dm.shape[1]), edges.basis, out=d_pq, d_m=_more(dm, 1), a=a, c1=c1,
            c2=c2, row_weight=row_weight, degree=in_degree, **cls._layer(linear, layer),
            **cls._edges(edges, by_sender=True),
        )  # fmt: skip


edge_moments = partial(triton.edge_moments, run=Kernels)
conv = partial(triton.conv, run=Kernels)
conv_backward = partial(triton.conv_backward, run=Kernels)
