"""One crystal at a time: what a single prediction costs, all Python included.

The model alone, on a graph that is ready, beside others; and from the structure to the value, ours alone.
"""

from __future__ import annotations

import statistics

import candidates as field
import measure
import numpy as np
import pytest
import torch
import workload

import srcgcnn_fast as sf

CRYSTALS, ROUNDS = 12, 30
NOTE = (
    f"Microseconds per prediction of a single crystal, one thread: median over {CRYSTALS} crystals of the median of "
    f"{ROUNDS} alternating rounds each. Behind a time: how many times longer than ours on the same graph / on our "
    "native graph. From the structure: neighbours, symmetry, graph, batch, model, value in the target's units."
)
NAMES = (*field.OURS, field.ORACLE, "PyG CGConv", "split", "reference")


@pytest.mark.parametrize("kind", field.MODELS)
def test_single_crystal_latency(record, kind):
    took: dict[str, list[float]] = {}
    absent: dict[str, str] = {}
    atoms = []
    with measure.threads(1):
        for seed in range(CRYSTALS):
            native, same = workload.batches(1, seed)
            atoms.append(same.num_rows)
            made = {name: field.make(kind, name, native, same) for name in NAMES}
            absent |= {name: why for name, why in made.items() if isinstance(why, str)}
            entered = {name: one for name, one in made.items() if not isinstance(one, str)}
            field.gate("inference", entered, {name: one.inference() for name, one in entered.items()})
            runs = {name: one.inference for name, one in entered.items()}
            runs["ours, from the structure"] = from_structure(entered["native"], seed)
            for name, seconds in measure.medians(measure.alternate(runs, ROUNDS)).items():
                took.setdefault(name, []).append(seconds)
    micro = {name: 1e6 * statistics.median(seconds) for name, seconds in took.items()}
    row: dict[str, object] = {"model": kind, "median atoms": float(np.median(atoms))}
    row |= {f"ours, {name}": micro.pop(name) for name in field.OURS}
    row["ours, from the structure"] = micro.pop("ours, from the structure")
    for name, time in micro.items():
        row[name] = f"{time:.0f} ({time / row['ours, same graph']:.3g} / {time / row['ours, native']:.3g})"
    record("latency of one crystal", row | absent, NOTE)


def from_structure(candidate: field.Candidate, seed: int):
    structure, model = workload.draw(1, seed)[0], candidate.model

    def run() -> torch.Tensor:
        batch = sf.collate([sf.build_graph(structure, padded=True, isolated="keep")])
        with torch.no_grad():
            return model.eval().predict(batch)

    torch.testing.assert_close(run(), candidate.inference(), rtol=1e-4, atol=1e-5)  # metadata: mean 0, deviation 1
    return run
