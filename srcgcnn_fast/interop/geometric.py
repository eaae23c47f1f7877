"""PyTorch Geometric's ``CGConv``: a module of this package in its place, and the replacement of theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from ..errors import InputError
from ..graph.batch import GraphBatch
from ..nn.frozen import is_untouched
from ..ops import fused, reference, registry
from ..ops.reference import BatchNorm, Edges
from .indexed import TensorCache, blocks, edge_batch, own_copy
from .swap import Swapped, arguments, is_traced, own_formula

_AGGREGATIONS = {"add": "add", "sum": "add", "mean": "mean", "max": "max"}
_MODULES = {"add": "SumAggregation", "mean": "MeanAggregation", "max": "MaxAggregation"}
_METHODS = ("propagate", "message", "aggregate", "update")
_ARGUMENTS = ("x", "edge_index", "edge_attr")
_cache = TensorCache()


class CGConv(nn.Module):
    """The layer of PyTorch Geometric of this name: x_i' = x_i + sum_j sigmoid(z_ij W_f + b_f) softplus(z_ij W_s + b_s),
    z_ij = [x_i, x_j, e_ij]; constructor, state dict, initial weights and numbers are theirs. PyTorch Geometric itself
    is not needed.

    Args:
        channels: F, or (F_source, F_target) for a bipartite graph.
        dim: K, features of an edge.
        aggr: "add", "mean" or "max".
        batch_norm: over the sums, before x is added.
        bias: of both linear maps.
        flow: "source_to_target" or "target_to_source".
    """

    def __init__(
        self,
        channels: int | tuple[int, int],
        dim: int = 0,
        aggr: str = "add",
        batch_norm: bool = False,
        bias: bool = True,
        *,
        flow: str = "source_to_target",
    ) -> None:
        super().__init__()
        if aggr not in _AGGREGATIONS:
            raise InputError(f"aggr must be 'add', 'mean' or 'max', not {aggr!r}.")
        if flow not in ("source_to_target", "target_to_source"):
            raise InputError(f"flow must be 'source_to_target' or 'target_to_source', not {flow!r}.")
        self.channels, self.dim, self.aggr, self.batch_norm, self.flow = channels, dim, aggr, batch_norm, flow
        source, target = (channels, channels) if isinstance(channels, int) else channels
        self.lin_f = nn.Linear(source + target + dim, target, bias=bias)
        self.lin_s = nn.Linear(source + target + dim, target, bias=bias)
        self.bn = nn.BatchNorm1d(target) if batch_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New weights; the order of the random numbers is PyTorch Geometric's."""
        self.lin_f.reset_parameters()
        self.lin_s.reset_parameters()
        if self.bn is not None:
            self.bn.reset_parameters()

    def forward(self, x: Tensor | tuple[Tensor, Tensor], edge_index: Any, edge_attr: Tensor | None = None) -> Tensor:
        """
        Args:
            x: (N, F), or ((N_source, F_source), (N_target, F_target)).
            edge_index: (2, E) integer, source first, in any order; or the transposed adjacency (rows are targets) as a
                ``torch_sparse.SparseTensor`` or a ``torch.sparse`` tensor, whose values serve as ``edge_attr``.
            edge_attr: (E, K).

        Returns:
            (N, F), or (N_target, F_target).

        Raises:
            InputError: an index is not a row of x, or shapes disagree.
        """
        source, target = (x, x) if isinstance(x, Tensor) else x
        edges, edge_attr = _edges(edge_index, edge_attr, self.flow, id(self))
        if edge_attr is not None and edge_attr.ndim == 1:
            edge_attr = edge_attr[:, None]
        self._check_shapes(source, target, edges, edge_attr)
        graph = None
        if not is_traced():
            graph = _graph(edges, len(source), len(target), id(self))
            if graph is None:
                raise InputError(f"edge_index points outside the {len(source)} sources or {len(target)} targets of x.")
        return _cg_conv(self, source, target, edges, edge_attr, graph)

    def _check_shapes(self, source: Tensor, target: Tensor, edges: Tensor, edge_attr: Tensor | None) -> None:
        given = 0 if edge_attr is None else edge_attr.shape[1]
        width = source.shape[1] + target.shape[1] + given
        if width != self.lin_f.in_features or target.shape[1] != self.lin_f.out_features:
            raise InputError(
                f"x {tuple(source.shape)} and {tuple(target.shape)} with {given} edge features do not fit {self}."
            )
        if edge_attr is not None and edge_attr.shape[0] != edges.shape[1]:
            raise InputError(f"edge_attr has {edge_attr.shape[0]} rows for {edges.shape[1]} edges.")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.channels}, dim={self.dim})"


