"""The programs under examples/ run, and say what they should."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import srcgcnn_fast as sf

EXAMPLES = Path(__file__).parents[1] / "examples"
ROOT = str(Path(sf.__file__).parents[1])


def run(name: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses_of(line: str) -> list[float]:
    return [float(x) for x in re.findall(r"\d+\.\d{6}", line)]


def test_every_example_has_a_test():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "own_network.py",
        "relax.py",
        "switch_published.py",
        "switch_pyg.py",
    }


@pytest.mark.slow
def test_slurm(tmp_path):
    """The batch script on one node of two processes, with stand-ins for what a cluster brings; submitted twice."""
    pytest.importorskip("ase", reason="ASE is not installed")
    from srcgcnn_fast.training.alloys import write_alloys

    shims = {
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "scontrol": "echo localhost",
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
        "srcgcnn-fast": f'exec {sys.executable} -m srcgcnn_fast.cli "$@"',
    }
    for name, body in shims.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    write_alloys(tmp_path / "alloys.parquet", 60, 0, False)
    job = {"JOB_NUM_NODES": "1", "JOB_ID": "7", "JOB_NODELIST": "localhost", "CPUS_PER_TASK": "2"}
    environment = os.environ | {f"SLURM_{name}": value for name, value in job.items()}
    environment["PATH"] = os.pathsep.join([str(tmp_path), environment["PATH"]])
    environment["PYTHONPATH"] = os.pathsep.join([ROOT, environment.get("PYTHONPATH", "")])
    options = ["--target", "formation_energy_per_atom", "--epochs", "2", "--batch-size", "10", "--atom-fea-len", "16"]

    def submit() -> subprocess.CompletedProcess:
        command = ["bash", str(EXAMPLES / "slurm.sh"), "alloys.parquet", "run", *options]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    first = submit()
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("best epoch") == 1
    epochs = (tmp_path / "run" / "metrics.csv").read_text()
    assert len(epochs.splitlines()) == 3
    again = submit()  # whose run is at its end
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "metrics.csv").read_text() == epochs


def test_own_network():
    pytest.importorskip("ase", reason="ASE is not installed")
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", run("own_network.py")).groups())
    assert last < first / 2


@pytest.mark.slow
@pytest.mark.parametrize("program", ["cgcnn2", "cgcnn", "SR-CGCNN/SR-CGCNN"])
def test_switch_published(program):
    pytest.importorskip("ase", reason="ASE is not installed")
    where = Path(os.environ.get("SRCGCNN_PEERS", "")) / program
    if program == "cgcnn2":
        pytest.importorskip("cgcnn2", reason="cgcnn2 is not installed")
    elif not (where / "cgcnn" / "model.py").is_file():
        pytest.skip(f"SRCGCNN_PEERS does not hold {program}")
    arguments = [] if program == "cgcnn2" else [str(where)]
    _, theirs, ours = run("switch_published.py", *arguments).strip().splitlines()
    assert losses_of(theirs)[0] == pytest.approx(losses_of(ours)[0], rel=1e-5, abs=1e-6)
    assert losses_of(theirs)[1] == pytest.approx(losses_of(ours)[1], rel=1e-2, abs=1e-3)


@pytest.mark.slow
def test_switch_pyg():
    if importlib.util.find_spec("torch_geometric") is None:
        pytest.skip("torch-geometric is not installed")
    pytest.importorskip("ase", reason="ASE is not installed")
    _, *lines = run("switch_pyg.py").strip().splitlines()
    (theirs,), *others = (losses_of(line) for line in lines)
    assert len(others) == 2 and all(x == pytest.approx(theirs, rel=1e-2, abs=1e-3) for (x,) in others)


@pytest.mark.slow
def test_relax():
    for module in ("ase", "sklearn", "lightning"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    predicted, theory, cell = (
        [float(x) for x in re.findall(r"-?\d+\.\d{3}", line)] for line in run("relax.py").strip().splitlines()
    )
    assert predicted[1] < predicted[0]
    assert theory[1] < theory[0] - 0.2  # the true energy of the cell falls with the predicted one
    assert 3.6 < cell[1] < cell[0] - 0.08
