"""The stateless operators: gated graph convolutions over a :class:`~srcgcnn_fast.GraphBatch`.

Shapes: N rows, E edges, F = ``atom_fea_len``, K edge features. Distances are in Å. A backend is chosen per call by
device and dtype; :func:`srcgcnn_fast.use_backend` forces one. Under autocast the convolutions run in the type of
their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import InputError
from .graph.batch import GraphBatch
from .ops import fused, reference, registry
from .ops.reference import BatchNorm, Dense, Edges

__all__ = [
    "BatchNorm",
    "ConvParameters",
    "Dense",
    "crystal_mean",
    "gated_conv",
    "network",
    "readout",
    "recurrent_gated_conv",
    "stacked_gated_conv",
]


_MANY_ROWS = 65_536
"""Beyond which the memory of a training step counts for more than five launches."""
_LARGE_TABLE = 1024
"""Rows beyond which a table is looked up: the CPU's backward keeps sums by its rows for every chunk of crystals."""


class ConvParameters(NamedTuple):
    """One convolution: the linear map of [h_i, h_j, e_ij] and its two batch norms."""

    weight: Tensor
    """(2F, 2F + K), filter channels first."""
    bias: Tensor | None
    """(2F,)"""
    bn1: BatchNorm
    """Over the 2F channels of the edges."""
    bn2: BatchNorm
    """Over the F channels of the summed messages."""


def gated_conv(
    atom_fea: Tensor,
    batch: GraphBatch,
    weight: Tensor,
    bias: Tensor | None,
    bn1: BatchNorm,
    bn2: BatchNorm,
    *,
    species: Tensor | None = None,
    dmin: float = 0.0,
    step: float = 0.2,
) -> Tensor:
    """One gated graph convolution (Xie & Grossman, PRL 120, 145301 (2018), eq. 5).

    z_ij = [h_i, h_j, e_ij] W^T + b;  y = bn1(z);  m_i = sum_j sigmoid(y[:F]) softplus(y[F:]);
    h_i' = softplus(h_i + bn2(m)_i)

    Args:
        atom_fea: (N, F) features of the rows.
        batch: the graphs; rows count by their ``weight`` in both batch norms.
        weight: (2F, 2F + K).
        bias: (2F,) or None.
        bn1: batch norm of the edges' 2F channels; its running statistics move in place when it trains.
        bn2: batch norm of the F summed channels.
        species: (N,) int32. If given, ``atom_fea`` is a table (U, F), of which row i takes row species[i]: rows of the
            same element share their part of the work. ``batch.numbers`` with features by atomic number, for instance.
        dmin: centre of the first Gaussian, Å; ignored where the batch has ``edge_features``.
        step: distance between the Gaussians' centres and their width, Å.

    Returns:
        (N, F)

    Raises:
        InputError: shapes do not fit, or batch statistics are asked of a single value.
    """
    layer = ConvParameters(weight, bias, bn1, bn2)
    return stacked_gated_conv(atom_fea, batch, [layer], species=species, dmin=dmin, step=step)[0]


