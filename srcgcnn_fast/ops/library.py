"""The operators as PyTorch sees them: schema, fake, autograd, and the kernel of each device."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import cpu, cuda, cuda_conv, reference, registry, triton
from .cpu import Graph, Layer, Moments
from .reference import BatchNorm, Dense, Edges

_GRAPH = (
    "Tensor distance, Tensor? features, Tensor sender, Tensor row_ptr, Tensor crystal_ptr, Tensor? shell_of, "
    "Tensor? shell_distance, Tensor? shell_count, float dmin, float step"
)
_LAYER = (
    "Tensor weight, Tensor? bias, Tensor gamma1, Tensor beta1, Tensor gamma2, Tensor beta2, Tensor mean1, Tensor var1, "
    "Tensor mean2, Tensor var2, float eps1, float eps2, bool train1, bool train2"
)
_MOMENTS = "Tensor row_weight, Tensor? in_degree, Tensor? by_receiver, Tensor? by_sender, Tensor? sum, Tensor? gram"
_N_LAYER, _N_GRAPH, _N_MOMENTS = len(Layer._fields), len(Graph._fields), len(Moments._fields)

_library = torch.library.Library("srcgcnn_fast", "DEF")
_library.define(
    "edge_shells(Tensor distance, Tensor sender, Tensor row_ptr, Tensor crystal_ptr) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"edge_moments(Tensor row_weight, {_GRAPH}, int n_features) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"gated_conv(Tensor h, {_LAYER}, {_GRAPH}, {_MOMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"gated_conv_backward(Tensor grad, Tensor h, Tensor m, {_LAYER}, {_GRAPH}, {_MOMENTS}, bool edge_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "gated_conv_stack(Tensor h, Tensor[] weights, Tensor[] biases, Tensor[] vectors, float[] eps, bool shared, "
    f"{_GRAPH}) -> Tensor"
)
_library.define(
    "gated_conv_network(Tensor h, Tensor? species, Tensor row_weight, Tensor?[] dense, Tensor[] weights, "
    f"Tensor[] biases, Tensor[] vectors, float[] eps, bool shared, {_GRAPH}) -> Tensor"
)


def _split(arguments: tuple[Any, ...]) -> tuple[Layer, Graph, Moments]:
    layer, rest = Layer(*arguments[:_N_LAYER]), arguments[_N_LAYER:]
    return layer, Graph(*rest[:_N_GRAPH]), Moments(*rest[_N_GRAPH : _N_GRAPH + _N_MOMENTS])


def _conv_cpu(h: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return cpu.conv(h, *_split(arguments))


def _conv_backward_cpu(grad: Tensor, h: Tensor, m: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return cpu.conv_backward(grad, h, m, *_split(arguments), arguments[-1])


def _stack_layers(
    weights: list[Tensor], biases: list[Tensor], vectors: list[Tensor], eps: list[float], shared: bool
) -> list[Layer]:
    n_steps = len(eps) // 2
    layers = []
    for t in range(n_steps):
        weight = weights[0 if shared else t]
        bias = biases[min(t, len(biases) - 1)] if biases else None
        fields: list[Any] = [weight, bias, *vectors[8 * t : 8 * t + 8], *eps[2 * t : 2 * t + 2], False, False]
        layers.append(Layer(*fields))
    return layers


_library.impl("edge_shells", cpu.edge_shells, "CPU")
_library.impl("edge_moments", lambda w, *g: cpu.edge_moments(w, Graph(*g[:-1]), g[-1]), "CPU")
_library.impl("gated_conv", _conv_cpu, "CPU")
_library.impl("gated_conv_backward", _conv_backward_cpu, "CPU")
_library.impl("gated_conv_stack", lambda h, *a: cpu.stack(h, _stack_layers(*a[:5]), Graph(*a[5:])), "CPU")


def _network(backend: Any, h: Tensor, species: Tensor | None, row_weight: Tensor, *arguments: Any) -> Tensor:
    """``dense``: weight and bias of the embedding, which may be absent, then of each map of the readout."""
    dense, *layers = arguments[:6]
    first, *readout = [Dense(w, b) for w, b in zip(dense[::2], dense[1::2], strict=True)]
    embedding, graph = None if first.weight is None else first, Graph(*arguments[6:])
    found: Tensor = backend.network(h, species, embedding, _stack_layers(*layers), graph, row_weight, readout)
    return found


_library.impl("gated_conv_network", partial(_network, cpu), "CPU")


@torch.library.register_fake("srcgcnn_fast::edge_shells", lib=_library)
def _(distance: Tensor, sender: Tensor, row_ptr: Tensor, crystal_ptr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(sender), torch.empty_like(distance), sender.new_empty(crystal_ptr.shape[0] - 1)


@torch.library.register_fake("srcgcnn_fast::edge_moments", lib=_library)
def _(row_weight: Tensor, *graph_and_size: Any) -> tuple[Tensor, ...]:
    n, k = row_weight.shape[0], graph_and_size[-1]
    by_row = row_weight.new_empty(n, k)
    gram = row_weight.new_empty(k, k, dtype=torch.float64)
    total = row_weight.new_empty(k, dtype=torch.float64)
    return torch.empty_like(row_weight), by_row, torch.empty_like(by_row), total, gram


@torch.library.register_fake("srcgcnn_fast::gated_conv", lib=_library)
def _(h: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    layer, _, _ = _split(arguments)
    return (torch.empty_like(h), torch.empty_like(h), *(torch.empty_like(x) for x in layer[6:10]))


@torch.library.register_fake("srcgcnn_fast::gated_conv_backward", lib=_library)
def _(grad: Tensor, h: Tensor, m: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    layer, graph, _ = _split(arguments)
    like = graph.distance if graph.features is None else graph.features
    shapes = (h, layer.weight, layer.gamma1, layer.gamma1, layer.beta1, layer.gamma2, layer.beta2)
    return (*(torch.empty_like(x) for x in shapes), h.new_empty(like.shape if arguments[-1] else (0,)))


@torch.library.register_fake("srcgcnn_fast::gated_conv_stack", lib=_library)
def _(h: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(h)


@torch.library.register_fake("srcgcnn_fast::gated_conv_network", lib=_library)
def _(h: Tensor, *arguments: Any) -> Tensor:
    dense, weights, graph = arguments[2], arguments[3], Graph(*arguments[8:])
    n_out = dense[-2].shape[0] if len(dense) > 2 else weights[0].shape[0] // 2
    return h.new_empty(graph.crystal_ptr.shape[0] - 1, n_out)


class _Saved:
    """Keeps an operator's mixed arguments on an autograd context, and gives them back."""

    @staticmethod
    def put(ctx: Any, arguments: tuple[Any, ...]) -> None:
        is_tensor = [isinstance(x, Tensor) for x in arguments]
        ctx.save_for_backward(*(x for x, keep in zip(arguments, is_tensor, strict=True) if keep))
        ctx.plain = [None if keep else x for x, keep in zip(arguments, is_tensor, strict=True)]
        ctx.is_tensor = is_tensor

    @staticmethod
    def get(ctx: Any) -> tuple[Any, ...]:
        tensors = iter(ctx.saved_tensors)
        return tuple(next(tensors) if keep else x for keep, x in zip(ctx.is_tensor, ctx.plain, strict=True))


