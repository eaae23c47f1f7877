"""A moving average of all weights in a few operations, which nothing waits for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class ExponentialAverage(AveragedModel):
    """d * average + (1 - d) * now, of parameters and buffers of ``model``, kept on ``device``.

    The first update copies them. After n updates d is min(``decay``, (1 + n) / (10 + n)), as in TensorFlow and
    torch_ema, so that a short run is not left with the weights of its first steps.

    To the bit what ``AveragedModel`` makes of PyTorch's ``get_ema_avg_fn`` with that d, but that numbers which are
    equal already stay, so that what is frozen does not drift. PyTorch's takes six operations for each of some 45
    tensors, and reads a counter back from the GPU twice.
    """

    def __init__(self, model: nn.Module, decay: float, device: torch.device) -> None:
        super().__init__(model, device=device, use_buffers=True)
        self.decay = decay
        self._updates: int | None = None
        self._places = [_places(self.module), _places(model)]

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move towards ``model``, which is the one that this was made of."""
        averages, values = ([held[name] for held, name in places] for places in self._places)
        if self._updates is None:
            self._updates = int(self.n_averaged)  # as a checkpoint may have it; waits, once
        if self._updates == 0:
            torch._foreach_copy_(averages, values)
        else:
            decay = min(self.decay, (1 + self._updates) / (10 + self._updates))
            for dtype in {x.dtype for x in averages}:
                self._move([(x, y) for x, y in zip(averages, values, strict=True) if x.dtype == dtype], decay)
        self._updates += 1
        self.n_averaged += 1

    def _move(self, pairs: list[tuple[Tensor, Tensor]], decay: float) -> None:
        """Towards the second of each pair, all at once; they have one type."""
        before, now = (torch.cat([x.reshape(-1) for x in some]) for some in zip(*pairs, strict=True))
        moved = torch.where(before == now, before, decay * before + (1 - decay) * now)
        averages = [x for x, _ in pairs]
        parts = moved.split([x.numel() for x in averages])
        torch._foreach_copy_(averages, [part.view(x.shape) for part, x in zip(parts, averages, strict=True)])


def _places(model: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where the tensors of ``parameters()`` and ``buffers()`` are held, which walk through all modules each time."""
    found: dict[int, tuple[dict[str, Any], str]] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, x in held.items():
                if x is not None:
                    found.setdefault(id(x), (held, name))
    return list(found.values())
