"""Convolutions on the fused operators: what they need of the graph, widths they do not take, batch norm's state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding, pad

from . import cpu, cuda, cuda_conv, reference, registry, triton
from . import library as library  # registers the operators
from .cpu import Graph, Layer, Moments, Running
from .reference import BatchNorm, Dense, Edges

_ops = torch.ops.srcgcnn_fast


# torch 2.6 cannot trace slices and _replace of named tuples: what is traced names their parts, or makes a plain tuple.


def shells(edges: Edges) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The distinct distances of every crystal, which the kernels of a GPU do without."""
    if edges.features is not None or edges.distance.device.type != "cpu":
        return None, None, None
    find = cpu.edge_shells if is_eager(edges.distance) else _ops.edge_shells
    found: tuple[Tensor, Tensor, Tensor] = find(
        edges.distance.detach().contiguous(), edges.sender, edges.row_ptr, edges.crystal_ptr
    )
    return found


def with_shells(edges: Edges, found: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None) -> Graph:
    """The edges with their :func:`shells`, which ``found`` may hold already."""
    distance, features, sender, row_ptr, crystal_ptr, dmin, step = edges
    return Graph(distance, features, sender, row_ptr, crystal_ptr, *(found or shells(edges)), dmin, step)


def moments(row_weight: Tensor, graph: Graph, n_features: int) -> Moments:
    """What batch statistics need, from the graph alone."""
    distance, features, *others = graph
    features = None if features is None else features.detach()
    if runs_compiled(row_weight):
        return Moments(row_weight, *cuda_conv.edge_moments(row_weight, graph, n_features))
    if (kernels := _kernels(row_weight, row_weight)) is not None:
        return Moments(row_weight, *kernels.edge_moments(row_weight, graph, n_features))
    return Moments(row_weight, *_ops.edge_moments(row_weight, distance.detach(), features, *others, n_features))


def _widen(x: Tensor, width: int, more: int) -> Tensor:
    """(2F,) or (F,) -> zeros added to each half."""
    return pad(x.reshape(-1, width), (0, more)).reshape(-1)


def _widen_weight(weight: Tensor, width: int, more: int) -> Tensor:
    halves = [pad(x, (0, more)) for x in (weight[:, :width], weight[:, width : 2 * width])]
    wide = torch.cat([*halves, weight[:, 2 * width :]], dim=1)
    return pad(wide.reshape(2, width, -1), (0, 0, 0, more)).reshape(2 * (width + more), -1)


def _constants(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ones and zeros, which nobody writes to.

    What is kept serves captured graphs, too, where it would take a launch each at every replay.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():  # fake tensors, for instance
        return torch.ones(size, dtype=dtype, device=device), torch.zeros(size, dtype=dtype, device=device)
    found = _kept_constants.get((size, dtype, device))
    if found is not None:
        return found
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.ones(size, dtype=dtype, device=device), torch.zeros(size, dtype=dtype, device=device)
    with torch.inference_mode(False):  # so that training may keep them; copies are there for any stream
        one, zero = (make(size, dtype=dtype, device="cpu") for make in (torch.ones, torch.zeros))
        found = one.to(device), zero.to(device)
    _kept_constants[size, dtype, device] = found
    return found


_kept_constants: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}


def operator_layer(weight: Tensor, bias: Tensor | None, bn1: BatchNorm, bn2: BatchNorm, width: int, more: int) -> Layer:
    """The layer as the operators take it, widened by ``more`` channels of zeros."""
    vectors = []
    for norm, size in ((bn1, 2 * width), (bn2, width)):
        one, zero = _constants(size, weight.dtype, weight.device)
        vectors.append(
            [
                one if norm.weight is None else norm.weight,
                zero if norm.bias is None else norm.bias,
                zero if norm.running_mean is None or norm.training else _in_type_of(weight, norm.running_mean),
                one if norm.running_var is None or norm.training else _in_type_of(weight, norm.running_var),
            ]
        )
    (g1, b1, m1, v1), (g2, b2, m2, v2) = vectors
    small: list[Any] = [bias, g1, b1, g2, b2, m1, v1, m2, v2]
    if more:
        weight = _widen_weight(weight, width, more)
        small = [None if x is None else _widen(x, width, more) for x in small]
    small = [x if x is None or x.is_contiguous() else x.contiguous() for x in small]  # to ask costs a tenth
    return Layer(*[weight.contiguous(), *small, bn1.eps, bn2.eps, bn1.training, bn2.training])


