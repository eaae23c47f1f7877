"""Everything that is measured, by name: each a model of its own with the same weights, and its input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import peers
import torch
from split import SplitModel, split_input
from torch import Tensor, nn

import srcgcnn_fast as sf
from srcgcnn_fast.graph import GraphBatch

MODELS = {"SR-CGCNN": sf.SRCGCNN, "CGCNN": sf.CGCNN}
WORK = ("inference", "training step")
OURS = ("native", "same graph")
EAGER = ("published, clean", "published, as shipped", "PyG CGConv", "split", "reference")
COMPILED = ("published, compiled", "split, compiled", "reference, compiled")
ORACLE = "published, clean"


class _flushed(AbstractContextManager):
    """Denormals are zero in the calling thread, as for every *clean* round of a peer."""

    def __enter__(self) -> None:
        torch.set_flush_denormal(True)

    def __exit__(self, *_: object) -> None:
        torch.set_flush_denormal(False)


@dataclass
class Candidate:
    """One model, its input, and the surroundings that it runs in."""

    model: nn.Module
    inputs: tuple[Any, ...]
    surroundings: Callable[[], AbstractContextManager] = nullcontext
    call: Callable[..., Tensor] | None = None
    """The compiled model, where it is one."""
    target: Tensor | None = field(default=None, repr=False)

    def inference(self) -> Tensor:
        self._forget()
        with self.surroundings(), torch.no_grad():
            self.model.eval()
            return self._forward(*self.inputs)

    def training_step(self) -> Tensor:
        """Forward, loss and backward; no optimiser, which would be the same for all."""
        self._forget()
        with self.surroundings():
            self.model.train().zero_grad(set_to_none=True)
            out = self._forward(*self.inputs)
            torch.nn.functional.mse_loss(out, self.target).backward()
            return out.detach()

    def run(self, work: str) -> Callable[[], Tensor]:
        return self.inference if work == "inference" else self.training_step

    def gradient(self) -> Tensor:
        """All gradients of the step before, in the order of their names."""
        named = {name.removeprefix("model."): p.grad for name, p in self.model.named_parameters()}
        return torch.cat([named[name].flatten() for name in sorted(named)])

    @property
    def _forward(self) -> Callable[..., Tensor]:
        return self.model if self.call is None else self.call  # a compiled module has no truth value

    def _forget(self) -> None:
        """A step meets a batch that is new: what ours keeps of a graph is not there yet."""
        for x in self.inputs:
            if isinstance(x, GraphBatch):
                x.cache.clear()


def make(kind: str, name: str, native: GraphBatch, same: GraphBatch) -> Candidate | str:
    """The candidate, or why it is absent. Weights depend on ``kind`` alone."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    with torch.no_grad():
        model.train()(native)  # running statistics that are those of crystals
    form, _, how = name.partition(", ")
    made = _form(form, how, model, native, same)
    if isinstance(made, Candidate):
        made.target = torch.randn(same.num_crystals, 1, generator=torch.Generator().manual_seed(1))
        if how == "compiled":
            made.call = torch.compile(made.model, dynamic=False, fullgraph=True)
    return made


def _form(form: str, how: str, model: nn.Module, native: GraphBatch, same: GraphBatch) -> Candidate | str:
    if form in OURS:
        return Candidate(model, (native if form == "native" else same,))
    if form == "reference":
        return Candidate(model, (same,), lambda: sf.use_backend("reference"))
    if form == "split":
        return Candidate(SplitModel(model), split_input(same), _flushed)
    if form == "PyG CGConv":
        if not peers.geometric_is_installed():
            return "absent: pip install torch-geometric"
        return Candidate(peers.GeometricModel(copy.deepcopy(model)), peers.geometric_input(same), _flushed)
    peer = peers.published_model(model)
    if peer is None:
        return "absent: set SRCGCNN_PEERS"
    if how == "as shipped":
        return Candidate(peer, peers.published_input(same, clean=False))
    inputs = peers.published_input(same, clean=True)
    if how == "compiled":
        return Candidate(peers.with_segment_mean(peer), (*inputs[:3], peers.segments(same)), _flushed)
    return Candidate(peer, inputs, _flushed)


def gate(work: str, candidates: dict[str, Candidate], outputs: dict[str, Tensor]) -> None:
    """Every candidate gives the numbers of the published program (of the reference where that is absent).

    Raises:
        AssertionError: one does not, so no time of it may be reported.
    """
    oracle = ORACLE if ORACLE in candidates else "reference"
    for name, got in outputs.items():
        if name.startswith("PyG"):
            _gate_geometric(candidates[name], work, got)
            continue
        torch.testing.assert_close(got, outputs[oracle], rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
        if work != "inference":
            ours, theirs = candidates[name].gradient(), candidates[oracle].gradient()
            error = float((ours - theirs).norm() / theirs.norm())
            assert error < 1e-3, f"{name}: gradients differ from those of {oracle} by {error:.1e}"


def _gate_geometric(candidate: Candidate, work: str, got: Tensor) -> None:
    """CGConv is another network; its inference is held against its formula, its training step against nonsense."""
    if work != "inference":
        assert bool(got.isfinite().all()) and bool(candidate.gradient().isfinite().all()), "PyG CGConv: not finite"
        return
    with torch.no_grad():
        torch.testing.assert_close(got, candidate.model.by_hand(*candidate.inputs), rtol=1e-3, atol=1e-4)
