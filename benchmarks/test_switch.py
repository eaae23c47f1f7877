"""What one line gains: other people's models and training scripts, as they are and accelerated.

SRCGCNN_PEERS=… SRCGCNN_TEST_DATA=… pytest benchmarks/test_switch.py --benchmark-enable --record NAME
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import measure
import peers
import pytest
import scripts
import torch
import workload
from torch import nn

import srcgcnn_fast as sf
from srcgcnn_fast.interop import difference, to_pyg

CRYSTALS, EPOCHS, ROUNDS = 500, 6, 10
SCRIPT_NOTE = (
    f"main.py of each program, fetched, with and without one line (`{scripts.LINE.strip()}` after the model), on "
    f"{CRYSTALS} CIFs of the Materials Project, formation energy, its default options (batch 256, SGD), 400 crystals "
    f"to train on, {EPOCHS} epochs, the same seed. Losses: of the first step, and the mean of the third epoch. An "
    "epoch: all its training steps with optimiser and metrics, without the script's loader, the median of epochs 2 to "
    f"{EPOCHS}. The whole script reads the CIFs, trains, validates and tests; reading them is most of it."
)
MODEL_NOTE = (
    "Milliseconds, medians of {rounds} alternating rounds in one process, 256 crystals, as the program's loader makes "
    "the batch; a training step is forward, loss and backward. Index tensors and features are new in every round, so "
    "that their conversion is in the time."
)
GEOMETRIC_NOTE = (
    f"Milliseconds per training step (forward, loss, backward), medians of {ROUNDS} alternating rounds in one process, "
    "256 crystals: embedding, 3 CGConv(64, dim=41, batch_norm=True), global_mean_pool, linear. Edges are new in every "
    "round. Gaussians: the published 41, recognised; other features: random numbers, taken as they are."
)


@pytest.mark.parametrize("kind", scripts.PROGRAMS)
def test_training_script_with_one_line_more(record, kind, tmp_path):
    data, programs = (os.environ.get(name, "") for name in ("SRCGCNN_TEST_DATA", "SRCGCNN_PEERS"))
    folder, options = scripts.PROGRAMS[kind]
    crystals = Path(data) / "mp" / "train.parquet"
    atom_init = Path(programs) / "cgcnn/data/sample-regression/atom_init.json"
    if not crystals.is_file() or not (Path(programs) / folder / "main.py").is_file():
        record("training scripts", {"script": kind, "absent": "set SRCGCNN_PEERS and SRCGCNN_TEST_DATA"}, SCRIPT_NOTE)
        pytest.skip("SRCGCNN_PEERS or SRCGCNN_TEST_DATA is absent")
    pytest.importorskip("sklearn", reason="the published scripts need scikit-learn")
    scripts.cif_folder(tmp_path / "cifs", crystals, atom_init, CRYSTALS)
    runs = {}
    for name in ("as it is", "accelerated"):
        scripts.copy_program(Path(programs) / folder, tmp_path / name, name == "accelerated")
        runs[name] = scripts.run(tmp_path / name, tmp_path / "cifs", options, EPOCHS)
    theirs, ours = runs.values()
    first = [run.losses[0][0] for run in (theirs, ours)]
    third = [sum(run.losses[2]) / len(run.losses[2]) for run in (theirs, ours)]
    assert abs(first[1] / first[0] - 1) < 1e-5 and abs(third[1] / third[0] - 1) < 1e-2, (first, third)
    row = {"script": kind, "first loss": f"{first[0]:.7g} / {first[1]:.7g}"}
    row |= {"third epoch": f"{third[0]:.7g} / {third[1]:.7g}", "relative": abs(third[1] / third[0] - 1)}
    row |= {"epoch as it is, s": theirs.epoch_seconds, "accelerated, s": ours.epoch_seconds}
    row["times faster"] = theirs.epoch_seconds / ours.epoch_seconds
    record("training scripts", row | {"whole script, s": f"{theirs.total:.1f} / {ours.total:.1f}"}, SCRIPT_NOTE)


def new(inputs: tuple) -> tuple:
    """The same batch as tensors that were never seen."""
    return tuple(x.view_as(x) if isinstance(x, torch.Tensor) else x for x in inputs)


def runs_of(model: nn.Module, inputs: tuple, target: torch.Tensor) -> dict:
    def training_step() -> None:
        model.train().zero_grad(set_to_none=True)
        nn.functional.mse_loss(model(*new(inputs)), target).backward()

    def inference() -> None:
        model.eval()
        with torch.no_grad():
            model(*new(inputs))

    return {"training step": training_step, "inference": inference}


@pytest.mark.parametrize("threads", [1, 2], ids=lambda n: f"{n}threads")
@pytest.mark.parametrize("kind", peers._MODEL_FILES)
def test_published_model(record, kind, threads):
    with measure.threads(threads):
        _, same = workload.batches(256)
        torch.manual_seed(0)
        ours = {"CGCNN": sf.CGCNN, "SR-CGCNN": sf.SRCGCNN}[kind]()
        model = peers.published_model(ours)
        if model is None:
            record("published models", {"model": kind, "absent": "set SRCGCNN_PEERS"}, MODEL_NOTE)
            pytest.skip("SRCGCNN_PEERS is absent")
        fast, batch = copy.deepcopy(model), peers.published_input(same, clean=False)
        sf.accelerate(fast, verify=batch)
        target = torch.randn(256, 1, generator=torch.Generator().manual_seed(1))
        made = {"as it is": runs_of(model, batch, target), "accelerated": runs_of(fast, batch, target)}
        made["our model, same graph"] = runs_of(ours, (same,), target)
        for work in ("training step", "inference"):

            def fresh(name: str, work: str = work) -> None:
                same.cache.clear()
                made[name][work]()

            took = measure.medians(measure.alternate({n: lambda n=n: fresh(n) for n in made}, ROUNDS))
            row = {"model": kind, "work": work, "threads": threads} | {n: 1e3 * s for n, s in took.items()}
            row["times faster"] = took["as it is"] / took["accelerated"]
            record("published models", row, MODEL_NOTE.format(rounds=ROUNDS))


class GeometricNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import CGConv

        self.embedding = nn.Embedding(101, 64)
        self.convs = nn.ModuleList(CGConv(64, dim=41, batch_norm=True) for _ in range(3))
        self.out = nn.Linear(64, 1)

    def forward(self, z, edge_index, edge_attr, batch):
        from torch_geometric.nn import global_mean_pool

        x = self.embedding(z)
        for conv in self.convs:
            x = conv(x, edge_index, edge_attr)
        return self.out(global_mean_pool(x, batch))


@pytest.mark.parametrize("threads", [1, 2], ids=lambda n: f"{n}threads")
@pytest.mark.parametrize("edges", ["Gaussians, sorted", "Gaussians, shuffled", "other features, sorted"])
def test_geometric_loop(record, edges, threads):
    table = "PyTorch Geometric"
    if not peers.geometric_is_installed():
        record(table, {"edges": edges, "absent": "pip install torch-geometric"}, GEOMETRIC_NOTE)
        pytest.skip("torch-geometric is not installed")
    with measure.threads(threads):
        _, same = workload.batches(256)
        fields, fea = to_pyg(same), peers.published_input(same, clean=True)[1].flatten(0, 1)
        index = fields["edge_index"]
        if "other" in edges:
            fea = torch.rand(fea.shape, generator=torch.Generator().manual_seed(0))
        if "shuffled" in edges:
            order = torch.randperm(len(fea), generator=torch.Generator().manual_seed(0))
            index, fea = index[:, order], fea[order]
        torch.manual_seed(0)
        model, inputs = GeometricNet(), (fields["z"], index, fea, fields["batch"])
        fast = sf.accelerate(copy.deepcopy(model))
        found = difference(fast, inputs)
        assert max(found.output, found.gradient, found.buffers) < 1e-4, found
        target = torch.randn(256, 1, generator=torch.Generator().manual_seed(1))
        step = {"as it is": runs_of(model, inputs, target)["training step"]}
        step["accelerated"] = runs_of(fast, inputs, target)["training step"]

        def clean(run):  # the peer's denormal numbers are flushed; ours does not need it
            torch.set_flush_denormal(True)
            run()
            torch.set_flush_denormal(False)

        pairs = {"as it is": lambda: clean(step["as it is"]), "accelerated": step["accelerated"]}
        took = measure.medians(measure.alternate(pairs, ROUNDS))
    row = {"edges": edges, "threads": threads, "as it is": 1e3 * took["as it is"]}
    row |= {"accelerated": 1e3 * took["accelerated"], "times faster": took["as it is"] / took["accelerated"]}
    record(table, row | {"gradient differs by": found.gradient}, GEOMETRIC_NOTE)
