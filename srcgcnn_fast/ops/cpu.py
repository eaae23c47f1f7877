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
        if graph.features is not None and n_edges == 0:  # whose address is null: as if there were none
            self.addresses[1] = self.addresses[3]
        fault, where = core.check_graph(*self.addresses[2:5], self.sizes)
        if fault:
            raise InputError(f"Bad graph at position {where}: {_FAULTS[fault]}.")

    @property
    def arguments(self) -> tuple[list[int], tuple[int, int, int, int], tuple[float, float]]:
        return self.addresses, self.sizes, self.basis


def checked(graph: Graph, n_features: int, dtype: torch.dtype) -> _Edges:
    """The graph for several calls of :func:`conv` and :func:`conv_backward`, checked once.

    Raises:
        InputError: a shape, type or index is wrong.
    """
    return _Edges(graph, n_features, dtype)


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
    shell_count = torch.empty(edges.sizes[2], dtype=torch.int32)
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
    total = torch.empty(n_features, dtype=torch.float64)
    gram = torch.empty(n_features, n_features, dtype=torch.float64)
    outputs = (in_degree, by_receiver, by_sender, total, gram)
    _kernel("edge_moments", dtype)(
        *(x.data_ptr() for x in outputs), row_weight.data_ptr(), *edges.arguments, torch.get_num_threads()
    )
    return outputs


def _layer_arguments(
    layer: Layer, width: int, n_features: int, dtype: torch.dtype
) -> tuple[list[int], tuple[float, float, bool, bool]]:
    if width % kernel_width(dtype):
        raise InputError(f"The CPU kernels take multiples of {kernel_width(dtype)} features of a row, not {width}.")
    _check("weight", layer.weight, (2 * width, 2 * width + n_features), dtype)
    for name, x in zip(Layer._fields[1:10], layer[1:10], strict=True):
        if x is not None:
            _check(name, x, (width if name.endswith("2") else 2 * width,), dtype)
    return [_address(x) for x in layer[:10]], layer[10:14]


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
    h: Tensor,
    layer: Layer,
    graph: Graph,
    moments: Moments,
    species: Tensor | None = None,
    edges: _Edges | None = None,
    into: tuple[Tensor, Tensor, Tensor | None] | None = None,
    joint: Joint = ALONE,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output and summed messages (N, F), then the statistics that were used: mean1, var1 (2F), mean2, var2 (F).

    A mean of the batch leaves without the bias. With ``species`` (N,), h is a table (U, F) of which row i takes row
    species[i]. ``edges``: the graph as :func:`checked` returns it. ``into``: where to put the output and the messages,
    and, if the backward shall have them, the rows' products (N, 4F). ``joint``: of norms that use batch statistics.
    """
    width = h.shape[1]
    n_features = layer.weight.shape[1] - 2 * width
    edges = edges or _Edges(graph, n_features, h.dtype)
    n_rows = edges.sizes[0]
    features = _features(h, species, n_rows, h.dtype)
    used = [
        torch.empty_like(x) if trains else x.clone()
        for x, trains in zip(layer[6:10], (layer.train1,) * 2 + (layer.train2,) * 2, strict=True)
    ]
    layer = layer._replace(mean1=used[0], var1=used[1], mean2=used[2], var2=used[3])
    addresses, norms = _layer_arguments(layer, width, n_features, h.dtype)
    if into is None:
        into = torch.empty(n_rows, width, dtype=h.dtype), torch.empty(n_rows, width, dtype=h.dtype), None
    out, m, products = into
    for name, x, columns in (("out", out, width), ("m", m, width), ("products", products, 4 * width)):
        if x is not None:
            _check(name, x, (n_rows, columns), h.dtype)
    _kernel("conv", h.dtype)(
        out.data_ptr(), m.data_ptr(), _address(products), features, addresses, norms, *edges.arguments,
        _moment_addresses(moments, edges, h.dtype, layer.train1), *_joint_arguments(joint, width), width,
        torch.get_num_threads(),
    )  # fmt: skip
    return out, m, used[0], used[1], used[2], used[3]


def conv_backward(
    grad: Tensor,
    h: Tensor,
    m: Tensor,
    layer: Layer,
    graph: Graph,
    moments: Moments,
    edge_grad: bool,
    species: Tensor | None = None,
    edges: _Edges | None = None,
    products: Tensor | None = None,
    joint: Joint = ALONE,
) -> tuple[Tensor, ...]:
    """Gradients of h, weight, bias, gamma1, beta1, gamma2, beta2, and of the edges (empty unless asked for)."""
    width = h.shape[1]
    n_features = layer.weight.shape[1] - 2 * width
    edges = edges or _Edges(graph, n_features, h.dtype)
    features = _features(h, species, edges.sizes[0], h.dtype)
    for name, x in (("grad", grad), ("m", m)):
        _check(name, x, (edges.sizes[0], width), h.dtype)
    if products is not None:
        _check("products", products, (edges.sizes[0], 4 * width), h.dtype)
    if edge_grad and layer.train1:
        raise InputError("Gradients of the edges exist for fixed statistics only; call model.eval() first.")
    addresses, norms = _layer_arguments(layer, width, n_features, h.dtype)
    like = graph.distance if graph.features is None else graph.features
    outputs = [torch.empty_like(x) for x in (h, layer.weight, layer.gamma1, layer.gamma1, layer.beta1)]
    outputs += [torch.empty_like(layer.gamma2), torch.empty_like(layer.beta2)]
    edge = torch.empty_like(like) if edge_grad else h.new_empty(0)
    gradients = [x.data_ptr() for x in outputs] + [edge.data_ptr() if edge_grad else 0]
    _kernel("conv_backward", h.dtype)(
        gradients, grad.data_ptr(), features, m.data_ptr(), _address(products), addresses, norms, *edges.arguments,
        _moment_addresses(moments, edges, h.dtype, layer.train1), *_joint_arguments(joint, width), width,
        torch.get_num_threads(),
    )  # fmt: skip
    return (*outputs, edge)


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
    out = torch.empty(crystals[2], arguments[-1][3], dtype=dtype)
    values = torch.empty(crystals[2], sum(-(-x[2] // lanes) * lanes for x in arguments), dtype=dtype)
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
    d_h = torch.empty(row_weight.shape[0], width, dtype=dtype)
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
        out = torch.empty(edges.sizes[2], self.last[-1][3], dtype=self.dtype)
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
    out = torch.empty(edges.sizes[0], width, dtype=h.dtype)
    _kernel("stack", h.dtype)(
        out.data_ptr(), features, [a for a, _ in arguments], [n for _, n in arguments], shared, *edges.arguments,
        width, torch.get_num_threads(),
    )  # fmt: skip
    return out
