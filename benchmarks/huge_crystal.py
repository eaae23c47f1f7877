"""Inference of one huge crystal by one thread and by all.

    python benchmarks/huge_crystal.py [ATOMS]

Milliseconds, medians of 30 alternating rounds on a graph that is new in every round: a face-centred alloy whose atoms
are off their sites, so that no symmetry helps and most distances differ. Both must give the same bits.
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np
import torch

import srcgcnn_fast as sf

ROUNDS, WARM_UP = 30, 5


def alloy(atoms: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    k = round((atoms / 4) ** (1 / 3))
    corners = np.stack(np.meshgrid(*[np.arange(k)] * 3, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    sites = (corners + 0.5 * np.array([[0, 0, 0], [1, 1, 0], [1, 0, 1], [0, 1, 1]])).reshape(-1, 3)
    displaced = (4.0 * sites + rng.normal(0, 0.05, sites.shape)) / (4.0 * k)
    return 4.0 * k * np.eye(3), displaced, rng.choice([28, 29, 46, 79], len(sites))


@torch.inference_mode()
def main(atoms: int) -> None:
    batch = sf.collate([sf.build_graph(alloy(atoms))])
    counts = sorted({1, torch.get_num_threads()})
    for kind in (sf.SRCGCNN, sf.CGCNN):
        torch.manual_seed(0)
        model = kind().eval()
        seconds: dict[int, list[float]] = {count: [] for count in counts}
        found: dict[int, torch.Tensor] = {}
        for _ in range(ROUNDS + WARM_UP):
            for count in counts:
                torch.set_num_threads(count)
                batch.cache.clear()
                start = time.perf_counter()
                found[count] = model(batch)
                seconds[count].append(time.perf_counter() - start)
        assert all(torch.equal(found[1], x) for x in found.values())
        times = {f"{n} thread(s)": f"{1e3 * statistics.median(x[WARM_UP:]):.1f}" for n, x in seconds.items()}
        print(f"{kind.__name__}, {batch.num_rows:,} atoms, {batch.num_edges:,} edges", times)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5000)
