"""Neighbours and graphs of random cells against a brute force that shares nothing with them (Hypothesis).

pytest tests/graph/test_random_cells.py -m "slow or not slow" -s     # more than 20 000 cells, minutes
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from srcgcnn_fast.graph.build import build_packed
from srcgcnn_fast.graph.neighbors import neighbor_list
from srcgcnn_fast.graph.parameters import GraphParameters

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

KINDS = ("triclinic", "skewed", "slender", "flat", "tiny", "dense", "one atom", "grid", "far origin", "many atoms")
COUNT = 12
MOST_DISTANCES = 1_300_000
LARGEST_RADIUS = {"many atoms": 3.5, "dense": 4.0, "tiny": 4.0}


def made_cell(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Lattice and fractional coordinates."""
    n = int(rng.integers(1, 14))
    lattice = rng.normal(size=(3, 3)) * rng.uniform(2, 6)
    if kind == "slender":
        lattice = np.diag([rng.uniform(2, 4), rng.uniform(2, 4), rng.uniform(30, 80)])
    elif kind == "flat":
        lattice = np.diag([rng.uniform(10, 25), rng.uniform(10, 25), rng.uniform(1.2, 3)])
    elif kind == "tiny":
        lattice, n = np.eye(3) * rng.uniform(0.9, 2) + rng.normal(size=(3, 3)) * 0.2, int(rng.integers(1, 3))
    elif kind == "one atom":
        n = 1
    elif kind == "many atoms":
        lattice, n = np.eye(3) * rng.uniform(9, 14) + rng.normal(size=(3, 3)), int(rng.integers(96, 120))
    volume = 0.6 if kind == "dense" else 6.0  # Å^3 an atom, at least
    if kind not in ("tiny", "many atoms"):
        lattice = lattice * max(1.0, (volume * n / max(abs(np.linalg.det(lattice)), 1e-3)) ** (1 / 3))
    frac = rng.random((n, 3))
    if kind == "grid":
        frac = np.unique(rng.integers(0, 4, (n, 3)) / 4, axis=0)
        lattice = np.diag(np.diag(lattice) * 0 + rng.uniform(3, 7, 3 if rng.random() < 0.5 else 1))
    if kind == "far origin":
        frac = frac + rng.integers(-50, 51, frac.shape)
    if kind == "skewed" or rng.random() < 0.3:
        for _ in range(3):
            a, b = rng.choice(3, 2, replace=False)
            change = np.eye(3)
            change[a, b] = rng.integers(-2, 3)
            lattice, frac = change @ lattice, frac @ np.linalg.inv(change)
    return lattice, frac


def brute_force(lattice: np.ndarray, frac: np.ndarray, radius: float) -> np.ndarray | None:
    """(pairs, 6): receiver, sender, image (3), distance; every image that can be within the radius is looked at.

    None where these are too many.
    """
    heights = 1 / np.linalg.norm(np.linalg.inv(lattice), axis=0)
    cell, frac = np.floor(frac), frac - np.floor(frac)
    ranges = [np.arange(-k, k + 1) for k in np.ceil(radius / heights + 1).astype(int)]
    if math.prod(len(r) for r in ranges) * len(frac) ** 2 > MOST_DISTANCES:
        return None
    images = np.stack(np.meshgrid(*ranges, indexing="ij"), -1).reshape(-1, 3)
    shifts, moved, found = images @ lattice, images.any(axis=1), []
    position = frac @ lattice
    for i in range(len(frac)):
        for j in range(len(frac)):
            vector = shifts + (position[j] - position[i])
            distance = np.sqrt((vector * vector).sum(axis=1))
            near = (distance <= radius) & ((i != j) | moved)
            pairs = np.empty((int(near.sum()), 6))
            pairs[:, 0], pairs[:, 1], pairs[:, 5] = i, j, distance[near]
            pairs[:, 2:5] = images[near] + cell[i] - cell[j]
            found.append(pairs)
    return np.concatenate(found)


