"""The reference backend: the published equations in plain PyTorch, for any device and dtype, differentiable twice.

Every other backend is compared with this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, softplus

# MKL chooses the code of a function at its first call, and of threads that make it at once one may compute with half of
# the digits (pytorch/pytorch#188792). One thread makes it here: for Gaussians, and for the square roots of optimisers.
for _one in (torch.ones(1, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)):
    _one.exp(), _one.sqrt()


class BatchNorm(NamedTuple):
    """Parameters and state of one batch norm over C channels, as ``torch.nn.BatchNorm1d`` holds them.

    With ``training`` the statistics are those of the batch, and the running ones, where given, move towards them
    in place by ``momentum``; otherwise the running ones are used. The tensors are (C,) each.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
    group: Any = None
    """Process group whose ranks share the statistics of the batch; None for those of this process alone."""

    def normalize(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """(x - mean) / sqrt(var + eps) * weight + bias"""
        scale, shift = self.fold(mean, var)
        return x * scale + shift

    def fold(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift, (C,) each, that the norm amounts to with the given statistics."""
        scale = torch.rsqrt(var + self.eps)
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean * scale
        return scale, shift if self.bias is None else shift + self.bias

    def update(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Move the running statistics towards those of a batch of ``count`` values (``var`` is biased)."""
        if self.running_mean is None or self.running_var is None:
            return
        unbiased = var.detach() * (count / (count - 1))
        self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)


class Edges(NamedTuple):
    """The edges of a batch, sorted by receiver, and how their features follow from their distances."""

    distance: Tensor
    """(E,) Å."""
    features: Tensor | None
    """(E, K), in place of the Gaussians of ``distance``."""
    sender: Tensor
    """(E,) int32."""
    row_ptr: Tensor
    """(N + 1,) int32."""
    crystal_ptr: Tensor
    """(B + 1,) int32; an edge never leaves its crystal."""
    dmin: float = 0.0
    step: float = 0.2


class Dense(NamedTuple):
    """A linear map, x -> x weight^T + bias."""

    weight: Tensor
    """(out, in)"""
    bias: Tensor | None
    """(out,)"""


def receivers(edges: Edges) -> Tensor:
    """(E,) int64, the row that each edge ends in."""
    rows = torch.arange(edges.row_ptr.shape[0] - 1, device=edges.row_ptr.device)
    return torch.repeat_interleave(rows, edges.row_ptr.diff().long(), output_size=edges.sender.shape[0])


def edge_vectors(edges: Edges, n_features: int, dtype: torch.dtype) -> Tensor:
    """(E, K): exp(-((d - mu_k) / step)^2), mu_k = dmin + k step (Xie & Grossman 2018, eq. of the supplement)."""
    if edges.features is not None:
        return edges.features.to(dtype)
    mu = edges.dmin + edges.step * torch.arange(n_features, device=edges.distance.device, dtype=dtype)
    return torch.exp(-(((edges.distance.to(dtype)[:, None] - mu) / edges.step) ** 2))


def batch_norm(x: Tensor, norm: BatchNorm, weight: Tensor) -> Tensor:
    """Batch norm of (n, C) values of which each counts ``weight`` (n, 1) times."""
    if not norm.training:
        return torch.nn.functional.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )
    dtype = x.dtype
    if dtype in (torch.float16, torch.bfloat16):  # whose sums over a batch overflow, or stop growing
        x, weight = x.float(), weight.float()
    count = weight.sum()
    mean = (weight * x).sum(0) / (count if norm.group is None else count.clamp_min(1))
    squares = (weight * (x - mean) ** 2).sum(0)
    var = squares / count
    if norm.group is not None:
        from .ranks import join_statistics  # which imports the compiler

        count, mean, var = join_statistics(count, mean, squares, norm.group)
    norm.update(mean, var, count)
    return norm.normalize(x, mean.to(x.dtype), var.to(x.dtype)).to(dtype)


def gated_conv(
    h: Tensor, edges: Edges, row_weight: Tensor, weight: Tensor, bias: Tensor | None, bn1: BatchNorm, bn2: BatchNorm
) -> Tensor:
    """One gated graph convolution (Xie & Grossman 2018, eq. 5), (N, F) -> (N, F)."""
    n, width = h.shape
    receiver, sender = receivers(edges), edges.sender.long()
    e = edge_vectors(edges, weight.shape[1] - 2 * width, h.dtype)
    z = linear(torch.cat([h[receiver], h[sender], e], dim=1), weight, bias)
    count = row_weight.to(h.dtype)[:, None]
    y = batch_norm(z, bn1, count[receiver])
    message = torch.sigmoid(y[:, :width]) * softplus(y[:, width:])
    m = h.new_zeros(n, width).index_add(0, receiver, message)
    return softplus(h + batch_norm(m, bn2, count))


def edge_moments(
    row_weight: Tensor, edges: Edges, n_features: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """What batch norm needs of the edge vectors, from the graph alone.

    Returns:
        sum_j e_ij (N, K); sum_i w_i e_ij, by sender (N, K); sum_ij w_i e_ij^T e_ij (K, K), float64.
    """
    n = edges.row_ptr.shape[0] - 1
    receiver = receivers(edges)
    e = edge_vectors(edges, n_features, dtype)
    we = row_weight.to(dtype)[receiver, None] * e
    zeros = e.new_zeros(n, n_features)
    gram = we.double().T @ e.double()
    return zeros.index_add(0, receiver, e), zeros.index_add(0, edges.sender.long(), we), gram


def shares(row_weight: Tensor, crystal: Tensor, n_crystals: int) -> Tensor:
    """(N,), that of each row in the mean over its crystal: in float64, where the device has it.

    In the type of float32 or float16 features sums over a large supercell drift, or overflow.
    """
    weight = row_weight.to(torch.float32 if row_weight.device.type == "mps" else torch.float64)
    atoms = weight.new_zeros(n_crystals).index_add(0, crystal, weight)
    return weight / torch.where(atoms == 0, 1, atoms).index_select(0, crystal)


def crystal_mean(h: Tensor, row_weight: Tensor, crystal_ptr: Tensor) -> Tensor:
    """(N, F) -> (B, F): the mean over the atoms of each crystal (Xie & Grossman 2018, eq. 6)."""
    rows = torch.arange(crystal_ptr.shape[0] - 1, device=h.device)
    crystal = torch.repeat_interleave(rows, crystal_ptr.diff().long(), output_size=h.shape[0])
    share = shares(row_weight, crystal, rows.shape[0])[:, None]
    return share.new_zeros(rows.shape[0], h.shape[1]).index_add(0, crystal, share * h).to(h.dtype)


def readout(h: Tensor, row_weight: Tensor, crystal_ptr: Tensor, layers: Sequence[Dense]) -> Tensor:
    """(N, F) -> (B, O): the mean, then softplus and a linear map, one layer after the other."""
    x = crystal_mean(h, row_weight, crystal_ptr)
    for layer in layers:
        x = linear(softplus(x), *layer)
    return x
