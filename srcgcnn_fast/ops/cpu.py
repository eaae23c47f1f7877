"""The compiled CPU backend: checks shapes, types and indices, then calls the C++ kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from .reference import Dense
from .registry import core, core_problem

_SUFFIX = {torch.float32: "_f32", torch.float64: "_f64"}
DTYPES = tuple(_SUFFIX)
_FAULTS = {
    1: "row_ptr must start at 0, never decrease and end at the number of edges",
    2: "an edge's sender must be a row of the receiver's own crystal",
    3: "crystal_ptr must start at 0, never decrease and end at the number of rows",
    4: "the kept shells are not those of the crystal's edges, so the batch was written to behind its cache; call "
    "batch.cache.clear()",
}


class Graph(NamedTuple):
    """The edges of a batch with their shells: edges of a crystal at the same distance are evaluated once."""

    distance: Tensor
    """(E,) Å."""
    features: Tensor | None
    """(E, K), in place of the Gaussians of ``distance``."""
    sender: Tensor
    """(E,) int32."""
    row_ptr: Tensor
    """(N + 1,) int32."""
    crystal_ptr: Tensor
    """(B + 1,) int32."""
    shell_of: Tensor | None
    """(E,) int32, shell of each edge, counted within its crystal; None where edges carry features."""
    shell_distance: Tensor | None
    """(E,) Å; those of a crystal begin at its first edge."""
    shell_count: Tensor | None
    """(B,) int32."""
    dmin: float
    step: float


class Moments(NamedTuple):
    """What batch statistics need of the graph and the rows' weights, for every layer and step."""

    row_weight: Tensor
    """(N,)"""
    in_degree: Tensor | None
    """(N,), sum of the receivers' weights, by sender."""
    by_receiver: Tensor | None
    """(N, K), sum_j e_ij."""
    by_sender: Tensor | None
    """(N, K), sum_i w_i e_ij."""
    sum: Tensor | None
    """(K,) float64, sum_ij w_i e_ij."""
    gram: Tensor | None
    """(K, K) float64, sum_ij w_i e_ij^T e_ij."""


class Layer(NamedTuple):
    """One convolution as the kernels take it; every vector is present: of the first norm (2F,), of the second (F,)."""

    weight: Tensor
    """(2F, 2F + K)"""
    bias: Tensor | None
    """(2F,)"""
    gamma1: Tensor
    beta1: Tensor
    gamma2: Tensor
    beta2: Tensor
    mean1: Tensor
    var1: Tensor
    mean2: Tensor
    var2: Tensor
    eps1: float
    eps2: float
    train1: bool
    train2: bool


class Running(NamedTuple):
    """Running statistics of a layer's norms that move with the batch; None where they do not."""

    mean1: Tensor | None
    var1: Tensor | None
    mean2: Tensor | None
    var2: Tensor | None
    momentum1: float
    momentum2: float


STILL = Running(None, None, None, None, 0.0, 0.0)


def kernel_width(dtype: torch.dtype) -> int:
    """F must be a multiple of this."""
    return int(getattr(_core(dtype), "width" + _SUFFIX[dtype]))


def _core(dtype: torch.dtype) -> Any:
    if core is None:
        raise InputError(f"The CPU backend cannot run: {core_problem}.")
    if dtype not in _SUFFIX:
        raise InputError(f"The CPU kernels take float32 and float64, not {dtype}.")
    return core


def _kernel(name: str, dtype: torch.dtype) -> Any:
    return getattr(_core(dtype), name + _SUFFIX[dtype])


