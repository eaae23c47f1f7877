"""Convolutions on the fused operators: what they need of the graph, widths they do not take, batch norm's state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import cpu
from . import library as library  # registers the operators
from .cpu import Graph, Layer, Moments
from .reference import BatchNorm, Edges

_ops = torch.ops.srcgcnn_fast


def with_shells(edges: Edges) -> Graph:
    """The edges with the distinct distances of every crystal."""
    if edges.features is not None:
        return Graph(*edges[:5], None, None, None, edges.dmin, edges.step)
    shells: tuple[Tensor, Tensor, Tensor] = _ops.edge_shells(edges.distance.detach().contiguous(), *edges[2:5])
    return Graph(*edges[:5], *shells, edges.dmin, edges.step)


def moments(row_weight: Tensor, graph: Graph, n_features: int) -> Moments:
    """What batch statistics need, from the graph alone."""
    graph = graph._replace(
        distance=graph.distance.detach(), features=None if graph.features is None else graph.features.detach()
    )
    return Moments(row_weight, *_ops.edge_moments(row_weight, *graph, n_features))


def _widen(x: Tensor, width: int, more: int) -> Tensor:
    """(2F,) or (F,) -> zeros added to each half."""
    return pad(x.reshape(-1, width), (0, more)).reshape(-1)


def _widen_weight(weight: Tensor, width: int, more: int) -> Tensor:
    halves = [pad(x, (0, more)) for x in (weight[:, :width], weight[:, width : 2 * width])]
    wide = torch.cat([*halves, weight[:, 2 * width :]], dim=1)
    return pad(wide.reshape(2, width, -1), (0, 0, 0, more)).reshape(2 * (width + more), -1)


def _layer(weight: Tensor, bias: Tensor | None, bn1: BatchNorm, bn2: BatchNorm, width: int, more: int) -> Layer:
    """The layer as the operators take it, widened by ``more`` channels of zeros."""
    vectors = []
    for norm, size in ((bn1, 2 * width), (bn2, width)):
        one, zero = weight.new_ones(size), weight.new_zeros(size)
        vectors.append(
            [
                one if norm.weight is None else norm.weight,
                zero if norm.bias is None else norm.bias,
                zero if norm.running_mean is None or norm.training else norm.running_mean,
                one if norm.running_var is None or norm.training else norm.running_var,
            ]
        )
    (g1, b1, m1, v1), (g2, b2, m2, v2) = vectors
    small: list[Any] = [bias, g1, b1, g2, b2, m1, v1, m2, v2]
    if more:
        weight = _widen_weight(weight, width, more)
        small = [None if x is None else _widen(x, width, more) for x in small]
    return Layer(*[weight.contiguous(), *small, bn1.eps, bn2.eps, bn1.training, bn2.training])


def _missing(h: Tensor) -> int:
    return -h.shape[1] % cpu.kernel_width(h.dtype)


def gated_conv(
    h: Tensor,
    graph: Graph,
    moments: Moments,
    weight: Tensor,
    bias: Tensor | None,
    bn1: BatchNorm,
    bn2: BatchNorm,
) -> Tensor:
    """One gated graph convolution, (N, F) -> (N, F), with one pass over the edges backward."""
    width, more = h.shape[1], _missing(h)
    layer = _layer(weight, bias, bn1, bn2, width, more)
    wide = pad(h, (0, more)) if more else h.contiguous()
    out, _m, *used = _ops.gated_conv(wide, *layer, *graph, *moments)
    if more:
        out = out[:, :width]
        used = [x.reshape(-1, width + more)[:, :width].reshape(-1) for x in used]
    if bn1.training:
        mean = used[0] if bias is None else used[0] + bias.detach()
        bn1.update(mean, used[1], moments.row_weight @ graph.row_ptr.diff().to(h.dtype))
    if bn2.training:
        bn2.update(used[2], used[3], moments.row_weight.sum())
    return out


def stack(h: Tensor, graph: Graph, layers: Sequence[Any], shared: bool) -> Tensor:
    """All convolutions with fixed statistics and without gradients; ``shared``: they have one weight."""
    width, more = h.shape[1], _missing(h)
    folded = [_layer(weight, bias, bn1, bn2, width, more) for weight, bias, bn1, bn2 in layers]
    wide = pad(h, (0, more)) if more else h.contiguous()
    own = folded[:1] if shared else folded
    out = _ops.gated_conv_stack(
        wide,
        [layer.weight for layer in own],
        [layer.bias for layer in own if layer.bias is not None],
        [x for layer in folded for x in layer[2:10]],
        [x for layer in folded for x in layer[10:12]],
        shared,
        *graph,
    )
    return out[:, :width] if more else out