class GeometricConv(Swapped):
    """PyTorch Geometric's own ``CGConv``."""

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return any(
            cls.__name__ == "CGConv" and cls.__module__.startswith("torch_geometric.") for cls in type(module).__mro__
        )

    @staticmethod
    def refusal(module: Any) -> str | None:
        if not isinstance(module.aggr, str) or module.aggr not in _AGGREGATIONS:
            return f"its aggregation {module.aggr!r} is not add, mean or max"
        aggregation, name = type(module.aggr_module), _MODULES[_AGGREGATIONS[module.aggr]]
        if aggregation.__name__ != name or not aggregation.__module__.startswith("torch_geometric."):
            return f"its aggr_module is {aggregation.__name__}, not {name}"
        for name in _METHODS:
            if name in vars(module) and not _is_of_pyg(module, vars(module)[name]):
                return f"its {name} was replaced on the object"
        if module.node_dim != -2 or module.decomposed_layers != 1:
            return "its node_dim or decomposed_layers is not the default"
        for name in ("lin_f", "lin_s"):
            if type(getattr(module, name)) is not nn.Linear:
                return f"its {name} is {type(getattr(module, name)).__name__}, not Linear"
        return None

    @staticmethod
    def probe(module: Any, generator: torch.Generator) -> list[tuple[Any, ...]]:
        channels, k = module.channels, module.dim
        edge_index = torch.tensor([[1, 2, 0, 4, 2, 1, 0, 3, 4], [0, 1, 0, 3, 1, 4, 2, 0, 2]])
        edge_attr = torch.rand(9, k, dtype=torch.float64, generator=generator) if k else None
        widths = (channels,) if isinstance(channels, int) else channels
        x = [torch.randn(5, width, dtype=torch.float64, generator=generator) for width in widths]
        return [(x[0], edge_index, edge_attr)] if len(x) == 1 else [(tuple(x), edge_index, edge_attr)]

    def _set_jittable_templates(self, raise_on_error: bool = False) -> None:
        """The module's own class has them. PyTorch Geometric asks where a module is copied or unpickled, and would then
        take these for the plain methods, by which explanations mask edges.
        """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        given = arguments(self, _ARGUMENTS, args, kwargs)
        hooked = self.explain or any(hooks for name, hooks in vars(self).items() if _is_propagation_hook(name))
        if given is None or hooked or not {"x", "edge_index"} <= given.keys() or own_formula(self):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        x, edge_index, edge_attr = (given.get(name) for name in _ARGUMENTS)
        source, target = x if isinstance(x, tuple | list) else (x, x)
        if not isinstance(source, Tensor) or not isinstance(target, Tensor) or source.is_meta:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        edges, features = _edges(edge_index, edge_attr, self.flow, id(self))
        fits = features is None or (features.ndim == 2 and len(features) == edges.shape[1])
        n_features = 0 if features is None or not fits else features.shape[1]
        fits = fits and source.shape[-1] + target.shape[-1] + n_features == self.lin_f.weight.shape[1]
        graph = _graph(edges, len(source), len(target), id(self)) if fits else None
        if graph is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return _cg_conv(self, source, target, edges, features, graph)