_STATISTICS = slice(6, 10)


def _setup_conv(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, *arguments = inputs
    _, m, *used = output
    arguments[_STATISTICS] = used
    _Saved.put(ctx, (h, m, *arguments))
    ctx.set_materialize_grads(False)


def _backward_conv(ctx: Any, grad: Tensor | None, *_unused: Any) -> tuple[Any, ...]:
    h, m, *arguments = _Saved.get(ctx)
    none = [None] * (1 + len(arguments))
    if grad is None:
        return tuple(none)
    at = 1 + _N_LAYER  # distance and features among the inputs (h, layer, graph, moments)
    edge_grad = ctx.needs_input_grad[at] or ctx.needs_input_grad[at + 1]
    dh, dw, db, dg1, db1, dg2, db2, d_edge = torch.ops.srcgcnn_fast.gated_conv_backward(
        grad.contiguous(), h, m, *arguments, edge_grad
    )
    none[:7] = [dh, dw, None if arguments[1] is None else db, dg1, db1, dg2, db2]
    if edge_grad:
        none[at + (arguments[_N_LAYER + 1] is not None)] = d_edge
    return tuple(none)


def by_formula(h: Tensor, layer: Layer, graph: Graph, row_weight: Tensor) -> Tensor:
    """A convolution by the reference, which leaves running statistics as they are."""
    edges = Edges(graph.distance, graph.features, *graph[2:5], graph.dmin, graph.step)
    bn1 = BatchNorm(layer.gamma1, layer.beta1, None, None, True, 0.0, layer.eps1)
    bn2 = BatchNorm(layer.gamma2, layer.beta2, None, None, True, 0.0, layer.eps2)
    if not layer.train1:
        bn1 = bn1._replace(training=False, running_mean=layer.mean1.detach(), running_var=layer.var1.detach())
    if not layer.train2:
        bn2 = bn2._replace(training=False, running_mean=layer.mean2.detach(), running_var=layer.var2.detach())
    return reference.gated_conv(h, edges, row_weight, layer.weight, layer.bias, bn1, bn2)


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _Saved.put(ctx, inputs)


def _backward_second(ctx: Any, *upper: Tensor) -> tuple[Any, ...]:
    """Second derivatives are rare: they go through the reference formula, and so do those of higher order."""
    is_again = torch.is_grad_enabled()

    def leaf(x: Tensor) -> Tensor:
        return x.view_as(x) if is_again and x.requires_grad else x.detach().requires_grad_()

    grad, h, _m, *arguments = _Saved.get(ctx)
    layer, graph, moments = _split(tuple(arguments))
    edge_grad = arguments[-1]
    first_inputs = [h, *layer[:6]] + ([graph.distance if graph.features is None else graph.features] * edge_grad)
    with torch.enable_grad():
        grad = leaf(grad)
        leaves: list[Any] = [None if x is None else leaf(x) for x in first_inputs]
        h, weight, bias, gamma1, beta1, gamma2, beta2, *edge = leaves
        distance, features = graph.distance, graph.features
        if edge_grad:
            distance, features = (edge[0], None) if features is None else (distance, edge[0])
        graph = graph._replace(distance=distance, features=features)
        layer = Layer(weight, bias, gamma1, beta1, gamma2, beta2, *layer[6:])
        out = by_formula(h, layer, graph, moments.row_weight)
        wanted = [x for x in leaves if x is not None]
        first = torch.autograd.grad(out, wanted, grad, create_graph=True)
        matching = [u for u, x in zip(upper, leaves, strict=False) if x is not None]
        second = torch.autograd.grad(first, [grad, *wanted], matching, create_graph=is_again, allow_unused=True)
    given = iter(second[1:])
    by_leaf = [None if x is None else next(given) for x in leaves]
    none: list[Tensor | None] = [None] * (3 + len(arguments))
    none[0], none[1], none[3:9] = second[0], by_leaf[0], by_leaf[1:7]
    if edge_grad:
        none[3 + _N_LAYER + (graph.features is not None)] = by_leaf[7]
    return tuple(none)


torch.library.register_autograd("srcgcnn_fast::gated_conv", _backward_conv, setup_context=_setup_conv, lib=_library)
torch.library.register_autograd(
    "srcgcnn_fast::gated_conv_backward", _backward_second, setup_context=_setup_second, lib=_library
)

# For CUDA tensors


def _gpu_kernels(h: Tensor) -> Any:
    """Whose convolutions a call with gradients or statistics of the batch takes."""
    return cuda_conv if registry.trains_compiled(h) else triton


_library.impl("edge_shells", triton.edge_shells, "CUDA")
_library.impl("edge_moments", lambda w, *g: _gpu_kernels(w).edge_moments(w, Graph(*g[:-1]), g[-1]), "CUDA")
_library.impl("gated_conv", lambda h, *a: _gpu_kernels(h).conv(h, *_split(a)), "CUDA")
_library.impl(
    "gated_conv_backward", lambda d, h, m, *a: _gpu_kernels(h).conv_backward(d, h, m, *_split(a), a[-1]), "CUDA"
)


def _stack_cuda(h: Tensor, *arguments: Any) -> Tensor:
    backend = cuda if registry.select(h, inference=True) == "cuda" else triton
    return backend.stack(h, _stack_layers(*arguments[:5]), Graph(*arguments[5:]))


_library.impl("gated_conv_stack", _stack_cuda, "CUDA")


def _network_cuda(h: Tensor, species: Tensor | None, row_weight: Tensor, *arguments: Any) -> Tensor:
    width = arguments[1][0].shape[0] // 2
    backend = cuda if registry.select(h, inference=True, width=width) == "cuda" else triton
    return _network(backend, h, species, row_weight, *arguments)


_library.impl("gated_conv_network", _network_cuda, "CUDA")
