"""The compiled CPU backend: checks shapes, types and indices, then calls the C++ kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .reference import Edges
from .registry import core, core_problem

_SUFFIX = {torch.float32: "_f32", torch.float64: "_f64"}
_FAULTS = {
    1: "row_ptr must start at 0, never decrease and end at the number of edges",
    2: "an edge's sender must be a row of the receiver's own crystal",
    3: "crystal_ptr must start at 0, never decrease and end at the number of rows",
}


def _kernel(name: str, dtype: torch.dtype) -> Any:
    if core is None:
        raise InputError(f"The CPU backend cannot run: {core_problem}.")
    if dtype not in _SUFFIX:
        raise InputError(f"The CPU kernels take float32 and float64, not {dtype}.")
    return getattr(core, name + _SUFFIX[dtype])


def _expect(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if x.dtype != dtype or tuple(x.shape) != shape or x.device.type != "cpu":
        raise InputError(
            f"{name} must be a {dtype} CPU tensor of shape {shape}, "
            f"not {x.dtype} {tuple(x.shape)} on {x.device.type}."
        )
    return x.contiguous()


class _Graph:
    """The arrays of a batch as the kernels take them; holds them alive during the call."""

    def __init__(self, edges: Edges, n_features: int, dtype: torch.dtype) -> None:
        n_rows, n_edges = edges.row_ptr.shape[0] - 1, edges.sender.shape[0]
        n_crystals = edges.crystal_ptr.shape[0] - 1
        if edges.step <= 0:
            raise InputError(f"The Gaussians' step must be positive, not {edges.step}.")
        self.sender = _expect("sender", edges.sender, (n_edges,), torch.int32)
        self.row_ptr = _expect("row_ptr", edges.row_ptr, (n_rows + 1,), torch.int32)
        self.crystal_ptr = _expect("crystal_ptr", edges.crystal_ptr, (n_crystals + 1,), torch.int32)
        self.features = self.distance = None
        if edges.features is not None:
            self.features = _expect("edge_features", edges.features, (n_edges, n_features), dtype)
        else:
            self.distance = _expect("distance", edges.distance, (n_edges,), dtype)
        index = (self.sender.data_ptr(), self.row_ptr.data_ptr(), self.crystal_ptr.data_ptr())
        self.sizes = (n_rows, n_edges, n_crystals, n_features)
        self.basis = (edges.dmin, edges.step)
        self.pointers = (
            0 if self.distance is None else self.distance.data_ptr(),
            0 if self.features is None else self.features.data_ptr(),
            *index,
        )
        fault, where = core.check_graph(*index, self.sizes)
        if fault:
            raise InputError(f"Bad graph at position {where}: {_FAULTS[fault]}.")


def gate_sum(p: Tensor, q: Tensor, w_e: Tensor, edges: Edges) -> Tensor:
    kernel = _kernel("gate_sum", p.dtype)
    n, width = edges.row_ptr.shape[0] - 1, p.shape[1] // 2
    graph = _Graph(edges, w_e.shape[0], p.dtype)
    p, q = _expect("p", p, (n, 2 * width), p.dtype), _expect("q", q, (n, 2 * width), p.dtype)
    w_e = _expect("w_e", w_e, (w_e.shape[0], 2 * width), p.dtype)
    m = p.new_empty(n, width)
    kernel(
        m.data_ptr(), p.data_ptr(), q.data_ptr(), w_e.data_ptr(),
        graph.pointers, graph.sizes, graph.basis, width, torch.get_num_threads(),
    )  # fmt: skip
    return m


def gate_sum_backward(
    grad: Tensor, p: Tensor, q: Tensor, w_e: Tensor, edges: Edges, edge_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernel = _kernel("gate_sum_backward", p.dtype)
    n, width, n_features = edges.row_ptr.shape[0] - 1, p.shape[1] // 2, w_e.shape[0]
    graph = _Graph(edges, n_features, p.dtype)
    grad = _expect("grad", grad, (n, width), p.dtype)
    p, q = _expect("p", p, (n, 2 * width), p.dtype), _expect("q", q, (n, 2 * width), p.dtype)
    w_e = _expect("w_e", w_e, (n_features, 2 * width), p.dtype)
    dp, dq, dw_e = torch.empty_like(p), torch.zeros_like(q), torch.empty_like(w_e)
    like = edges.distance if edges.features is None else edges.features
    d_edge = torch.empty_like(like, dtype=p.dtype, memory_format=torch.contiguous_format) if edge_grad else p.new_empty(0)
    kernel(
        dp.data_ptr(), dq.data_ptr(), dw_e.data_ptr(), d_edge.data_ptr() if edge_grad else 0,
        grad.data_ptr(), p.data_ptr(), q.data_ptr(), w_e.data_ptr(),
        graph.pointers, graph.sizes, graph.basis, width, torch.get_num_threads(),
    )  # fmt: skip
    return dp, dq, dw_e, d_edge


def neighbor_sum(h: Tensor, edges: Edges, transpose: bool = False) -> Tensor:
    kernel = _kernel("neighbor_sum", h.dtype)
    n, width = edges.row_ptr.shape[0] - 1, h.shape[1]
    graph = _Graph(edges._replace(features=None, distance=h.new_empty(edges.sender.shape[0])), 0, h.dtype)
    h = _expect("h", h, (n, width), h.dtype)
    out = torch.empty_like(h)
    kernel(out.data_ptr(), h.data_ptr(), graph.pointers, graph.sizes, width, transpose, torch.get_num_threads())
    return out


def edge_moments(row_weight: Tensor, edges: Edges, n_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    kernel = _kernel("edge_moments", dtype)
    n = edges.row_ptr.shape[0] - 1
    graph = _Graph(edges, n_features, dtype)
    row_weight = _expect("row_weight", row_weight.to(dtype), (n,), dtype)
    by_receiver, by_sender = (row_weight.new_empty(n, n_features) for _ in range(2))
    gram = torch.empty(n_features, n_features, dtype=torch.float64)
    kernel(
        by_receiver.data_ptr(), by_sender.data_ptr(), gram.data_ptr(), row_weight.data_ptr(),
        graph.pointers, graph.sizes, graph.basis, torch.get_num_threads(),
    )  # fmt: skip
    return by_receiver, by_sender, gram
