"""Gated convolutions whose batch statistics are those of several processes.

The CPU kernels exchange them between their passes. The operators of a GPU take them as fixed: those of z follow from
the Gram matrix of [h_i, h_j, e_ij], which is formed from node-level products; through them the gradient passes in plain
PyTorch. Compiled code calls all of this as it is: a trace would not keep the ranks in step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag, pad, softplus

from . import fused, reference
from .cpu import Graph, Layer, Moments
from .ranks import join_statistics
from .reference import BatchNorm

_ops = torch.ops.srcgcnn_fast
_NO_SECOND_NORM = BatchNorm(None, None, None, None)


class Neighbors(NamedTuple):
    """What the statistics of z need of the graph beside the moments; e is taken about its mean."""

    row_weight: Tensor
    """(N, 1)"""
    in_degree: Tensor
    """(N, 1), sum of the receivers' weights, by sender."""
    edges_of: Tensor
    """(N, 1), edges that each row receives, times the row's weight."""
    by_receiver: Tensor
    """(N, K), w_i sum_j e_ij."""
    by_sender: Tensor
    """(N, K), sum_i w_i e_ij."""
    edges: Tensor
    """() float64, edges of the full cells."""
    mean: Tensor
    """(K,) float64, of e."""
    gram: Tensor
    """(K, K) float64, sum_ij w_i e_ij^T e_ij."""
    senders: tuple[Tensor, Tensor]
    """(E,) and (N + 1,) int32: the sender of each edge, by receiver."""
    receivers: tuple[Tensor, Tensor]
    """(E,) and (N + 1,) int32: the receiver of each edge, by sender."""


@torch.compiler.disable
def neighbors(moments: Moments, graph: Graph) -> Neighbors:
    """From the graph alone, for every layer and step."""
    weight, in_degree = moments.row_weight, moments.in_degree
    assert in_degree is not None and moments.by_receiver is not None and moments.by_sender is not None
    assert moments.sum is not None and moments.gram is not None
    degree = graph.row_ptr.diff().to(weight.dtype)
    count = weight.double() @ degree.double()
    mean = moments.sum / count.clamp_min(1)
    about = mean.to(weight.dtype)
    order = graph.sender.argsort(stable=True)
    rows = torch.arange(len(degree), device=weight.device, dtype=torch.int32)
    receiver = torch.repeat_interleave(rows, graph.row_ptr.diff(), output_size=len(order))
    counts = torch.bincount(graph.sender, minlength=len(degree)).cumsum(0, dtype=torch.int32)
    return Neighbors(
        weight[:, None],
        in_degree[:, None],
        (weight * degree)[:, None],
        weight[:, None] * (moments.by_receiver - degree[:, None] * about),
        moments.by_sender - in_degree[:, None] * about,
        count,
        mean,
        moments.gram - count * torch.outer(mean, mean),
        (graph.sender, graph.row_ptr),
        (receiver.index_select(0, order), pad(counts, (1, 0))),
    )


