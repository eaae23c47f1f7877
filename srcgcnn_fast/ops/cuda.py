"""The CUDA backend: inference of ``ops/cpu.py`` for CUDA tensors, float32, in the compiled kernels of ``csrc/cuda``.

Checks shapes, types and devices, never values: nothing here waits for the GPU, and all of it can be captured in a CUDA
graph. An index that leaves its crystal makes its row NaN. Results do not depend on what else is in the batch.
``ops/precision.py`` says when rows' products use TF32 and what edges read is bfloat16. Training: ``ops/cuda_conv.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    return NetworkParameters(h.shape[1], None, layers, None).run(h, species, graph, None)


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
    return NetworkParameters(h.shape[1], embedding, layers, readout_layers).run(h, species, graph, row_weight)


def readout_refusal(readout_layers: Sequence[Dense]) -> str | None:
    """Why the kernels cannot take this readout; None if they can."""
    if len(readout_layers) > MOST_LAYERS:
        return f"the CUDA kernels take up to {MOST_LAYERS} layers of a readout, not {len(readout_layers)}"
    for layer in readout_layers:
        if layer.weight.shape[1] > WIDEST_READOUT:
            return f"the CUDA kernels take readouts up to {WIDEST_READOUT}, not {layer.weight.shape[1]}"
    return None


class NetworkParameters:
    """Those of :func:`network`, checked, as the kernels take them; good while each stays where it is.

    ``given``: columns of ``h``; ``readout`` None: the rows leave.
    """

    def __init__(
        self, given: int, embedding: Dense | None, layers: Sequence[Layer], readout: Sequence[Dense] | None
    ) -> None:
        features = given if embedding is None else embedding.weight.shape[0]
        self.given, self.features = given, features
        self.embedding, self.layers, self.readout = embedding, layers, readout
        self.dtype, self.device = layers[0].weight.dtype, layers[0].weight.device
        self.width = next((w for w in WIDTHS if features <= w), 0)
        if not self.width:
            raise InputError(f"The CUDA kernels take up to {MOST_FEATURES} features, not {features}.")
        self.n_features = layers[0].weight.shape[1] - 2 * features
        if embedding is not None:
            self._check_dense("embedding", embedding, given, features)
        for layer in layers:
            _check_layer(layer, features, self.n_features, self.device)
        widths = [features]
        for dense in readout or ():
            self._check_dense("readout", dense, widths[-1], dense.weight.shape[0])
            widths.append(dense.weight.shape[0])
        if readout is not None and (refusal := readout_refusal(readout)):
            raise InputError(f"{refusal[0].upper()}{refusal[1:]}.")
        self.widths = [] if readout is None else widths
        self.shared = all(layer.weight is layers[0].weight for layer in layers)
        self.addresses = [[_address(x) for x in layer[:10]] for layer in layers]
        self.eps = [(float(layer.eps1), float(layer.eps2)) for layer in layers]
        maps = ((None, None) if embedding is None else embedding, *(readout or ()))
        self.ends = [_address(x) for one in maps for x in one]

    def _check_dense(self, name: str, layer: Dense, given: int, made: int) -> None:
        _check(f"{name}'s weight", layer.weight, (made, given), self.dtype, self.device)
        if layer.bias is not None:
            _check(f"{name}'s bias", layer.bias, (made,), self.dtype, self.device)

    def run(self, h: Tensor, species: Tensor | None, graph: Graph, row_weight: Tensor | None) -> Tensor:
        """Features of the rows, (N, F), or, with the rows' weights, what the readout makes of the crystals, (B, O)."""
        dtype, device = self.dtype, self.device
        edges, n_crystals = _Edges(graph, self.n_features, dtype, device), graph.crystal_ptr.shape[0] - 1
        n = edges.n_rows
        _check("h", h, (n if species is None else h.shape[0], self.given), dtype, device)
        if species is not None:
            _check("species", species, (n,), torch.int32, device)
        _check("crystal_ptr", graph.crystal_ptr, (n_crystals + 1,), torch.int32, device)
        if row_weight is not None:
            _check("row_weight", row_weight, (n,), dtype, device)
        if row_weight is None and (n == 0 or n_crystals == 0):
            return h.new_full((n, self.features), float("nan"))  # rows of no crystal
        if n_crystals == 0:
            return h.new_empty(0, self.widths[-1])
        with triton.launching(device) as stream:
            if graph.features is None or self.shared:
                return self._launch(stream, h, species, edges, row_weight)
            for part in self._one_by_one():  # r is a product made before, of one layer at a time
                h = part._launch(stream, h, species, edges, None if part.readout is None else row_weight)
                species = None
            return h

    def _one_by_one(self) -> Iterator[NetworkParameters]:
        last = len(self.layers) - 1
        for k, layer in enumerate(self.layers):
            given, embedding = (self.features, None) if k else (self.given, self.embedding)
            yield NetworkParameters(given, embedding, [layer], self.readout if k == last else None)

    def _launch(
        self, stream: int, h: Tensor, species: Tensor | None, edges: _Edges, row_weight: Tensor | None
    ) -> Tensor:
        call, graph, width = native(), edges.graph, self.width
        n, k, n_crystals = edges.n_rows, edges.n_features, graph.crystal_ptr.shape[0] - 1
        table = (0, 0) if self.embedding is None else h.shape
        plan = [self.features, len(self.layers), k, _exactness(), int(self.shared), *table, *self.widths]
        sizes = (n, edges.n_edges, n_crystals, k)
        index = [x.data_ptr() for x in graph[2:5]]
        prepared = h.new_empty(call.cuda_prepared_size(width, plan))
        given = ([_address(edges.distance), 0, *index], sizes, edges.basis)
        ends = [h.data_ptr(), *self.ends]
        call.cuda_prepare(width, prepared.data_ptr(), plan, self.addresses, self.eps, ends, *given, stream)
        products = None
        if graph.features is not None and edges.n_edges:
            at, storage = call.cuda_filter_at(width, plan), _storage()
            numbers = prepared[at:].view(storage)[: k * 2 * width]
            products = graph.features.to(storage) @ numbers.view(k, 2 * width)
            given = ([0, products.data_ptr(), *index], sizes, edges.basis)
        scratch = h.new_empty(call.cuda_scratch_size(width, plan, n, n_crystals))
        out = h.new_empty((n, self.features) if row_weight is None else (n_crystals, self.widths[-1]))
        rows = (h.data_ptr(), _address(species), h.shape[0])
        weights = _address(row_weight)
        call.cuda_stack(
            width, out.data_ptr(), scratch.data_ptr(), rows, weights, prepared.data_ptr(), plan, *given, stream
        )
        return out
