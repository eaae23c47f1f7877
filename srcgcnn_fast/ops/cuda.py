"""The CUDA backend: inference of ``ops/cpu.py`` for CUDA tensors, float32, in the compiled kernels of ``csrc/cuda``.

Checks shapes, types and devices, never values: nothing here waits for the GPU. An index that leaves its crystal makes
its row NaN. Results do not depend on what else is in the batch. Under ``torch.backends.cuda.matmul.allow_tf32`` the
rows' products use TF32, as PyTorch's do. Training goes through ``ops/triton.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .cpu import Graph, Layer
from .registry import MOST_FEATURES, core
from .triton import _check, _check_layer, _Edges, _precision

WIDTHS = (32, 64, MOST_FEATURES)
"""Of the compiled kernels; F takes the next one, with zeros."""


def native() -> Any:
    """The compiled functions."""
    return core


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def stack(h: Tensor, layers: Sequence[Layer], graph: Graph, species: Tensor | None = None) -> Tensor:
    """As ``cpu.stack``: in one kernel where the crystals fit, layer by layer for those that do not.

    Raises:
        InputError: a shape, type or device is wrong, or F is above 128.
    """
    features, width = h.shape[1], next((w for w in WIDTHS if h.shape[1] <= w), 0)
    if not width:
        raise InputError(f"The CUDA kernels take up to {MOST_FEATURES} features, not {features}.")
    edges = _Edges(graph, layers[0].weight.shape[1] - 2 * features, h.dtype, h.device)
    if species is None:
        _check("h", h, (edges.n_rows, features), h.dtype, h.device)
    else:
        _check("h", h, (h.shape[0], features), h.dtype, h.device)
        _check("species", species, (edges.n_rows,), torch.int32, h.device)
    for layer in layers:
        _check_layer(layer, features, edges.n_features, h.device)
    n_crystals = graph.crystal_ptr.shape[0] - 1
    _check("crystal_ptr", graph.crystal_ptr, (n_crystals + 1,), torch.int32, h.device)
    if edges.n_rows == 0:
        return h.new_empty(0, features)
    shared = all(layer.weight is layers[0].weight for layer in layers)
    batches = [layers]
    if graph.features is not None and not shared:  # r of every edge is a product made before, one layer's at a time
        batches, shared = [[layer] for layer in layers], True
    with torch.cuda.device(h.device) if h.device.type == "cuda" else contextlib.nullcontext():
        for some in batches:
            h, species = _run(h, some, graph, species, edges, width, shared), None
    return h


def _run(
    h: Tensor, layers: Sequence[Layer], graph: Graph, species: Tensor | None, edges: _Edges, width: int, shared: bool
) -> Tensor:
    call, (n, features), k = native(), (edges.n_rows, h.shape[1]), edges.n_features
    stream = torch.cuda.current_stream(h.device).cuda_stream if h.device.type == "cuda" else 0
    addresses = [[_address(x) for x in layer[:10]] for layer in layers]
    eps = [(float(layer.eps1), float(layer.eps2)) for layer in layers]
    sizes = (n, edges.n_edges, graph.crystal_ptr.shape[0] - 1, k)
    index = [x.data_ptr() for x in graph[2:5]]
    prepared = h.new_empty(call.cuda_prepared_size(width, k, len(layers), shared))
    given = ([_address(edges.distance), 0, *index], sizes, edges.basis)
    call.cuda_prepare(width, prepared.data_ptr(), addresses, eps, shared, features, *given, stream)
    table = None
    if graph.features is not None:
        at = call.cuda_filter_at(width)
        table = graph.features @ prepared[at : at + k * 2 * width].view(k, 2 * width)
        given = ([0, table.data_ptr(), *index], sizes, edges.basis)
    scratch = h.new_empty(call.cuda_scratch_size(width, n))
    out = h.new_empty(n, features)
    rows = (h.data_ptr(), _address(species), h.shape[0])
    call.cuda_stack(
        width, out.data_ptr(), scratch.data_ptr(), rows, prepared.data_ptr(), len(layers), shared, features,
        _precision() != "tf32x3", *given, stream,
    )  # fmt: skip
    return out
