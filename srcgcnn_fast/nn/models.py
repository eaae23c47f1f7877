"""CGCNN and SR-CGCNN, with the parameters, state-dict names and numbers of the published programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from numbers import Integral
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, softplus

from .. import functional
from ..errors import InputError
from ..graph.batch import GraphBatch
from ..graph.elements import element_features
from ..graph.parameters import as_python, is_real
from ..ops.fused import lookup
from .conv import GatedConv
from .frozen import Frozen, is_untouched
from .metadata import ModelMetadata
from .norm import batch_norm_states, stand_in_for

_PATIENCE = 16


def _positive(**values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, not {value!r}.")


def _check_batch(batch: Any) -> None:
    if not isinstance(batch, GraphBatch):
        raise InputError(f"A model takes a GraphBatch, not a {type(batch).__name__}; collate([graph, …]) makes one.")


def _is_plain(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Is it computed by its parameters alone, without anybody watching?"""
    return type(module) is kind and is_untouched(module)


def _with_first(states: list[functional.BatchNorm]) -> list[functional.BatchNorm]:
    """Norms without scale and shift take the first one's."""
    first = states[0]
    return [s if s.weight is not None else s._replace(weight=first.weight, bias=first.bias) for s in states]


_held: dict[int, tuple[int, bool]] = {}
"""Of each module (its id) within :func:`in_eval_mode`: how many have it there, and the mode that the first found."""
_holds = Lock()


@contextmanager
def in_eval_mode(models: Sequence[nn.Module]) -> Iterator[None]:
    """Afterwards every part of them has the mode that it had; of several threads within, the last sees to that."""
    modules = [module for model in models for module in model.modules()]
    with _holds:
        for module in modules:
            count, training = _held.get(id(module), (0, module.training))
            _held[id(module)] = count + 1, training
        for model in models:
            model.eval()
    try:
        yield
    finally:
        with _holds:
            for module in modules:
                count, training = _held.pop(id(module))
                if count > 1:
                    _held[id(module)] = count - 1, training
                else:
                    module.training = training


def _element_table(width: int) -> Tensor:
    """The built-in one; nothing for another width, whose model is given a table, or batches with atom features."""
    table = torch.from_numpy(element_features().copy())
    return table if table.shape[1] == width else torch.zeros(table.shape[0], width)


