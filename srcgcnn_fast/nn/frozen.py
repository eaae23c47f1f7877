"""What a model's call in inference comes to, kept while nothing changes that it follows from."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, getitem, is_
from typing import Any

from torch import Tensor, nn

from ..functional import FrozenNetwork

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PARTS = ("_modules", "_parameters", "_buffers")
_dtype = attrgetter("dtype")


def is_untouched(module: nn.Module) -> bool:
    """Has it no hook, and the forward of its class?"""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in module.__dict__


class Frozen:
    """A network, and the places in its model that it follows from, with what was there.

    Places are entries of the dictionaries in which ``nn.Module`` keeps modules, parameters, buffers and flags; of a
    tensor there the address, shape and type count, not its values.

    Args:
        modules: all of the model's, and itself.
        linears: those that stand for their weight and bias only as long as nobody watches them.
        network: None: there is none for this model.
    """

    was_used = False
    """Whether it held once."""

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[nn.Module],
        linears: Sequence[nn.Module],
        network: FrozenNetwork | None,
    ) -> None:
        self.network = network
        # The model's own dictionary would lead back to this object, and keep both alive.
        self._own = {name: model.__dict__[name] for name in (*_PARTS, "_hyperparameters")}
        settings: dict[str, Any] = self._own["_hyperparameters"]
        held = [(settings, name) for name in settings]
        for module in modules:
            for part in (module._modules, module._parameters, module._buffers):
                held += [(part, name) for name in part if name != "num_batches_tracked"]
            if module is not model:
                held += [(module.__dict__, name) for name in (*_PARTS, "training", "eps") if name in module.__dict__]
        held += [(module.__dict__, name) for module in linears for name in _HOOKS]
        self._places, self._names = [place for place, _ in held], [name for _, name in held]
        self._found = [place[name] for place, name in held]
        self._containers = [module._modules for module in modules if module._modules or module is model]
        self._hooks = [module.__dict__[name] for module in linears for name in _HOOKS]
        self._linears = list(linears)
        self._attributes = [module.__dict__ for module in linears]
        self._tensors = [x for x in self._found if isinstance(x, Tensor)]
        self._layout = self._now()

    def holds(self, model: nn.Module) -> bool:
        """Is everything as it was?"""
        own = model.__dict__
        try:
            same = all(map(is_, map(getitem, self._places, self._names), self._found))
        except KeyError:  # moved elsewhere, by a parametrization for instance
            return False
        if (
            same
            and all(own[name] is value for name, value in self._own.items())
            and not any(self._hooks)
            and not any("forward" in attributes for attributes in self._attributes)  # that somebody replaced
            and self._now() == self._layout
        ):
            self.was_used = True
            return True
        return False

    def _now(self) -> tuple[list[Any], ...]:
        x = self._tensors
        return (
            list(map(len, self._containers)),
            list(map(type, self._linears)),
            list(map(Tensor.data_ptr, x)),
            list(map(Tensor.size, x)),
            list(map(Tensor.is_contiguous, x)),
            list(map(_dtype, x)),
        )