def _in_type_of(weight: Tensor, statistics: Tensor) -> Tensor:
    """Integers stay such, and are refused."""
    if statistics.dtype is weight.dtype or not statistics.is_floating_point():
        return statistics
    return statistics.to(weight.dtype)


def missing_channels(h: Tensor) -> int:
    """How many channels of zeros fill the last vector of the CPU kernels."""
    return -h.shape[1] % cpu.kernel_width(h.dtype) if h.device.type == "cpu" else 0


class _Shared:
    """Norms of several convolutions that other processes share: what each exchanges, and the counts of all."""

    def __init__(
        self, norms: Sequence[tuple[BatchNorm, BatchNorm]], biases: list[Tensor | None], width: int, more: int
    ) -> None:
        """``biases`` (2F,) of F channels to which ``more`` were added."""
        from .ranks import Exchange  # which imports the compiler

        self.exchange = Exchange
        self.groups = [[norm.group if norm.training else None for norm in pair] for pair in norms]
        self.biases, self.width, self.wide = biases, width, width + more
        self.counts: list[list[Tensor | None]] = []
        """Values that either norm has seen on all processes; None where it is this one's own."""

    def statistics(self, t: int) -> cpu.Joint:
        exchange = self.exchange(self.groups[t], self.width, self.wide, self.biases[t])
        self.counts.append([None if message is None else message[0] for message in exchange.messages])
        return cpu.Joint(exchange.messages, exchange.statistics)

    def gradients(self, t: int) -> cpu.Joint:
        exchange = self.exchange(self.groups[t], self.width, self.wide, counts=self.counts[t])
        return cpu.Joint(exchange.messages, exchange.gradients)


def _kernels(h: Tensor, row_weight: Tensor) -> ModuleType | None:
    """Those of the CPU or Triton's, if they take this call without PyTorch's dispatcher; see also runs_compiled."""
    if is_eager(h):
        return cpu
    by_triton = is_eager(h, "cuda") and not registry.is_transformed() and not registry.trains_compiled(h)
    return triton if by_triton and len(row_weight) > 0 else None