class _Gram(torch.autograd.Function):
    """Blocks hh, hn, he and nn, ne of the Gram matrix of [h_i, h_j, e_ij], and the sums of h_i and h_j over the edges.

    (F, 2F + K), (F, F + K), (F,), (F,). The backward passes once over the rows for each block.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, graph: Neighbors) -> tuple[Tensor, ...]:
        received = _bag(x, *graph.senders).mul_(graph.row_weight)
        own, sent = graph.edges_of * x, graph.in_degree * x
        ctx.graph = graph
        ctx.save_for_backward(x, received)
        first = x.T @ torch.cat([own, received, graph.by_receiver], 1)
        second = x.T @ torch.cat([sent, graph.by_sender], 1)
        return first, second, own.sum(0), sent.sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        graph, (x, received) = ctx.graph, ctx.saved_tensors
        first, second, d_own, d_sent = gradients
        width = x.shape[1]
        hh, hn, he = first.tensor_split((width, 2 * width), 1)
        nn, ne = second.tensor_split((width,), 1)
        own, sent, to_senders = (x @ torch.cat([hh + hh.T, nn + nn.T, hn], 1)).split(width, 1)
        d_x = _bag(to_senders * graph.row_weight, *graph.receivers)
        d_x.addcmul_(own + d_own, graph.edges_of).addcmul_(sent + d_sent, graph.in_degree)
        d_x.addmm_(received, hn.T).addmm_(graph.by_receiver, he.T).addmm_(graph.by_sender, ne.T)
        return d_x, None


def _bag(h: Tensor, index: Tensor, first: Tensor) -> Tensor:
    return embedding_bag(index, h, first, mode="sum", include_last_offset=True)


def edge_statistics(h: Tensor, weight: Tensor, graph: Neighbors) -> tuple[Tensor, Tensor, Tensor]:
    """Of z without the bias on this process: edges (), mean (2F,), sum of squares about it (2F,), float64.

    Features are taken about their mean before anything is summed, so that no digits are lost.
    """
    width = h.shape[1]
    edges = graph.edges.clamp_min(1)
    centre = (graph.edges_of.T @ h.detach())[0] / edges.to(h.dtype)
    first, second, own, sent = (x.double() for x in _Gram.apply(h - centre, graph))
    # The upper triangle, with twice what is off the diagonal blocks: enough for w^T S w.
    twice = torch.cat([first.new_ones(width), first.new_full((first.shape[1] - width,), 2.0)])
    below = pad(second * twice[: second.shape[1]], (width, 0)), pad(graph.gram, (2 * width, 0))
    gram = torch.cat([first * twice, *below])
    shift = torch.cat([own, sent]) / edges  # of the mean from the centre
    w = weight.double()
    rest = w[:, : 2 * width] @ shift
    squares = ((w @ gram) * w).sum(1) - graph.edges * rest.square()
    mean = w @ torch.cat([centre.double(), centre.double(), graph.mean]) + rest
    return graph.edges, mean, squares.clamp_min(0)


class _Messages(torch.autograd.Function):
    """m of one convolution with given statistics of z, which receive gradients too."""

    @staticmethod
    def forward(
        ctx: Any, graph: Graph, moments: Moments, unused: Tensor | None, h: Tensor, edge_values: Tensor, *layer: Any
    ) -> Tensor:
        m = _ops.gated_conv(h, *layer, *graph, *moments)[1]
        ctx.graph, ctx.moments, ctx.unused, ctx.scalars = graph, moments, unused, layer[10:]
        ctx.save_for_backward(h, m, *layer[:10])
        return m

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        h, m, *tensors = ctx.saved_tensors
        # A huge shift makes the derivative of the operator's last softplus 1, so that grad arrives at m as it is.
        layer = Layer(*tensors, *ctx.scalars)
        layer = layer._replace(beta2=torch.full_like(layer.beta2, 1e4), var2=torch.zeros_like(layer.var2), eps2=1.0)
        edge_grad = ctx.needs_input_grad[4]
        grad = grad.contiguous()
        found = _ops.gated_conv_backward(grad, h, m, *layer, *ctx.graph, *ctx.moments, edge_grad)
        d_h, d_weight, d_bias, d_gamma, d_beta, _, _, d_edge = found
        d_h -= grad  # the operator's residual
        rstd = torch.rsqrt(layer.var1 + layer.eps1)
        d_mean = -layer.gamma1 * rstd * d_beta
        d_var = -0.5 * layer.gamma1 * rstd.square() * d_gamma
        gradients = [d_weight, None if layer.bias is None else d_bias, d_gamma, d_beta, None, None, d_mean, d_var]
        # Absent, it would be missed by those who wait for every parameter's gradient.
        no_bias = None if ctx.unused is None else torch.zeros_like(ctx.unused)
        return (None, None, no_bias, d_h, d_edge if edge_grad else None, *gradients, *([None] * 6))


def _messages(
    h: Tensor, graph: Graph, moments: Moments, weight: Tensor, bias: Tensor | None, bn1: BatchNorm, has_bias: bool
) -> Tensor:
    """m (N, F); without ``has_bias`` the mean of z is meant without the bias, whose gradient is then zero."""
    width, more = h.shape[1], fused.missing_channels(h)
    wide = pad(h, (0, more)) if more else h.contiguous()
    layer = fused.operator_layer(weight, bias if has_bias else None, bn1, _NO_SECOND_NORM, width, more)
    edge_values = graph.distance if graph.features is None else graph.features
    m: Tensor = _Messages.apply(graph, moments, None if has_bias else bias, wide, edge_values, *layer)
    return m[:, :width] if more else m


@torch.compiler.disable
def gated_convs(
    h: Tensor,
    graph: Graph,
    moments: Moments,
    around: Neighbors | None,
    layers: Sequence[tuple[Tensor, Tensor | None, BatchNorm, BatchNorm]],
    species: Tensor | None = None,
) -> Tensor:
    """As ``fused.gated_convs`` for layers of which a norm has a ``group``; every rank of it takes the same steps.

    ``around`` is needed where a first norm trains and the CPU kernels are not called as they are, ``species`` is taken
    by those alone.
    """
    if fused.is_eager(h):
        return fused.gated_convs(h, graph, moments, layers, species)
    row_weight = moments.row_weight[:, None]
    for weight, bias, bn1, bn2 in layers:
        fixed = bn1
        if bn1.training:
            assert around is not None
            shift = 0.0 if bias is None else bias.detach().double()
            count, mean, squares = edge_statistics(h, weight, around)
            if bn1.group is not None:
                count, mean, var = join_statistics(count, mean + shift, squares, bn1.group)
                mean = mean - shift
            else:
                var = squares / count
            bn1.update(mean + shift, var, count)
            fixed = bn1._replace(running_mean=mean.to(h.dtype), running_var=var.to(h.dtype), training=False)
        m = _messages(h, graph, moments, weight, bias, fixed, has_bias=not bn1.training)
        h = softplus(h + reference.batch_norm(m, bn2, row_weight))
    return h