def stacked_gated_conv(
    atom_fea: Tensor,
    batch: GraphBatch,
    layers: Sequence[ConvParameters],
    *,
    species: Tensor | None = None,
    dmin: float = 0.0,
    step: float = 0.2,
    return_steps: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Several convolutions, each with its own parameters (CGCNN). Arguments are those of :func:`gated_conv`.

    Returns:
        The features after the last one, (N, F), and, with ``return_steps``, those after each (else an empty list).

    Raises:
        InputError: as :func:`gated_conv`, or there are no layers.
    """
    return _stack(atom_fea, batch, layers, species, dmin, step, return_steps, None)


def recurrent_gated_conv(
    atom_fea: Tensor,
    batch: GraphBatch,
    weight: Tensor,
    bias: Tensor | None,
    bn1s: Sequence[BatchNorm],
    bn2s: Sequence[BatchNorm],
    *,
    layer_norm: Callable[[Tensor], Tensor] | None = None,
    alpha: Tensor | None = None,
    species: Tensor | None = None,
    dmin: float = 0.0,
    step: float = 0.2,
    return_steps: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """One convolution applied T = len(bn1s) times, with its own batch norms per step (SR-CGCNN, arXiv 2605.01304).

    Args:
        layer_norm: applied to (N, F) after each step, as the authors' ``recurrent_norm``.
        alpha: (T,) gates; h <- (1 - sigmoid(alpha_t)) h + sigmoid(alpha_t) h'.

    Other arguments and the result are those of :func:`gated_conv` and :func:`stacked_gated_conv`.

    Raises:
        InputError: as those; or there are not T ``bn2s``, or gates.
    """
    steps = len(bn1s)
    if len(bn2s) != steps or (alpha is not None and alpha.shape != (steps,)):
        gates = "no gates" if alpha is None else f"gates of shape {tuple(alpha.shape)}"
        raise InputError(f"Give each step one of bn1s, bn2s and gates (T,), not {steps}, {len(bn2s)} and {gates}.")
    layers = [ConvParameters(weight, bias, bn1, bn2) for bn1, bn2 in zip(bn1s, bn2s, strict=True)]

    def after(t: int, old: Tensor, new: Tensor) -> Tensor:
        if alpha is not None:
            gate = torch.sigmoid(alpha[t])
            new = (1 - gate) * old + gate * new
        return new if layer_norm is None else layer_norm(new)

    plain = layer_norm is None and alpha is None
    return _stack(atom_fea, batch, layers, species, dmin, step, return_steps, None if plain else after)


def crystal_mean(atom_fea: Tensor, batch: GraphBatch) -> Tensor:
    """(N, F) -> (B, F): the mean over the atoms of each crystal; a row counts as many times as it stands for atoms.

    Raises:
        InputError: ``atom_fea`` has another shape.
    """
    _check_features(atom_fea, batch, None)
    traced = torch.compiler.is_compiling() or registry.is_transformed()
    if traced or atom_fea.dtype not in (torch.float32, torch.float64):
        return reference.crystal_mean(atom_fea, batch.weight, batch.crystal_ptr)
    mean: Tensor
    if fused.runs_compiled(atom_fea):
        weight, crystal_ptr = _row_weight(batch, atom_fea.dtype), batch.crystal_ptr.contiguous()
        mean = fused.CrystalMean.apply(atom_fea.contiguous(), weight, crystal_ptr)
        return mean
    shares = batch.cached("shares", lambda: _shares(batch))
    mean = _CrystalMean.apply(atom_fea, *shares, batch.atom_crystal)
    return mean


def readout(atom_fea: Tensor, batch: GraphBatch, layers: Sequence[Dense]) -> Tensor:
    """From rows to crystals: the mean over a crystal's atoms, then softplus and a linear map for every layer.

    Args:
        atom_fea: (N, F) features of the rows; each counts as many times as it stands for atoms.
        layers: (H, F), (H', H), …, (O, H) weights with their biases; at least one.

    Returns:
        (B, O)

    Raises:
        InputError: shapes do not fit.
    """
    registry.refuse_tracing()
    if not layers or atom_fea.shape[:-1] != (batch.num_rows,):
        raise InputError(f"readout takes (N, F) with N = {batch.num_rows} rows of the batch, and at least one layer.")
    _check_maps(atom_fea.shape[-1], layers)
    autocast = torch.is_autocast_enabled(atom_fea.device.type)
    if not autocast and fused.takes_readout(atom_fea, layers) and registry.select(atom_fea) == "cpu":
        return fused.readout(atom_fea, _row_weight(batch, atom_fea.dtype), batch.crystal_ptr.contiguous(), layers)
    return _maps(crystal_mean(atom_fea, batch), layers)


def _check_maps(width: int, layers: Sequence[Dense]) -> None:
    for weight, bias in layers:
        if weight.shape[1] != width:
            raise InputError(f"A linear map takes {weight.shape[1]} features, but is given {width}.")
        width = weight.shape[0]
        if bias is not None and bias.shape != (width,):
            raise InputError(f"A linear map to {width} features has a bias of shape {tuple(bias.shape)}.")


def _maps(x: Tensor, layers: Sequence[Dense]) -> Tensor:
    """(B, F) -> (B, O)"""
    for layer in layers:
        x = torch.nn.functional.linear(torch.nn.functional.softplus(x), *layer)
    return x


def network(
    atom_fea: Tensor,
    batch: GraphBatch,
    embedding: Dense,
    layers: Sequence[ConvParameters],
    readout_layers: Sequence[Dense],
    *,
    species: Tensor | None = None,
    dmin: float = 0.0,
    step: float = 0.2,
) -> Tensor:
    """A whole network: a linear map of the atoms' features, :func:`stacked_gated_conv` and :func:`readout`.

    The same numbers as from the three, up to rounding; in inference by the compiled kernels of the CPU and of CUDA in
    one operator, in which no feature leaves the cache.

    Args:
        atom_fea: (N, A), or, with ``species``, a table (U, A) as for :func:`gated_conv`.
        embedding: (F, A) weight with its bias.
        layers: SR-CGCNN has the same weight and bias in all of them.
        readout_layers: none: the mean over each crystal's atoms, as from :func:`crystal_mean`.

    Returns:
        (B, O), or (B, F) without ``readout_layers``

    Raises:
        InputError: shapes do not fit, there are no ``layers``, or batch statistics are asked of a single value.
    """
    registry.refuse_tracing()
    _check_maps(atom_fea.shape[-1], [embedding])
    device = atom_fea.device.type
    runs_at_once = (
        fused.takes_network(atom_fea, embedding, layers, readout_layers)
        and not torch.is_autocast_enabled(device)
        and not _needs_autograd(atom_fea, batch, layers, embedding, readout_layers)
        and registry.select(atom_fea, inference=True, width=embedding.weight.shape[0]) == device
    )
    if not runs_at_once:
        h = torch.nn.functional.linear(atom_fea, *embedding)
        if fused.runs_compiled(h):  # which do not give out the rows where nobody asks for them
            _check_maps(h.shape[1], readout_layers)
            return _maps(_stack(h, batch, layers, species, dmin, step, False, None, pooled=True)[0], readout_layers)
        h, _ = stacked_gated_conv(h, batch, layers, species=species, dmin=dmin, step=step)
        return readout(h, batch, readout_layers) if readout_layers else crystal_mean(h, batch)
    width, n_features = embedding.weight.shape[0], None if batch.edge_features is None else batch.edge_features.shape[1]
    _check_features(atom_fea, batch, species)
    for layer in layers:
        _check_layer(atom_fea, width, layer, n_features)
    first: Dense | None = embedding
    species = None if species is None else species.contiguous()
    if species is None:
        atom_fea, first = torch.nn.functional.linear(atom_fea, *embedding), None
    dtype = atom_fea.dtype
    edges = _edges(batch, dtype, dmin, step)
    tracing = torch.compiler.is_compiling()  # a traced graph must not hold what this batch's cache has
    of, distance, count = (None if tracing else batch.kept(("shells", dtype))) or (None, None, None)
    graph = fused.Graph(  # field by field, since torch 2.6 traces no slice of a named tuple
        edges.distance, edges.features, edges.sender, edges.row_ptr, edges.crystal_ptr, of, distance, count, edges.dmin,
        edges.step,
    )  # fmt: skip
    return fused.network(atom_fea, species, first, graph, layers, _row_weight(batch, dtype), readout_layers)


class FrozenNetwork:
    """:func:`network` of a table and parameters that stay where they are, laid out for the kernels once.

    Their values may change in place. Raises what :func:`network` raises for parameters; make it where :func:`is_plain`
    says so, and call it there.
    """

    def __init__(
        self,
        table: Tensor,
        embedding: Dense,
        layers: Sequence[ConvParameters],
        readout_layers: Sequence[Dense],
        dmin: float,
        step: float,
    ) -> None:
        self._table, self._basis, self._dtype = table, (float(dmin), float(step)), table.dtype
        self._shells = ("shells", table.dtype)
        self._parameters: Any = None
        width = embedding.weight.shape[0]
        for layer in layers:
            _check_layer(table, width, layer, None)
        if (
            fused.takes_network(table, embedding, layers, readout_layers)
            and not any(layer.bn1.training or layer.bn2.training for layer in layers)
            and registry.select(table, inference=True, width=width) == table.device.type
        ):
            self._parameters = fused.network_parameters(table, embedding, layers, readout_layers)

    def takes(self, batch: GraphBatch) -> bool:
        """Are kernels there that take all of it at once, and batches like this one as they are?"""
        return (
            self._parameters is not None
            and batch.atom_features is None
            and batch.edge_features is None
            and batch.numbers.dtype is torch.int32
            and batch.distance.dtype is batch.weight.dtype is self._dtype
        )

    def __call__(self, batch: GraphBatch) -> Tensor:
        """(B, O)"""
        of, distance, count = batch.kept(self._shells) or (None, None, None)
        edges = (batch.distance, batch.sender, batch.row_ptr, batch.crystal_ptr, batch.numbers, batch.weight)
        d, sender, row_ptr, crystal_ptr, numbers, weight = (x if x.is_contiguous() else x.contiguous() for x in edges)
        graph = fused.Graph(d, None, sender, row_ptr, crystal_ptr, of, distance, count, *self._basis)
        out: Tensor = self._parameters.run(self._table, numbers, graph, weight)
        return out


def is_plain(device: torch.device) -> bool:
    """Is this an ordinary call without gradients: not compiled, traced, transformed, captured, under autocast or on a
    backend by force that is not the device's own?
    """
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not registry.is_transformed()
        and torch._C._get_tracing_state() is None
        and not torch.is_autocast_enabled(device.type)
        and registry.forced_backend() in (None, device.type)
        and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    )


def _shares(batch: GraphBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Number of each row, first row of each crystal (B + 1), and the share of each row in its crystal's mean (N)."""
    rows = torch.arange(batch.num_rows, device=batch.device)
    return rows, batch.crystal_ptr.long(), reference.shares(batch.weight, batch.atom_crystal, batch.num_crystals)


class _CrystalMean(torch.autograd.Function):
    """A weighted sum per crystal whose backward is one lookup and one product."""

    @staticmethod
    def forward(h: Tensor, rows: Tensor, first: Tensor, share: Tensor, crystal: Tensor) -> Tensor:
        return torch.nn.functional.embedding_bag(
            rows, h.to(share.dtype), first, mode="sum", per_sample_weights=share, include_last_offset=True
        ).to(h.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.share, ctx.crystal = inputs[3].to(output.dtype), inputs[4]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.index_select(0, ctx.crystal) * ctx.share[:, None], None, None, None, None


def _stack(
    h: Tensor,
    batch: GraphBatch,
    layers: Sequence[ConvParameters],
    species: Tensor | None,
    dmin: float,
    step: float,
    return_steps: bool,
    after: Callable[[int, Tensor, Tensor], Tensor] | None,
    pooled: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """``pooled``, of a plain stack: the crystals' means, (B, F), in place of the rows."""
    registry.refuse_tracing()
    if not layers:
        raise InputError("There is no convolution; give at least one.")
    device = h.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            h = h.to(layers[0].weight.dtype)
            return _stack(h, batch, layers, species, dmin, step, return_steps, after, pooled)
    _check_features(h, batch, species)
    for layer in layers:
        _check(h, batch, layer)
    plain = after is None and not return_steps
    edges = _edges(batch, h.dtype, dmin, step)
    trains = any(layer.bn1.training for layer in layers)
    norms = [norm for layer in layers for norm in (layer.bn1, layer.bn2)]
    is_synchronized = any(norm.training and norm.group is not None for norm in norms)
    infers = plain and not _needs_autograd(h, batch, layers)
    through_statistics = trains and _requires_grad(batch)
    is_reference = registry.select(h, through_statistics, infers) == "reference"
    has_own = is_synchronized and fused.is_eager(h)  # kernels that exchange statistics themselves
    # A table pays where many rows share its rows, and the steps after the first have none. A traced graph keeps no
    # table, and would otherwise be bound to batches on one side of this comparison.
    tracing = torch.compiler.is_compiling()
    pool = (lambda h: crystal_mean(h, batch)) if pooled else None
    if species is not None and (
        is_reference
        or (is_synchronized and not has_own)
        or not plain
        or tracing
        or (h.shape[0] > min(_LARGE_TABLE, batch.num_rows // 4) and not fused.runs_compiled(h))
    ):
        h, species = fused.lookup(h, species), None
    species = None if species is None else species.contiguous()
    convolve: Callable[[Tensor, Sequence[ConvParameters]], Tensor]
    if is_reference:
        row_weight = batch.weight

        def convolve(h: Tensor, layers: Sequence[ConvParameters]) -> Tensor:
            for layer in layers:
                h = reference.gated_conv(h, edges, row_weight, *layer)
            return h

    else:
        graph = _with_shells(batch, edges, h.dtype)
        if infers:
            shared = all(layer.weight is layers[0].weight for layer in layers)
            rows = fused.stack(h, graph, layers, shared, species)
            return rows if pool is None else pool(rows), []
        moments = _moments(batch, graph, layers, h.dtype, trains)
        around = _neighbors(batch, graph, moments) if is_synchronized and trains and not has_own else None

        def convolve(h: Tensor, layers: Sequence[ConvParameters]) -> Tensor:
            if is_synchronized:
                from .ops import synchronized  # which imports the compiler

                return synchronized.gated_convs(h, graph, moments, around, layers, species)
            return fused.gated_convs(h, graph, moments, layers, species)

        if plain and not is_synchronized:
            return fused.gated_convs(h, graph, moments, layers, species, pool), []
    if plain:
        rows = convolve(h, layers)
        return rows if pool is None else pool(rows), []
    steps: list[Tensor] = []
    for t, layer in enumerate(layers):
        new = convolve(h, [layer])
        h = new if after is None else after(t, h, new)
        if return_steps:
            steps.append(h)
    return h, steps


def _with_shells(batch: GraphBatch, edges: Edges, dtype: torch.dtype) -> fused.Graph:
    """The edges with their distinct distances, which the batch keeps."""
    return fused.with_shells(edges, batch.cached(("shells", dtype), lambda: fused.shells(edges)))


def _moments(
    batch: GraphBatch, graph: fused.Graph, layers: Sequence[ConvParameters], dtype: torch.dtype, trains: bool
) -> fused.Moments:
    """What batch statistics need of the graph, which the batch keeps, unless its size makes memory dear."""
    row_weight = _row_weight(batch, dtype)
    if not trains:
        return fused.Moments(row_weight, None, None, None, None, None)
    n_features = layers[0].weight.shape[1] - layers[0].weight.shape[0]
    key = ("moments", n_features, graph.dmin, graph.step, dtype)
    if batch.num_rows > _MANY_ROWS and fused.runs_compiled(row_weight):
        return fused.moments(row_weight, graph, n_features)
    return batch.cached(key, lambda: fused.moments(row_weight, graph, n_features))


def _neighbors(batch: GraphBatch, graph: fused.Graph, moments: fused.Moments) -> Any:
    """What statistics over several processes need of the graph beside its moments, which the batch keeps."""
    from .ops import synchronized

    assert moments.gram is not None
    key = ("neighbors", len(moments.gram), graph.dmin, graph.step, moments.row_weight.dtype)
    return batch.cached(key, lambda: synchronized.neighbors(moments, graph))


def _edges(batch: GraphBatch, dtype: torch.dtype, dmin: float, step: float) -> Edges:
    features = None if batch.edge_features is None else batch.edge_features.to(dtype).contiguous()
    pointers = batch.row_ptr.contiguous(), batch.crystal_ptr.contiguous()
    distance, sender = batch.distance.to(dtype).contiguous(), batch.sender.contiguous()
    return Edges(distance, features, sender, *pointers, float(dmin), float(step))


def _row_weight(batch: GraphBatch, dtype: torch.dtype) -> Tensor:
    return batch.weight.to(dtype).contiguous()


def _needs_autograd(
    h: Tensor,
    batch: GraphBatch,
    layers: Sequence[ConvParameters],
    embedding: Dense | None = None,
    readout_layers: Sequence[Dense] = (),
) -> bool:
    if any(layer.bn1.training or layer.bn2.training for layer in layers):
        return True
    if not torch.is_grad_enabled():
        return False
    vectors = [x for w, b, bn1, bn2 in layers for x in (w, b, bn1.weight, bn1.bias, bn2.weight, bn2.bias)]
    vectors += [h, *(embedding or ()), *(x for layer in readout_layers for x in layer)]
    return _requires_grad(batch) or any(x is not None and x.requires_grad for x in vectors)


def _requires_grad(batch: GraphBatch) -> bool:
    features = batch.edge_features
    return batch.distance.requires_grad or (features is not None and features.requires_grad)


def _check_features(h: Tensor, batch: GraphBatch, species: Tensor | None) -> None:
    n = batch.num_rows
    if species is None:
        if h.dim() != 2 or h.shape[0] != n:
            raise InputError(f"atom_fea must be (N, F) with N = {n} rows of the batch, not {tuple(h.shape)}.")
    elif h.dim() != 2 or species.shape != (n,) or species.dtype != torch.int32:
        raise InputError(
            f"With species, atom_fea must be a table (U, F), not {tuple(h.shape)}, and species int32 of shape ({n},), "
            f"not {species.dtype} {tuple(species.shape)}."
        )


def _check_layer(h: Tensor, width: int, layer: ConvParameters, n_given: int | None) -> None:
    weight = layer.weight
    if weight.dtype is not h.dtype:
        raise InputError(f"weight is {weight.dtype} and atom_fea {h.dtype}; convert one to the other's type.")
    n_features = weight.shape[1] - 2 * width
    if weight.shape[0] != 2 * width or n_features < 1:
        raise InputError(f"weight must be (2F, 2F + K) with F = {width} as in atom_fea, not {tuple(weight.shape)}.")
    if n_given is not None and n_given != n_features:
        raise InputError(f"The batch has {n_given} edge features, but the weight expects K = {n_features}.")
    for norm in (layer.bn1, layer.bn2):
        if not norm.training and (norm.running_mean is None or norm.running_var is None):
            raise InputError("A batch norm without running statistics needs training=True.")
        if norm.training and norm.momentum is None:
            raise InputError("A batch norm's momentum must be a number; for torch's None give 1 / (batches so far).")


def _check(h: Tensor, batch: GraphBatch, layer: ConvParameters) -> None:
    _check_layer(h, h.shape[1], layer, None if batch.edge_features is None else batch.edge_features.shape[1])
    alone = [norm.training and norm.group is None for norm in (layer.bn1, layer.bn2)]
    single_edge = alone[0] and batch.num_edges <= 1 and _at_most_one(batch, batch.receiver)
    if single_edge or (alone[1] and batch.num_rows <= 1 and _at_most_one(batch)):
        raise InputError("Batch norm cannot train on a single atom or edge; use larger batches, or model.eval().")


def _at_most_one(batch: GraphBatch, rows: Tensor | None = None) -> bool:
    """Do all rows, or these, stand for at most one atom or edge of the full cell?"""
    return torch.compiler.is_compiling() or float((batch.weight if rows is None else batch.weight[rows]).sum()) <= 1
