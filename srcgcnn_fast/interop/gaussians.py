"""Distances from edge features that are Gaussians of them, where they are exactly that (Numba)."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from torch import Tensor

from ..graph.neighbors import kernel

_TOLERANCE = {torch.float32: 3e-7, torch.float64: 1e-13}
"""Largest difference between a feature and its Gaussian: what rounding to the dtype leaves, twice."""
_EDGES_PER_THREAD = 16384
_NOT_FOUND = 0.1  # the largest Gaussian is above this, unless the distance is beyond the first or last centre
_NOTHING = 1e-30  # where all Gaussians are below this, the distance is anything that is far beyond the last centre
_BEYOND = 12.0


def distances_from_gaussians(features: Tensor) -> Tensor | None:
    """(E,) u with features[e, k] = exp(-(u[e] - k)^2) for every edge and k, or None where that is not so.

    u = (distance - dmin) / step: the Gaussians of the published programs, whose width is the distance between their
    centres, say nothing about dmin and step themselves. Every feature of every edge is compared with its Gaussian.

    Args:
        features: (E, K) contiguous, float32 or float64, on the CPU; anything else gives None.
    """
    tolerance = _TOLERANCE.get(features.dtype)
    if tolerance is None or features.device.type != "cpu" or features.shape[1] < 3 or features.shape[0] == 0:
        return None
    given = features.detach().numpy()
    out = np.empty(len(given), given.dtype)
    reach = math.ceil(math.sqrt(-math.log(tolerance / 8)))
    threads = min(torch.get_num_threads(), 1 + len(given) // _EDGES_PER_THREAD)
    cuts = np.linspace(0, len(given), threads + 1).astype(np.int64)

    def part(i: int) -> bool:
        return bool(_invert(given[cuts[i] : cuts[i + 1]], out[cuts[i] : cuts[i + 1]], tolerance, reach))

    if threads == 1:
        found = part(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            found = all(pool.map(part, range(threads)))
    return torch.from_numpy(out) if found else None


_jit = numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})


@_jit
def _total(row, first, last):
    """Sum of the magnitudes in row[first:last]."""
    total = row.dtype.type(0)
    for k in range(first, last):
        total += abs(row[k])
    return total


@_jit
def _same(row, other):
    different = 0
    for k in range(len(row)):
        different += row[k] != other[k]
    return different == 0


@kernel
def _invert(features, out, tolerance, reach):
    """False as soon as one edge's features are not Gaussians of one distance."""
    last = features.shape[1] - 1
    decay = math.exp(-2.0)
    top = 0
    for e in range(features.shape[0]):
        row = features[e]
        if e > 0 and _same(row, features[e - 1]):  # neighbours of one shell follow one another
            out[e] = out[e - 1]
            continue
        if not row[top] > _NOT_FOUND:
            for k in range(last + 1):
                if row[k] > row[top]:
                    top = k
        while top < last and row[top + 1] > row[top]:
            top += 1
        while top > 0 and row[top - 1] > row[top]:
            top -= 1
        peak = np.float64(row[top])
        if abs(peak) < _NOTHING:
            u = last + _BEYOND
        # The ratio of two neighbouring Gaussians is exp(2 (u - k) - 1).
        elif top < last and (top == 0 or row[top + 1] >= row[top - 1]):
            u = top + 0.5 * (1.0 + math.log(row[top + 1] / peak))
        else:
            u = top - 0.5 * (1.0 + math.log(row[top - 1] / peak))
        if not abs(u) < 1e6:
            return False
        out[e] = u
        first = min(max(0, int(u) - reach), last + 1)
        end = max(min(last + 1, int(u) + reach + 2), first)
        fits = _total(row, 0, first) + _total(row, end, last + 1) <= tolerance
        value, ratio = math.exp(-((u - first) ** 2)), math.exp(2.0 * (u - first) - 1.0)
        for k in range(first, end):
            fits &= abs(row[k] - value) <= tolerance
            value *= ratio
            ratio *= decay
        if not fits:
            return False
    return True
