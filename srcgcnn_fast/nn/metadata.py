"""What a model's numbers mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from ..graph.parameters import GraphParameters


@dataclass
class ModelMetadata:
    """Targets, units, normaliser and graph parameters of a trained model.

    value = network output * ``std`` + ``mean``, per target.

    Raises:
        InputError: there is not one unit, mean and std per target.
    """

    targets: tuple[str, ...] = ("target",)
    units: tuple[str, ...] = ("",)
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    graph: GraphParameters = field(default_factory=GraphParameters)
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything worth keeping: data set, MAE, citation."""

    def __post_init__(self) -> None:
        self.mean, self.std = (tuple(map(float, numbers)) for numbers in (self.mean, self.std))
        sizes = {len(self.targets), len(self.units), len(self.mean), len(self.std)}
        if len(sizes) > 1:
            raise InputError(
                f"Give one unit, mean and std per target; there are {len(self.targets)} targets, {len(self.units)} "
                f"units, {len(self.mean)} means and {len(self.std)} stds."
            )
