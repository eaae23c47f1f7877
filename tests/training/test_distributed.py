"""Two processes that torchrun starts compute what one does with their joined batch, and survive the death of one."""

from __future__ import annotations

import copy
import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import srcgcnn_fast as sf
from srcgcnn_fast import InputError
from srcgcnn_fast.cli import main
from srcgcnn_fast.nn import norm, synchronize_batch_norm
from srcgcnn_fast.training import distributed
from srcgcnn_fast.training.data import EpochSampler

SCRIPT = Path(__file__).with_name("two_processes.py")
_spec = importlib.util.spec_from_file_location("two_processes", SCRIPT)
two_processes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(two_processes)


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    root = str(Path(sf.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory, alloys):
    """The directory in which two processes have trained."""
    place = tmp_path_factory.mktemp("distributed")
    (place / "store.pickle").write_bytes(pickle.dumps(alloys))
    done = torchrun(SCRIPT, place, "models", "run", "wait")
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(scope="module")
def models(place):
    return torch.load(place / "models.pt")


def check_equal(name: str, together: list[dict], alone: dict) -> None:
    first, second = together
    tolerance = {"rtol": 2e-4, "atol": 2e-5} if name == "float32" else {"rtol": 1e-8, "atol": 1e-11}
    torch.testing.assert_close((first["losses"] + second["losses"]) / 2, alone["losses"], **tolerance)
    if name == "reference beside kernels":  # which differ in the gradient of a bias that the norm takes away again
        return
    for rank in (first, second):
        if name != "FullyShardedDataParallel":  # whose gradients lie scattered
            torch.testing.assert_close(rank["gradient"], alone["gradient"], **tolerance)
        for found, expected in zip(rank["buffers"], alone["buffers"], strict=True):
            torch.testing.assert_close(found, expected, **tolerance)
    assert all(torch.equal(a, b) for a, b in zip(first["buffers"], second["buffers"], strict=True))


@pytest.mark.parametrize("name", two_processes.CASES)
@pytest.mark.compiled
def test_equal_to_one_process_with_the_joined_batch(models, name):
    check_equal(name, *models[name])


@pytest.mark.slow
def test_compiled_models_are_equal_too(place):
    done = torchrun(SCRIPT, place, "slow")
    assert done.returncode == 0, done.stderr
    for name, found in torch.load(place / "slow.pt").items():
        check_equal(name, *found)


@pytest.mark.compiled
def test_a_run_of_two_is_the_run_of_one(place, alloys, tmp_path):
    alone = two_processes.run(tmp_path / "run", alloys)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {p.name for p in (place / "run").iterdir()}
    assert (tmp_path / "run" / "run.json").read_text() == (place / "run" / "run.json").read_text()
    for rank in (0, 1):
        history, weights, *_ = torch.load(place / f"result{rank}.pt")
        for key in ("train_loss", "val_mae", "val_r2", "lr"):
            assert [row[key] for row in history] == pytest.approx([row[key] for row in alone.history], rel=1e-4)
        for name, x in alone.model.state_dict().items():
            torch.testing.assert_close(weights[name], x, rtol=1e-3, atol=1e-4)
    saved = sf.load_model(place / "run" / "model").state_dict()
    assert all(torch.equal(saved[name], x) for name, x in weights.items())


@pytest.mark.compiled
def test_the_others_wait_for_rank_zero_beyond_the_timeout(place):
    """As for a data set whose preparation takes longer than PyTorch's half hour."""
    assert [(place / f"waited{rank}").read_text() for rank in (0, 1)] == ["prepared", "prepared"]


@pytest.mark.compiled
def test_losses_with_missing_labels_are_those_of_one(place, alloys, tmp_path):
    alone = two_processes.missing_labels(tmp_path / "run", alloys)
    for rank in (0, 1):
        assert torch.load(place / f"result{rank}.pt")[2] == pytest.approx(alone, rel=1e-4)


@pytest.mark.compiled
def test_a_trainer_of_ones_own_trains_on_every_crystal_too(place):
    (first, whole), (second, _) = (torch.load(place / f"result{rank}.pt")[3] for rank in (0, 1))
    assert sorted([*first, *second]) == sorted(whole)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_resumes_to_the_same_bits(place, alloys, tmp_path):
    killed = torchrun(SCRIPT, place, "killed")
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr
    assert not (place / "cut" / "model").exists()
    before = torch.load(place / "cut" / "last.ckpt", weights_only=True)
    assert before["epoch"] == 0
    shutil.copytree(place / "cut", tmp_path / "cut")
    resumed = torchrun(SCRIPT, place, "resumed")
    assert resumed.returncode == 0, resumed.stderr
    whole, cut = (torch.load(place / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("run", "cut"))
    assert all(torch.equal(whole[name], x) for name, x in cut.items())
    two_processes.run(tmp_path / "cut", alloys, resume=True)  # by one process
    for name, x in torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)["state_dict"].items():
        torch.testing.assert_close(whole[name], x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("options", [{"batch_size": 16}, {"batch_rows": 60}], ids=["size", "rows"])
def test_shares_join_to_the_batches_of_one(world_size, options):
    rng = np.random.default_rng(0)
    indices, rows = rng.permutation(200)[:130], rng.integers(1, 9, 200)
    make = lambda **more: EpochSampler(indices, rows, shuffle=True, seed=3, **options, **more)  # noqa: E731
    for epoch in (0, 1):
        alone, *ranks = (make(), *(make(rank=r, world_size=world_size) for r in range(world_size)))
        for sampler in (alone, *ranks):
            sampler.set_epoch(epoch)
        batches = list(alone)
        shares = [list(sampler) for sampler in ranks]
        assert {len(sampler) for sampler in ranks} == {len(share) for share in shares}
        joined = [np.concatenate(parts) for parts in zip(*shares, strict=True)]
        sizes = [[len(x) for x in parts] for parts in zip(*shares, strict=True)]
        assert all(min(s) >= 1 and max(s) - min(s) <= 1 for s in sizes)
        if len(batches[-1]) < world_size:  # which joins the one before
            batches[-2:] = [np.concatenate(batches[-2:])]
        assert all(np.array_equal(a, b) for a, b in zip(joined, batches, strict=True))


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("options", [{"batch_size": 16}, {"batch_rows": 60}], ids=["size", "rows"])
def test_length_buckets_are_shared_too(world_size, options):
    rng = np.random.default_rng(1)
    indices, rows = rng.permutation(900)[:658], rng.integers(1, 9, 900)

    def epoch(number, buckets=True, seed=3, rank=0, world_size=world_size):
        where = {"rank": rank, "world_size": world_size}
        sampler = EpochSampler(indices, rows, shuffle=True, seed=seed, length_buckets=buckets, **options, **where)
        sampler.set_epoch(number)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        return batches

    def together(number, **more):
        shares = [epoch(number, rank=rank, **more) for rank in range(world_size)]
        sizes = np.array([[len(x) for x in share] for share in shares])
        assert sizes.min() >= 1 and np.ptp(sizes, axis=0).max() <= 1
        return [np.concatenate(parts) for parts in zip(*shares, strict=True)]

    found = {number: together(number) for number in (0, 1)}
    for batches in found.values():
        assert sorted(np.concatenate(batches)) == sorted(indices)  # each crystal once
    assert all(np.array_equal(a, b) for a, b in zip(found[0], together(0), strict=True))
    for other in (found[1], together(0, seed=4)):
        assert not np.array_equal(np.concatenate(found[0]), np.concatenate(other))
    alone = epoch(0, world_size=1)
    if len(alone) == len(found[0]):  # else the last batch had too few crystals for the processes
        assert all(np.array_equal(a, b) for a, b in zip(found[0], alone, strict=True))
    spread = [np.mean([np.std(rows[batch]) for batch in found]) for found in (found[0], together(0, buckets=False))]
    assert spread[0] < 0.5 * spread[1]


def test_validation_is_shared_without_gap_or_overlap():
    indices, rows = np.arange(50, 91), np.ones(100, int)
    shares = [np.concatenate(list(EpochSampler(indices, rows, batch_size=7, rank=r, world_size=3))) for r in range(3)]
    assert sorted(np.concatenate(shares)) == list(indices)


def test_too_few_crystals_for_the_processes():
    with pytest.raises(InputError, match="4 processes cannot share 3 crystals"):
        EpochSampler(np.arange(3), np.ones(3, int), world_size=4)
    with pytest.raises(InputError, match="in batches of 2"):
        EpochSampler(np.arange(30), np.ones(30, int), batch_size=2, shuffle=True, world_size=4)


def test_processes_that_something_else_started(monkeypatch):
    monkeypatch.setattr(distributed, "is_shared", lambda: True)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(InputError, match="start them with torchrun"):
        distributed.trainer_options()


def test_commands_that_run_in_one_process_say_so_once(monkeypatch, capsys):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for rank, said in (("0", "error: doctor runs in one process; start it without torchrun.\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert main(["doctor"]) == 2
        assert capsys.readouterr().err == said


def test_batch_norm_alone_is_batch_norm():
    plain, synchronised = (torch.nn.Sequential(torch.nn.BatchNorm1d(3)) for _ in range(2))
    assert synchronize_batch_norm(synchronised)[0].state_dict().keys() == plain[0].state_dict().keys()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    for mode in (True, False):
        assert torch.equal(synchronised.train(mode)(x), plain.train(mode)(x))
    assert torch.equal(synchronised[0].running_var, plain[0].running_var)


@pytest.fixture
def group_of_one(monkeypatch):
    """One process that exchanges with itself, which is otherwise no group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(
        norm,
        "process_group",
        lambda m: dist.group.WORLD if m.training and type(m) is norm.SynchronizedBatchNorm1d else None,
    )
    yield
    dist.destroy_process_group()


def test_norms_of_the_batch_are_not_shared_in_evaluation(monkeypatch):
    """As torch.nn.SyncBatchNorm: one process may evaluate alone."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda _: 2)
    shared = torch.nn.BatchNorm1d(3, track_running_stats=False)
    synchronize_batch_norm(shared)
    shared.process_group = "both"
    assert norm.process_group(shared) == "both" and norm.process_group(shared.eval()) is None


@pytest.mark.skipif(not sf.backends()["cpu"].available, reason="needs the compiled kernels")
def test_kernels_that_exchange_with_themselves(group_of_one, monkeypatch):
    model, shares, _ = two_processes.case("CGCNN")
    batch = sf.collate(shares[0], distance_dtype=torch.float64)
    together = synchronize_batch_norm(copy.deepcopy(model))
    results = []
    for each in (model, together):
        parameters = list(each.parameters())
        out = each(batch).square().sum()
        results.append([out, *torch.autograd.grad(out, parameters, create_graph=True), *each.buffers()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        results[1][1].sum().backward()

    def broken(*_, **__):
        raise ConnectionError("the other process is gone")

    loss = together(batch).square().sum()
    monkeypatch.setattr(dist, "all_reduce", broken)
    with pytest.raises(ConnectionError, match="is gone"):
        loss.backward()
    monkeypatch.setattr(dist, "all_gather", broken)
    before = {name: x.clone() for name, x in together.named_buffers() if name.endswith(("running_mean", "running_var"))}
    with pytest.raises(ConnectionError, match="is gone"):
        together(batch)
    with pytest.raises(InputError, match="single atom or edge"):
        monkeypatch.undo()
        monkeypatch.setattr(norm, "process_group", lambda m: dist.group.WORLD)
        together(sf.collate([two_processes.graph(np.random.default_rng(0), 1, 0)], distance_dtype=torch.float64))
    assert before and all(torch.equal(together.get_buffer(name), x) for name, x in before.items())