def _is_of_pyg(module: Any, method: Any) -> bool:
    """Is it what an explanation leaves on the object when it ends: the method that the class has?"""
    forms = [getattr(type(module), f"_{form}_propagate", None) for form in ("orig", "jinja")]
    return getattr(method, "__self__", None) is module and method.__func__ in forms


def _is_propagation_hook(name: str) -> bool:
    parts = ("_propagate_", "_message_", "_aggregate_", "_edge_update_")
    return name.startswith(parts) and name.endswith("_hooks")


class _Graph(NamedTuple):
    """The edges in the order of their receivers."""

    sender: Tensor
    """(E,) int64"""
    receiver: Tensor
    """(E,) int64"""
    order: Tensor | None
    """(E,) int64, place of each edge in the input; None where that was sorted."""
    row_ptr: Tensor
    """(N_target + 1,) int32"""


def _edges(edge_index: Any, edge_attr: Tensor | None, flow: str, caller: int) -> tuple[Tensor, Tensor | None]:
    """(2, E) integer senders and receivers, and the features of the edges."""
    if isinstance(edge_index, Tensor) and edge_index.layout == torch.strided:
        wrapped = type(edge_index).__name__ == "EdgeIndex"
        if flow == "source_to_target" and not wrapped:
            return edge_index, edge_attr
        plain: Tensor = edge_index.as_tensor() if wrapped else edge_index  # type: ignore[attr-defined]
        if flow == "source_to_target":
            return _kept(edge_index, "plain", caller, lambda: plain.detach()), edge_attr
        return _kept(edge_index, "reversed", caller, lambda: plain.detach().flip(0)), edge_attr
    if flow != "source_to_target":
        raise InputError("A sparse adjacency has the flow 'source_to_target'; transpose it for the other.")
    if isinstance(edge_index, Tensor):
        coo = edge_index.to_sparse_coo().coalesce()
        pair = _kept(edge_index, "sparse", caller, lambda: coo.indices().detach().flip(0))
        value = coo.values() if coo.values().ndim > 1 else None
    else:  # torch_sparse.SparseTensor
        receiver, sender, value = edge_index.coo()
        pair = torch.stack([sender, receiver])
    return pair, value if edge_attr is None else edge_attr


def _kept(edge_index: Tensor, key: str, caller: int, build: Callable[[], Tensor]) -> Tensor:
    """One tensor for each given, so that what follows from it is found again."""
    pair: Tensor = build() if is_traced() else _cache.get((edge_index,), key, caller, build)
    return pair


def _graph(edges: Tensor, n_sources: int, n_targets: int, caller: int) -> _Graph | None:
    """The edges in order, for all layers of a forward pass; None where an index is not a row."""

    def build() -> _Graph | None:
        sender, receiver = edges.detach().long()
        if edges.shape[1]:
            outside = int(edges.min()) < 0 or int(sender.max()) >= n_sources or int(receiver.max()) >= n_targets
            if outside:
                return None
        order = None
        if bool((receiver.diff() < 0).any()):
            order = torch.argsort(receiver, stable=True)
            sender, receiver = sender[order], receiver[order]
        ends = torch.bincount(receiver, minlength=n_targets).cumsum(0)
        return _Graph(sender, receiver, order, torch.nn.functional.pad(ends, (1, 0)).int())

    if edges.ndim != 2 or edges.shape[0] != 2 or edges.is_floating_point():
        return None
    graph: _Graph | None = _cache.get((edges,), ("graph", n_sources, n_targets), caller, build)
    return graph


