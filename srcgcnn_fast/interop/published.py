"""The convolution and the pooling of the published programs' models, computed by the operators of this package.

Each is a class that takes the place of a module's own class, so that the module keeps its parameters, buffers, hooks
and everything that refers to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..nn.norm import SynchronizedBatchNorm1d, batch_norm_state
from ..ops import registry
from .indexed import is_index, neighbor_batch, own_copy
from .swap import Swapped, arguments, is_traced, own_formula

_LAYERS = {"fc_full": nn.Linear, "sigmoid": nn.Sigmoid, "softplus1": nn.Softplus, "softplus2": nn.Softplus}
_NORMS = (nn.BatchNorm1d, SynchronizedBatchNorm1d)
_ARGUMENTS = ("atom_in_fea", "nbr_fea", "nbr_fea_idx", "bn1", "bn2")


class PublishedConv(Swapped):
    """``ConvLayer`` of txie-93/cgcnn, cgcnn2 and sata-deep/SR-CGCNN."""

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return any(cls.__name__ == "ConvLayer" for cls in type(module).__mro__) and hasattr(module, "fc_full")

    @staticmethod
    def refusal(module: Any) -> str | None:
        for name, cls in _LAYERS.items():
            if type(getattr(module, name, None)) is not cls:
                return f"its {name} is {_name(getattr(module, name, None))}, not {cls.__name__}"
        for layer in (module.softplus1, module.softplus2):
            if (layer.beta, layer.threshold) != (1, 20):
                return "its softplus has a beta or threshold of its own"
        for name in ("bn1", "bn2"):
            norm = getattr(module, name, None)
            if norm is not None and type(norm) not in _NORMS:
                return f"its {name} is {_name(norm)}, not BatchNorm1d"
        c, k = module.fc_full.weight.shape
        if c % 2 or k <= c:
            return f"its fc_full maps {k} numbers to {c}, not 2F + K to 2F"
        return None

    @staticmethod
    def probe(module: Any, generator: torch.Generator) -> list[tuple[Any, ...]]:
        width = module.fc_full.weight.shape[0] // 2
        n_features = module.fc_full.weight.shape[1] - 2 * width
        given: list[Any] = [
            torch.randn(7, width, dtype=torch.float64, generator=generator),
            torch.rand(7, 3, n_features, dtype=torch.float64, generator=generator),
            torch.tensor([[1, 2, 0], [0, 0, 0], [2, 1, 0], [3, 3, 3], [6, 4, 5], [4, 4, 6], [5, 4, 4]]),
        ]
        if getattr(module, "bn1", None) is None or getattr(module, "bn2", None) is None:
            given += [nn.BatchNorm1d(size).double().train(module.training) for size in (2 * width, width)]
        return [tuple(given)]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        given = arguments(self, _ARGUMENTS, args, kwargs)
        batch = None
        if given is not None and all(isinstance(given.get(name), Tensor) for name in _ARGUMENTS[:3]):
            norms: list[Any] = [
                getattr(self, name, None) if given.get(name) is None else given[name] for name in _ARGUMENTS[3:]
            ]
            h, nbr_fea, nbr_fea_idx = (given[name] for name in _ARGUMENTS[:3])
            if (
                all(type(norm) in _NORMS for norm in norms)
                and not own_formula(self, *norms)
                and _is_graph(h, nbr_fea, nbr_fea_idx)
                and 2 * h.shape[1] + nbr_fea.shape[2] == self.fc_full.weight.shape[1]
            ):
                h = h.to(self.fc_full.weight.dtype) if torch.is_autocast_enabled(h.device.type) else h
                infers = not torch.is_grad_enabled() and not any(norm.training for norm in norms)
                if registry.select(h, inference=infers) != "reference":
                    batch = neighbor_batch(nbr_fea, nbr_fea_idx, h.dtype, (id(self), id(norms[0])))
        if batch is None or batch.num_edges < 2 or batch.num_rows < 2:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        linear: Any = self.fc_full
        first, second = (batch_norm_state(norm) for norm in norms)
        return functional.gated_conv(own_copy(h), batch, linear.weight, linear.bias, first, second, dmin=0.0, step=1.0)


class PublishedPooling(Swapped):
    """``CrystalGraphConvNet``: its mean over the atoms of each crystal, without a loop over the crystals."""

    @staticmethod
    def matches(module: nn.Module) -> bool:
        pooling = getattr(type(module), "pooling", None)
        return callable(pooling) and list(inspect.signature(pooling).parameters)[1:] == ["atom_fea", "crystal_atom_idx"]

    @staticmethod
    def refusal(module: nn.Module) -> str | None:
        return None

    method = "pooling"

    @staticmethod
    def probe(module: nn.Module, generator: torch.Generator) -> list[tuple[Any, ...]]:
        fea = torch.randn(7, 3, dtype=torch.float64, generator=generator)
        return [
            (fea, [torch.tensor(x) for x in idx]) for idx in ([[0, 1, 2], [3], [4, 5, 6]], [[6, 0], [2, 1, 5, 3, 4]])
        ]

    def pooling(self: Any, atom_fea: Tensor, crystal_atom_idx: Sequence[Tensor]) -> Tensor:
        if (
            is_traced()
            or atom_fea.dtype not in (torch.float32, torch.float64)
            or len(crystal_atom_idx) < 2
            or not all(isinstance(x, Tensor) and x.ndim == 1 and is_index(x) for x in crystal_atom_idx)
            or sum(map(len, crystal_atom_idx)) != atom_fea.shape[0]
        ):
            return super().pooling(atom_fea, crystal_atom_idx)  # type: ignore[misc]
        counts = torch.tensor([len(x) for x in crystal_atom_idx], device=atom_fea.device)
        index = torch.cat(list(crystal_atom_idx)).to(atom_fea.device)
        index = torch.where(index < 0, index + atom_fea.shape[0], index)  # those count from the end
        rows = atom_fea.index_select(0, index)
        crystal = torch.repeat_interleave(counts, output_size=atom_fea.shape[0])
        total = atom_fea.new_zeros(len(counts), atom_fea.shape[1]).index_add(0, crystal, rows)
        return total / counts[:, None]


def _name(value: Any) -> str:
    return "absent" if value is None else type(value).__name__


def _is_graph(atom_fea: Tensor, nbr_fea: Tensor, nbr_fea_idx: Tensor) -> bool:
    """Have the tensors the shapes, types and device of a published batch?"""
    return (
        (atom_fea.ndim, nbr_fea.ndim, nbr_fea_idx.ndim) == (2, 3, 2)
        and atom_fea.shape[0] == nbr_fea_idx.shape[0]
        and nbr_fea.is_floating_point()
        and is_index(nbr_fea_idx)
        and atom_fea.device == nbr_fea.device == nbr_fea_idx.device
        and not atom_fea.is_meta
    )