@lru_cache(64)
def _vectors(std: tuple[float, ...], mean: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Both, which to copy anew would let every call wait for the GPU."""
    with torch.inference_mode(False):
        return [torch.tensor(x, dtype=dtype, device=device) for x in (std, mean)]


class CrystalModel(nn.Module):
    """Embedding, convolutions, mean over atoms, head; the convolutions are the subclass's.

    ``metadata`` says what the outputs mean; it is saved with the model.
    """

    element_table: Tensor
    _frozen: Frozen | None = None
    _wait = 0
    """Calls until parameters are laid out again, after some that changed from one call to the next."""

    def __init__(
        self,
        atom_fea_len: int,
        h_fea_len: int,
        n_h: int,
        classification: bool,
        n_targets: int,
        orig_atom_fea_len: int,
        nbr_fea_len: int,
        dmin: float,
        step: float,
        dropout: float | None,
    ) -> None:
        super().__init__()
        _positive(
            atom_fea_len=atom_fea_len, h_fea_len=h_fea_len, n_h=n_h, n_targets=n_targets,
            orig_atom_fea_len=orig_atom_fea_len, nbr_fea_len=nbr_fea_len,
        )  # fmt: skip
        if classification and n_targets > 1:
            raise InputError(f"A classifier has one target, not {n_targets}; train one model per class label.")
        if not (is_real(step) and step > 0):
            raise InputError(f"The Gaussians' step must be a positive number of Å, not {step!r}.")
        if not is_real(dmin):
            raise InputError(f"dmin, the first Gaussian's centre, must be a number of Å, not {dmin!r}.")
        if dropout is not None and not (is_real(dropout) and 0 <= dropout < 1):
            raise InputError(f"dropout is a probability from 0 to below 1, not {dropout!r}.")
        self._hyperparameters: dict[str, Any] = {
            "atom_fea_len": atom_fea_len,
            "h_fea_len": h_fea_len,
            "n_h": n_h,
            "classification": classification,
            "n_targets": n_targets,
            "orig_atom_fea_len": orig_atom_fea_len,
            "nbr_fea_len": nbr_fea_len,
            "dmin": dmin,
            "step": step,
            "dropout": dropout,
        }
        self.classification = classification
        self.metadata = ModelMetadata(
            tuple(f"target_{k}" if n_targets > 1 else "target" for k in range(n_targets)),
            *((x,) * n_targets for x in ("", 0.0, 1.0)),  # type: ignore[arg-type]
        )
        # The order of construction is the published programs', so that a seed gives the same weights.
        self.embedding = nn.Linear(orig_atom_fea_len, atom_fea_len)
        made, table = self.embedding.weight, _element_table(orig_atom_fea_len)
        table = table.to(made.dtype) if made.is_meta else table.to(made)  # which a state_dict does not bring
        self.register_buffer("element_table", table, persistent=False)
        self._build_convolutions()
        self.conv_to_fc = nn.Linear(atom_fea_len, h_fea_len)
        if n_h > 1:
            self.fcs = nn.ModuleList(nn.Linear(h_fea_len, h_fea_len) for _ in range(n_h - 1))
        self.fc_out = nn.Linear(h_fea_len, 2 if classification else n_targets)
        rate = dropout if dropout is not None else 0.5 * classification
        self.dropout = nn.Dropout(rate) if rate else None

    def _apply(self, fn: Any, recurse: bool = True) -> CrystalModel:
        had_none, table = any(p.is_meta for p in self.parameters()), self.element_table
        super()._apply(fn, recurse)
        if had_none and not self.element_table.is_meta:  # to_empty, for a state_dict to fill
            self.element_table.copy_(_element_table(table.shape[1]) if table.is_meta else table)
        return self

    def _build_convolutions(self) -> None:
        raise NotImplementedError

    def _layers(self) -> list[functional.ConvParameters]:
        """The convolutions of one call, which counts a batch in training mode."""
        raise NotImplementedError

    def _is_stack(self) -> bool:
        """Are the convolutions ours, and nothing between them?"""
        return True

    def _called(self) -> list[nn.Module]:
        """The convolutions that are called as modules where :meth:`_is_stack` is not true."""
        return []

    def _convolve(
        self, h: Tensor, species: Tensor | None, batch: GraphBatch, return_steps: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        p = self._hyperparameters
        return functional.stacked_gated_conv(
            h, batch, self._layers(), species=species, dmin=p["dmin"], step=p["step"], return_steps=return_steps
        )

    def _convolution_modules(self) -> list[nn.Module]:
        raise NotImplementedError

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's arguments, so that ``type(model)(**model.hyperparameters)`` is the same architecture."""
        return {name: as_python(value) for name, value in self._hyperparameters.items()}

    def count_conv_parameters(self) -> int:
        """Trainable parameters of the convolutions: 66 432 for CGCNN, 22 912 for SR-CGCNN, at the defaults."""
        modules = self._convolution_modules()
        return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)

    def embed(self, batch: GraphBatch) -> Tensor:
        """(N, F): the embedded element vector, or atom features, of every row."""
        _check_batch(batch)
        h, species = self._embed(batch)
        return h if species is None else lookup(h, species)

    def _embed(self, batch: GraphBatch) -> tuple[Tensor, Tensor | None]:
        """The features of the rows, or a table (U, F) and each row's place in it."""
        atoms, species = self._atoms(batch)
        return self.embedding(atoms), species

    def _atoms(self, batch: GraphBatch) -> tuple[Tensor, Tensor | None]:
        """What is embedded: the rows' own features, or the element table and each row's place in it."""
        if batch.atom_features is not None:
            given = batch.atom_features.shape[1]
            takes = getattr(self.embedding, "in_features", 0) or given  # another module than ours may not tell
            if given != takes:
                raise InputError(
                    f"The batch brings {given} features an atom, and the model takes {takes}: make it with "
                    f"orig_atom_fea_len={given}, or leave these features out of the batch."
                )
            return batch.atom_features.to(next(self.embedding.parameters(), self.element_table).dtype), None
        if self._hyperparameters["orig_atom_fea_len"] != self.element_table.shape[1]:
            raise InputError("The element table's width is not orig_atom_fea_len; set a table that fits.")
        return self.element_table, batch.numbers

    def features(self, batch: GraphBatch) -> Tensor:
        """The pooled crystal vector, (B, F): a descriptor of the crystal."""
        _check_batch(batch)
        if self._is_stack() and _is_plain(self.embedding):
            return self._network(batch, [])
        return functional.crystal_mean(self._convolve(*self._embed(batch), batch)[0], batch)

    def forward(self, batch: GraphBatch, return_steps: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """(B, n_targets) network outputs, normalised as ``metadata`` says; a classifier's (B, 2) log-probabilities.

        With ``return_steps`` also the list of (N, F) features after each convolution.
        """
        _check_batch(batch)
        if not return_steps and (network := self._frozen_network()) is not None and network.takes(batch):
            out = network(batch)
            return log_softmax(out, dim=1) if self.classification else out
        steps: list[Tensor] = []
        hidden = self._hidden()
        drops = self.dropout is not None and self.dropout.training
        plain = not drops and all(map(_is_plain, hidden))
        if plain and not return_steps and self._is_stack() and _is_plain(self.embedding):
            out = self._network(batch, hidden)
        else:
            h, steps = self._convolve(*self._embed(batch), batch, return_steps)
            if plain:
                out = functional.readout(h, batch, [functional.Dense(x.weight, x.bias) for x in hidden])
            else:
                out = self._head(functional.crystal_mean(h, batch))
        if self.classification:
            out = log_softmax(out, dim=1)
        return (out, steps) if return_steps else out

    def _network(self, batch: GraphBatch, hidden: list[nn.Linear]) -> Tensor:
        """Everything in one call, where nothing stands between; without ``hidden`` the crystal vectors."""
        atoms, species = self._atoms(batch)
        embedding, *readout = (functional.Dense(x.weight, x.bias) for x in (self.embedding, *hidden))
        p = self._hyperparameters
        return functional.network(
            atoms, batch, embedding, self._layers(), readout, species=species, dmin=p["dmin"], step=p["step"]
        )

    def _hidden(self) -> list[nn.Linear]:
        return [self.conv_to_fc, *getattr(self, "fcs", ()), self.fc_out]

    def _frozen_network(self) -> functional.FrozenNetwork | None:
        """What :meth:`_network` comes to without gradients and statistics of the batch, looked up and checked once."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.training:
            return None
        table, dropout = self._buffers["element_table"], self.dropout
        if table is None or (dropout is not None and dropout.training) or not functional.is_plain(table.device):
            return None
        frozen, own = self._frozen, self.__dict__  # setattr of a module takes its time
        if frozen is not None:
            if frozen.holds(self):
                return frozen.network
            own["_frozen"], own["_wait"] = None, 0 if frozen.was_used else _PATIENCE
        if self._wait:
            own["_wait"] -= 1
            return None
        modules, linears = list(self.modules()), [self.embedding, *self._hidden()]
        tensors = [x for module in modules for part in (module._parameters, module._buffers) for x in part.values()]
        if any(x is not None and type(x) not in (Tensor, nn.Parameter) for x in tensors):
            return None
        network = self._freeze(table, modules, linears, tensors)
        own["_frozen"] = Frozen(self, modules, [*linears, *self._called()], network)
        return network

    def _freeze(
        self, table: Tensor, modules: list[nn.Module], linears: list[nn.Linear], tensors: list[Any]
    ) -> functional.FrozenNetwork | None:
        """None where not everything is computed from ``tensors``, the parameters and buffers, alone."""
        trains, is_ours = any(module.training for module in modules), type(self) in (CGCNN, SRCGCNN)
        if trains or not (is_ours and self._is_stack() and all(map(_is_plain, linears))):
            return None
        dense, layers = [functional.Dense(x.weight, x.bias) for x in linears], self._layers()
        used = [x for layer in layers for x in (*layer[:2], *layer.bn1[:4], *layer.bn2[:4])]
        used += [x for layer in dense for x in layer]
        if not {id(None), *map(id, tensors)}.issuperset(map(id, used)):  # weights that follow from others
            return None
        p = self._hyperparameters
        with suppress(InputError):  # the ordinary call says it
            return functional.FrozenNetwork(table, dense[0], layers, dense[1:], p["dmin"], p["step"])
        return None

    def __getstate__(self) -> dict[str, Any]:
        """Without what is bound to addresses."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_frozen", "_wait")}

    def _head(self, pooled: Tensor, kept: Tensor | None = None) -> Tensor:
        """(B, F) -> (B, outputs), layer by layer, with the dropout, or ``kept`` in its place."""
        out = pooled
        for k, layer in enumerate((self.conv_to_fc, *getattr(self, "fcs", ()), self.fc_out)):
            out = softplus(out)
            if k == 1 and self.dropout is not None:
                out = self.dropout(out) if kept is None else out * kept
            out = layer(out)
        return out

    def predict(self, batch: GraphBatch) -> Tensor:
        """(B, n_targets) in the targets' units; a classifier's P(class 1), (B, 1). Call ``eval()`` first."""
        return self.in_units(self(batch))

    def predict_from(self, features: Tensor, kept: Tensor | None = None) -> Tensor:
        """What :meth:`predict` gives for the crystal vectors of :meth:`features`, (B, F).

        ``kept`` (h_fea_len,) are factors in place of a random dropout.
        """
        out = self._head(features, kept)
        return self.in_units(log_softmax(out, dim=1) if self.classification else out)

    def _units(self, n_outputs: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Deviation and mean of each target."""
        std, mean = self.metadata.std, self.metadata.mean
        if len(std) != n_outputs:
            raise InputError(f"The metadata has {len(std)} targets for {n_outputs} outputs; give it one for each.")
        return std, mean

    def in_units(self, out: Tensor) -> Tensor:
        """What ``predict`` makes of the network's outputs.

        Raises:
            InputError: ``metadata`` has another number of targets.
        """
        if self.classification:
            return out[:, 1:].exp()
        std, mean = self._units(out.shape[1])
        if len(std) == 1:  # numbers go along with the kernels, tensors are copied first
            return out * std[0] + mean[0]
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return out * out.new_tensor(std) + out.new_tensor(mean)
        scale, shift = _vectors(tuple(std), tuple(mean), out.dtype, out.device)
        return out * scale + shift


class CGCNN(CrystalModel):
    """Crystal graph convolutional network: L gated convolutions, each with its own weights (Xie & Grossman 2018).

    Args:
        n_conv: L, convolutions.
        atom_fea_len: F, features of an atom.
        h_fea_len: features after pooling.
        n_h: hidden layers after pooling.
        classification: two classes and log-probabilities in place of a regression.
        n_targets: properties predicted at once.
        orig_atom_fea_len: components of the element vector.
        nbr_fea_len: K, Gaussians (41 for 0 to 8 Å).
        dmin: centre of the first Gaussian, Å.
        step: distance between centres and width of the Gaussians, Å.
        dropout: probability after pooling; by default 0.5 for a classifier, as published, and none for a regressor.

    Raises:
        InputError: a number is out of range, or a classifier has several targets.
    """

    def __init__(
        self,
        n_conv: int = 3,
        atom_fea_len: int = 64,
        h_fea_len: int = 128,
        n_h: int = 1,
        classification: bool = False,
        *,
        n_targets: int = 1,
        orig_atom_fea_len: int = 92,
        nbr_fea_len: int = 41,
        dmin: float = 0.0,
        step: float = 0.2,
        dropout: float | None = None,
    ) -> None:
        _positive(n_conv=n_conv)
        self._n_conv = n_conv
        super().__init__(
            atom_fea_len, h_fea_len, n_h, classification, n_targets, orig_atom_fea_len, nbr_fea_len, dmin, step, dropout
        )
        self._hyperparameters = {"n_conv": n_conv, **self._hyperparameters}

    def _build_convolutions(self) -> None:
        p = self._hyperparameters
        self.convs = nn.ModuleList(
            GatedConv(p["atom_fea_len"], p["nbr_fea_len"], dmin=p["dmin"], step=p["step"]) for _ in range(self._n_conv)
        )

    def _convolution_modules(self) -> list[nn.Module]:
        return [self.convs]

    def _layers(self) -> list[functional.ConvParameters]:
        states = iter(batch_norm_states(norm for conv in self.convs for norm in (conv.bn1, conv.bn2)))  # type: ignore[misc]
        maps = [conv.fc_full for conv in self.convs]
        for linear in maps:
            stand_in_for(linear, nn.Linear)  # type: ignore[arg-type]
        return [functional.ConvParameters(x.weight, x.bias, next(states), next(states)) for x in maps]  # type: ignore[union-attr, arg-type]

    def _is_stack(self) -> bool:
        return all(_is_plain(conv, GatedConv) for conv in self.convs)

    def _called(self) -> list[nn.Module]:
        return list(self.convs)

    def _convolve(
        self, h: Tensor, species: Tensor | None, batch: GraphBatch, return_steps: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        if self._is_stack():
            return super()._convolve(h, species, batch, return_steps)
        h, steps = h if species is None else lookup(h, species), []
        for conv in self.convs:  # of which one has a hook or another class, and wants to be called
            h = conv(h, batch)
            steps.append(h)
        return h, steps if return_steps else []


class SRCGCNN(CrystalModel):
    """Shared-recurrent CGCNN: one gated convolution applied T times (Bhattacharjee, arXiv 2605.01304).

    Args:
        n_recurrent_steps: T, applications of the one convolution; each has its own batch norms.
        recurrent_shared_norms: one scale and shift for the batch norms of all steps, which keep their own statistics;
            T then costs no parameters. The published program has no such model.
        recurrent_layer_norm: a LayerNorm after each step.
        recurrent_learnable_alpha: a learned gate between old and new features per step.

    The other arguments and errors are those of :class:`CGCNN`.
    """

    recurrent_alpha: Tensor | None

    def __init__(
        self,
        n_recurrent_steps: int = 3,
        atom_fea_len: int = 64,
        h_fea_len: int = 128,
        n_h: int = 1,
        classification: bool = False,
        *,
        recurrent_layer_norm: bool = False,
        recurrent_learnable_alpha: bool = False,
        recurrent_shared_norms: bool = False,
        n_targets: int = 1,
        orig_atom_fea_len: int = 92,
        nbr_fea_len: int = 41,
        dmin: float = 0.0,
        step: float = 0.2,
        dropout: float | None = None,
    ) -> None:
        _positive(n_recurrent_steps=n_recurrent_steps)
        self._recurrence = {
            "n_recurrent_steps": n_recurrent_steps,
            "recurrent_layer_norm": recurrent_layer_norm,
            "recurrent_learnable_alpha": recurrent_learnable_alpha,
            "recurrent_shared_norms": recurrent_shared_norms,
        }
        super().__init__(
            atom_fea_len, h_fea_len, n_h, classification, n_targets, orig_atom_fea_len, nbr_fea_len, dmin, step, dropout
        )
        self._hyperparameters = {**self._recurrence, **self._hyperparameters}

    def _build_convolutions(self) -> None:
        p, steps = self._hyperparameters, self._recurrence["n_recurrent_steps"]
        width, is_shared = p["atom_fea_len"], self._recurrence["recurrent_shared_norms"]
        own = [t == 0 or not is_shared for t in range(steps)]
        self.shared_conv = GatedConv(width, p["nbr_fea_len"], batch_norm=False, dmin=p["dmin"], step=p["step"])
        self.recurrent_bn1s = nn.ModuleList(nn.BatchNorm1d(2 * width, affine=affine) for affine in own)
        self.recurrent_bn2s = nn.ModuleList(nn.BatchNorm1d(width, affine=affine) for affine in own)
        self.recurrent_norm = nn.LayerNorm(width) if self._recurrence["recurrent_layer_norm"] else None
        alpha = nn.Parameter(torch.ones(steps)) if self._recurrence["recurrent_learnable_alpha"] else None
        self.register_parameter("recurrent_alpha", alpha)

    def _convolution_modules(self) -> list[nn.Module]:
        return [self.shared_conv, self.recurrent_bn1s, self.recurrent_bn2s]

    def _layers(self) -> list[functional.ConvParameters]:
        shared = self.shared_conv.fc_full
        stand_in_for(self.shared_conv, GatedConv)
        stand_in_for(shared, nn.Linear)
        states = batch_norm_states([*self.recurrent_bn1s, *self.recurrent_bn2s])  # type: ignore[list-item]
        steps = len(states) // 2
        halves = [states[:steps], states[steps:]]
        if self._hyperparameters["recurrent_shared_norms"]:
            halves = [_with_first(half) for half in halves]
        return [functional.ConvParameters(shared.weight, shared.bias, *pair) for pair in zip(*halves, strict=True)]

    def _is_stack(self) -> bool:
        return self.recurrent_norm is None and self.recurrent_alpha is None

    def _convolve(
        self, h: Tensor, species: Tensor | None, batch: GraphBatch, return_steps: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        p, layers = self._hyperparameters, self._layers()
        return functional.recurrent_gated_conv(
            h,
            batch,
            layers[0].weight,
            layers[0].bias,
            [layer.bn1 for layer in layers],
            [layer.bn2 for layer in layers],
            layer_norm=self.recurrent_norm,
            alpha=self.recurrent_alpha,
            species=species,
            dmin=p["dmin"],
            step=p["step"],
            return_steps=return_steps,
        )
