"""How far predictions move when a crystal is written differently: ours and the published program's.

    SRCGCNN_PEERS=… SRCGCNN_TEST_DATA=… python benchmarks/invariance.py [CRYSTALS]

Prints a table. 500 Materials Project crystals of at most 24 atoms, each written in four other ways; the published
checkpoint for formation energies, ours on our native graphs and the published model on graphs as its loader builds
them (pymatgen's ``get_all_neighbors``, the first 12 by distance).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import measure
import numpy as np
import torch
import workload

import srcgcnn_fast as sf
from srcgcnn_fast.graph import CrystalGraph
from srcgcnn_fast.graph.parameters import GraphParameters

RADIUS, COUNT = 8.0, 12


def permuted(rng, lattice, frac, numbers):
    order = rng.permutation(len(numbers))
    return lattice, frac[order], numbers[order]


def shifted(rng, lattice, frac, numbers):
    return lattice, frac + rng.random(3), numbers


def other_cell(rng, lattice, frac, numbers):
    change = np.array([[1, 1, 0], [0, 1, 0], [1, 0, 1]])
    return change @ lattice, frac @ np.linalg.inv(change), numbers


def supercell(rng, lattice, frac, numbers):
    half = np.concatenate([frac * [0.5, 1, 1], frac * [0.5, 1, 1] + [0.5, 0, 0]])
    return lattice * [[2], [1], [1]], half, np.concatenate([numbers, numbers])


CHANGES = (permuted, shifted, other_cell, supercell)


def published_graph(crystal) -> CrystalGraph:
    """The published loader's own steps: neighbours within the radius, sorted by distance, the first 12, padding."""
    from pymatgen.core import Structure

    lattice, frac, numbers = crystal
    sender, distance = [], []
    for near in Structure(lattice, numbers, frac).get_all_neighbors(RADIUS, include_index=True):
        near = sorted(near, key=lambda x: x[1])[:COUNT]
        sender += [x[2] for x in near] + [0] * (COUNT - len(near))
        distance += [x[1] for x in near] + [RADIUS + 1] * (COUNT - len(near))
    n = len(numbers)
    return CrystalGraph(
        np.asarray(numbers, np.int32), np.ones(n, np.float32), np.array(sender, np.int32),
        np.array(distance, np.float32), np.arange(0, COUNT * n + 1, COUNT, dtype=np.int32),
        np.arange(n, dtype=np.int32),
    )  # fmt: skip


def main(crystals: int) -> None:
    import peers

    model = sf.load_model(Path(os.environ["SRCGCNN_TEST_DATA"]) / "upstream" / "formation-energy-per-atom.pth.tar")
    parameters = GraphParameters(isolated="keep")
    published = peers.published_model(model)
    if published is None:
        raise SystemExit("SRCGCNN_PEERS lacks the published program.")
    published.eval()
    chosen = [c for c in workload.draw(4 * crystals) if len(c[2]) <= 24][:crystals]

    def ours(variants) -> torch.Tensor:
        graphs = sf.build_graphs(variants, parameters.radius, parameters.max_neighbors, isolated="keep")
        with torch.no_grad():
            return model.predict(sf.collate(graphs))[:, 0].double()

    def theirs(variants) -> torch.Tensor:
        batch = sf.collate([published_graph(c) for c in variants])
        with torch.no_grad():
            values, outputs = model.predict(batch)[:, 0].double(), model(batch)[:, 0].double()
            low, high = outputs.argmin(), outputs.argmax()
            deviation = (values[high] - values[low]) / (outputs[high] - outputs[low])  # of the checkpoint's targets
            return values[low] + deviation * (published(*peers.published_input(batch, clean=True))[:, 0] - outputs[low])

    rng = np.random.default_rng(3)
    with torch.no_grad():
        before = {"ours": ours(chosen), "published program": theirs(chosen)}
        print(f"{len(chosen)} crystals, {sum(len(c[2]) for c in chosen)} atoms; {measure.machine()['commit']}\n")
        print("| change | program | moved by more than 1e-5 eV/atom | largest, eV/atom |\n| --- | --- | --- | --- |")
        for change in CHANGES:
            variants = [change(rng, *c) for c in chosen]
            for name, run in (("ours", ours), ("published program", theirs)):
                moved = (run(variants) - before[name]).abs()
                share = 100 * float((moved > 1e-5).double().mean())
                print(f"| {change.__name__.replace('_', ' ')} | {name} | {share:.1f} % | {float(moved.max()):.1e} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
