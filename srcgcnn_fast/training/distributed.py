"""Several processes that train as one: those that torchrun started."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from ..errors import InputError

_T = TypeVar("_T")


def join() -> None:
    """Connect the processes that torchrun started, once and until they end; a process alone goes on as it is."""
    if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    if int(os.environ["WORLD_SIZE"]) > 1:
        has_gpu = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo")
        atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def is_shared() -> bool:
    """Does this process train together with others?"""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@lru_cache(1)
def _patient(world: Any) -> Any:
    """All processes of ``world``, to wait for one of them as long as it lives; PyTorch's own timeout is 30 minutes."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))


def on_rank_zero(function: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
    """What ``function`` returns, which rank 0 alone runs, however long; its exception is every rank's."""
    if not is_shared():
        return function(*arguments, **options)
    group = _patient(dist.group.WORLD)  # made by all, before the others wait
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function(*arguments, **options)
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    result: _T = outcome[0]
    return result


def trainer_options() -> dict[str, Any]:
    """How a Lightning trainer takes the processes at hand; the data module shares out the crystals."""
    if not is_shared():
        # Asked, Lightning takes the tasks of a SLURM, LSF or MPI job for processes of this training.
        return {"devices": 1, "plugins": [LightningEnvironment()]}
    if not dist.is_torchelastic_launched():
        raise InputError("Of several processes, fit trains those that torchrun started; start them with torchrun.")
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    # Synchronised statistics leave the same buffers everywhere, and ranks may validate different numbers of batches.
    strategy = DDPStrategy(broadcast_buffers=False)
    return {
        "devices": local,
        "num_nodes": dist.get_world_size() // local,
        "strategy": strategy,
        "use_distributed_sampler": False,
    }


def place(trainer: pl.Trainer | None) -> tuple[int, int]:
    """Rank and number of the processes that ``trainer`` runs in."""
    return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


def total(x: Tensor) -> Tensor:
    """The sum of ``x`` over all processes, without gradient."""
    x = x.detach().clone()
    if is_shared():
        dist.all_reduce(x)
    return x


def of_all(rows: list[Tensor]) -> Tensor:
    """The rows that all processes hold, in the order of their ranks, on the CPU if there are several."""
    if not is_shared():
        return torch.cat(rows)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, [x.cpu() for x in rows])
    return torch.cat([x for part in every for x in part])
