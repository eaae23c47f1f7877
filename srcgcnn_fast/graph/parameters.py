"""Everything that decides which graph a crystal becomes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np

from ..errors import InputError


def as_python(value: Any) -> Any:
    """A NumPy number as Python's, which JSON and checkpoints take; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def check_policy(disorder: str) -> None:
    """Raises InputError: ``disorder`` is none of the policies."""
    if disorder not in ("error", "majority", "average"):
        raise InputError(f'disorder must be "error", "majority" or "average", not {disorder!r}.')


@dataclass(frozen=True)
class GraphParameters:
    """How a crystal becomes a graph; kept in models and in stores of prepared graphs.

    Raises:
        InputError: a value is out of range.
    """

    radius: float = 8.0
    """Cutoff, Å."""
    max_neighbors: int = 12
    """The nearest ones are kept."""
    symmetry_tolerance: float | None = 1e-5
    """Å up to which distances count as equal when atoms of one symmetry kind are merged; None keeps every atom."""
    padded: bool = False
    """Fill short rows up as the published programs do: (index 0 of the crystal, distance radius + 1)."""
    isolated: Literal["error", "warn", "keep"] = "error"
    """What to do with an atom without neighbours: refuse the crystal, or keep it and (warn) say so."""
    disorder: Literal["error", "majority", "average"] = "error"
    """What to do with a site that is not one full atom: refuse the crystal, let the species (or vacancy) with the
    largest share stand for it, or mix the built-in element vectors by occupancy."""

    def __post_init__(self) -> None:
        radius, count, tolerance = self.radius, self.max_neighbors, self.symmetry_tolerance
        if not (is_real(radius) and math.isfinite(radius) and radius > 0):
            raise InputError(f"radius must be a positive number of Å, not {radius!r}.")
        if isinstance(count, bool) or not isinstance(count, Integral) or not 1 <= count < 2**31:
            raise InputError(f"max_neighbors must be a whole number of at least 1, not {count!r}.")
        if tolerance is not None and not (is_real(tolerance) and 0 < tolerance < 0.1):
            raise InputError(
                f"symmetry_tolerance must be a number between 0 and 0.1 Å, or None for the full graph, "
                f"not {tolerance!r}."
            )
        if not isinstance(self.padded, bool):
            raise InputError(f"padded must be True or False, not {self.padded!r}.")
        if self.isolated not in ("error", "warn", "keep"):
            raise InputError(f'isolated must be "error", "warn" or "keep", not {self.isolated!r}.')
        check_policy(self.disorder)
        # NumPy's numbers become Python's, which stores and models write as JSON.
        object.__setattr__(self, "radius", float(radius))
        object.__setattr__(self, "max_neighbors", int(count))
        object.__setattr__(self, "symmetry_tolerance", None if tolerance is None else float(tolerance))

    def n_gaussians(self, dmin: float = 0.0, step: float = 0.2) -> int:
        """Gaussians of the distance that reach the radius: the published ``len(np.arange(dmin, radius + step, step))``.

        41 for 8 Å; ``nbr_fea_len`` of a model trained on these graphs.
        """
        return max(0, math.ceil((self.radius + step - dmin) / step))


def is_real(value: object) -> bool:
    """Is it a number, of Python or NumPy?"""
    return isinstance(value, Real) and not isinstance(value, bool)