class _Convolutions(torch.autograd.Function):
    """Convolutions one after the other as one node of the autograd graph, for calls outside of compilation.

    It calls the kernels without PyTorch's dispatcher, which takes longer than small batches; compiled and traced code
    goes through the operators of :mod:`.library`, and so do second derivatives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        graph: Graph,
        moments: Moments,
        species: Tensor | None,
        norms: list[tuple[Any, ...]],
        running: list[Running] | None,
        shared: _Shared | None,
        h: Tensor,
        edge_values: Tensor,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        layers, kernels = _layers_of(parameters, norms), _kernels(h, moments.row_weight)
        assert kernels is not None
        joint = [] if shared is None else [shared.statistics]
        out, statistics, block = kernels.convs(h, layers, graph, moments, species, running, *joint)
        ctx.graph, ctx.moments, ctx.species, ctx.norms, ctx.shared = graph, moments, species, norms, shared
        ctx.kernels = kernels
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        ctx.n_parameters = len(parameters)
        ctx.save_for_backward(h, edge_values, statistics, block, *parameters, *_watched(graph, moments, species))
        return out, statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
        none: list[Any] = [None] * 6
        h, edge_values, statistics, block, *parameters = ctx.saved_tensors
        parameters = parameters[: ctx.n_parameters]
        if grad is None:
            return (*none, *([None] * (2 + len(parameters))))
        if is_again(grad):
            width = h.shape[1]
            used = [x.split([2 * width, 2 * width, width, width]) for x in statistics]
            return (*none, *_differentiable(ctx, grad, used, h, edge_values, parameters))
        of_h, edge_grad, *wanted = ctx.needs_input_grad[6:]
        joint = [] if ctx.shared is None else [ctx.shared.gradients]
        d_h, gradients, d_edge = ctx.kernels.convs_backward(
            grad.contiguous(), h, statistics, block, _layers_of(parameters, ctx.norms), ctx.graph, ctx.moments,
            edge_grad, ctx.species, *joint,
        )  # fmt: skip
        found = (g if want else None for g, want in zip(gradients, wanted, strict=True))
        return (*none, d_h if of_h else None, d_edge, *found)


def _watched(graph: Graph, moments: Moments, species: Tensor | None) -> list[Tensor]:
    """What a backward pass reads besides, so that autograd says so if it was written to meanwhile."""
    return _written_to(species, moments.row_weight, graph.sender, graph.row_ptr, graph.crystal_ptr)


def _written_to(*tensors: Tensor | None) -> list[Tensor]:
    """Those of which autograd counts what is written to them."""
    return [x for x in tensors if x is not None and not x.is_inference()]


def _layers_of(parameters: Sequence[Tensor | None], norms: list[tuple[Any, ...]]) -> list[Layer]:
    return [Layer(*parameters[6 * t : 6 * t + 6], *norm) for t, norm in enumerate(norms)]  # type: ignore[arg-type]


def _differentiable(
    ctx: Any,
    grad: Tensor,
    statistics: Sequence[Sequence[Tensor]],
    h: Tensor,
    edge_values: Tensor,
    parameters: list[Tensor | None],
    after: Callable[[Tensor], Tensor] | None = None,
) -> list[Tensor | None]:
    """The gradients once more, from operators that can be differentiated again; within vmap from the formula.

    ``statistics``: those used, of each layer. ``after``: what became of the rows.
    """
    slot = "distance" if ctx.graph.features is None else "features"

    def run(h: Tensor, edge_values: Tensor, *parameters: Tensor | None) -> Tensor:
        x = h if ctx.species is None else h.index_select(0, ctx.species)
        graph = ctx.graph._replace(**{slot: edge_values})
        for t, norm in enumerate(ctx.norms):
            layer = Layer(*parameters[6 * t : 6 * t + 6], *statistics[t], *norm[4:])  # type: ignore[arg-type]
            if _is_batched(grad):
                x = library.by_formula(x, layer, graph, ctx.moments.row_weight)
            else:
                x = _ops.gated_conv(x, *layer, *graph, *ctx.moments)[0]
        return x if after is None else after(x)

    return gradients(run, [h, edge_values, *parameters], ctx.needs_input_grad[6:], grad)


def gradients(
    run: Callable[..., Tensor], inputs: Sequence[Tensor | None], wanted: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Those of ``run`` at its inputs, where wanted, to be differentiated again.

    At each place apart: what is given twice, or follows from another input, does not count there.
    """
    with torch.enable_grad():
        own = [None if x is None else x.view_as(x) for x in inputs]
        at = [x is not None and want for x, want in zip(own, wanted, strict=True)]
        places = [x for x, is_asked in zip(own, at, strict=True) if is_asked]
        found = iter(torch.autograd.grad(run(*own), places, grad, create_graph=True, allow_unused=True))  # type: ignore[arg-type]
    return [next(found) if is_asked else None for is_asked in at]


def is_again(grad: Tensor) -> bool:
    """Must a backward pass be one that can be differentiated, or is inside of vmap?"""
    return torch.is_grad_enabled() or _is_batched(grad)


def _is_batched(grad: Tensor) -> bool:
    """Of vmap, or of ``torch.autograd.grad`` with ``is_grads_batched``."""
    return registry.is_transformed() or torch._C._functorch.is_legacy_batchedtensor(grad)


