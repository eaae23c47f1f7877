"""The optimisers that a recipe names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import InputError

if TYPE_CHECKING:
    from .module import Recipe

OPTIMIZERS = ("sgd", "adam", "adamw", "muon")


def make_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """Of the parameters of ``model`` that learn.

    Raises:
        InputError: PyTorch has no such optimiser.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            [p for _, p in named], recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True
        )
    if recipe.optimizer == "adam":
        return torch.optim.Adam([p for _, p in named], recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    if recipe.optimizer == "adamw":
        return _adamw([p for _, p in named], recipe)
    if not hasattr(torch.optim, "Muon"):
        raise InputError(f"Muon needs PyTorch 2.9, this is {torch.__version__}; update it, or choose adamw.")
    gates = [p for name, p in named if name.endswith("fc_full.weight")]
    rest = [p for name, p in named if not name.endswith("fc_full.weight")]
    if not gates:  # the convolutions are frozen
        return _adamw(rest, recipe)
    muon = torch.optim.Muon(gates, recipe.muon_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
    return Joined([_adamw(rest, recipe), muon])


def _adamw(parameters: Iterable[nn.Parameter], recipe: Recipe) -> Optimizer:
    parameters = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, recipe.lr, weight_decay=recipe.weight_decay, fused=True)


class Joined(Optimizer):
    """Several optimisers, each with parameters of its own, as one: for schedules, clipping and checkpoints."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = tuple(parts)
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()  # loading gave the parts new ones
