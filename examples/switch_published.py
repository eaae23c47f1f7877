"""A published program's own model and batches, trained as they are and with one line more.

    python examples/switch_published.py                      (cgcnn2, from PyPI)
    python examples/switch_published.py path/to/cgcnn        (a clone of txie-93/cgcnn or sata-deep/SR-CGCNN)

The crystals are alloys made on the spot; needs srcgcnn_fast[train].
"""

from __future__ import annotations

import copy
import importlib
import sys
import time

import numpy as np
import torch

import srcgcnn_fast as sf
from srcgcnn_fast.interop import difference, to_upstream
from srcgcnn_fast.training.alloys import random_alloy


def batch_of_alloys(n: int) -> tuple:
    """atom_fea, nbr_fea, nbr_fea_idx, crystal_atom_idx: what the programs' collate_pool makes."""
    rng = np.random.default_rng(0)
    graphs = sf.build_graphs([random_alloy(rng) for _ in range(n)], padded=True, symmetry_tolerance=None)
    return to_upstream(sf.collate(graphs))


def train(model: torch.nn.Module, batch: tuple, steps: int = 10) -> list[float]:
    target = batch[0].new_tensor([[float(len(rows)) / 100] for rows in batch[3]])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        output = model(*batch)
        output = output[0] if isinstance(output, tuple) else output  # cgcnn2 returns the crystal vectors too
        loss = torch.nn.functional.mse_loss(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def network(program: str | None) -> type[torch.nn.Module]:
    """The program's own ``CrystalGraphConvNet``."""
    if program is not None:
        sys.path.insert(0, program)
    return importlib.import_module("cgcnn2.model" if program is None else "cgcnn.model").CrystalGraphConvNet


def main(program: str | None = None) -> None:
    torch.manual_seed(0)
    batch = batch_of_alloys(64)
    model = network(program)(batch[0].shape[1], batch[1].shape[2])
    accelerated = copy.deepcopy(model)
    sf.accelerate(accelerated)  # the one line
    print("differs by:", difference(accelerated, batch))
    for name, each in (("as it is", model), ("accelerated", accelerated)):
        start = time.perf_counter()
        losses = train(each, batch)
        seconds = time.perf_counter() - start
        print(f"{name:12} losses {losses[0]:.6f} … {losses[-1]:.6f}   {1e3 * seconds / len(losses):.0f} ms a step")


if __name__ == "__main__":
    main(*sys.argv[1:])
