"""The crystals that the benchmarks run on: Materials Project where the data are at hand, alloys made here otherwise."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np

import srcgcnn_fast as sf
from srcgcnn_fast.graph import GraphBatch
from srcgcnn_fast.interop.upstream import expand_quotient

GENERATED = 512
"""Alloys to make where there are no data; a few seconds."""


@cache
def crystals() -> tuple[str, list]:
    """Name of the set, and its crystals as (lattice, frac_coords, numbers)."""
    data = os.environ.get("SRCGCNN_TEST_DATA")
    if data and (Path(data) / "mp").is_dir():
        import pandas as pd

        frame = pd.read_parquet(Path(data) / "mp" / "train.parquet")
        rows = zip(frame["lattice"], frame["frac_coords"], frame["atomic_numbers"], strict=True)
        return "Materials Project", [(np.reshape(a, (3, 3)), np.reshape(f, (-1, 3)), np.asarray(z)) for a, f, z in rows]
    from srcgcnn_fast.training.alloys import random_alloy

    rng = np.random.default_rng(0)
    alloys = (random_alloy(rng) for _ in range(GENERATED))
    return "generated fcc alloys", [(a.cell[:], a.get_scaled_positions(), a.numbers) for a in alloys]


def draw(n_crystals: int, seed: int = 0) -> list:
    """Crystals of the set, drawn at random; again from the start where it has fewer."""
    _, population = crystals()
    chosen = np.random.default_rng(seed).choice(len(population), n_crystals, replace=n_crystals > len(population))
    return [population[i] for i in chosen]


@cache
def batches(n_crystals: int, seed: int = 0) -> tuple[GraphBatch, GraphBatch]:
    """(native, same): n crystals drawn at random as symmetry quotients, and the same edges with one row per atom.

    Rows are padded, so that the published programs can take the same graph.
    """
    native = sf.collate(sf.build_graphs(draw(n_crystals, seed), padded=True, isolated="keep"))
    return native, expand_quotient(native)