class _SharedConvolutions(_Convolutions):
    """The same for norms that several processes share, without second derivatives."""

    backward = staticmethod(once_differentiable(_Convolutions.backward))  # type: ignore[assignment]


def is_eager(h: Tensor, device: str = "cpu") -> bool:
    """Is this a call on tensors of the device that nobody traces?"""
    return (
        h.device.type == device
        and not torch.compiler.is_compiling()
        and type(h) in (Tensor, torch.nn.Parameter)
        and not torch._C._len_torch_dispatch_stack()
    )


class _Lookup(torch.autograd.Function):
    """Rows of a table, with a gradient whose bits repeat on a GPU."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, species: Tensor) -> Tensor:
        ctx.species, ctx.count = species, table.shape[0]
        indices = species.dtype == torch.int32 and species.is_contiguous() and species.device == table.device
        ctx.compiled = indices and table.is_contiguous() and registry.trains_compiled(table)
        return cuda_conv.lookup(table, species) if ctx.compiled else table.index_select(0, species)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.compiled and not torch.is_grad_enabled():
            return cuda_conv.sum_by_species(grad.contiguous(), ctx.species, ctx.count), None
        return triton.sum_by_species(grad, ctx.species, ctx.count), None


def lookup(table: Tensor, species: Tensor) -> Tensor:
    """(N, F): of a table (U, F) the row that ``species`` (N,) names.

    Raises:
        InputError: on the CPU, ``species`` leave the table; on a GPU to look would mean to wait.
    """
    if is_eager(table, "cuda") and not registry.is_transformed():
        found: Tensor = _Lookup.apply(table, species)
        return found
    indices = species.long()  # vmap of torch 2.6 takes no others
    if torch.compiler.is_compiling():
        return table.index_select(0, indices)
    try:
        return table.index_select(0, indices)
    except IndexError as error:
        raise cpu.bad_species(species, table.shape[0]) from error


def runs_compiled(h: Tensor) -> bool:
    """Is this a call that the CUDA kernels for training take without PyTorch's dispatcher?"""
    return is_eager(h, "cuda") and not registry.is_transformed() and registry.trains_compiled(h)


def runs_on_gpu(h: Tensor) -> bool:
    """Is this a call that kernels for GPUs take without PyTorch's dispatcher, the compiled ones or Triton's?"""
    return is_eager(h, "cuda") and not registry.is_transformed() and registry.select(h) in ("cuda", "triton")


class CrystalMean(torch.autograd.Function):
    """The mean over the atoms of each crystal on a GPU, one launch forward and one backward."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, row_weight: Tensor, crystal_ptr: Tensor) -> Tensor:
        ctx.crystals = row_weight, crystal_ptr
        return cuda_conv.crystal_mean(h, row_weight, crystal_ptr)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _CrystalMeanBackward.apply(grad, *ctx.crystals), None, None


class _CrystalMeanBackward(torch.autograd.Function):
    """Its gradient, whose own gradient is the mean."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, row_weight: Tensor, crystal_ptr: Tensor) -> Tensor:
        ctx.crystals = row_weight, crystal_ptr
        return cuda_conv.crystal_mean_backward(grad.contiguous(), row_weight, crystal_ptr)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return CrystalMean.apply(grad.contiguous(), *ctx.crystals), None, None


