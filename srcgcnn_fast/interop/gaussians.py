"""Distances from edge features that are Gaussians of them, where they are exactly that (Numba)."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..graph.neighbors import kernel

_TOLERANCE = {torch.float32: 3e-7, torch.float64: 1e-13}
"""Largest difference between a feature and its Gaussian: what rounding to the dtype leaves, twice."""
_EDGES_PER_THREAD = 16384
_NOTHING = 1e-30  # where all Gaussians are below this, the distance is anything that is far beyond the last centre
_BEYOND = 12.0
_DECAY = math.exp(-2.0)  # of the ratio of neighbouring Gaussians from one to the next
_WHOLE = {torch.float32: np.int32, torch.float64: np.int64}


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
    bits = given.view(_WHOLE[features.dtype])
    limit = given.dtype.type(tolerance).view(bits.dtype)
    magnitude = bits.dtype.type(np.iinfo(bits.dtype).max)  # all bits but the sign
    reach = math.ceil(0.5 + math.sqrt(-math.log(tolerance / 8)))
    out = np.empty(len(given), given.dtype)

    def part(mine: slice) -> bool:
        top, ratio = np.empty(mine.stop - mine.start, np.int32), np.empty(mine.stop - mine.start)
        if not _peaks(given[mine], bits[mine], top, ratio):
            return False
        offset = 0.5 * (1.0 + np.log(ratio))
        out[mine] = top + offset
        return bool(_fit(given[mine], bits[mine], limit, magnitude, top, ratio, np.exp(-(offset**2)), tolerance, reach))

    threads = min(torch.get_num_threads(), 1 + len(given) // _EDGES_PER_THREAD)
    cuts = np.linspace(0, len(given), threads + 1).astype(int).tolist()
    parts = [slice(a, b) for a, b in pairwise(cuts)]
    if threads == 1:
        found = part(parts[0])
    else:
        with ThreadPoolExecutor(threads) as pool:
            found = all(pool.map(part, parts))
    return torch.from_numpy(out) if found else None


@kernel
def _peaks(features, bits, top, ratio):
    """The largest Gaussian of each edge, and the next one's ratio to it, which is exp(2 (u - top) - 1).

    False where a ratio does not exist.
    """
    last = features.shape[1] - 1
    for e in range(features.shape[0]):
        largest = bits[e, 0]  # as integers: those of positive numbers have the same order, and no slow denormals
        for k in range(1, last + 1):
            largest = max(largest, bits[e, k])
        place = 0
        for k in range(last + 1):
            if bits[e, k] == largest:
                place = k
        peak = np.float64(features[e, place])
        top[e] = place
        if abs(peak) < _NOTHING:
            top[e] = last
            ratio[e] = math.exp(2.0 * _BEYOND - 1.0)
        elif place < last:
            ratio[e] = features[e, place + 1] / peak
        else:
            ratio[e] = _DECAY * peak / features[e, place - 1]
        if not 1e-300 < ratio[e] < 1e300:
            return False
    return True


@kernel
def _fit(features, bits, limit, magnitude, top, ratio, value, tolerance, reach):
    """Is every feature the Gaussian of its edge's distance? ``value``: the Gaussian at ``top``."""
    last = features.shape[1] - 1
    for e in range(features.shape[0]):
        place = top[e]
        first, end = max(0, place - reach), min(last + 1, place + reach + 1)
        far = magnitude & 0
        for k in range(first):
            far = max(far, bits[e, k] & magnitude)
        for k in range(end, last + 1):
            far = max(far, bits[e, k] & magnitude)
        fits = far <= limit
        expected, factor = value[e], ratio[e]
        for k in range(place, end):
            fits &= abs(features[e, k] - expected) <= tolerance
            expected *= factor
            factor *= _DECAY
        expected, factor = value[e], _DECAY / ratio[e]
        for k in range(place - 1, first - 1, -1):
            expected *= factor
            factor *= _DECAY
            fits &= abs(features[e, k] - expected) <= tolerance
        if not fits:
            return False
    return True
