"""Everything that decides which graph a crystal becomes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import InputError


@dataclass(frozen=True)
class GraphParameters:
    """How a crystal becomes a graph; kept in models and in stores of prepared graphs."""

    radius: float = 8.0
    """Cutoff, Å."""
    max_neighbors: int = 12
    """The nearest ones are kept."""
    symmetry_tolerance: float | None = 1e-5
    """Å within which atoms count as equivalent; None keeps every atom."""
    padded: bool = False
    """Fill short rows up as the published programs do: (index 0 of the crystal, distance radius + 1)."""
    isolated: str = "error"
    """What to do with an atom without neighbours: "error" or "keep"."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.radius) and self.radius > 0):
            raise InputError(f"radius must be a positive number of Å, not {self.radius}.")
        if self.max_neighbors < 1:
            raise InputError(f"max_neighbors must be at least 1, not {self.max_neighbors}.")
        if self.symmetry_tolerance is not None and not 0 < self.symmetry_tolerance < 0.1:
            raise InputError(
                f"symmetry_tolerance must be between 0 and 0.1 Å, or None for the full graph, "
                f"not {self.symmetry_tolerance}."
            )
        if self.isolated not in ("error", "keep"):
            raise InputError(f'isolated must be "error" or "keep", not {self.isolated!r}.')
