"""One line for other people's models: their layers replaced in place by those of this package."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..nn import GatedConv
from .geometric import CGConv, GeometricConv
from .published import PublishedConv, PublishedPooling
from .swap import Swapped, own_class, probe_difference, relative_difference, swap, unswap

logger = logging.getLogger(__name__)

_KINDS: tuple[type[Swapped], ...] = (PublishedConv, PublishedPooling, GeometricConv)
_OURS = (GatedConv, CGConv)
_MODEL = TypeVar("_MODEL", bound=nn.Module)


def accelerate(model: _MODEL, verify: Any = None) -> _MODEL:
    """Replace, in place, the layers of a model that this package computes faster, and return the same model.

    Known are ``ConvLayer`` and the pooling of txie-93/cgcnn, cgcnn2 and sata-deep/SR-CGCNN, and PyTorch Geometric's
    ``CGConv``, in any module that holds them. Only the computation changes: parameters, buffers, names, hooks, mode,
    device, and every reference to them stay, as do the arguments that ``forward`` takes. A layer is replaced when its
    parts are the expected ones and its output, gradients and buffers agree with its own formula on a small example in
    float64; others are left as they are and named, with the reason, in the log and by :func:`acceleration`. A model of
    this package's own layers, such as :class:`srcgcnn_fast.CGCNN`, is returned as it is, and the log says so.

    A replaced layer computes its own formula when the operators cannot take a call: with a hook on a part of a layer, a
    part that was replaced since, arguments that the published layer does not have, half precision, ``torch.func``,
    tracing, export, compilation, or a mode that sees every operator, such as ``FlopCounterMode``.

    Args:
        model: a module that holds such layers, at any depth; calling this twice changes nothing.
        verify: inputs of ``model`` (a tuple of arguments, a mapping of keyword arguments, or the one argument) on
            which it and its own formulas are run, forward and backward, on copies.

    Raises:
        InputError: nothing in the model can be replaced or is this package's, or with ``verify`` the results differ by
            more than rounding; the model is then as before.
    """
    refused, changed = {}, []
    for name, module, kind in _candidates(model):
        if isinstance(module, Swapped):
            continue
        reason = _refusal(module, kind)
        if reason is None:
            swap(module, kind)
            changed.append(module)
        else:
            refused[_label(name, module)] = reason
            logger.warning("%s is not accelerated: %s.", _label(name, module), reason)
    replaced = [name for name, reason in acceleration(model).items() if reason is None]
    if not replaced and any(isinstance(module, _OURS) for module in model.modules()):
        logger.warning(
            "This %s computes with the layers of this package, and is fast as it is.", own_class(model).__name__
        )
    elif not replaced:
        why = "; ".join(f"{name}: {reason}" for name, reason in refused.items()) or (
            "it holds no ConvLayer of a published CGCNN program and no CGConv of PyTorch Geometric"
        )
        raise InputError(f"Nothing in this {own_class(model).__name__} can be accelerated ({why}).")
    else:
        logger.info("Accelerated: %s.", ", ".join(replaced))
    if verify is not None:
        try:
            found = difference(model, verify)
            if not found.rounding:
                raise InputError(
                    f"The accelerated model does not agree with its own formulas ({found}); it is as before."
                )
        except BaseException:
            unswap(changed)
            raise
        logger.warning("Verified: %s.", found)
    return model


def restore(model: _MODEL) -> _MODEL:
    """Undo :func:`accelerate`.

    Raises:
        InputError: a replaced layer's class was exchanged since (``torch.nn.utils.parametrize``); none is undone.
    """
    unswap(module for module in model.modules() if isinstance(module, Swapped))
    return model


def acceleration(model: nn.Module) -> dict[str, str | None]:
    """What :func:`accelerate` looks at in a model: by name, None where it is replaced, else the reason why not."""
    return {
        _label(name, module): kind.refusal(module)
        if isinstance(module, Swapped)  # None, unless a part was exchanged since
        else _refusal(module, kind) or "not accelerated yet"
        for name, module, kind in _candidates(model)
    }


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module, type[Swapped]]]:
    pairs = ((name, module, kind) for name, module in model.named_modules() for kind in _KINDS)
    return [(name, module, kind) for name, module, kind in pairs if kind.matches(module)]


def _refusal(module: nn.Module, kind: type[Swapped]) -> str | None:
    if kind.method in vars(module):
        return f"its {kind.method} was replaced on the object"
    return kind.refusal(module) or probe_difference(module, kind)


def _label(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({own_class(module).__name__})"


@dataclass(frozen=True)
class Difference:
    """Relative differences (norm over norm) between an accelerated model and its own formulas."""

    output: float
    gradient: float
    buffers: float
    dtype: torch.dtype

    @property
    def rounding(self) -> bool:
        """Are all of them what rounding can explain?"""
        limit = 1e-3 if self.dtype == torch.float32 else 1e-9
        return all(x <= limit for x in (self.output, self.gradient, self.buffers))  # NaN is not

    def __str__(self) -> str:
        return f"output {self.output:.1e}, gradient {self.gradient:.1e}, buffers {self.buffers:.1e}, relative"


def difference(model: nn.Module, inputs: Any, reference: nn.Module | None = None) -> Difference:
    """Run an accelerated model and its own formulas on the same inputs, forward and backward, on copies of both.

    Args:
        inputs: a tuple of arguments, a mapping of keyword arguments, or the one argument.
        reference: what to compare with; by default a copy of ``model`` with its own formulas.
    """
    reference = restore(copy.deepcopy(model)) if reference is None else reference
    theirs, ours = (_outcome(copy.deepcopy(x), inputs) for x in (reference, model))
    found = [relative_difference(a, b) for a, b in zip(ours, theirs, strict=True)]
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    dtype = parameters[0].dtype if parameters else torch.float32
    return Difference(found[0], found[1], found[2], dtype)


def _outcome(model: nn.Module, inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """All outputs, gradients and buffers of one call in the model's mode, each as one vector."""
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"]
    with torch.random.fork_rng(devices=devices), torch.enable_grad():  # dropout is the same for both
        torch.manual_seed(0)
        out = _tensors(_call(model, inputs))
        loss = sum((x * torch.cos(torch.arange(x.numel(), device=x.device)).reshape(x.shape)).sum() for x in out)
        wanted = [p for p in model.parameters() if p.requires_grad]
        gradients: Any = torch.autograd.grad(loss, wanted, allow_unused=True) if wanted else ()  # type: ignore[arg-type]
    joined = (out, [x for x in gradients if x is not None], list(model.buffers()))
    vectors = [torch.cat([y.detach().double().flatten() for y in x] or [torch.zeros(0)]) for x in joined]
    return vectors[0], vectors[1], vectors[2]


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, tuple):
        return model(*inputs)
    # PyTorch Geometric's Data is no Mapping, and goes in as the one argument.
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def _tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors in a nest of tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = value.values()
    return [x for item in value for x in _tensors(item)] if isinstance(value, list | tuple | type({}.values())) else []