def _check(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if x.dtype is not dtype or x.shape != shape or not x.is_cpu or not x.is_contiguous() or x.is_neg():
        view = ", a negated view (call resolve_neg())" if x.is_neg() else ""
        raise InputError(
            f"{name} must be a contiguous {dtype} CPU tensor of shape {shape}, "
            f"not {x.dtype} {tuple(x.shape)} on {x.device.type}{view}."
        )
    if not x.data_ptr() and x.numel():
        raise InputError(
            f"{name} is a {type(x).__name__}, whose numbers the kernels cannot read; use plain tensors, or the backend "
            "'reference'."
        )


def counted(name: str, ptr: Tensor) -> int:
    """What a pointer counts, which has one place more."""
    if ptr.dim() != 1 or ptr.shape[0] == 0:
        raise InputError(f"{name} must have one dimension and begin with a 0, not the shape {tuple(ptr.shape)}.")
    return ptr.shape[0] - 1


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class _Edges:
    """Addresses, sizes and Gaussians of a graph, checked."""

    def __init__(self, graph: Graph, n_features: int, dtype: torch.dtype, with_shells: bool = True) -> None:
        n_rows, n_edges = counted("row_ptr", graph.row_ptr), graph.sender.shape[0]
        n_crystals = counted("crystal_ptr", graph.crystal_ptr)
        if graph.step <= 0:
            raise InputError(f"The Gaussians' step must be positive, not {graph.step}.")
        _check("sender", graph.sender, (n_edges,), torch.int32)
        _check("row_ptr", graph.row_ptr, (n_rows + 1,), torch.int32)
        _check("crystal_ptr", graph.crystal_ptr, (n_crystals + 1,), torch.int32)
        if graph.features is not None:
            _check("edge_features", graph.features, (n_edges, n_features), dtype)
        else:
            _check("distance", graph.distance, (n_edges,), dtype)
            if with_shells:
                assert graph.shell_of is not None and graph.shell_distance is not None and graph.shell_count is not None
                _check("shell_of", graph.shell_of, (n_edges,), torch.int32)
                _check("shell_distance", graph.shell_distance, (n_edges,), dtype)
                _check("shell_count", graph.shell_count, (n_crystals,), torch.int32)
        self.sizes = (n_rows, n_edges, n_crystals, n_features)
        self.basis = (float(graph.dmin), float(graph.step))
        self.addresses = [_address(x) for x in graph[:8]]
        if graph.features is not None:
            self.addresses[5:] = 0, 0, 0  # edges with features have no shells
            if n_edges == 0:  # whose address is null: as if there were none
                self.addresses[1] = self.addresses[3]
        fault, where = core.check_graph(self.addresses, self.sizes)
        if fault:
            raise InputError(f"Bad graph at position {where}: {_FAULTS[fault]}.")

    @property
    def arguments(self) -> tuple[list[int], tuple[int, int, int, int], tuple[float, float]]:
        return self.addresses, self.sizes, self.basis


def edge_shells(
    distance: Tensor, sender: Tensor, row_ptr: Tensor, crystal_ptr: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``shell_of``, ``shell_distance`` and ``shell_count`` of :class:`Graph`.

    Raises:
        InputError: a shape, type or index is wrong.
    """
    graph = Graph(distance, None, sender, row_ptr, crystal_ptr, None, None, None, 0.0, 1.0)
    edges = _Edges(graph, 1, distance.dtype, with_shells=False)
    shell_of, shell_distance = torch.empty_like(sender), torch.zeros_like(distance)
    shell_count = torch.empty(edges.sizes[2], dtype=torch.int32, device="cpu")
    _kernel("edge_shells", distance.dtype)(
        shell_of.data_ptr(),
        shell_distance.data_ptr(),
        shell_count.data_ptr(),
        *edges.arguments,
        torch.get_num_threads(),
    )
    return shell_of, shell_distance, shell_count


def edge_moments(row_weight: Tensor, graph: Graph, n_features: int) -> tuple[Tensor, ...]:
    """The other fields of :class:`Moments`, for K = ``n_features``.

    Raises:
        InputError: a shape, type or index is wrong.
    """
    dtype = row_weight.dtype
    edges = _Edges(graph, n_features, dtype)
    n = edges.sizes[0]
    _check("row_weight", row_weight, (n,), dtype)
    in_degree = torch.empty_like(row_weight)
    by_receiver, by_sender = (row_weight.new_empty(n, n_features) for _ in range(2))
    total = row_weight.new_empty(n_features, dtype=torch.float64)
    gram = row_weight.new_empty(n_features, n_features, dtype=torch.float64)
    outputs = (in_degree, by_receiver, by_sender, total, gram)
    _kernel("edge_moments", dtype)(
        *(x.data_ptr() for x in outputs), row_weight.data_ptr(), *edges.arguments, torch.get_num_threads()
    )
    return outputs


def _layer_arguments(
    layer: Layer, width: int, n_features: int, dtype: torch.dtype, statistics: list[int] | None = None
) -> tuple[list[int], tuple[float, float, bool, bool]]:
    """``statistics``: addresses in place of the layer's means and variances."""
    if width % kernel_width(dtype):
        raise InputError(f"The CPU kernels take multiples of {kernel_width(dtype)} features of a row, not {width}.")
    _check("weight", layer.weight, (2 * width, 2 * width + n_features), dtype)
    vectors = layer[1:10] if statistics is None else layer[1:6]
    for name, x in zip(Layer._fields[1:], vectors, strict=False):
        if x is not None:
            _check(name, x, (width if name.endswith("2") else 2 * width,), dtype)
    return [layer.weight.data_ptr(), *map(_address, vectors), *(statistics or ())], layer[10:14]


def _moment_addresses(moments: Moments, edges: _Edges, dtype: torch.dtype, train1: bool) -> list[int]:
    n, _, _, n_features = edges.sizes
    _check("row_weight", moments.row_weight, (n,), dtype)
    if train1:
        assert moments.in_degree is not None and moments.by_receiver is not None
        assert moments.by_sender is not None and moments.sum is not None and moments.gram is not None
        _check("in_degree", moments.in_degree, (n,), dtype)
        _check("by_receiver", moments.by_receiver, (n, n_features), dtype)
        _check("by_sender", moments.by_sender, (n, n_features), dtype)
        _check("sum", moments.sum, (n_features,), torch.float64)
        _check("gram", moments.gram, (n_features, n_features), torch.float64)
    return [_address(x) for x in moments]


def _running_arguments(running: Running, width: int, dtype: torch.dtype) -> tuple[list[int], tuple[float, float]]:
    for name, x in zip(Running._fields[:4], running[:4], strict=True):
        if x is not None:
            _check("running_" + name, x, (width if name.endswith("2") else 2 * width,), dtype)
    return [_address(x) for x in running[:4]], running[4:]


class Joint(NamedTuple):
    """Norms that train on the values of several processes, as :class:`.ranks.Exchange` joins them."""

    messages: Sequence[Tensor | None]
    """Of the first and the second norm (1 + 4F,) and (1 + 2F,) float64: what the kernel says, and is then told."""
    exchange: Callable[[int], None]
    """Called with 0 or 1 when that message is written; replaces it by what all processes know (see kernels.h)."""


ALONE = Joint((), lambda _: None)


def _joint_arguments(joint: Joint, width: int) -> tuple[list[int], Callable[[int], None]]:
    for message, size in zip(joint.messages, (4 * width, 2 * width), strict=False):
        if message is not None:
            _check("message", message, (1 + size,), torch.float64)
    return [_address(x) for x in joint.messages], joint.exchange


def _features(h: Tensor, species: Tensor | None, n_rows: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Addresses and size of the rows' features, checked: (N, F), or a table (U, F) and the row's place in it (N,)."""
    width = h.shape[1]
    if species is None:
        _check("h", h, (n_rows, width), dtype)
        return h.data_ptr(), 0, 0
    _check("h", h, (h.shape[0], width), dtype)
    _check("species", species, (n_rows,), torch.int32)
    fault = core.check_species(species.data_ptr(), n_rows, h.shape[0])
    if fault >= 0:
        raise bad_species(species, h.shape[0])
    return h.data_ptr(), species.data_ptr(), h.shape[0]


def bad_species(species: Tensor, n_table: int) -> InputError:
    """The sentence for ``species`` (N,) of which some leave a table of so many rows."""
    row = int(((species < 0) | (species >= n_table)).nonzero()[0])
    return InputError(
        f"Row {row} of the batch has the atomic number {int(species[row])}, but the element table holds 0 to "
        f"{n_table - 1}; correct it, or leave its crystal out."
    )


def conv(
    h: Tensor, layer: Layer, graph: Graph, moments: Moments
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output and summed messages (N, F), then the statistics that were used: mean1, var1 (2F), mean2, var2 (F).

    A mean of the batch leaves without the bias.
    """
    width, dtype = h.shape[1], h.dtype
    edges = _Edges(graph, layer.weight.shape[1] - 2 * width, dtype)
    n_rows, n_features = edges.sizes[0], edges.sizes[3]
    features = _features(h, None, n_rows, dtype)
    used = [
        torch.empty_like(x) if trains else x.clone()
        for x, trains in zip(layer[6:10], (layer.train1,) * 2 + (layer.train2,) * 2, strict=True)
    ]
    layer = layer._replace(mean1=used[0], var1=used[1], mean2=used[2], var2=used[3])
    arguments = _layer_arguments(layer, width, n_features, dtype)
    out, m = (h.new_empty(n_rows, width) for _ in range(2))
    _kernel("conv", dtype)(
        out.data_ptr(), m.data_ptr(), 0, features, *arguments, *_running_arguments(STILL, width, dtype),
        *edges.arguments, _moment_addresses(moments, edges, dtype, layer.train1), *_joint_arguments(ALONE, width),
        width, torch.get_num_threads(),
    )  # fmt: skip
    return out, m, used[0], used[1], used[2], used[3]


def conv_backward(
    grad: Tensor, h: Tensor, m: Tensor, layer: Layer, graph: Graph, moments: Moments, edge_grad: bool
) -> tuple[Tensor, ...]:
    """Gradients of h, weight, bias, gamma1, beta1, gamma2, beta2, and of the edges (empty unless asked for)."""
    width, dtype = h.shape[1], h.dtype
    edges = _Edges(graph, layer.weight.shape[1] - 2 * width, dtype)
    features = _features(h, None, edges.sizes[0], dtype)
    for name, x in (("grad", grad), ("m", m)):
        _check(name, x, (edges.sizes[0], width), dtype)
    if edge_grad:
        refuse_edge_grad([layer])
    arguments = _layer_arguments(layer, width, edges.sizes[3], dtype)
    edge = torch.empty_like(_edge_values(graph)) if edge_grad else h.new_empty(0)
    outputs = [torch.empty_like(h), *_like_parameters(layer)]
    gradients = [x.data_ptr() for x in outputs] + [edge.data_ptr() if edge_grad else 0]
    _kernel("conv_backward", dtype)(
        gradients, grad.data_ptr(), features, m.data_ptr(), 0, *arguments, *edges.arguments,
        _moment_addresses(moments, edges, dtype, layer.train1), *_joint_arguments(ALONE, width), width,
        torch.get_num_threads(),
    )  # fmt: skip
    return (*outputs, edge)


def _edge_values(graph: Graph) -> Tensor:
    return graph.distance if graph.features is None else graph.features


def refuse_edge_grad(layers: Sequence[Layer]) -> None:
    if any(layer.train1 for layer in layers):
        raise InputError("Gradients of the edges exist for fixed statistics only; call model.eval() first.")


def _like_parameters(layer: Layer) -> list[Tensor]:
    """New tensors for the gradients of weight, bias, gamma1, beta1, gamma2, beta2."""
    like = torch.empty_like
    vector, half = layer.gamma1, layer.gamma2
    return [like(layer.weight), like(vector), like(vector), like(vector), like(half), like(half)]


class _Kept:
    """Addresses of what the backward of several convolutions needs of each, in one block.

    The C library keeps the pages of one block for the next batch; those of its parts it would give back to the system,
    and take new ones every time. Products of the rows spare their second computation; a table's are soon formed.
    """

    def __init__(self, h: Tensor, n: int, steps: int, has_table: bool, block: Tensor | None = None) -> None:
        width = h.shape[1]
        self.size = n * width * (2 * steps - 1 + 4 * (steps - has_table))
        self.block = h.new_empty(self.size) if block is None else block
        first, part = self.block.data_ptr(), n * width * h.element_size()
        self.features = [first + t * part for t in range(steps - 1)]
        """(N, F), what each step but the last gives."""
        self.messages = [first + (steps - 1 + t) * part for t in range(steps)]
        """(N, F)"""
        rest = [first + (2 * steps - 1 + 4 * t) * part for t in range(steps - has_table)]
        self.products = [0] * has_table + rest
        """(N, 4F)"""


def _statistics_at(statistics: Tensor, t: int) -> list[int]:
    """Addresses of mean1, var1, mean2, var2 of a layer in (T, 6F)."""
    part = statistics.shape[1] // 6 * statistics.element_size()
    first = statistics.data_ptr() + 6 * t * part
    return [first, first + 2 * part, first + 4 * part, first + 5 * part]


def convs(
    h: Tensor,
    layers: Sequence[Layer],
    graph: Graph,
    moments: Moments,
    species: Tensor | None = None,
    running: Sequence[Running] | None = None,
    joint: Callable[[int], Joint] = lambda t: ALONE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolutions one after the other, (N, F) -> (N, F), each as :func:`conv`.

    With ``species`` (N,), h is a table (U, F) of which row i takes row species[i]. ``running`` moves in place.
    ``joint``, called before each layer: its norms that share their batch.

    Returns:
        The features; the statistics that were used, (T, 6F): mean1, var1, mean2, var2 of each layer; and what
        :func:`convs_backward` needs.
    """
    width, dtype, steps = h.shape[1], h.dtype, len(layers)
    edges = _Edges(graph, layers[0].weight.shape[1] - 2 * width, dtype)
    n_rows, n_features = edges.sizes[0], edges.sizes[3]
    features = _features(h, species, n_rows, dtype)
    of_graph = _moment_addresses(moments, edges, dtype, any(layer.train1 for layer in layers))
    statistics, out = h.new_empty(steps, 6 * width), h.new_empty(n_rows, width)
    kept = _Kept(h, n_rows, steps, species is not None)
    kernel, threads = _kernel("conv", dtype), torch.get_num_threads()
    arguments = []  # of all layers, so that nothing has moved when one is refused
    for t, layer in enumerate(layers):
        for name, x, trains, at in zip(Layer._fields[6:10], layer[6:10], _TRAINS, (0, 2, 4, 5), strict=True):
            if not layer[trains]:
                _check(name, x, (width if name.endswith("2") else 2 * width,), dtype)
                statistics[t, at * width : at * width + x.shape[0]] = x
        of_layer = _layer_arguments(layer, width, n_features, dtype, _statistics_at(statistics, t))
        arguments.append((*of_layer, *_running_arguments(running[t] if running else STILL, width, dtype)))
    for t in range(steps):
        to = kept.features[t] if t < steps - 1 else out.data_ptr()
        kernel(
            to, kept.messages[t], kept.products[t], features, *arguments[t], *edges.arguments, of_graph,
            *_joint_arguments(joint(t), width), width, threads,
        )  # fmt: skip
        features = to, 0, 0
    return out, statistics, kept.block


_TRAINS = [Layer._fields.index(name) for name in ("train1", "train1", "train2", "train2")]


def convs_backward(
    grad: Tensor,
    h: Tensor,
    statistics: Tensor,
    block: Tensor,
    layers: Sequence[Layer],
    graph: Graph,
    moments: Moments,
    edge_grad: bool,
    species: Tensor | None = None,
    joint: Callable[[int], Joint] = lambda t: ALONE,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Gradients of h; of weight, bias, gamma1, beta1, gamma2, beta2 of each layer; and, if asked for, of the edges."""
    width, dtype, steps = h.shape[1], h.dtype, len(layers)
    edges = _Edges(graph, layers[0].weight.shape[1] - 2 * width, dtype)
    n_rows, n_features = edges.sizes[0], edges.sizes[3]
    first = _features(h, species, n_rows, dtype)
    _check("grad", grad, (n_rows, width), dtype)
    if edge_grad:
        refuse_edge_grad(layers)
    of_graph = _moment_addresses(moments, edges, dtype, any(layer.train1 for layer in layers))
    kept = _Kept(h, n_rows, steps, species is not None, block)
    _check("what is kept", block, (kept.size,), dtype)
    _check("statistics", statistics, (steps, 6 * width), dtype)
    kernel, threads = _kernel("conv_backward", dtype), torch.get_num_threads()
    gradients: list[Tensor] = []
    d_edge = None
    for t in reversed(range(steps)):
        arguments = _layer_arguments(layers[t], width, n_features, dtype, _statistics_at(statistics, t))
        d_h = h.new_empty(n_rows, width) if t else torch.empty_like(h)
        of_layer = _like_parameters(layers[t])
        edge = torch.empty_like(_edge_values(graph)) if edge_grad else None
        kernel(
            [d_h.data_ptr(), *(x.data_ptr() for x in of_layer), _address(edge)], grad.data_ptr(),
            (kept.features[t - 1], 0, 0) if t else first, kept.messages[t], kept.products[t], *arguments,
            *edges.arguments, of_graph, *_joint_arguments(joint(t), width), width, threads,
        )  # fmt: skip
        grad, gradients = d_h, of_layer + gradients
        if edge is not None:
            d_edge = edge if d_edge is None else d_edge + edge
    return grad, gradients, d_edge


MOST_LAYERS = 16
"""Linear maps that :func:`readout` takes."""


def _dense_arguments(name: str, layers: Sequence[Dense], width: int, dtype: torch.dtype) -> list[tuple[int, ...]]:
    arguments: list[tuple[int, ...]] = []
    for weight, bias in layers:
        _check(f"{name}'s weight", weight, (weight.shape[0], width), dtype)
        if bias is not None:
            _check(f"{name}'s bias", bias, (weight.shape[0],), dtype)
        arguments.append((weight.data_ptr(), _address(bias), width, weight.shape[0]))
        width = weight.shape[0]
    return arguments


def _crystals(row_weight: Tensor, crystal_ptr: Tensor, dtype: torch.dtype) -> tuple[int, int, int]:
    n_rows, n_crystals = row_weight.shape[0], counted("crystal_ptr", crystal_ptr)
    _check("row_weight", row_weight, (n_rows,), dtype)
    _check("crystal_ptr", crystal_ptr, (n_crystals + 1,), torch.int32)
    fault = core.check_crystals(crystal_ptr.data_ptr(), n_crystals, n_rows)
    if fault >= 0:
        raise InputError(f"Bad graph at position {fault}: {_FAULTS[3]}.")
    return row_weight.data_ptr(), crystal_ptr.data_ptr(), n_crystals


def readout(h: Tensor, row_weight: Tensor, crystal_ptr: Tensor, layers: Sequence[Dense]) -> tuple[Tensor, Tensor]:
    """Mean of h (N, F) over each crystal's atoms, then softplus and a linear map for every layer: (B, O).

    Also what :func:`readout_backward` needs.
    """
    dtype, lanes = h.dtype, getattr(_core(h.dtype), "lanes" + _SUFFIX[h.dtype])
    _check("h", h, (row_weight.shape[0], h.shape[1]), dtype)
    crystals = _crystals(row_weight, crystal_ptr, dtype)
    arguments = _dense_arguments("readout", layers, h.shape[1], dtype)
    out = h.new_empty(crystals[2], arguments[-1][3])
    values = h.new_empty(crystals[2], sum(-(-x[2] // lanes) * lanes for x in arguments))
    _kernel("readout", dtype)(
        out.data_ptr(), values.data_ptr(), h.data_ptr(), *crystals, arguments, torch.get_num_threads()
    )
    return out, values


def readout_backward(
    grad: Tensor, values: Tensor, row_weight: Tensor, crystal_ptr: Tensor, layers: Sequence[Dense]
) -> tuple[Tensor, list[Tensor]]:
    """Gradient of h, (N, F), and of every weight and bias in turn (of a bias also where there is none)."""
    dtype, width = values.dtype, layers[0].weight.shape[1]
    crystals = _crystals(row_weight, crystal_ptr, dtype)
    arguments = _dense_arguments("readout", layers, width, dtype)
    _check("grad", grad, (crystals[2], arguments[-1][3]), dtype)
    _check("values", values, (crystals[2], values.shape[1]), dtype)
    d_h = grad.new_empty(row_weight.shape[0], width)
    gradients = [
        x for layer in layers for x in (torch.empty_like(layer.weight), layer.weight.new_empty(len(layer.weight)))
    ]
    addresses = [x.data_ptr() for x in gradients]
    _kernel("readout_backward", dtype)(
        list(zip(addresses[::2], addresses[1::2], strict=True)), d_h.data_ptr(), grad.data_ptr(), values.data_ptr(),
        *crystals, arguments, torch.get_num_threads(),
    )  # fmt: skip
    return d_h, gradients


class NetworkParameters:
    """Those of :func:`network`, checked, as its kernel takes them; good while each stays where it is.

    ``given``: columns of its ``h``.
    """

    def __init__(
        self, given: int, embedding: Dense | None, layers: Sequence[Layer], readout_layers: Sequence[Dense]
    ) -> None:
        self.tensors = embedding, layers, readout_layers  # which live as long as their addresses are known
        self.dtype, self.width = layers[0].weight.dtype, layers[0].gamma2.shape[0]
        self.n_features = layers[0].weight.shape[1] - 2 * self.width
        self.first = [] if embedding is None else _dense_arguments("embedding", [embedding], given, self.dtype)
        if (self.first[0][3] if self.first else given) != self.width:
            raise InputError(
                f"The convolutions take {self.width} features of a row, but the embedding gives another number."
            )
        arguments = [_layer_arguments(layer, self.width, self.n_features, self.dtype) for layer in layers]
        self.layers, self.norms = [a for a, _ in arguments], [n for _, n in arguments]
        self.last = _dense_arguments("readout", readout_layers, self.width, self.dtype)
        self.shared = all(a[0] == self.layers[0][0] for a in self.layers)

    def run(self, h: Tensor, species: Tensor | None, graph: Graph, row_weight: Tensor) -> Tensor:
        edges = _Edges(graph, self.n_features, self.dtype, with_shells=graph.shell_of is not None)
        features = _features(h, species, edges.sizes[0], self.dtype)
        _check("row_weight", row_weight, (edges.sizes[0],), self.dtype)
        out = h.new_empty(edges.sizes[2], self.last[-1][3])
        _kernel("network", self.dtype)(
            out.data_ptr(), features, self.first, self.layers, self.norms, self.shared, *edges.arguments,
            row_weight.data_ptr(), self.last, self.width, torch.get_num_threads(),
        )  # fmt: skip
        return out


def network(
    h: Tensor,
    species: Tensor | None,
    embedding: Dense | None,
    layers: Sequence[Layer],
    graph: Graph,
    row_weight: Tensor,
    readout_layers: Sequence[Dense],
) -> Tensor:
    """:func:`stack` and :func:`readout` in one, crystal by crystal: (B, O).

    With ``embedding``, h is a table (U, A) that goes through it first. The graph may come without shells.
    """
    assert embedding is None or species is not None
    return NetworkParameters(h.shape[1], embedding, layers, readout_layers).run(h, species, graph, row_weight)


def stack(h: Tensor, layers: Sequence[Layer], graph: Graph, species: Tensor | None = None) -> Tensor:
    """All convolutions with fixed statistics, crystal by crystal; layers may share one weight tensor."""
    width = h.shape[1]
    n_features = layers[0].weight.shape[1] - 2 * width
    edges = _Edges(graph, n_features, h.dtype)
    features = _features(h, species, edges.sizes[0], h.dtype)
    arguments = [_layer_arguments(layer, width, n_features, h.dtype) for layer in layers]
    shared = all(layer.weight.data_ptr() == layers[0].weight.data_ptr() for layer in layers)
    out = h.new_empty(edges.sizes[0], width)
    _kernel("stack", h.dtype)(
        out.data_ptr(), features, [a for a, _ in arguments], [n for _, n in arguments], shared, *edges.arguments,
        width, torch.get_num_threads(),
    )  # fmt: skip
    return out