def _batch(edges: Tensor, graph: _Graph, features: Tensor | None, dtype: torch.dtype, caller: int) -> GraphBatch:
    """The graph as the operators take it, with one feature of zero where there are none."""

    def build() -> GraphBatch:
        rows = torch.arange(graph.row_ptr.shape[0] - 1, device=edges.device)
        low, high = (rows.scatter_reduce(0, graph.receiver, graph.sender, how) for how in ("amin", "amax"))
        given = edges.new_zeros(edges.shape[1], 1, dtype=dtype) if features is None else features.to(dtype)
        given = given if graph.order is None else given.index_select(0, graph.order)
        return edge_batch(graph.sender.int(), graph.row_ptr, blocks(low, high), given, features)

    if features is not None and features.requires_grad and torch.is_grad_enabled():
        return build()
    key = "batch", dtype, len(graph.row_ptr), torch.is_grad_enabled()
    batch: GraphBatch = _cache.get((edges, features), key, caller, build)
    return batch


def _cg_conv(
    module: Any, source: Tensor, target: Tensor, edges: Tensor, features: Tensor | None, graph: _Graph | None
) -> Tensor:
    """``graph``: the edges in order, or None where the call is traced."""
    device = target.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            dtype = module.lin_f.weight.dtype
            real = None if features is None else features.to(dtype)
            h = target.to(dtype)
            return _cg_conv(module, h if source is target else source.to(dtype), h, edges, real, graph)
    aggr = _AGGREGATIONS[module.aggr]
    if not all(map(_is_plain, (module.lin_f, module.lin_s))):
        sender, receiver = edges.long()
        ends = [target.index_select(0, receiver), source.index_select(0, sender)]
        z = torch.cat(ends if features is None else [*ends, features], dim=1)
        message = torch.sigmoid(module.lin_f(z)) * softplus(module.lin_s(z))
        return _finish(module, _aggregate(message, receiver, target, aggr), target, edges, aggr)
    weight = torch.cat([module.lin_f.weight, module.lin_s.weight])
    bias = None if module.lin_f.bias is None else torch.cat([module.lin_f.bias, module.lin_s.bias])
    fast = graph is not None and source is target and aggr != "max" and edges.shape[1] > 0
    if graph is not None and fast and registry.select(target, inference=True) == "cpu":
        batch = _batch(edges, graph, features, target.dtype, id(module))
        total = _summed_messages(own_copy(target), weight, bias, batch)
    else:
        sender, receiver = edges.long()
        kept = None if features is None else own_copy(features)
        message = _messages(own_copy(source), own_copy(target), weight, bias, sender, receiver, kept)
        total = _aggregate(message, receiver, target, aggr)
    return _finish(module, total, target, edges, aggr)


def _is_plain(linear: nn.Module) -> bool:
    """Is it computed by its weight and bias alone, without anybody watching?"""
    return type(linear).forward is nn.Linear.forward and is_untouched(linear)


def _finish(module: Any, total: Tensor, target: Tensor, edges: Tensor, aggr: str) -> Tensor:
    """From sums over the edges to the output."""
    if aggr == "mean":
        degree = total.new_zeros(len(total)).index_add(0, edges[1].long(), total.new_ones(edges.shape[1]))
        total = total / degree.clamp(min=1)[:, None]
    return (total if module.bn is None else module.bn(total)) + target


def _messages(
    source: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sender: Tensor,
    receiver: Tensor,
    features: Tensor | None,
) -> Tensor:
    """(E, F), with one product per node in place of one per edge."""
    width, ends = target.shape[1], target.shape[1] + source.shape[1]
    z = linear(target, weight[:, :width], bias).index_select(0, receiver)
    z = z + linear(source, weight[:, width:ends]).index_select(0, sender)
    if features is not None:
        z = z + linear(features, weight[:, ends:])
    return torch.sigmoid(z[:, :width]) * softplus(z[:, width:])


def _aggregate(message: Tensor, receiver: Tensor, target: Tensor, aggr: str) -> Tensor:
    zeros = message.new_zeros(len(target), message.shape[1])
    if aggr != "max":
        return zeros.index_add(0, receiver, message)
    index = receiver[:, None].expand_as(message)
    return zeros.scatter_reduce(0, index, message, "amax", include_self=False)


