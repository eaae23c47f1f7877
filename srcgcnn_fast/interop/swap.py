"""Giving a module another forward in place: its class is exchanged, everything else stays."""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Iterable
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import InputError, one_line
from ..nn.frozen import is_untouched

logger = logging.getLogger(__name__)

_PROBE_TOLERANCE = 1e-9
"""Relative, in float64; rounding leaves some 1e-14."""


class Swapped:
    """Mixed in before a module's own class. ``super()`` reaches the module's own formula."""

    method: ClassVar[str] = "forward"
    """The method that is replaced."""

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """Does the module look like what this class replaces?"""
        raise NotImplementedError

    @staticmethod
    def refusal(module: nn.Module) -> str | None:
        """Why the operators of this package cannot compute it, as its parts show; None where they can."""
        raise NotImplementedError

    @staticmethod
    def probe(module: nn.Module, generator: torch.Generator) -> list[tuple[Any, ...]]:
        """Small float64 inputs on which both formulas are compared."""
        raise NotImplementedError

    _kind: ClassVar[type[Swapped]]
    _own_class: ClassVar[type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__.copy()  # Python 3.10 has none
        return _rebuild, (self._kind, self._own_class), state


def own_class(module: Any) -> type:
    """The class that the module was written as."""
    cls: type = module._own_class if isinstance(module, Swapped) else type(module)
    return cls


@cache
def _swapped_class(kind: Any, cls: Any) -> Any:
    members = {"__module__": cls.__module__, "__doc__": cls.__doc__, "_kind": kind, "_own_class": cls}
    return type(f"Fast{cls.__name__}", (kind, cls), members)


def _rebuild(kind: Any, cls: Any) -> Any:
    new: Any = _swapped_class(kind, cls)
    return new.__new__(new)


def swap(module: Any, kind: Any) -> None:
    """Let ``kind``, a subclass of :class:`Swapped`, compute what the module's own class did."""
    cls: Any = type(module)
    module.__class__ = _swapped_class(kind, cls)


def unswap(modules: Iterable[Any]) -> None:
    """Give each module its own class back, or none of them.

    Raises:
        InputError: a class was exchanged again afterwards, as ``torch.nn.utils.parametrize`` does.
    """
    swapped = [(module, own_class(module)) for module in modules]
    for module, own in swapped:
        if type(module) is not _swapped_class(module._kind, own):
            raise InputError(
                f"A {own.__name__} became a {type(module).__name__} after it was accelerated; undo that before restore."
            )
    for module, own in swapped:
        module.__class__ = own


def arguments(
    module: Any, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """The arguments of a call by the published names; None where it has others, which the module's own forward takes,
    or is traced.
    """
    if is_traced():
        return None
    given = dict(zip(names, args, strict=False)) | kwargs
    if len(args) <= len(names) and given.keys() <= set(names) and len(given) == len(args) + len(kwargs):
        return given
    _say_once(f"a {own_class(module).__name__} that is called with other arguments computes its own formula")
    return None


def is_traced() -> bool:
    """Is this call compiled, exported, traced or transformed, so that it may hold plain PyTorch only?"""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    # Modes that see each operator: fake tensors, counters of operations, selective checkpoints.
    return bool(torch._C._len_torch_dispatch_stack()) or bool(torch._C._functorch.peek_interpreter_stack())


def own_formula(module: Any, *more: nn.Module | None) -> bool:
    """Must this call go through the module's own formula? A hooked part wants to be called; tracers want its operators;
    a part may have been exchanged since.

    Args:
        more: modules beside its parts that the call involves.
    """
    if is_traced():
        return True
    reason = module._kind.refusal(module)
    if reason is None:
        if all(part is None or is_untouched(part) for part in (*module._modules.values(), *more)):
            return False
        reason = "a part of it has a hook or a forward of its own"
    _say_once(f"a {own_class(module).__name__} computes its own formula, since {reason}")
    return True


@cache
def _say_once(reason: str) -> None:
    logger.warning("Not accelerated: %s.", reason)


def probe_difference(module: nn.Module, kind: type[Swapped]) -> str | None:
    """How the two formulas differ on small random inputs, in float64; None where they agree.

    Compared are output, gradients and buffers, in training and evaluation mode, with random parameters. What else its
    own formula writes would not be written any more, which is a difference, too.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
    ):
        for training in (False, True):
            results = []
            for fast in (False, True):
                generator = torch.Generator("cpu").manual_seed(0)
                try:
                    twin = _twin(module, kind, training, generator)
                    if fast:
                        swap(twin, kind)
                    before = _attributes(twin, kind)
                    results.append([_run(twin, kind.method, args) for args in kind.probe(twin, generator)])
                    after = _attributes(twin, kind)
                except Exception as error:  # whatever their code raises
                    return f"it does not run on a small example ({type(error).__name__}: {one_line(error)})"
                for name, (x, state) in after.items():
                    if name not in before or before[name][0] is not x or before[name][1] != state:
                        return f"it writes {name}, which the replacement would not"
            for ours, theirs in zip(*reversed(results), strict=True):
                for name, x in theirs.items():
                    difference = relative_difference(ours[name], x)
                    if not difference <= _PROBE_TOLERANCE:
                        return f"its {name} differs from the published formula's by {difference:.1e} on a small example"
    return None


def relative_difference(x: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the reference's norm; equal NaNs are equal."""
    if x.shape != reference.shape:
        return float("inf")
    x, reference = x.detach().double(), reference.detach().double()
    both = x.isnan() & reference.isnan()
    x, reference = x.masked_fill(both, 0), reference.masked_fill(both, 0)
    return float((x - reference).norm() / reference.norm().clamp_min(1e-30))


def _twin(module: nn.Module, kind: type[Swapped], training: bool, generator: torch.Generator) -> nn.Module:
    if kind.method == "forward":
        twin = copy.deepcopy(module)
    else:  # a whole model, which may hold what cannot be copied
        twin = copy.copy(module)
        vars(twin).update(copy.deepcopy({name: vars(module)[name] for name in _CONTENTS}))
    for part in twin.modules():
        for name in [name for name in vars(part) if name.endswith("_hooks")]:
            vars(part)[name] = type(vars(part)[name])()
    if kind.method != "forward":
        return twin  # uses no parameters
    twin = twin.to(device="cpu", dtype=torch.float64).train(training).requires_grad_()
    with torch.no_grad():
        for name, x in [*twin.named_parameters(), *twin.named_buffers()]:
            if x.is_floating_point():
                x.uniform_(*((0.5, 1.5) if name.endswith("running_var") else (-1, 1)), generator=generator)
    return twin


_CONTENTS = ("_modules", "_buffers", "_parameters")


def _attributes(module: nn.Module, kind: type[Swapped]) -> dict[str, tuple[Any, Any]]:
    """What the module and its parts hold, each with what tells whether it was written to; buffers of layers are
    compared as numbers.
    """
    found = {}
    for path, part in module.named_modules():
        held = vars(part) if kind.method == "forward" else vars(part) | part._buffers
        for name, x in held.items():
            state = len(x) if isinstance(x, list | dict | set | deque) else None
            if isinstance(x, Tensor) and not x.is_inference():
                state = x._version
            found[".".join(["self", *filter(None, [path]), name])] = x, state
    return found


def _run(module: nn.Module, method: str, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """Output, gradients and buffers of one call."""
    several = isinstance(args[0], tuple)
    inputs = [x.clone().requires_grad_() for x in (args[0] if several else args[:1])]
    out = getattr(module, method)(tuple(inputs) if several else inputs[0], *args[1:])
    weight = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).reshape(out.shape)
    wanted = [*inputs, *(p for p in module.parameters() if p.requires_grad and method == "forward")]
    gradients = torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True)
    found = {"output": out, "gradient": torch.cat([g.flatten() for g in gradients if g is not None])}
    return found | {f"buffer {name}": x for name, x in module.named_buffers()} if method == "forward" else found
