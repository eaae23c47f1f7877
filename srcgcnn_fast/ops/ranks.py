"""Batch statistics of several processes as those of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import InputError


def _join(own: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """From this rank's count, means and sums of squares, (1 + 2C,): count, means and variances of all ranks, then the
    share and the means' deviation of every rank."""
    every = own.new_empty(dist.get_world_size(group), own.shape[0])
    dist.all_gather(list(every.unbind(0)), own, group=group)
    counts, (means, squares) = every[:, 0], every[:, 1:].chunk(2, dim=1)
    total = counts.sum()
    if total.device.type == "cpu" and total <= 1:
        raise InputError("Batch norm cannot train on a single atom or edge; use larger batches, or model.eval().")
    share = counts / total
    joined = share @ means
    deviation = means - joined
    return total, joined, squares.sum(0) / total + share @ deviation.square(), share, deviation


class _Joined(torch.autograd.Function):
    """Counts, means and sums of squares of all ranks, joined by the pairwise formula; all ranks get the same bits."""

    @staticmethod
    def forward(
        ctx: Any, count: Tensor, mean: Tensor, squares: Tensor, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        total, joined, var, share, deviation = _join(torch.cat([count.reshape(1), mean, squares]), group)
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


class Exchange:
    """What a kernel of the CPU backend exchanges with other ranks between its passes, in place, for one convolution.

    ``messages[k]`` of the first and of the second norm is (1 + 2C,) float64, or None where the norm is this rank's own.
    """

    def __init__(
        self,
        groups: Sequence[Any],
        width: int,
        wide: int,
        bias: Tensor | None = None,
        counts: Sequence[Tensor | None] = (None, None),
    ) -> None:
        """``width`` of the ``wide`` channels of a half are real; a mean of z leaves the kernels without ``bias``.

        ``counts``: of the values that either norm sees on all ranks, for the backward.
        """
        self.groups, self.width, self.wide, self.bias = groups, width, wide, bias
        sizes = (4 * wide, 2 * wide)
        self.messages = [
            None if group is None else torch.empty(1 + size, dtype=torch.float64)
            for group, size in zip(groups, sizes, strict=True)
        ]
        for message, count in zip(self.messages, counts, strict=True):
            if message is not None and count is not None:
                message[0] = count

    def _real(self, message: Tensor) -> Tensor:
        """(2, 1 or 2, F): what the message says of means and of squares (gradients of mean and of variance)."""
        return message[1:].view(2, -1, self.wide)[..., : self.width]

    def statistics(self, k: int) -> None:
        """Count, means and sums of squares of this rank -> count, means and variances of all, of norm ``k``."""
        message = self.messages[k]
        assert message is not None
        real = self._real(message)
        mean, squares = real[0].flatten(), real[1].flatten()
        shift = 0.0 if k == 1 or self.bias is None else self.bias.detach().double().view(-1, self.wide)
        shift = shift if isinstance(shift, float) else shift[:, : self.width].flatten()
        total, mean, var, *_ = _join(torch.cat([message[:1], mean + shift, squares]), self.groups[k])
        message[0] = total
        real.copy_(torch.stack([mean - shift, var]).view_as(real))

    def gradients(self, k: int) -> None:
        """Gradients of mean and variance through this rank's loss -> through the sum of all losses, of norm ``k``."""
        message = self.messages[k]
        assert message is not None
        real = self._real(message)
        total = real.contiguous()
        dist.all_reduce(total, group=self.groups[k])
        real.copy_(total)
