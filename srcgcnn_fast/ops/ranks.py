"""Batch statistics of several processes as those of one batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import InputError


class _Joined(torch.autograd.Function):
    """Counts, means and sums of squares of all ranks, joined by the pairwise formula; all ranks get the same bits."""

    @staticmethod
    def forward(
        ctx: Any, count: Tensor, mean: Tensor, squares: Tensor, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        own = torch.cat([count.reshape(1), mean, squares])
        every = own.new_empty(dist.get_world_size(group), own.shape[0])
        dist.all_gather(list(every.unbind(0)), own, group=group)
        counts, (means, parts) = every[:, 0], every[:, 1:].chunk(2, dim=1)
        total = counts.sum()
        if total.device.type == "cpu" and total <= 1:
            raise InputError("Batch norm cannot train on a single atom or edge; use larger batches, or model.eval().")
        share = counts / total
        joined = share @ means
        deviation = means - joined
        var = parts.sum(0) / total + share @ deviation.square()
        rank = dist.get_rank(group)
        ctx.group = group
        ctx.save_for_backward(share[rank], deviation[rank], total)
        ctx.mark_non_differentiable(total)
        return total, joined, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, d_mean: Tensor, d_var: Tensor) -> tuple[Tensor | None, ...]:
        # The losses of all ranks depend on these statistics, and each rank's part of them is this rank's to pass on.
        share, deviation, total = ctx.saved_tensors
        gradients = torch.cat([d_mean, d_var])
        dist.all_reduce(gradients, group=ctx.group)
        d_mean, d_var = gradients.chunk(2)
        return None, share * (d_mean + 2 * deviation * d_var), d_var / total, None


@torch.compiler.disable
def join_statistics(
    count: Tensor, mean: Tensor, squares: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """The batch that all ranks of ``group`` hold together, from what each knows of its own part.

    Gradients are those of the sum of the ranks' losses; averaging the parameters' gradients over the ranks, as
    ``DistributedDataParallel`` does, makes them those of the mean. Second derivatives do not exist.

    Args:
        count: (), values of this rank; it may be 0.
        mean: (C,) of this rank's values (anything finite where there are none).
        squares: (C,) sum of squares about ``mean``.

    Returns:
        Count (), mean (C,) and biased variance (C,) over all ranks, float64, the same bits on every rank.

    Raises:
        InputError: the ranks hold one value or none together.
    """
    joined: tuple[Tensor, Tensor, Tensor] = _Joined.apply(count.double(), mean.double(), squares.double(), group)
    return joined