class _DeviceConvolutions(torch.autograd.Function):
    """As :class:`_Convolutions` on a GPU: a layer is one call forward and one backward, and running statistics move.

    Kept are the summed messages alone, (N, F) a layer: the features that they led to are soon formed again. With
    ``pooled`` the result is the mean over the rows of each crystal, (B, F), and the rows' features need not be kept
    either, nor their gradient be given.
    """

    @staticmethod
    def forward(
        ctx: Any,
        graph: Graph,
        moments: Moments,
        species: Tensor | None,
        norms: list[tuple[Any, ...]],
        running: list[Running],
        pooled: bool,
        h: Tensor,
        edge_values: Tensor,
        *parameters: Tensor | None,
    ) -> Tensor:
        run = cuda_conv.Call(graph, moments, h, parameters[0].shape[1] - 2 * h.shape[1])  # type: ignore[union-attr]
        n, steps = len(moments.row_weight), len(norms)
        messages = cuda_conv.Messages(h.new_empty(steps, n, h.shape[1]), h.new_empty(steps, 2, h.shape[1]))
        kept: list[Tensor | None] = []
        x = h if species is None else cuda_conv.features(h, species, messages, 0)
        with triton.launching(h.device) as stream:
            for t, norm in enumerate(norms):
                layer = Layer(*parameters[6 * t : 6 * t + 6], *norm)  # type: ignore[arg-type]
                run.check(layer, h=x)
                out = torch.empty_like(x) if x is h else x
                into = out, messages.sums[t], messages.norms[t]
                statistics, product = run.forward(x, layer, stream, into, running[t])
                kept += [*statistics, product]
                x = out
        ctx.graph, ctx.species, ctx.norms, ctx.pooled = graph, species, norms, pooled
        row_weight, in_degree, _, _, e_sum, gram = moments  # those in between led to the Gram matrices, and are large
        ctx.moments = Moments(row_weight, in_degree, None, None, e_sum, gram)
        ctx.n_parameters = len(parameters)
        watched = _watched(graph, moments, species)
        ctx.n_kept = 2 + len(kept)
        ctx.save_for_backward(h, edge_values, *parameters, *messages, *kept, *watched)
        return cuda_conv.crystal_mean(x, row_weight, graph.crystal_ptr) if pooled else x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        none: list[Any] = [None] * 6
        h, edge_values, *saved = ctx.saved_tensors
        parameters, of_forward = saved[: ctx.n_parameters], saved[ctx.n_parameters :]
        sums, scales, *kept = of_forward[: ctx.n_kept]
        row_weight, crystal_ptr = ctx.moments.row_weight, ctx.graph.crystal_ptr
        n_features = parameters[0].shape[1] - 2 * h.shape[1]
        if is_again(grad):
            if any(norm[-2] for norm in ctx.norms):
                ctx.moments = moments(row_weight, ctx.graph, n_features)
            pool = (lambda x: CrystalMean.apply(x, row_weight, crystal_ptr)) if ctx.pooled else None
            used = [kept[5 * t : 5 * t + 4] for t in range(len(ctx.norms))]
            return (*none, *_differentiable(ctx, grad, used, h, edge_values, parameters, pool))
        edge_grad = ctx.needs_input_grad[7]
        layers = [Layer(*parameters[6 * t : 6 * t + 6], *norm) for t, norm in enumerate(ctx.norms)]
        if edge_grad:
            cpu.refuse_edge_grad(layers)
        run = cuda_conv.Call(ctx.graph, ctx.moments, h, n_features)
        run.by_sender()
        messages, d_edge = cuda_conv.Messages(sums, scales), None
        gradients: list[Any] = [None] * len(parameters)
        grad = grad.contiguous()
        if ctx.pooled:
            grad = cuda_conv.crystal_mean_backward(grad, row_weight, crystal_ptr)
        into = grad if ctx.pooled else torch.empty_like(grad)
        with triton.launching(h.device) as stream:
            for t in reversed(range(len(layers))):
                x = h if t == 0 and ctx.species is None else cuda_conv.features(h, ctx.species, messages, t)
                *statistics, product = kept[5 * t : 5 * t + 5]
                of_layer = cuda_conv.Kept(sums[t], statistics, product)
                grad, *rest, dy = run.backward(grad, x, layers[t], of_layer, edge_grad, stream, into)
                gradients[6 * t : 6 * t + 6] = rest
                del x  # before the next one asks for memory
                if edge_grad:
                    d = cuda_conv.edge_gradient(dy, layers[t], statistics[1], ctx.graph)
                    d_edge = d if d_edge is None else d_edge + d
        if ctx.species is not None and ctx.needs_input_grad[6]:
            grad = cuda_conv.sum_by_species(grad, ctx.species, len(h))
        wanted = ctx.needs_input_grad[8:]
        gradients = [g if want else None for g, want in zip(gradients, wanted, strict=True)]
        return (*none, grad, d_edge, *gradients)


