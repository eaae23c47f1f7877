"""What synchronised batch statistics cost: a training step of each process beside one with statistics of its own.

    SRCGCNN_TEST_DATA=… OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/synchronized.py [CRYSTALS]

Milliseconds, medians of 15 alternating rounds: forward, loss and backward with DistributedDataParallel on a batch per
process that is new in every round. With one process the synchronised one exchanges its statistics with itself. The
reference backend runs afterwards, because it leaves caches and memory in a state that slows what follows.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import workload
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import srcgcnn_fast as sf
from srcgcnn_fast.nn import norm, synchronize_batch_norm

ROUNDS, WARM_UP = 15, 3


def step(model: nn.Module, batch: sf.GraphBatch, backend: str) -> Callable[[], None]:
    parallel = DistributedDataParallel(model)

    def run() -> None:
        batch.cache.clear()
        with sf.use_backend(backend):
            parallel(batch).square().mean().backward()

    return run


def main(crystals: int) -> None:
    dist.init_process_group("gloo")
    if dist.get_world_size() == 1:  # a group of one is otherwise no group
        norm.process_group = lambda module: (
            dist.group.WORLD if module.training and isinstance(module, norm.SynchronizedBatchNorm1d) else None
        )
    batch = sf.collate(sf.build_graphs(workload.draw(crystals, seed=dist.get_rank())))
    for kind in (sf.CGCNN, sf.SRCGCNN):
        torch.manual_seed(0)
        own = kind().train()
        together = synchronize_batch_norm(copy.deepcopy(own))
        steps = {
            "own statistics": step(own, batch, "cpu"),
            "synchronised": step(together, batch, "cpu"),
            "synchronised, reference": step(copy.deepcopy(together), batch, "reference"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        alternating, last = list(steps)[:2], list(steps)[2:]
        for names in [alternating] * (ROUNDS + WARM_UP) + [last] * (ROUNDS + WARM_UP):
            for name in names:
                dist.barrier()
                start = time.perf_counter()
                steps[name]()
                seconds[name].append(time.perf_counter() - start)
        if dist.get_rank() == 0:
            sizes = f"{kind.__name__}, {dist.get_world_size()} process(es), {crystals} crystals each"
            print(sizes, {name: f"{1e3 * statistics.median(x[WARM_UP:]):.1f}" for name, x in seconds.items()})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 256)
