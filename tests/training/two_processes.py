"""What two processes do together, for test_distributed.py, which starts this with torchrun and an empty directory.

The directory receives ``models.pt`` (``slow.pt``): for each of CASES (SLOW_CASES) what both processes found, and what
one finds with the joined batch; and ``run``, a run of ``fit`` on the store in ``store.pickle``.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import pickle
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import srcgcnn_fast as sf
from srcgcnn_fast.graph import CrystalGraph, collate
from srcgcnn_fast.nn import synchronize_batch_norm
from srcgcnn_fast.ops import fused
from srcgcnn_fast.training import GraphDataModule, Recipe, TrainingModule, distributed, fit

SMALL = {"atom_fea_len": 16, "h_fea_len": 8}
GATED = {"recurrent_layer_norm": True, "recurrent_learnable_alpha": True}
RAGGED = [[7, 1, 12], [20, 3, 5]]
CASES = {
    "SR-CGCNN": (sf.SRCGCNN, SMALL, RAGGED, {}),
    "CGCNN": (sf.CGCNN, SMALL, RAGGED, {}),
    "unequal numbers of crystals": (sf.SRCGCNN, SMALL, [[7, 1, 12, 9, 2], [20, 3]], {}),
    "gates, layer norm, padded width": (sf.SRCGCNN, {**SMALL, **GATED, "atom_fea_len": 20}, RAGGED, {}),
    "float32": (sf.SRCGCNN, {}, [[30, 12, 25], [17, 40, 3]], {"dtype": torch.float32}),
    "reference": (sf.CGCNN, SMALL, RAGGED, {"backend": "reference"}),
    "reference beside kernels": (sf.CGCNN, {**SMALL, "atom_fea_len": 20}, RAGGED, {"backend": ("reference", "cpu")}),
    "as on a GPU": (sf.CGCNN, {**SMALL, "atom_fea_len": 20}, RAGGED, {"operators": True}),
    "operators beside kernels": (sf.SRCGCNN, SMALL, RAGGED, {"operators": (True, False)}),
    "a table of elements": (sf.SRCGCNN, SMALL, [[200, 150, 120], [90, 400]], {}),
    "one atom": (sf.CGCNN, SMALL, [[1], [20, 3]], {"most": 1}),
    "no edges": (sf.SRCGCNN, SMALL, [[2, 3], [20, 3]], {"most": 0}),
    "features of edges": (sf.SRCGCNN, {**SMALL, "nbr_fea_len": 6}, RAGGED, {"n_features": 6}),
    "frozen first norms": (sf.CGCNN, SMALL, RAGGED, {"frozen": "bn1"}),
    "frozen second norms": (sf.CGCNN, SMALL, RAGGED, {"frozen": "bn2"}),
    "fully_shard": (sf.SRCGCNN, SMALL, RAGGED, {"wrap": "fully_shard"}),
    "torch's SyncBatchNorm": (sf.CGCNN, SMALL, RAGGED, {"wrap": "fully_shard", "norm": nn.SyncBatchNorm}),
    "FullyShardedDataParallel": (sf.SRCGCNN, SMALL, RAGGED, {"wrap": "FullyShardedDataParallel"}),
    "accelerated": ("published", {}, RAGGED, {"accelerate": True}),
    "published": ("published", {}, RAGGED, {}),
    "batch norm of its own": ("own", {}, [[1, 1, 1], [1, 1]], {}),
}
if torch.__version__ < "2.7":  # whose fully_shard does not run on a CPU
    CASES = {name: case for name, case in CASES.items() if case[3].get("wrap") != "fully_shard"}
SLOW_CASES = {"compiled": (sf.CGCNN, SMALL, RAGGED, {"compile": True})}


def graph(rng: np.random.Generator, n: int, most: int, n_features: int = 0) -> CrystalGraph:
    """n rows of weight 1 to 6 that receive up to ``most`` edges."""
    degrees = rng.integers(0, most + 1, n)
    e, weight = int(degrees.sum()), rng.integers(1, 7, n)
    return CrystalGraph(
        numbers=rng.integers(1, 101, n).astype(np.int32),
        weight=weight.astype(np.float32),
        sender=rng.integers(0, n, e).astype(np.int32),
        distance=rng.uniform(0.5, 9.0, e),
        row_ptr=np.concatenate([[0], np.cumsum(degrees)]).astype(np.int32),
        atom_class=np.repeat(np.arange(n), weight).astype(np.int32),
        edge_features=rng.random((e, n_features)).astype(np.float32) if n_features else None,
    )


def published(rng: np.random.Generator, n: int) -> tuple[torch.Tensor, ...]:
    """Atom features, edge features and neighbours of n atoms, as the published programs take them."""
    neighbors = torch.from_numpy(rng.integers(0, n, (n, 4)))
    return torch.from_numpy(rng.random((n, 5))), torch.from_numpy(rng.random((n, 4, 6))), neighbors


def joined(items: list, dtype: torch.dtype) -> tuple:
    """The arguments of a model for these crystals as one batch."""
    if isinstance(items[0], CrystalGraph):
        return (collate(items, distance_dtype=dtype),)
    if isinstance(items[0], torch.Tensor):
        return (torch.stack(items),)
    atoms, edges, neighbors = zip(*items, strict=True)
    first = np.cumsum([0, *(len(x) for x in atoms)])
    crystals = [torch.arange(a, b) for a, b in pairwise(first)]
    shifted = [x + int(a) for x, a in zip(neighbors, first, strict=False)]
    return torch.cat(atoms), torch.cat(edges), torch.cat(shifted), crystals


class WithOwnNorms(nn.Sequential):
    """Batch norm of (B, C) and of (B, C, L), outside of any convolution of this package."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5), nn.Flatten(), nn.Linear(20, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
        )


