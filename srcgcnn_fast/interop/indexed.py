"""Graph batches from the index tensors of other programs, made once per forward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..graph.batch import GraphBatch, outside_inference_mode
from .gaussians import distances_from_gaussians


class _Known(NamedTuple):
    tensor: weakref.ref[Tensor]
    version: int
    sample: Tensor | None


class _Kept(NamedTuple):
    tensors: list[_Known | None]
    value: Any
    callers: set[Any]


class TensorCache:
    """What follows from some tensors, for the layers of one forward pass: kept while the first tensor lives.

    A caller that comes again is in another pass, and gets what follows anew: tensors can be written to without a trace
    (through NumPy, or ``.data``) between two passes. For the others some of the numbers are compared.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], dict[Any, _Kept]]] = {}

    def get(self, tensors: tuple[Tensor | None, ...], key: Any, caller: Any, build: Callable[[], Any]) -> Any:
        """``build()``, made once for these very tensors in their present version and all callers of a pass."""
        first = tensors[0]
        assert first is not None
        if any(x is not None and x.is_inference() for x in tensors):
            return build()  # writing to an inference tensor leaves no trace
        entry = self._entries.get(id(first))
        if entry is None or entry[0]() is not first:
            number = id(first)
            reference = weakref.ref(first, lambda r: self._drop(number, r))
            entry = self._entries[number] = (reference, {})
        kept = entry[1].get(key)
        if kept is None or caller in kept.callers or not all(map(_is, tensors, kept.tensors)):
            known = [None if x is None else _Known(weakref.ref(x), x._version, _copied_sample(x)) for x in tensors]
            kept = entry[1][key] = _Kept(known, outside_inference_mode(build), set())
        kept.callers.add(caller)
        return kept.value

    def _drop(self, number: int, reference: weakref.ref[Tensor]) -> None:
        entry = self._entries.get(number)
        if entry is not None and entry[0] is reference:
            del self._entries[number]


def _is(given: Tensor | None, known: _Known | None) -> bool:
    if given is None or known is None:
        return given is None and known is None
    if known.tensor() is not given or known.version != given._version:
        return False
    return known.sample is None or torch.equal(known.sample, _sample(given))


def _copied_sample(x: Tensor) -> Tensor | None:
    usual = type(x) is Tensor and x.layout == torch.strided and x.device.type == "cpu"
    return _sample(x).clone() if usual else None


def _sample(x: Tensor) -> Tensor:
    """Up to 256 of its numbers, which tell whether another batch was written over it."""
    return x.detach().flatten()[:: 1 + x.numel() // 256]


_cache = TensorCache()


def neighbor_batch(nbr_fea: Tensor, nbr_fea_idx: Tensor, dtype: torch.dtype, caller: Any) -> GraphBatch | None:
    """The batch of a published program's edges, or None where it has no edge or an index is not a row.

    Distances, in units of the Gaussians' step and from ``dmin`` on, stand in for features that are Gaussians;
    other features are taken as they are. Rows are joined into blocks that no edge leaves, which need not be the
    crystals.

    Args:
        nbr_fea: (N, M, K).
        nbr_fea_idx: (N, M) integer, rows of the batch; padding counts, as it does in those programs.
        dtype: of the convolution; Gaussians are recognised at its precision.
        caller: who asks, hashable; the same one again means another forward pass.
    """
    n, m = nbr_fea_idx.shape
    if n * m == 0 or nbr_fea.shape[:2] != (n, m):
        return None

    def build() -> GraphBatch | None:
        index = nbr_fea_idx.detach()
        low, high = index.aminmax(dim=1)
        if int(low.min()) < 0 or int(high.max()) >= n:
            return None
        row_ptr = torch.arange(0, n * m + 1, m, dtype=torch.int32, device=index.device)
        features = nbr_fea.reshape(n * m, -1).to(dtype)
        return edge_batch(index.reshape(-1).int(), row_ptr, blocks(low, high), features, nbr_fea)

    if nbr_fea.requires_grad and torch.is_grad_enabled():
        return build()
    key = "neighbors", dtype, torch.is_grad_enabled()
    batch: GraphBatch | None = _cache.get((nbr_fea_idx, nbr_fea), key, caller, build)
    return batch


def edge_batch(
    sender: Tensor, row_ptr: Tensor, crystal_ptr: Tensor, features: Tensor, given: Tensor | None = None
) -> GraphBatch:
    """The batch of edges sorted by receiver with their features (E, K), or the distances that these stand for.

    Features are copied where a backward pass may read them and they lie in ``given``, which is the caller's.
    """
    n, device = row_ptr.shape[0] - 1, sender.device
    needs_grad = features.requires_grad and torch.is_grad_enabled()
    distance = None if needs_grad else distances_from_gaussians(features.detach().contiguous())
    if distance is None and given is not None and features.data_ptr() == given.data_ptr():
        features = own_copy(features)
    return GraphBatch(
        numbers=torch.zeros(n, dtype=torch.int32, device=device),
        weight=torch.ones(n, device=device),
        sender=sender,
        distance=features.new_zeros(features.shape[0]) if distance is None else distance,
        row_ptr=row_ptr,
        crystal_ptr=crystal_ptr,
        atom_class=torch.arange(n, dtype=torch.int32, device=device),
        edge_features=features.contiguous() if distance is None else None,
    )


def is_index(x: Tensor) -> bool:
    """Do its numbers name rows? Those of torch.bool and torch.uint8 select them."""
    return x.dtype in (torch.int64, torch.int32, torch.int16, torch.int8)


def own_copy(x: Tensor) -> Tensor:
    """What a backward pass may read: a copy where gradients are recorded, so that the caller may write to ``x``."""
    return x.clone() if torch.is_grad_enabled() else x


def blocks(low: Tensor, high: Tensor) -> Tensor:
    """(B + 1,) int32 boundaries of the shortest runs of rows that no edge leaves.

    Args:
        low: (N,) int64, smallest row that each row has an edge with.
        high: (N,) int64, largest one.
    """
    rows = torch.arange(low.shape[0], device=low.device)
    reach = torch.maximum(high, rows).cummax(0).values
    back = torch.minimum(low, rows).flip(0).cummin(0).values.flip(0)
    # A block begins where no row before reaches to, and from where on no row reaches back.
    begins = (reach[:-1] < rows[1:]) & (back[1:] >= rows[1:])
    inner = begins.nonzero().flatten() + 1
    ends = low.new_tensor([0, low.shape[0]])
    return torch.cat([ends[:1], inner, ends[1:]]).int()
