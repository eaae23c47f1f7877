"""A network of one's own on the operators of this package: two gated convolutions, a sum over the atoms, two targets.

python examples/own_network.py        (needs srcgcnn_fast[train] for the alloys only)
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import srcgcnn_fast as sf
from srcgcnn_fast.training.alloys import random_alloy


class Net(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(101, width)
        self.first, self.second = sf.GatedConv(width), sf.GatedConv(width)
        self.out = nn.Linear(width, 2)

    def forward(self, batch: sf.GraphBatch) -> torch.Tensor:
        h = self.second(self.first(self.embedding(batch.numbers.long()), batch), batch)
        # A row stands for `weight` atoms: a sum over atoms is a weighted sum over rows.
        total = h.new_zeros(batch.num_crystals, h.shape[1])
        return self.out(total.index_add(0, batch.atom_crystal, batch.weight[:, None] * h))


def main() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    crystals = [random_alloy(rng) for _ in range(64)]
    batch = sf.collate(sf.build_graphs(crystals))
    target = torch.tensor([[len(c), c.get_volume() / len(c)] for c in crystals], dtype=torch.float32)
    target = (target - target.mean(0)) / target.std(0).clamp_min(1e-6)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = nn.functional.mse_loss(model(batch), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"{batch.num_rows} rows for {len(batch.atom_class)} atoms; loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
