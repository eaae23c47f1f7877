"""A PyTorch Geometric network with CGConv layers, as it is, with one line more, and with the module of this package.

python examples/switch_pyg.py        (needs torch-geometric and srcgcnn_fast[train])
"""

from __future__ import annotations

import copy
import time

import numpy as np
import torch
from torch import nn
from torch_geometric.data import Data
from torch_geometric.nn import CGConv, global_mean_pool

import srcgcnn_fast as sf
from srcgcnn_fast import interop
from srcgcnn_fast.training.alloys import random_alloy


class Net(nn.Module):
    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(101, 64)
        self.convs = nn.ModuleList(layer(64, dim=41, batch_norm=True) for _ in range(3))
        self.out = nn.Linear(64, 1)

    def forward(self, data: Data) -> torch.Tensor:
        x = self.embedding(data.z)
        for conv in self.convs:
            x = conv(x, data.edge_index, data.edge_attr)
        return self.out(global_mean_pool(x, data.batch))


def alloys(n: int) -> Data:
    rng = np.random.default_rng(0)
    graphs = sf.build_graphs([random_alloy(rng) for _ in range(n)], symmetry_tolerance=None)
    data = Data(**interop.to_pyg(sf.collate(graphs)))
    centres = torch.arange(41, dtype=torch.float64)  # Gaussians every 0.2 Å and as wide as that are recognised
    data.edge_attr = torch.exp(-((data.edge_weight.double()[:, None] / 0.2 - centres) ** 2)).float()
    return data


def main() -> None:
    torch.manual_seed(0)
    data = alloys(64)
    target = torch.randn(64, 1)
    theirs, ours = Net(CGConv), Net(interop.CGConv)
    ours.load_state_dict(theirs.state_dict())
    accelerated = sf.accelerate(copy.deepcopy(theirs))  # the one line
    print("differs by:", interop.difference(accelerated, data))
    for name, model in (("as it is", theirs), ("accelerated", accelerated), ("ours", ours)):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        start = time.perf_counter()
        for _ in range(10):
            loss = nn.functional.mse_loss(model(data), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds = time.perf_counter() - start
        print(f"{name:12} last loss {loss.item():.6f}   {100 * seconds:.0f} ms a step")


if __name__ == "__main__":
    main()