def case(name: str) -> tuple[nn.Module, list[list], dict]:
    """Model, crystals of each process, and how to train."""
    kind, hyperparameters, sizes, how = (CASES | SLOW_CASES)[name]
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    if kind == "published":
        model = conftest().CrystalGraphConvNet(5, 6, atom_fea_len=16, n_conv=2, h_fea_len=8)
        shares = [[published(rng, n) for n in numbers] for numbers in sizes]
    elif kind == "own":
        model, shares = WithOwnNorms(), [[torch.from_numpy(rng.random((2, 6))) for _ in numbers] for numbers in sizes]
    else:
        model, most, k = kind(2, **hyperparameters), (how.get("most", 15), 15), how.get("n_features", 0)
        shares = [[graph(rng, n, m, k) for n in numbers] for numbers, m in zip(sizes, most, strict=True)]
    model = model.to(how.get("dtype", torch.float64))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    for part, module in model.named_modules():
        if "frozen" in how and part.endswith(how["frozen"]):
            module.eval()
    return (sf.accelerate(model) if how.get("accelerate") else model), shares, how


def conftest():
    """The models that the tests of interop wrote after the published programs."""
    spec = importlib.util.spec_from_file_location("interop_models", Path(__file__).parents[1] / "interop/conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wrapped(model: nn.Module, how: dict) -> nn.Module:
    if how.get("norm"):
        model = how["norm"].convert_sync_batchnorm(model)
    else:
        synchronize_batch_norm(model)
    if how.get("compile"):
        model = torch.compile(model, backend="aot_eager")
    if how.get("wrap") == "fully_shard":
        return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    if how.get("wrap") == "FullyShardedDataParallel":
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    return DistributedDataParallel(model)


def train(model: nn.Module, items: list, first: int, share: float = 1.0) -> dict:
    """Three steps on crystals of which the first has number ``first``: losses, the last gradient, all buffers."""
    parameters = list(model.parameters())
    arguments = joined(items, parameters[0].dtype)
    target = torch.arange(first, first + len(items), dtype=parameters[0].dtype)[:, None].cos()
    optimizer = torch.optim.SGD(parameters, lr=2e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = share * (model(*arguments) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.numel()]
    return {
        "losses": torch.stack(losses),
        "gradient": torch.cat([g.flatten() for g in gradients]),
        "buffers": [b.clone() for b in model.buffers()],
    }


def in_step(name: str) -> tuple[dict, dict | None]:
    """What this process finds together with the other one, and what the first finds alone."""
    rank = dist.get_rank()
    model, shares, how = case(name)
    backend = how.get("backend", "cpu" if sf.backends()["cpu"].available else "reference")
    operators = how.get("operators", False)
    with sf.use_backend(backend if isinstance(backend, str) else backend[rank]):
        alone = train(copy.deepcopy(model), [*shares[0], *shares[1]], 0) if rank == 0 else None
        numbers = [len(x) for x in shares]
        first, share = rank * numbers[0], 2 * numbers[rank] / sum(numbers)
        with without_own_exchange(operators if isinstance(operators, bool) else operators[rank]):
            return train(wrapped(model, how), shares[rank], first, share), alone


@contextmanager
def without_own_exchange(wanted: bool) -> Iterator[None]:
    """Take the operators, and so the way of a GPU, in place of the kernels that exchange statistics themselves."""
    before = fused.is_eager
    try:
        fused.is_eager = (lambda _h, _device="cpu": False) if wanted else before
        yield
    finally:
        fused.is_eager = before


class KillIn(pl.Callback):
    """The second process is killed in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx, trainer.global_rank) == (self.epoch, 2, 1):
            os.kill(os.getpid(), signal.SIGKILL)


def run(directory: Path, store, callbacks=(), resume=False):
    torch.manual_seed(0)
    model = sf.SRCGCNN(2, **SMALL)
    data = GraphDataModule(store, "energy", batch_size=15, length_buckets=True)
    return fit(model, data, directory, Recipe(epochs=3, lr=5e-3), callbacks=callbacks, resume=resume, accelerator="cpu")


def missing_labels(directory: Path, store) -> list[float]:
    """The losses of a run whose second target some crystals lack."""
    torch.manual_seed(0)
    data = GraphDataModule(store, ["energy", "volume"], batch_size=15)
    result = fit(sf.CGCNN(1, n_targets=2, **SMALL), data, directory, Recipe(epochs=2), accelerator="cpu")
    return [row["train_loss"] for row in result.history]


class Seen(TrainingModule):
    """Notes the crystals that it trains on."""

    def training_step(self, batch, batch_idx):
        self.seen = [*getattr(self, "seen", []), *batch[2].tolist()]
        return super().training_step(batch, batch_idx)


def own_trainer(store) -> tuple[list[int], list[int]]:
    """What this process trains on in an epoch, under a trainer that shares out crystals itself; and all there is."""
    data = GraphDataModule(store, "energy", batch_size=15)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", **quiet)
    module = Seen(sf.CGCNN(1, **SMALL), data, Recipe(epochs=1))
    trainer.fit(module, data)
    return module.seen, data.parts["train"].indices.tolist()


if __name__ == "__main__":
    place, what = Path(sys.argv[1]), sys.argv[2:]
    store = pickle.loads((place / "store.pickle").read_bytes())
    for word, cases in (("models", CASES), ("slow", SLOW_CASES)):
        if word not in what:
            continue
        distributed.join()
        results = {}
        for name in cases:
            own, alone = in_step(name)
            every = [None, None]
            dist.all_gather_object(every, own)
            results[name] = (every, alone)
        if dist.get_rank() == 0:
            torch.save(results, place / f"{word}.pt")
    if "run" in what:
        result = run(place / "run", store)
        more = missing_labels(place / "missing", store), own_trainer(store)
        torch.save((result.history, result.model.state_dict(), *more), place / f"result{os.environ['RANK']}.pt")
    if "wait" in what:
        distributed.join()
        _set_pg_timeout(timedelta(seconds=0.3), dist.group.WORLD)
        prepared = distributed.on_rank_zero(lambda: time.sleep(0.6) or "prepared")
        (place / f"waited{os.environ['RANK']}").write_text(prepared)
    if "killed" in what:
        run(place / "cut", store, [KillIn(1)])
    if "resumed" in what:
        run(place / "cut", store, resume=True)
