"""A run that is killed with SIGKILL, wherever, and resumed ends with the bits of one that was left alone; SIGTERM is
told."""

from __future__ import annotations

import csv
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from srcgcnn_fast.graph import GraphStore, prepare
from srcgcnn_fast.training.alloys import write_alloys

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL and fork are POSIX")

CHILD = '''
import os, pickle, random, signal, sys, time
from pathlib import Path
import torch
from lightning.pytorch import Callback, Trainer
from srcgcnn_fast import SRCGCNN
from srcgcnn_fast.training import GraphDataModule, Recipe, fit

folder, plan = Path(sys.argv[1]), sys.argv[2]
store = pickle.loads((folder / "store").read_bytes())
EPOCHS = 2
recipe = Recipe(epochs=EPOCHS, lr=5e-3, optimizer="adamw", schedule="one_cycle", ema=0.9)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class InBatch(Callback):
    def __init__(self, epoch, batch):
        self.at = epoch, batch

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            die()


def at_write(wanted, occurrence):
    """Die when the file of this name is half written for the n-th time; a directory is not yet in its place."""
    seen = []

    def dying(real):
        def replace(source, target):
            if os.path.basename(target) == wanted:
                if len(seen) == occurrence:
                    if os.path.isfile(source):
                        os.truncate(source, os.path.getsize(source) // 2)
                    die()
                seen.append(target)
            real(source, target)

        return replace

    os.replace, os.rename = dying(os.replace), dying(os.rename)


def train(name, callbacks=(), resume=False):
    torch.manual_seed(0)
    model = SRCGCNN(n_recurrent_steps=2, atom_fea_len=16, h_fea_len=16)
    data = GraphDataModule(store, "energy", batch_size=16, split=(0.7, 0.3, 0.0))
    fit(model, data, folder / name, recipe, resume=resume, callbacks=callbacks, accelerator="cpu")


def forked(work):
    """Whether `work` was killed by SIGKILL, in a process of its own."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        assert os.WEXITSTATUS(status) == 0, "the run failed"
    return os.WIFSIGNALED(status)


def again(name):
    """What a user does after a crash."""
    return lambda: train(name, resume=(folder / name / "run.json").exists())


def cut(name, work):
    assert forked(work), f"{name} was not killed"
    assert not forked(again(name))


def in_write(name, *where):
    def work():
        at_write(*where)
        train(name)

    cut(name, work)


started = time.perf_counter()
assert not forked(lambda: train("whole"))
whole = time.perf_counter() - started
if plan != "times":
    for number, where in enumerate(eval(plan)):
        name = f"run_{number}"
        if isinstance(where[0], int):
            cut(name, lambda: train(name, [InBatch(*where)]))
        else:
            in_write(name, *where)
else:
    random.seed(0)
    for number in range(12):
        name, kills, deadline = f"time_{number}", 0, None
        while True:
            child = os.fork()
            if child == 0:
                try:
                    again(name)()
                finally:
                    os._exit(0)
            time.sleep(random.uniform(0.05, 0.5) * whole * (1 + kills / 4))
            if os.waitpid(child, os.WNOHANG)[0]:
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
        print(kills)
'''


def killed(store: GraphStore, folder: Path, plan: object) -> list[int]:
    """Run the plan in child processes; what it prints."""
    small = GraphStore.from_graphs([store[i] for i in range(60)], targets={"energy": store.targets["energy"][:60]})
    (folder / "store").write_bytes(pickle.dumps(small))
    done = subprocess.run([sys.executable, "-c", CHILD, folder, str(plan)], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def table(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    measured = ("seconds", "crystals_per_second", "data_wait", "memory_mib")
    return [{key: value for key, value in row.items() if key not in measured} for row in rows]


def assert_same(folder: Path) -> int:
    """Every run of ``folder`` ended as ``whole`` did, and left nothing else behind; how many there are."""
    whole = folder / "whole"
    runs = [run for run in folder.iterdir() if run.is_dir() and run != whole]
    expected = torch.load(whole / "last.ckpt", weights_only=True)
    for run in runs:
        found = torch.load(run / "last.ckpt", weights_only=True)
        for part in ("state_dict", "current_model_state"):  # averages, and the weights themselves
            assert all(torch.equal(expected[part][name], found[part][name]) for name in expected[part]), run.name
        moments = [state["optimizer_states"][0]["state"] for state in (expected, found)]
        assert all(torch.equal(moments[0][k]["exp_avg_sq"], moments[1][k]["exp_avg_sq"]) for k in moments[0])
        weights = [(path / "model" / "model.safetensors").read_bytes() for path in (whole, run)]
        assert weights[0] == weights[1], run.name
        assert table(run) == table(whole), run.name
        assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in whole.iterdir())
    return len(runs)


POINTS = [(1, 2), ("best.ckpt", 0), ("last.ckpt", 1), ("metrics.csv", 1), ("model", 0)]
"""(epoch, batch), or (file, how many times it was written before)."""
MORE = [(0, 1), (1, 0), ("run.json", 0), ("last.ckpt", 0), ("metrics.csv", 0), ("metrics.csv", 2)]


@pytest.mark.parametrize("points", [POINTS, pytest.param(MORE, marks=pytest.mark.slow)], ids=["main", "more"])
def test_killed_in_an_epoch_or_while_writing(alloys, tmp_path, points):
    killed(alloys, tmp_path, points)
    assert assert_same(tmp_path) == len(points)


@pytest.mark.slow
def test_killed_again_and_again_at_any_moment(alloys, tmp_path):
    kills = killed(alloys, tmp_path, "times")
    assert sum(kills) > 12, str(kills)
    assert assert_same(tmp_path) == len(kills)


@pytest.mark.parametrize(
    ("command", "begun", "says"),
    [
        (["train"], "o/last.ckpt", "terminated; --resume continues after the last whole epoch"),
        (["train", "--workers", "2"], "o/last.ckpt", "terminated; --resume continues after the last whole epoch"),
        pytest.param(
            ["compare", "--seeds", "0"],
            "o/runs/*/last.ckpt",
            "terminated; with --study or --seeds the same command",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["train", "workers", "study"],
)
def test_sigterm_is_told(tmp_path, command, begun, says):
    prepare(write_alloys(tmp_path / "a.parquet", 40), tmp_path / "graphs")
    argv = [command[0], "graphs", *command[1:], "--out", "o", "--target", "formation_energy_per_atom"]
    argv += ["--epochs", "100000", "--atom-fea-len", "8", "--h-fea-len", "8", "--accelerator", "cpu"]
    call = [sys.executable, "-m", "srcgcnn_fast.cli", *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(call, cwd=tmp_path, start_new_session=True, **pipes) as process:
        while process.poll() is None and not list(tmp_path.glob(begun)):
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)  # all of the group, as schedulers do
        error = process.communicate(timeout=300)[1]
    assert process.returncode == 143 and says in error and "Traceback" not in error
    if command[0] == "train":
        assert not (tmp_path / "o" / "model").exists()
    else:
        assert "2 of 2 runs of this section are still missing." in (tmp_path / "o" / "report.md").read_text()
