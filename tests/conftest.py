"""Fixtures that every room of the tests shares."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable
from pathlib import Path

# Idle OpenMP threads that spin stall every parallel region of a busy machine; read once, when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import pytest
import torch

import srcgcnn_fast as sf
from srcgcnn_fast.graph import CrystalGraph, GraphBatch, collate
from srcgcnn_fast.ops import registry

# Read once, when something imports Triton (lightning does): without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at its options
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Plain ``pytest`` runs on all cores; with a path, another ``-m`` or ``-n 0`` one test runs after the other."""
    workers = min(torch.get_num_threads(), 8)  # of 1.4 GB each
    is_whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and config.option.markexpr == "not slow"
    is_unasked = getattr(config.option, "numprocesses", 0) is None and not hasattr(config, "workerinput")
    if is_whole and is_unasked and workers > 1:
        config.option.numprocesses, config.option.dist = workers, "worksteal"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items if registry.core is None else []:
        if item.get_closest_marker("compiled"):
            item.add_marker(pytest.mark.skip(reason=registry.core_problem))


def pytest_collection_finish() -> None:
    """No search for garbage looks at modules and tests again, of which there are a million objects."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what is left at the end is taken for leaked


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real crystals and published checkpoints; the tests that want them skip where they are absent."""
    where = os.environ.get("SRCGCNN_TEST_DATA", "")
    if not where or not Path(where).is_dir():
        pytest.skip("SRCGCNN_TEST_DATA does not name the directory of test data")
    return Path(where)


@pytest.fixture(scope="session")
def small_1500(data_dir):
    """1500 crystals of the Materials Project, as a table."""
    pandas = pytest.importorskip("pandas")
    return pandas.read_parquet(data_dir / "mp" / "small_1500.parquet")


@pytest.fixture(scope="session")
def crystals_1500(small_1500) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Lattice, fractional coordinates and numbers of each."""
    columns = (small_1500[name] for name in ("lattice", "frac_coords", "atomic_numbers"))
    return [(np.reshape(a, (3, 3)), np.reshape(f, (-1, 3)), np.asarray(z)) for a, f, z in zip(*columns, strict=True)]


@pytest.fixture
def backend(request: pytest.FixtureRequest):
    """Parametrise indirectly with a backend's name; skips, saying why, where it cannot run."""
    status = sf.backends()[request.param]
    if not status.available:
        pytest.skip(f"backend {request.param}: {status.reason}")
    with sf.use_backend(request.param):
        yield request.param


def random_graph(rng: np.random.Generator, degrees: np.ndarray, weighted: bool = False) -> CrystalGraph:
    """A graph with the given degree of every row, random senders, sorted distances of 0.5 to 9 Å."""
    n, e = len(degrees), int(degrees.sum())
    distance = np.concatenate([np.sort(rng.uniform(0.5, 9.0, k)) for k in degrees]) if e else np.zeros(0)
    weight = rng.integers(1, 7, n) if weighted else np.ones(n)
    return CrystalGraph(
        numbers=rng.integers(1, 101, n).astype(np.int32),
        weight=weight.astype(np.float32),
        sender=rng.integers(0, max(n, 1), e).astype(np.int32),
        distance=distance.astype(np.float32),
        row_ptr=np.concatenate([[0], np.cumsum(degrees)]).astype(np.int32),
        atom_class=np.repeat(np.arange(n), weight.astype(int)).astype(np.int32),
    )


def twelve(sizes: Iterable[int]) -> list[np.ndarray]:
    return [np.full(n, 12) for n in sizes]


DEGREES: dict[str, Callable[[np.random.Generator], list[np.ndarray]]] = {
    "plain": lambda rng: twelve((5, 1, 17, 30, 2, 64, 3)),
    "weighted": lambda rng: [rng.integers(0, 16, n) for n in (7, 1, 40, 3, 25)],
    "ragged": lambda rng: [rng.integers(0, 40, n) for n in (4, 33, 1, 12)],
    "one atom": lambda rng: twelve([1]),
    "isolated": lambda rng: [np.array([0, 3, 0]), np.zeros(2, int), np.array([5])],
    "no edges": lambda rng: [np.zeros(3, int)],
    "one crystal": lambda rng: twelve([150]),
    "many crystals": lambda rng: twelve(rng.integers(1, 9, 200)),
    "huge crystals": lambda rng: [9 + np.arange(n) % 7 for n in (3, 1500, 40, 2, 700, 17)],
    "large": lambda rng: twelve(rng.integers(1, 60, 280)),
}
"""Kind of graph -> degrees of the rows of each crystal."""
WEIGHTED = ("weighted", "ragged", "huge crystals")


@pytest.fixture
def make_batch():
    """make_batch(kind, seed=0) -> GraphBatch; the shapes that kernels get wrong."""

    def make(kind: str, seed: int = 0) -> GraphBatch:
        rng = np.random.default_rng([seed, *kind.encode()])  # so that a new kind leaves the others as they are
        return collate([random_graph(rng, degrees, kind in WEIGHTED) for degrees in DEGREES[kind](rng)])

    return make


@pytest.fixture
def empty_batch() -> GraphBatch:
    """A batch of one crystal without rows."""
    none = torch.zeros(0, dtype=torch.int32)
    two = torch.zeros(2, dtype=torch.int32)
    return GraphBatch(none, torch.zeros(0), none, torch.zeros(0), torch.zeros(1, dtype=torch.int32), two, none)
