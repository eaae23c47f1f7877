"""A gated convolution with one pass over the edges forward and one backward, in training too.

The linear map is split into node-level products, and the statistics of batch norm come from the Gram matrix of its
inputs, whose blocks are sums over rows, so that no (E, 2F) tensor exists. All of it is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from . import library as library  # registers the operators
from .reference import BatchNorm, Edges, batch_norm

_ops = torch.ops.srcgcnn_fast


class EdgeMoments(NamedTuple):
    """What batch norm needs of a batch's edges; it follows from the graph alone and serves every layer and step."""

    count: Tensor
    """(), sum_i w_i deg_i: edges of the full cells."""
    degree: Tensor
    """(N, 1)."""
    in_degree: Tensor
    """(N, 1), sum of the receivers' weights, by sender."""
    mean: Tensor
    """(K,), mean edge vector."""
    by_receiver: Tensor
    """(N, K), sum_j e_ij."""
    by_sender: Tensor
    """(N, K), sum_i w_i e_ij."""
    gram: Tensor
    """(K, K), sum w_i (e_ij - mean)^T (e_ij - mean)."""


@torch.no_grad()
def edge_moments(row_weight: Tensor, edges: Edges, n_features: int, dtype: torch.dtype) -> EdgeMoments:
    w = row_weight.to(dtype)
    topology = edges[2:5]
    by_receiver, by_sender, gram = _ops.edge_moments(w, *edges, n_features)
    degree = edges.row_ptr.diff().to(dtype)[:, None]
    in_degree = _ops.neighbor_sum(w[:, None].contiguous(), *topology, True)
    count = (w.double() @ degree[:, 0].double()).clamp_min(1e-30)
    mean = (w.double() @ by_receiver.double()) / count
    gram = gram - count * mean[:, None] * mean
    return EdgeMoments(count.to(dtype), degree, in_degree, mean.to(dtype), by_receiver, by_sender, gram.to(dtype))


def edge_statistics(
    h: Tensor, edges: Edges, row_weight: Tensor, weight: Tensor, moments: EdgeMoments
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (2F,) each, over all edges of [h_i, h_j, e_ij] @ weight.T, without an edge pass."""
    w = row_weight.to(h.dtype)[:, None]
    count, degree, in_degree, e_mean, by_receiver, by_sender, e_gram = moments
    receiver_weight = w * degree
    h_mean, n_mean = (receiver_weight * h).sum(0) / count, (in_degree * h).sum(0) / count
    hc, nc = h - h_mean, h - n_mean  # centred first: features are positive and an uncentred Gram loses digits
    senders = _ops.neighbor_sum(h.contiguous(), *edges[2:5], False)
    hn = hc.T @ (w * (senders - degree * n_mean))
    he = hc.T @ (w * (by_receiver - degree * e_mean))
    ne = nc.T @ (by_sender - in_degree * e_mean)
    gram = torch.cat(
        [
            torch.cat([hc.T @ (receiver_weight * hc), hn, he], 1),
            torch.cat([hn.T, nc.T @ (in_degree * nc), ne], 1),
            torch.cat([he.T, ne.T, e_gram], 1),
        ]
    )
    mean = weight @ torch.cat([h_mean, n_mean, e_mean])
    var = ((weight @ gram) * weight).sum(1) / count
    return mean, var.clamp_min(0)


def gated_conv(
    h: Tensor,
    edges: Edges,
    row_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn1: BatchNorm,
    bn2: BatchNorm,
    moments: EdgeMoments | None = None,
) -> Tensor:
    """One gated graph convolution, (N, F) -> (N, F); ``moments`` is needed where ``bn1.training``."""
    width = h.shape[1]
    if bn1.training:
        assert moments is not None
        mean, var = edge_statistics(h, edges, row_weight, weight, moments)
        bn1.update(mean if bias is None else mean + bias, var, moments.count)
        scale, shift = bn1.fold(mean, var)  # the bias cancels; its gradient is zero, not absent
        shift = shift if bias is None else shift + 0 * bias
    else:
        assert bn1.running_mean is not None and bn1.running_var is not None
        scale, shift = bn1.fold(bn1.running_mean, bn1.running_var)
        shift = shift if bias is None else shift + bias * scale
    scaled = weight * scale[:, None]
    p = torch.addmm(shift, h, scaled[:, :width].T)
    q = h @ scaled[:, width : 2 * width].T
    w_e = scaled[:, 2 * width :].T.contiguous()
    m = _ops.gate_sum(p, q, w_e, *edges)
    return softplus(h + batch_norm(m, bn2, row_weight.to(h.dtype)[:, None]))
