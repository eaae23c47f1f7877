"""A few alloys, made once."""

from __future__ import annotations

import numpy as np
import pytest

from srcgcnn_fast.graph import GraphStore, build_graphs
from srcgcnn_fast.training.alloys import formation_energy, random_alloy


@pytest.fixture(scope="session")
def alloys() -> GraphStore:
    """160 alloys with their formation energy, a class (above the median) and a target that some lack."""
    rng = np.random.default_rng(0)
    atoms = [random_alloy(rng) for _ in range(160)]
    energy = np.array([formation_energy(a) for a in atoms])
    volume = np.array([a.get_volume() / len(a) for a in atoms])
    volume[::10] = np.nan
    targets = {"energy": energy, "high": (energy > np.median(energy)).astype(float), "volume": volume}
    return GraphStore.from_graphs(build_graphs(atoms), targets=targets)