def _summed_messages(h: Tensor, weight: Tensor, bias: Tensor | None, batch: GraphBatch) -> Tensor:
    """(N, F) sums of the messages by the compiled operator."""
    missing = weight.shape[1] - 2 * h.shape[1]
    if missing == 0:  # no features: those of the batch are zero
        weight = torch.nn.functional.pad(weight, (0, 1))
    return _SummedMessages.apply(h, weight, bias, batch.edge_features, batch)


class _SummedMessages(torch.autograd.Function):
    """m_i = sum_j sigmoid(z_ij[:F]) softplus(z_ij[F:]).

    The operator computes softplus(h + bn2(m)) after bn1(z). Both norms are the identity here; m is one of its outputs.
    Backward, the derivative of the outer softplus is 1 where its argument is large, so the operator is given
    64 + 2 |h| in place of m, at least 64 with any h, and the residual path is taken off.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, features: Tensor | None, batch: GraphBatch
    ) -> Tensor:
        ctx.save_for_backward(h, weight, bias, features)
        ctx.batch = batch
        with torch.no_grad():
            layer, graph, moments, wide = _operands(h, weight, bias, features, batch)
            return torch.ops.srcgcnn_fast.gated_conv(wide(h), *layer, *graph, *moments)[1][:, : h.shape[1]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h, weight, bias, features = ctx.saved_tensors
        batch: GraphBatch = ctx.batch
        if fused.is_again(grad):  # to be differentiated again: through the formula

            def run(h: Tensor, weight: Tensor, bias: Tensor | None, features: Tensor | None) -> Tensor:
                given = reference.edge_vectors(_plain_edges(batch, features), weight.shape[1] - 2 * h.shape[1], h.dtype)
                message = _messages(h, h, weight, bias, batch.sender.long(), batch.receiver, given)
                return _aggregate(message, batch.receiver, h, "add")

            return *fused.gradients(run, [h, weight, bias, features], ctx.needs_input_grad[:4], grad), None
        layer, graph, moments, wide = _operands(h, weight, bias, features, batch)
        width, more = h.shape[1], layer.gamma2.shape[0] - h.shape[1]
        edge_grad = ctx.needs_input_grad[3]
        dh, dw, db, *_, edge = torch.ops.srcgcnn_fast.gated_conv_backward(
            wide(grad), wide(h), 64 + 2 * wide(h).abs(), *layer, *graph, *moments, edge_grad
        )
        if more:
            dw = dw.reshape(2, width + more, -1)[:, :width].flatten(0, 1)
            dw = torch.cat([dw[:, :width], dw[:, width + more : 2 * width + more], dw[:, 2 * (width + more) :]], 1)
            db = db.reshape(2, -1)[:, :width].flatten()
        return dh[:, :width] - grad, dw, None if bias is None else db, edge if edge_grad else None, None


def _plain_edges(batch: GraphBatch, features: Tensor | None) -> Edges:
    return Edges(batch.distance, features, batch.sender, batch.row_ptr, batch.crystal_ptr, 0.0, 1.0)


def _operands(h: Tensor, weight: Tensor, bias: Tensor | None, features: Tensor | None, batch: GraphBatch) -> Any:
    """Layer, graph and moments as the operators take them, and what widens (N, F) to their width."""
    zero = weight.new_zeros(weight.shape[0])
    width = h.shape[1]
    more = fused.missing_channels(h)
    # 1 / sqrt(0 + 1) is exactly 1, for the channels that widening adds too.
    norms = [BatchNorm(None, None, zero[:n], zero[:n], False, 0.0, 1.0) for n in (2 * width, width)]
    layer = fused.operator_layer(weight, bias, norms[0], norms[1], width, more)
    edges = _plain_edges(batch, features)
    graph = batch.cached(("graph", h.dtype), lambda: fused.with_shells(edges)) if features is None else None
    graph = fused.with_shells(edges) if graph is None else graph
    moments = fused.Moments(batch.weight.to(h.dtype), None, None, None, None, None)
    return layer, graph, moments, lambda x: torch.nn.functional.pad(x, (0, more)) if more else x.contiguous()
