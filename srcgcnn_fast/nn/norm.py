"""Batch norm over the crystals of several processes."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .. import functional
from ..errors import InputError
from ..ops import reference

logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound=nn.Module)


class SynchronizedBatchNorm1d(nn.BatchNorm1d):
    """``BatchNorm1d`` whose batch in training mode is that of all processes together, on any device.

    Statistics and gradients are those of one process that holds all their values, however many each one has. Where
    no process group is initialised, or it has one process, it is ``BatchNorm1d``.
    """

    def forward(self, input: Tensor) -> Tensor:
        if process_group(self) is None:
            return super().forward(input)
        self._check_input_dim(input)
        x = input if input.dim() == 2 else input.transpose(1, 2).flatten(0, 1)
        x = reference.batch_norm(x, batch_norm_state(self), x.new_ones(x.shape[0], 1))
        return x if input.dim() == 2 else x.unflatten(0, (input.shape[0], input.shape[2])).transpose(1, 2)


def synchronize_batch_norm(model: _Model) -> _Model:
    """Turn every ``BatchNorm1d`` of ``model`` into a :class:`SynchronizedBatchNorm1d`, in place; returns ``model``.

    Parameters, buffers, names and hooks stay, so call it before or after making the optimiser, and before wrapping the
    model in ``DistributedDataParallel(model, broadcast_buffers=False)``. (``torch.nn.SyncBatchNorm``, which computes
    the same, is taken too, but ``DistributedDataParallel`` refuses it on a CPU.)
    """
    for module in model.modules():
        if type(module) is nn.BatchNorm1d:
            module.__class__ = SynchronizedBatchNorm1d
    return model


def process_group(norm: nn.Module) -> Any:
    """The processes that share the batch statistics of ``norm`` now; None if this one is alone."""
    if not isinstance(norm, (SynchronizedBatchNorm1d, nn.SyncBatchNorm)):  # torch 2.6 traces no union
        return None
    if not (norm.training and dist.is_available() and dist.is_initialized()):
        return None
    group = getattr(norm, "process_group", None) or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


_NORMS = (nn.BatchNorm1d, nn.SyncBatchNorm, SynchronizedBatchNorm1d)


def stand_in_for(module: nn.Module, *kinds: type[nn.Module]) -> None:
    """Before the kernels compute ``module``, one of ``kinds``, without calling it: what its hooks make of its weights.

    Raises:
        InputError: it has a forward of its own.
    """
    found = type(module)
    if "forward" in module.__dict__ or (found not in kinds and all(found.forward is not x.forward for x in kinds)):
        raise InputError(
            f"A convolution has a {found.__module__}.{found.__qualname__} where the kernels compute torch.nn."
            f"{kinds[0].__name__}; give it that, or put a module in place of the whole convolution of a CGCNN."
        )
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (BasePruningMethod, WeightNorm, SpectralNorm)):
            hook(module, ())
        else:
            _say_once(type(module).__name__)
    if module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
        _say_once(type(module).__name__)


@cache
def _say_once(name: str) -> None:
    logger.warning(
        "Hooks on the %s of a convolution are not called: kernels compute it. Those on the model and on the "
        "convolutions of a CGCNN are.",
        name,
    )


def batch_norm_states(norms: Iterable[nn.BatchNorm1d | nn.SyncBatchNorm]) -> list[functional.BatchNorm]:
    """Parameters and state of each norm for one call; counts the batch, as their own forward would."""
    norms = list(norms)
    for norm in norms:
        stand_in_for(norm, *_NORMS)
    if len({id(norm) for norm in norms}) < len(norms):  # each place of one norm counts a batch of its own
        return [state for norm in norms for state in batch_norm_states([norm])]
    counts = [norm._buffers["num_batches_tracked"] for norm in norms if _tracks(norm)]
    if counts := [count for count in counts if count is not None]:
        torch._foreach_add_(counts, 1)
    return [_state(norm) for norm in norms]


def batch_norm_state(norm: nn.BatchNorm1d | nn.SyncBatchNorm) -> functional.BatchNorm:
    """:func:`batch_norm_states` of one."""
    return batch_norm_states([norm])[0]


def _tracks(norm: nn.Module) -> bool:
    """Does a call update its running statistics?"""
    return norm.training and bool(norm.track_running_stats)


def _state(norm: nn.BatchNorm1d | nn.SyncBatchNorm) -> functional.BatchNorm:
    trains, momentum = norm.training, norm.momentum
    buffers = norm._buffers  # nn.Module looks every name up in three places
    mean, var, count = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    if _tracks(norm):
        if count is not None and momentum is None:
            momentum = 1.0 / float(count)
    elif trains:  # somebody stopped the tracking afterwards
        mean = var = None
    momentum = 0.0 if momentum is None else momentum
    uses_batch, group = trains or mean is None, process_group(norm)
    return functional.BatchNorm(norm.weight, norm.bias, mean, var, uses_batch, momentum, norm.eps, group)
