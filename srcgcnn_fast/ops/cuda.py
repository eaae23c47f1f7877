"""The CUDA backend: inference of ``ops/cpu.py`` for CUDA tensors, float32, in the compiled kernels of ``csrc/cuda``.

Checks shapes, types and devices, never values: nothing here waits for the GPU, and all of it can be captured in a CUDA
graph. An index that leaves its crystal makes its row NaN. Results do not depend on what else is in the batch.
``ops/precision.py`` says when rows' products use TF32 and what edges read is bfloat16. Training: ``ops/cuda_conv.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from . import triton
from .cpu import MOST_LAYERS, Graph, Layer, _address
from .reference import Dense
from .registry import MOST_FEATURES, core
from .triton import _check, _check_layer, _Edges, _precision, _storage

WIDTHS = (32, 64, MOST_FEATURES)
"""Of the compiled kernels; F takes the next one, with zeros."""
WIDEST_READOUT = 1024
"""Numbers between the linear maps of a readout."""


def native() -> Any:
    """The compiled functions."""
    return core


def _exactness() -> int:
    """DevicePrecision of csrc/cuda/stack.h."""
    return 2 if _storage() == torch.bfloat16 else int(_precision() != "tf32x3")


def stack(h: Tensor, layers: Sequence[Layer], graph: Graph, species: Tensor | None = None) -> Tensor:
    """As ``cpu.stack``: in one kernel where the crystals fit, layer by layer for those that do not.

    Raises:
        InputError: a shape, type or device is wrong, or F is above 128.
    """
    return _Call(h, species, None, layers, graph).run(None, ())


def network(
    h: Tensor,
    species: Tensor | None,
    embedding: Dense | None,
    layers: Sequence[Layer],
    graph: Graph,
    row_weight: Tensor,
    readout_layers: Sequence[Dense],
) -> Tensor:
    """As ``cpu.network``, in the kernels of :func:`stack`, so that no row leaves them; (B, O).

    Without ``readout_layers``: the means over the crystals, (B, F).

    Raises:
        InputError: a shape, type or device is wrong, F is above 128, or a readout has more than 16 layers or is wider
            than 1024.
    """
    assert embedding is None or species is not None
    return _Call(h, species, embedding, layers, graph).run(row_weight, readout_layers)


def readout_refusal(readout_layers: Sequence[Dense]) -> str | None:
    """Why the kernels cannot take this readout; None if they can."""
    if len(readout_layers) > MOST_LAYERS:
        return f"the CUDA kernels take up to {MOST_LAYERS} layers of a readout, not {len(readout_layers)}"
    for layer in readout_layers:
        if layer.weight.shape[1] > WIDEST_READOUT:
            return f"the CUDA kernels take readouts up to {WIDEST_READOUT}, not {layer.weight.shape[1]}"
    return None


class _Call:
    """One call, checked: rows' features, layers and graph."""

    def __init__(
        self, h: Tensor, species: Tensor | None, embedding: Dense | None, layers: Sequence[Layer], graph: Graph
    ) -> None:
        features = h.shape[1] if embedding is None else embedding.weight.shape[0]
        self.h, self.species, self.embedding, self.layers, self.graph = h, species, embedding, layers, graph
        self.features = features
        self.width = next((w for w in WIDTHS if features <= w), 0)
        if not self.width:
            raise InputError(f"The CUDA kernels take up to {MOST_FEATURES} features, not {features}.")
        self.edges = _Edges(graph, layers[0].weight.shape[1] - 2 * features, h.dtype, h.device)
        n, given = self.edges.n_rows, h.shape[1] if embedding is not None else features
        _check("h", h, (n if species is None else h.shape[0], given), h.dtype, h.device)
        if species is not None:
            _check("species", species, (n,), torch.int32, h.device)
        if embedding is not None:
            self._check_dense("embedding", embedding, given, features)
        for layer in layers:
            _check_layer(layer, features, self.edges.n_features, h.device)
        self.n_crystals = graph.crystal_ptr.shape[0] - 1
        _check("crystal_ptr", graph.crystal_ptr, (self.n_crystals + 1,), torch.int32, h.device)

    def _check_dense(self, name: str, layer: Dense, given: int, made: int) -> None:
        _check(f"{name}'s weight", layer.weight, (made, given), self.h.dtype, self.h.device)
        if layer.bias is not None:
            _check(f"{name}'s bias", layer.bias, (made,), self.h.dtype, self.h.device)

    def run(self, row_weight: Tensor | None, readout: Sequence[Dense]) -> Tensor:
        """Features of the rows, (N, F), or, with the rows' weights, what the readout makes of the crystals, (B, O)."""
        widths = [self.features]
        for layer in readout:
            self._check_dense("readout", layer, widths[-1], layer.weight.shape[0])
            widths.append(layer.weight.shape[0])
        if row_weight is not None:
            _check("row_weight", row_weight, (self.edges.n_rows,), self.h.dtype, self.h.device)
            if refusal := readout_refusal(readout):
                raise InputError(f"{refusal[0].upper()}{refusal[1:]}.")
        size = (self.edges.n_rows, self.features) if row_weight is None else (self.n_crystals, widths[-1])
        if size[0] == 0:
            return self.h.new_empty(size)
        shared = all(layer.weight is self.layers[0].weight for layer in self.layers)
        batches = [self.layers]
        if self.graph.features is not None and not shared:  # r is a product made before, of one layer at a time
            batches, shared = [[layer] for layer in self.layers], True
        with triton.launching(self.h.device) as stream:
            for some in batches[:-1]:
                self.h = self._launch(stream, some, shared, None, [], (self.edges.n_rows, self.features))
                self.species = self.embedding = None
            widths = [] if row_weight is None else widths
            return self._launch(stream, batches[-1], shared, row_weight, widths, size, readout)

    def _launch(
        self,
        stream: int,
        layers: Sequence[Layer],
        shared: bool,
        row_weight: Tensor | None,
        widths: list[int],
        size: tuple[int, int],
        readout: Sequence[Dense] = (),
    ) -> Tensor:
        call, h, edges, graph, width = native(), self.h, self.edges, self.graph, self.width
        n, k = edges.n_rows, edges.n_features
        embedding = self.embedding or Dense(None, None)  # type: ignore[arg-type]
        table = (0, 0) if self.embedding is None else h.shape
        plan = [self.features, len(layers), k, _exactness(), int(shared), *table, *widths]
        addresses = [[_address(x) for x in layer[:10]] for layer in layers]
        eps = [(float(layer.eps1), float(layer.eps2)) for layer in layers]
        ends = [_address(x) for x in (h, *embedding, *(x for layer in readout for x in layer))]
        sizes = (n, edges.n_edges, self.n_crystals, k)
        index = [x.data_ptr() for x in graph[2:5]]
        prepared = h.new_empty(call.cuda_prepared_size(width, plan))
        given = ([_address(edges.distance), 0, *index], sizes, edges.basis)
        call.cuda_prepare(width, prepared.data_ptr(), plan, addresses, eps, ends, *given, stream)
        products = None
        if graph.features is not None and edges.n_edges:
            at, storage = call.cuda_filter_at(width, plan), _storage()
            numbers = prepared[at:].view(storage)[: k * 2 * width]
            products = graph.features.to(storage) @ numbers.view(k, 2 * width)
            given = ([0, products.data_ptr(), *index], sizes, edges.basis)
        scratch = h.new_empty(call.cuda_scratch_size(width, plan, n, self.n_crystals))
        out = h.new_empty(size)
        rows = (h.data_ptr(), _address(self.species), h.shape[0])
        weights = _address(row_weight)
        call.cuda_stack(
            width, out.data_ptr(), scratch.data_ptr(), rows, weights, prepared.data_ptr(), plan, *given, stream
        )
        return out