def check(kind: str, seed: int, radius: float, seen: Counter) -> None:
    lattice, frac = made_cell(kind, np.random.default_rng(seed))
    n, numbers = len(frac), np.random.default_rng(seed).integers(1, 5, len(frac))
    expected = brute_force(lattice, frac, radius + 1e-6)
    if expected is None:
        seen["too many images for the brute force, left out"] += 1
        return
    while len(expected) and (np.abs(expected[:, 5] - radius) < 1e-6).any():  # on the cutoff either answer is right
        radius -= 3.3e-5
    expected = expected[expected[:, 5] <= radius]
    if len(expected) and expected[:, 5].min() < 2e-3:
        seen["coincident atoms, left out"] += 1
        return
    found = neighbor_list(lattice, frac, numbers, radius)
    pairs = np.column_stack([found.receiver, found.sender, found.image])
    assert {tuple(p) for p in pairs.tolist()} == {tuple(p) for p in expected[:, :5].astype(int).tolist()}
    assert len(pairs) == len(expected)
    order, own = np.lexsort(expected[:, 4::-1].T), np.lexsort(pairs[:, ::-1].T)
    error = np.abs(expected[order, 5] - found.distance[own]).max(initial=0.0)
    assert error < 1e-9 * (1 + np.abs(frac).max())
    seen["pairs"] += len(pairs)
    check_nearest(lattice, frac, numbers, radius, expected)
    seen[kind] += 1
    seen["atoms"] += n


def check_nearest(lattice, frac, numbers, radius, expected) -> None:
    """The graph of the nearest: per atom their distances, and the very edges below the last shell."""
    parameters = GraphParameters(radius, COUNT, None, isolated="keep")
    arrays = (lattice[None], frac, numbers, np.array([0, len(frac)]))
    packed = build_packed(*arrays, parameters)
    assert not packed.errors
    quotient = build_packed(*arrays, GraphParameters(radius, COUNT, 1e-5, isolated="keep")).graph(0, np.float64)
    graph = packed.graph(0, np.float64)
    for i in range(len(frac)):
        mine = expected[expected[:, 0] == i]
        mine = mine[np.argsort(mine[:, 5], kind="stable")]
        edges = slice(graph.row_ptr[i], graph.row_ptr[i + 1])
        nearest = mine[:COUNT, 5]
        assert graph.row_ptr[i + 1] - graph.row_ptr[i] == len(nearest)
        slack = 1.1e-5 + 1e-9 * np.abs(frac).max()
        assert np.abs(np.sort(graph.distance[edges]) - nearest).max(initial=0.0) < slack
        last = nearest[-1] - 2e-5 if len(mine) > COUNT else np.inf
        keys = np.column_stack([graph.sender[edges], graph.image[edges]])[graph.distance[edges] < last]
        assert {tuple(k) for k in keys.tolist()} == {
            tuple(k) for k in mine[mine[:, 5] < last, 1:5].astype(int).tolist()
        }
        row = quotient.atom_class[i]
        own = quotient.distance[quotient.row_ptr[row] : quotient.row_ptr[row + 1]]
        assert len(own) == len(nearest) and np.abs(np.sort(own) - nearest).max(initial=0.0) < slack


def run(examples: int, part: int = 0) -> Counter:
    seen: Counter = Counter()

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(
        kind=st.sampled_from(KINDS),
        seed=st.integers(0, 2**53 - 1),
        radius=st.floats(1.5, 8.0, allow_nan=False),
    )
    def all_kinds(kind: str, seed: int, radius: float) -> None:
        check(kind, 16 * seed + part, min(radius, LARGEST_RADIUS.get(kind, 8.0)), seen)

    all_kinds()
    return seen


def test_a_few_hundred() -> None:
    seen = run(300)
    assert sum(seen[kind] for kind in KINDS) > 200


@pytest.mark.slow
@pytest.mark.parametrize("part", range(1, 6))
def test_thousands(part: int, capsys: pytest.CaptureFixture[str]) -> None:
    seen = run(5_500, part)
    with capsys.disabled():
        print(f"\npart {part}: " + ", ".join(f"{count:,} {name}" for name, count in sorted(seen.items())))
    assert sum(seen[kind] for kind in KINDS) >= 4_000
