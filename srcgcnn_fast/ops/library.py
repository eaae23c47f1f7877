"""The operators as PyTorch sees them: schema, fake, autograd, and the kernel of each device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import cpu, reference
from .reference import Edges

_EDGES = "Tensor distance, Tensor? features, Tensor sender, Tensor row_ptr, Tensor crystal_ptr, float dmin, float step"

_library = torch.library.Library("srcgcnn_fast", "DEF")
_library.define(f"gate_sum(Tensor p, Tensor q, Tensor w_e, {_EDGES}) -> Tensor")
_library.define(
    f"gate_sum_backward(Tensor grad, Tensor p, Tensor q, Tensor w_e, {_EDGES}, bool edge_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define("neighbor_sum(Tensor h, Tensor sender, Tensor row_ptr, Tensor crystal_ptr, bool transpose) -> Tensor")
_library.define(f"edge_moments(Tensor row_weight, {_EDGES}, int n_features) -> (Tensor, Tensor, Tensor)")


def _topology(sender: Tensor, row_ptr: Tensor, crystal_ptr: Tensor) -> Edges:
    return Edges(sender, None, sender, row_ptr, crystal_ptr)


_library.impl("gate_sum", lambda p, q, w, *e: cpu.gate_sum(p, q, w, Edges(*e)), "CPU")
_library.impl(
    "gate_sum_backward", lambda g, p, q, w, *e: cpu.gate_sum_backward(g, p, q, w, Edges(*e[:-1]), e[-1]), "CPU"
)
_library.impl("neighbor_sum", lambda h, s, r, c, t: cpu.neighbor_sum(h, _topology(s, r, c), t), "CPU")
_library.impl("edge_moments", lambda w, *e: cpu.edge_moments(w, Edges(*e[:-1]), e[-1], w.dtype), "CPU")


@torch.library.register_fake("srcgcnn_fast::gate_sum", lib=_library)
def _(p: Tensor, q: Tensor, w_e: Tensor, *edges: Any) -> Tensor:
    return p.new_empty(p.shape[0], p.shape[1] // 2)


@torch.library.register_fake("srcgcnn_fast::gate_sum_backward", lib=_library)
def _(grad: Tensor, p: Tensor, q: Tensor, w_e: Tensor, *edges_and_flag: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    edges, edge_grad = Edges(*edges_and_flag[:-1]), edges_and_flag[-1]
    like = edges.distance if edges.features is None else edges.features
    d_edge = p.new_empty(like.shape if edge_grad else (0,))
    return p.new_empty(p.shape), p.new_empty(q.shape), p.new_empty(w_e.shape), d_edge


@torch.library.register_fake("srcgcnn_fast::neighbor_sum", lib=_library)
def _(h: Tensor, *topology: Any) -> Tensor:
    return h.new_empty(h.shape)


@torch.library.register_fake("srcgcnn_fast::edge_moments", lib=_library)
def _(row_weight: Tensor, *edges_and_size: Any) -> tuple[Tensor, Tensor, Tensor]:
    n, k = row_weight.shape[0], edges_and_size[-1]
    by_row = row_weight.new_empty(n, k)
    return by_row, torch.empty_like(by_row), row_weight.new_empty(k, k, dtype=torch.float64)


def _save_edges(ctx: Any, inputs: tuple[Any, ...], first: int) -> None:
    ctx.save_for_backward(*inputs[: first + 5])
    ctx.dmin, ctx.step = inputs[first + 5 : first + 7]
    ctx.first = first


def _saved(ctx: Any) -> tuple[tuple[Tensor, ...], Edges]:
    tensors = ctx.saved_tensors
    return tensors[: ctx.first], Edges(*tensors[ctx.first :], ctx.dmin, ctx.step)


def _setup_gate_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save_edges(ctx, inputs, 3)


def _backward_gate_sum(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (p, q, w_e), edges = _saved(ctx)
    edge_grad = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    dp, dq, dw_e, d_edge = torch.ops.srcgcnn_fast.gate_sum_backward(grad.contiguous(), p, q, w_e, *edges, edge_grad)
    d_distance = d_edge if edge_grad and edges.features is None else None
    d_features = d_edge if edge_grad and edges.features is not None else None
    return dp, dq, dw_e, d_distance, d_features, None, None, None, None, None


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save_edges(ctx, inputs, 4)
    ctx.edge_grad = inputs[-1]


def _backward_second(ctx: Any, *upper: Tensor) -> tuple[Any, ...]:
    """Second derivatives are rare: they go through the reference formula."""
    (grad, p, q, w_e), edges = _saved(ctx)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (grad, p, q, w_e)]
        edge = (edges.distance if edges.features is None else edges.features).detach()
        if ctx.edge_grad:
            edge.requires_grad_()
        leaves += [edge] if ctx.edge_grad else []
        edges = edges._replace(distance=edge) if edges.features is None else edges._replace(features=edge)
        m = reference.gate_sum(leaves[1], leaves[2], leaves[3], edges)
        first = torch.autograd.grad(m, leaves[1:], leaves[0], create_graph=True)
        second = torch.autograd.grad(first, leaves, upper[: len(first)], allow_unused=True)
    d_edge = second[4] if ctx.edge_grad else None
    d_distance, d_features = (d_edge, None) if edges.features is None else (None, d_edge)
    return *second[:4], d_distance, d_features, None, None, None, None, None, None


def _setup_neighbor_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:4])
    ctx.transpose = inputs[4]


def _backward_neighbor_sum(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    topology = ctx.saved_tensors
    dh = torch.ops.srcgcnn_fast.neighbor_sum(grad.contiguous(), *topology, not ctx.transpose)
    return dh, None, None, None, None


def _register(name: str, backward: Any, setup: Any) -> None:
    torch.library.register_autograd(f"srcgcnn_fast::{name}", backward, setup_context=setup, lib=_library)


_register("gate_sum", _backward_gate_sum, _setup_gate_sum)
_register("gate_sum_backward", _backward_second, _setup_second)
_register("neighbor_sum", _backward_neighbor_sum, _setup_neighbor_sum)
