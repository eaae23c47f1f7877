"""Batches of real crystals where SRCGCNN_TEST_DATA has some, and made-up ones from a small table, which need no data.

The made-up ones have the sizes, symmetries and distances of the Materials Project, but no two equal distances, which
real crystals have many of: the worst case for kernels that form an edge term once a distance. ``crystals.json`` holds,
of a random part of it, how many crystals have so many atoms and symmetry classes, and quantiles of the distance to the
k-th neighbour. ``python crystals.py`` makes it again from SRCGCNN_TEST_DATA.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

import srcgcnn_fast as sf
from srcgcnn_fast.graph import CrystalGraph, GraphBatch, GraphStore
from srcgcnn_fast.interop.upstream import expand_quotient

TABLE = Path(__file__).with_name("crystals.json")
QUANTILES = 11


def batches(n_crystals: int, device: str, seed: int = 0) -> tuple[GraphBatch, GraphBatch]:
    """(native, same): made-up crystals as symmetry quotients, and the same edges with one row per atom.

    A row receives from random rows of its crystal; distances are independent of each other but for their order.
    """
    table = json.loads(TABLE.read_text())
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.tensor(table["crystals"])  # atoms, classes, how many
    drawn = kinds[torch.multinomial(kinds[:, 2].double(), n_crystals, replacement=True, generator=generator)]
    atoms, classes = drawn[:, 0], drawn[:, 1]
    crystal = torch.repeat_interleave(torch.arange(n_crystals), classes)
    crystal_ptr = torch.nn.functional.pad(classes.cumsum(0), (1, 0))
    n_rows = len(crystal)
    place = torch.arange(n_rows) - crystal_ptr[crystal]
    weight = atoms[crystal] // classes[crystal] + (place < atoms[crystal] % classes[crystal])
    quantiles = torch.tensor(table["distances"])  # (neighbours, QUANTILES)
    degree = len(quantiles)
    at = torch.rand(n_rows, degree, generator=generator) * (QUANTILES - 1)
    low = at.long().clamp_max(QUANTILES - 2)
    k = torch.arange(degree)
    distance = torch.lerp(quantiles[k, low], quantiles[k, low + 1], at - low).sort(1).values
    chosen = (torch.rand(n_rows, degree, generator=generator) * classes[crystal][:, None]).long()
    sender = crystal_ptr[crystal][:, None] + chosen.minimum(classes[crystal][:, None] - 1)
    native = GraphBatch(
        numbers=torch.randint(1, 93, (n_rows,), generator=generator, dtype=torch.int32),
        weight=weight.float(),
        sender=sender.flatten().int(),
        distance=distance.flatten(),
        row_ptr=(torch.arange(n_rows + 1) * degree).int(),
        crystal_ptr=crystal_ptr.int(),
        atom_class=torch.repeat_interleave(torch.arange(n_rows), weight).int(),
    ).to(device)
    return native, expand_quotient(native)


def graphs(n_crystals: int, seed: int = 0) -> list[CrystalGraph]:
    """The crystals of ``batches`` one by one, as symmetry quotients."""
    batch, _ = batches(n_crystals, "cpu", seed)
    numbers, weight, sender, distance, row_ptr, crystal_ptr = (
        getattr(batch, name).numpy() for name in ("numbers", "weight", "sender", "distance", "row_ptr", "crystal_ptr")
    )
    found = []
    for a, b in pairwise(crystal_ptr):
        first, last = row_ptr[a], row_ptr[b]
        atoms = np.repeat(np.arange(b - a, dtype=np.int32), weight[a:b].astype(int))
        edges = sender[first:last] - a, distance[first:last]
        found.append(CrystalGraph(numbers[a:b], weight[a:b], *edges, row_ptr[a : b + 1] - first, atoms))
    return found


@cache
def real() -> GraphStore | None:
    """Quotient graphs of 12 neighbours of mp/train.parquet in SRCGCNN_TEST_DATA; None where that is not there."""
    path = Path(os.environ.get("SRCGCNN_TEST_DATA", ""), "mp", "train.parquet")
    if not path.is_file():
        return None
    import pandas as pd

    frame = pd.read_parquet(path, columns=["lattice", "frac_coords", "atomic_numbers"])
    structures = zip(*(frame[name] for name in frame.columns), strict=True)
    crystals = [(np.reshape(a, (3, 3)), np.reshape(x, (-1, 3)), np.asarray(z)) for a, x, z in structures]
    return GraphStore.from_graphs(sf.build_graphs(crystals, padded=True, isolated="keep"))


def drawn(n_crystals: int, seed: int = 0) -> np.ndarray:
    """Positions in ``real()``: each crystal as often as the others or once more, in random order."""
    store, generator = real(), np.random.default_rng(seed)
    assert store is not None
    return generator.permutation(np.resize(generator.permutation(len(store)), n_crystals))


def forms(n_crystals: int, device: str, made_up: bool = False) -> tuple[GraphBatch, GraphBatch]:
    """(native, same) as from :func:`batches`, of real crystals where there are some."""
    store = None if made_up else real()
    if store is None:
        return batches(n_crystals, device)
    native = store.batch(drawn(n_crystals)).to(device)
    return native, expand_quotient(native)


def source(made_up: bool = False) -> str:
    store = None if made_up else real()
    return "made up" if store is None else f"{len(store)} of the Materials Project, repeated"


def make_table(n_crystals: int = 2000, neighbours: int = 12) -> dict[str, list]:
    """The table of a random part of the Materials Project."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from workload import crystals, draw

    if crystals()[0] != "Materials Project":
        raise SystemExit("SRCGCNN_TEST_DATA does not name the directory of test data.")
    graphs = sf.build_graphs(draw(n_crystals, seed=7), isolated="keep")
    sizes = Counter((g.n_atoms, g.n_rows) for g in graphs)
    rows = [
        g.distance[a : a + neighbours]
        for g in graphs
        for a, b in zip(g.row_ptr, g.row_ptr[1:], strict=False)
        if b - a == neighbours
    ]
    quantiles = np.quantile(np.sort(np.stack(rows), axis=1), np.linspace(0.01, 0.99, QUANTILES), axis=0).T
    return {
        "source": f"{n_crystals} random crystals of the Materials Project (CC-BY 4.0), counted, no crystal among them",
        "crystals": sorted([int(a), int(c), n] for (a, c), n in sizes.items()),
        "distances": [[round(float(x), 3) for x in row] for row in quantiles],
    }


if __name__ == "__main__":
    text = json.dumps(make_table())
    TABLE.write_text(text.replace("]], ", "]],\n ").replace('"crystals"', '\n "crystals"') + "\n")