def _running(
    layers: Sequence[tuple[Tensor, Tensor | None, BatchNorm, BatchNorm]],
) -> list[Running] | None:
    """What kernels are to move in each layer; None if some of it they do not take."""
    found, dtype, device = [], layers[0][0].dtype, layers[0][0].device
    for _, _, *norms in layers:
        states: list[Any] = []
        for norm in norms:
            mean, var = norm.running_mean, norm.running_var
            if not norm.training or mean is None or var is None:
                states += None, None
            elif not all(
                type(x) is Tensor and x.dtype == dtype and x.is_contiguous() and x.device == device for x in (mean, var)
            ):
                return None
            else:
                states += mean, var
        states += norms[0].momentum, norms[1].momentum
        found.append(Running(*states))
    return found


def _say_moved(running: Sequence[Running]) -> None:
    """To autograd, which does not see what kernels write."""
    for x in (x for state in running for x in state[:4]):
        if x is not None and not x.is_inference():
            torch.autograd.graph.increment_version(x)


def gated_convs(
    h: Tensor,
    graph: Graph,
    moments: Moments,
    layers: Sequence[tuple[Tensor, Tensor | None, BatchNorm, BatchNorm]],
    species: Tensor | None = None,
    pool: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Gated graph convolutions one after the other, (N, F) -> (N, F), each with one pass over the edges backward.

    With ``species`` (N,), h is a table (U, F) of which row i takes row species[i]. Norms with a group share their batch
    with other processes where nothing is traced; for others see :mod:`.synchronized`. With ``pool``, which gives the
    mean over each crystal's rows, the result is that, (B, F); kernels that can do so themselves do.
    """
    width, more = h.shape[1], missing_channels(h)
    wide = pad(h, (0, more)) if more else h.contiguous()
    given = [operator_layer(*layer, width, more) for layer in layers]
    statistics: Sequence[Tensor]
    shared = None
    if _kernels(h, moments.row_weight) is not None:
        edge_values = graph.distance if graph.features is None else graph.features
        parameters = [x for layer in given for x in layer[:6]]
        is_shared = any(norm.training and norm.group is not None for layer in layers for norm in layer[2:])
        shared = _Shared([layer[2:] for layer in layers], parameters[1::6], width, more) if is_shared else None
        function = _SharedConvolutions if is_shared else _Convolutions
        norms = [tuple(x[6:]) for x in given]
        running = None if more else _running(layers)
        out, used = function.apply(graph, moments, species, norms, running, shared, wide, edge_values, *parameters)
        if running is None:
            statistics = used.flatten().split([2 * wide.shape[1], 2 * wide.shape[1], *wide.shape[1:] * 2] * len(layers))
            _update(layers, statistics, graph, moments, width, more, None if shared is None else shared.counts)
        else:
            _say_moved(running)
    elif runs_compiled(h) and len(moments.row_weight) > 0 and (running := _running(layers)) is not None:
        edge_values = graph.distance if graph.features is None else graph.features
        parameters = [x for layer in given for x in layer[:6]]
        norms, pooled = [tuple(x[6:]) for x in given], pool is not None
        found: Tensor = _DeviceConvolutions.apply(
            graph, moments, species, norms, running, pooled, h.contiguous(), edge_values, *parameters
        )
        _say_moved(running)
        return found
    else:
        out = wide if species is None else lookup(wide, species)
        statistics = []
        for layer in given:
            out, _m, *used = _ops.gated_conv(out, *layer, *graph, *moments)
            statistics += used
        _update(layers, statistics, graph, moments, width, more)
    out = out[:, :width].contiguous() if more else out
    return out if pool is None else pool(out)


def _update(
    layers: Sequence[tuple[Tensor, Tensor | None, BatchNorm, BatchNorm]],
    statistics: Sequence[Tensor],
    graph: Graph,
    moments: Moments,
    width: int,
    more: int,
    counts: list[list[Tensor | None]] | None = None,
) -> None:
    """Move the running statistics of the norms that train towards those of the batch, where no kernel does.

    ``counts`` of the values that both norms of each layer have seen, where that is not this process's batch alone.
    """
    if not any(bn1.training or bn2.training for _, _, bn1, bn2 in layers):
        return
    if more:
        statistics = [x.reshape(-1, width + more)[:, :width].reshape(-1) for x in statistics]
    atoms = moments.row_weight.sum()
    edges = moments.row_weight @ graph.row_ptr.diff().to(atoms.dtype)
    for t, (_, bias, bn1, bn2) in enumerate(layers):
        mean1, var1, mean2, var2 = statistics[4 * t : 4 * t + 4]
        of_all = (None, None) if counts is None else counts[t]
        if bn1.training:
            bn1.update(
                mean1 if bias is None else mean1 + bias.detach(), var1, edges if of_all[0] is None else of_all[0]
            )
        if bn2.training:
            bn2.update(mean2, var2, atoms if of_all[1] is None else of_all[1])


class _Readout(torch.autograd.Function):
    """Mean over each crystal's atoms and the layers after it as one node of the autograd graph."""

    @staticmethod
    def forward(ctx: Any, row_weight: Tensor, crystal_ptr: Tensor, h: Tensor, *parameters: Tensor | None) -> Tensor:
        layers = _pairs(parameters)
        out, values = cpu.readout(h, row_weight, crystal_ptr, layers)
        ctx.crystals = row_weight, crystal_ptr
        ctx.n_parameters = len(parameters)
        ctx.save_for_backward(h, values, *parameters, *_written_to(row_weight, crystal_ptr))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, values, *parameters = ctx.saved_tensors
        parameters = parameters[: ctx.n_parameters]
        wanted = ctx.needs_input_grad[2:]
        row_weight, crystal_ptr = ctx.crystals
        if is_again(grad):
            run = partial(_readout_formula, row_weight, crystal_ptr)
            return None, None, *gradients(run, [h, *parameters], wanted, grad)
        d_h, others = cpu.readout_backward(grad.contiguous(), values, row_weight, crystal_ptr, _pairs(parameters))
        return None, None, *(g if want else None for g, want in zip([d_h, *others], wanted, strict=True))


def _readout_formula(row_weight: Tensor, crystal_ptr: Tensor, h: Tensor, *parameters: Tensor | None) -> Tensor:
    return reference.readout(h, row_weight, crystal_ptr, _pairs(parameters))


def _pairs(parameters: Sequence[Tensor | None]) -> list[Dense]:
    return [Dense(w, b) for w, b in zip(parameters[::2], parameters[1::2], strict=True)]  # type: ignore[arg-type]


def takes_readout(h: Tensor, layers: Sequence[Dense]) -> bool:
    """Is this a call of the kernels, and can they take these layers?"""
    return is_eager(h) and len(layers) <= cpu.MOST_LAYERS and _are_plain(h, layers)


def _are_plain(h: Tensor, layers: Sequence[Dense]) -> bool:
    return all(x is None or (x.dtype is h.dtype and x.is_contiguous()) for layer in layers for x in layer)


def readout(h: Tensor, row_weight: Tensor, crystal_ptr: Tensor, layers: Sequence[Dense]) -> Tensor:
    """:func:`.reference.readout` by the kernels."""
    out: Tensor = _Readout.apply(row_weight, crystal_ptr, h.contiguous(), *(x for layer in layers for x in layer))
    return out


def takes_network(
    h: Tensor,
    embedding: Dense,
    layers: Sequence[tuple[Tensor, Tensor | None, BatchNorm, BatchNorm]],
    readout_layers: Sequence[Dense],
) -> bool:
    """Can the kernels take all of a call at once?"""
    if h.device.type == "cuda":
        can = cuda.readout_refusal(readout_layers) is None
    else:
        can = cpu.core is not None and h.dtype in cpu.DTYPES and 0 < len(readout_layers) <= cpu.MOST_LAYERS
        can = can and embedding.weight.shape[0] % cpu.kernel_width(h.dtype) == 0
    return can and len(layers) > 0 and h.is_contiguous() and _are_plain(h, [embedding, *readout_layers])


def network(
    h: Tensor,
    species: Tensor | None,
    embedding: Dense | None,
    graph: Graph,
    layers: Sequence[tuple[Tensor, Tensor | None, BatchNorm, BatchNorm]],
    row_weight: Tensor,
    readout_layers: Sequence[Dense],
) -> Tensor:
    """Embedding, convolutions with fixed statistics and readout at once, without gradients."""
    width = layers[0][0].shape[0] // 2
    folded = [operator_layer(*layer, width, 0) for layer in layers]
    if is_eager(h, h.device.type):
        backend = cuda if h.device.type == "cuda" else cpu
        return backend.network(h, species, embedding, folded, graph, row_weight, readout_layers)
    dense: list[Tensor | None] = [None, None] if embedding is None else [*embedding]
    dense += [x for layer in readout_layers for x in layer]
    shared = all(layer[0] is layers[0][0] for layer in layers)
    out: Tensor = _ops.gated_conv_network(h, species, row_weight, dense, *_lists(folded, shared), *graph)
    return out


def network_parameters(
    h: Tensor,
    embedding: Dense,
    layers: Sequence[tuple[Tensor, Tensor | None, BatchNorm, BatchNorm]],
    readout_layers: Sequence[Dense],
) -> cpu.NetworkParameters | cuda.NetworkParameters | None:
    """Those of :func:`network` with a table, for many calls; None where kernels would read copies of them."""
    width = layers[0][0].shape[0] // 2
    folded = [operator_layer(*layer, width, 0) for layer in layers]
    for (weight, bias, bn1, bn2), layer in zip(layers, folded, strict=True):
        given = weight, bias, *bn1[:2], *bn2[:2], *bn1[2:4], *bn2[2:4]
        if any(x is not None and x is not read for x, read in zip(given, layer, strict=False)):
            return None
    backend = cuda if h.device.type == "cuda" else cpu
    return backend.NetworkParameters(h.shape[1], embedding, folded, readout_layers)


def _lists(layers: list[Layer], shared: bool) -> tuple[Any, ...]:
    """Layers with fixed statistics as an operator takes them; ``shared``: they have one weight."""
    own = layers[:1] if shared else layers
    biases = layers[:1] if shared and all(layer.bias is layers[0].bias for layer in layers) else layers
    if all(layer.bias is None for layer in layers):
        biases = []
    return (
        [layer.weight for layer in own],
        [torch.zeros_like(layer.beta1) if layer.bias is None else layer.bias for layer in biases],
        [x for layer in layers for x in tuple(layer)[2:10]],
        [x for layer in layers for x in tuple(layer)[10:12]],
        shared,
    )


def stack(
    h: Tensor,
    graph: Graph,
    layers: Sequence[tuple[Tensor, Tensor | None, BatchNorm, BatchNorm]],
    shared: bool,
    species: Tensor | None = None,
) -> Tensor:
    """All convolutions with fixed statistics and without gradients; ``shared``: they have one weight."""
    width, more = h.shape[1], missing_channels(h)
    folded = [operator_layer(*layer, width, more) for layer in layers]
    if shared and more:  # widened once, so that it is one still
        folded = [layer._replace(weight=folded[0].weight) for layer in folded]
    wide = pad(h, (0, more)) if more else h.contiguous()
    if is_eager(h):
        out = cpu.stack(wide, folded, graph, species)
    else:
        rows = wide if species is None else embedding(species, wide)
        out = _ops.gated_conv_stack(rows, *_lists(folded, shared), *graph)
    return out[:, :width].contiguous() if more else out
