"""Both models as an ASE calculator: the predicted properties, with forces and stress where one is an energy."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, require
from ..graph import CrystalGraph, GraphBatch, build_graph, collate
from ..graph.crystal import from_ase
from ..graph.elements import with_vector, without_vector
from ..nn import CGCNN, SRCGCNN
from ..serialization import loaded
from .smoothing import is_no_stack, soft_choice, weighted_convolve

_ase: Any = require("ase.calculators.calculator", "An ASE calculator", "io")
_outputs: Any = require("ase.outputs", "An ASE calculator", "io")
_stress: Any = require("ase.stress", "An ASE calculator", "io")

_EVERY_NEIGHBOUR = 2**30


class CrystalCalculator(_ase.Calculator):  # type: ignore[misc]
    """An ASE calculator of a copy of the model in float64.

    Every target is a property under its own name and in its own unit: ``calculator.get_property("band_gap", atoms)``.
    If one is an energy per atom, there are also ``energy`` (eV, of the whole cell), ``forces`` (eV/Å) and ``stress``
    (eV/Å³, Voigt): the exact derivatives of the predicted energy, by autograd through the distances.

    The energy is smooth only as long as every atom keeps its ``max_neighbors`` neighbours: where the 12th and the 13th
    swap, it jumps. ``smoothing`` removes the jumps: each neighbour has a weight that falls from 1 to 0 over the last
    ``smoothing`` Å before a cutoff. Each atom has its own cutoff, chosen such that its weights add up to
    ``max_neighbors``. If the 13th neighbour is farther than the 12th by more than ``smoothing``, energies are the
    model's own; otherwise, and within ``smoothing`` of the model's radius, they differ.

    Args:
        model: a model, or what :func:`srcgcnn_fast.load_model` takes.
        energy: the target that is an energy in eV/atom; None for the one whose unit says so, if any.
        smoothing: Å, or None for the model as it is. Smoothed energies are computed in plain PyTorch.

    Raises:
        InputError: the model is quantised; ``energy`` is no target, or has another unit; several targets have the unit
            eV/atom; another target has the name of what follows from the energy; ``smoothing`` is not between 0 and the
            radius; later, when a property is asked for: the crystal has no graph, or an element that the model does not
            know.
    """

    def __init__(
        self,
        model: CGCNN | SRCGCNN | str | os.PathLike[str],
        *,
        energy: str | None = None,
        smoothing: float | None = None,
    ) -> None:
        super().__init__()
        model = loaded(model)
        with torch.inference_mode(False):  # that forces can be asked of it
            self.model = copy.deepcopy(model).double().eval().requires_grad_(False)
        if any(isinstance(x, torch.dtype) for x in self.model.state_dict().values()):  # as packed weights name theirs
            raise InputError(
                "The model is quantised, and a calculator computes in float64; give it the model as it was before."
            )
        self.smoothing = smoothing
        metadata = self.model.metadata
        self._energy = _energy_target(metadata.targets, metadata.units, energy, self.model.classification)
        if smoothing is not None:
            if not 0 < smoothing < metadata.graph.radius:
                raise InputError(
                    f"smoothing must be between 0 and the radius of {metadata.graph.radius:g} Å, not {smoothing!r}."
                )
            self.model._convolve = partial(weighted_convolve, self.model)  # type: ignore[method-assign]
            self.model._is_stack = is_no_stack  # type: ignore[method-assign]
        derived = [] if self._energy is None else ["energy", "free_energy", "forces", "stress"]
        for k, name in enumerate(metadata.targets):
            if name in derived and (k != self._energy or name in ("forces", "stress")):
                raise InputError(
                    f"The target {name} has the name of what follows from the energy; change model.metadata.targets."
                )
        self.implemented_properties = [*derived, *(name for name in metadata.targets if name not in derived)]

    @torch.inference_mode(False)  # whoever asks for forces
    def calculate(
        self,
        atoms: Any = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = _ase.all_changes,
    ) -> None:
        """What ASE calls; fills ``results``."""
        super().calculate(atoms, properties, system_changes)
        self.results = {}  # those of other atoms, should this fail
        derivatives = not {"forces", "stress"}.isdisjoint(properties)
        graph = self._graph()
        n = graph.n_atoms
        distance = torch.from_numpy(graph.distance).to(self.model.element_table.device).requires_grad_(derivatives)
        with torch.set_grad_enabled(derivatives):
            values = self.model.predict(self._batch(graph, distance))[0]
        if not bool(torch.isfinite(values).all()):
            raise InputError("The model's output is not finite; check its weights and the structure.")
        self.results = dict(zip(self.model.metadata.targets, values.tolist(), strict=True))
        if self._energy is None:
            return
        self.results["energy"] = self.results["free_energy"] = n * values[self._energy].item()
        if derivatives:
            (slope,) = torch.autograd.grad(n * values[self._energy], distance)
            self.results |= self._derivatives(graph, slope.cpu().numpy())

    def export_properties(self) -> Any:
        """Those of the results that ASE has names for; it takes no others."""
        return _outputs.Properties({name: x for name, x in self.results.items() if name in _outputs.all_outputs})

    def _graph(self) -> CrystalGraph:
        """The full graph with its images: of the nearest neighbours, or of all within the radius where smoothed."""
        parameters = self.model.metadata.graph
        count, padded = (parameters.max_neighbors, parameters.padded)
        if self.smoothing is not None:
            count, padded = _EVERY_NEIGHBOUR, False
        graph = build_graph(
            from_ase(self.atoms), parameters.radius, count, None,
            padded=padded, isolated=parameters.isolated, distance_dtype=np.float64,
        )  # fmt: skip
        unknown = ~with_vector(self.model.element_table, graph.numbers)
        if unknown.any():
            raise InputError(without_vector("The crystal", graph.numbers[unknown][0]))
        return graph

    def _batch(self, graph: CrystalGraph, distance: Tensor) -> GraphBatch:
        batch = collate([graph], torch.float64).to(distance.device)
        batch.distance = distance
        if self.smoothing is not None:
            batch.cache["messages"] = soft_choice(batch, self.model.metadata.graph, self.smoothing)
        return batch

    def _derivatives(self, graph: CrystalGraph, slope: np.ndarray) -> dict[str, np.ndarray]:
        """Forces (n, 3) and stress (6,) from dE/d(distance), (E,)."""
        receiver = np.repeat(np.arange(graph.n_rows), np.diff(graph.row_ptr))
        cell, position = self.atoms.cell.array, self.atoms.positions
        vector = position[graph.sender] - position[receiver] + graph.image @ cell
        padding = graph.distance > self.model.metadata.graph.radius
        pull = np.where(padding, 0.0, slope / graph.distance)[:, None] * vector
        forces = np.zeros_like(position)
        np.add.at(forces, receiver, pull)
        np.add.at(forces, graph.sender, -pull)
        stress = vector.T @ pull / self.atoms.get_volume()
        return {"forces": forces, "stress": _stress.full_3x3_to_voigt_6_stress(stress)}


def _energy_target(
    targets: Sequence[str], units: Sequence[str], energy: str | None, classification: bool
) -> int | None:
    """The position of the energy per atom among the targets."""
    if energy is None:
        found = [k for k, unit in enumerate(units) if unit == "eV/atom"]
        if len(found) > 1:
            names = ", ".join(targets[k] for k in found)
            raise InputError(f"Several targets are in eV/atom ({names}); say which by energy=NAME.")
        return found[0] if found else None
    if energy not in targets:
        raise InputError(f"energy={energy!r} is not a target of the model; choose one of {', '.join(targets)}.")
    k = list(targets).index(energy)
    if classification or units[k] not in ("", "eV/atom"):
        unit = "a probability" if classification else f"in {units[k]}"
        raise InputError(f"{energy} is {unit}, not an energy in eV/atom; leave energy out.")
    return k
