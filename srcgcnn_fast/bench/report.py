"""The short benchmark: both models, inference and training step, every backend that runs here."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError, require
from ..files import write_text
from ..graph import GraphBatch, build_graphs, collate
from ..graph.readers import read_inputs
from ..graph.store import is_store, open_store
from ..interop.upstream import expand_quotient
from ..nn import CGCNN, SRCGCNN
from ..ops import registry
from .ceilings import Ceilings, Floor, floor, measure_ceilings
from .plots import bar_chart, roofline

CRYSTALS = 256
_SECONDS = 1.2  # of measurement per model, work and number of threads
_MODELS = {"SR-CGCNN": SRCGCNN, "CGCNN": CGCNN}


class WrongNumbersError(ArithmeticError):
    """Two backends give different numbers."""


@dataclass(frozen=True)
class Row:
    """One measured median."""

    model: str
    work: str
    threads: int
    backend: str
    graph: str
    milliseconds: float
    crystals_per_second: float
    nanoseconds: float
    """Per edge and step."""
    floor: Floor


def bench(
    source: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] = "srcgcnn_fast_bench",
    threads: int | None = None,
    crystals: int = CRYSTALS,
) -> str:
    """Measure, draw ``bench.png`` and ``roofline.png`` into ``out``, write ``bench.json``, return a table.

    Each round runs every candidate once, on a batch whose graph was not seen before; times are medians.

    Args:
        source: a prepared store, or what ``prepare`` reads; None for alloys made here.
        threads: most threads; beside them one thread is measured. None: as torch has them.
        crystals: of ``source``, at most.

    Raises:
        InputError: ``source`` has no readable crystal, or ``threads`` or ``crystals`` is not positive.
        WrongNumbersError: two candidates give different numbers; their times are then not reported.
    """
    most = torch.get_num_threads() if threads is None else threads
    for name, value in (("threads", most), ("crystals", crystals)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}.")
    require("matplotlib", "Plotting", extra="train")
    folder = _writable(Path(out))
    graphs, described = _graphs(source, crystals)
    rows: list[Row] = []
    ceilings: dict[int, Ceilings] = {}
    for count in sorted({1, most}):
        with _threads(count):
            ceilings[count] = measure_ceilings()
            for model in _MODELS:
                for work in ("inference", "training step"):
                    rows += _measure(model, work, graphs, ceilings[count])
    bar_chart(folder / "bench.png", rows, described)
    roofline(folder / "roofline.png", rows, ceilings, described)
    document = {
        "workload": described,
        "ceilings": {count: asdict(c) for count, c in ceilings.items()},
        "rows": [asdict(row) for row in rows],
    }
    write_text(folder / "bench.json", json.dumps(document, indent=1) + "\n")
    return _table(rows, ceilings, described)


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"Cannot write {folder}: {error.strerror}; choose a directory that you may write to."
        ) from error
    return folder


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _graphs(source: str | os.PathLike[str] | None, crystals: int) -> tuple[dict[str, GraphBatch], str]:
    """The same crystals as symmetry quotients (native) and with one row per atom (same graph), and what they are."""
    if source is not None and is_store(source):
        store = open_store(source)
        native = store.batch(_sample(len(store), crystals))
    else:
        structures = _alloys(crystals) if source is None else _read(source, crystals)
        built = build_graphs(structures, isolated="keep", errors="collect")
        good = [graph for graph in built if not isinstance(graph, InputError)]
        if not good:
            raise InputError(f"{source} has no crystal that becomes a graph; the first one: {built[0]}")
        native = collate(good)
    same = expand_quotient(native)
    name = "generated alloys" if source is None else "crystals of the given source"
    described = f"{native.num_crystals} {name}, {same.num_rows:,} atoms in {native.num_rows:,} rows"
    return {"native": native, "same graph": same}, described


def _sample(population: int, count: int) -> np.ndarray:
    if population == 0:
        raise InputError("The store has no crystal; prepare one that has.")
    return np.sort(np.random.default_rng(0).permutation(population)[:count])


def _read(source: str | os.PathLike[str], crystals: int) -> list[object]:
    found: list[object] = []
    for record in read_inputs(source):
        if record.crystal is not None:
            found.append(record.crystal)
        if len(found) == crystals:
            break
    if not found:
        raise InputError(f"{source} has no readable crystal; `srcgcnn-fast prepare` names what is wrong with each.")
    return found


def _alloys(crystals: int) -> list[object]:
    from ..training.alloys import random_alloy

    rng = np.random.default_rng(0)
    return [random_alloy(rng) for _ in range(crystals)]


def _measure(kind: str, work: str, graphs: dict[str, GraphBatch], ceilings: Ceilings) -> list[Row]:
    names = [(backend, "same graph") for backend, status in registry.backends().items() if status.available]
    names = [name for name in names if name[0] in ("reference", "cpu")]
    names.append((names[-1][0], "native"))
    torch.manual_seed(0)
    model = _MODELS[kind]()
    runs = {(backend, graph): _run(model, work, backend, graphs[graph]) for backend, graph in names}
    _gate(kind, work, {name: run() for name, run in runs.items()})
    seconds = _alternate(runs)
    steps = model.hyperparameters["n_conv" if kind == "CGCNN" else "n_recurrent_steps"]
    width = model.hyperparameters["atom_fea_len"]
    rows = []
    for (backend, graph), took in seconds.items():
        batch = graphs[graph]
        least = floor(batch, width, work != "inference", ceilings, steps)
        per_edge = 1e9 * took / (steps * max(batch.num_edges, 1))
        per_second = batch.num_crystals / took
        threads = torch.get_num_threads()
        rows.append(Row(kind, work, threads, backend, graph, 1e3 * took, per_second, per_edge, least))
    return rows


def _run(model: torch.nn.Module, work: str, backend: str, batch: GraphBatch) -> Callable[[], torch.Tensor]:
    """One round; returns the output, after a training step with the gradients behind it."""
    target = torch.linspace(-1, 1, batch.num_crystals)[:, None]

    def run() -> torch.Tensor:
        batch.cache.clear()  # a batch is new to its step
        with registry.use_backend(backend):
            if work == "inference":
                with torch.no_grad():
                    return model.eval()(batch)
            model.train().zero_grad(set_to_none=True)
            output = model(batch)
            torch.nn.functional.mse_loss(output, target).backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat([output.detach().flatten(), *gradients])

    return run


def _gate(kind: str, work: str, results: dict[tuple[str, str], torch.Tensor]) -> None:
    """No time of what is wrong."""
    names = list(results)
    truth = results[names[0]]
    for name in names[1:]:
        error = float((results[name] - truth).norm() / truth.norm())
        if not error < 1e-3:
            first, other = (f"{backend} ({graph})" for backend, graph in (names[0], name))
            raise WrongNumbersError(
                f"{first} and {other} differ by {error:.1e} in the {work} of {kind}, so no time is reported; "
                "please report this with the output of srcgcnn-fast doctor."
            )


def _alternate(runs: Mapping[tuple[str, str], Callable[[], object]]) -> dict[tuple[str, str], float]:
    """Median seconds of at least three alternating rounds."""
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in runs}
    begun = time.perf_counter()
    for rounds in range(1000):
        if rounds >= 3 and time.perf_counter() - begun > _SECONDS:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _table(rows: Sequence[Row], ceilings: dict[int, Ceilings], described: str) -> str:
    head = ("model", "work", "threads", "backend", "graph", "ms", "crystals/s", "ns/edge/step", "floor")
    lines = [f"{described}; float32, F = 64, three steps", ""]
    for count, c in ceilings.items():
        lines.append(
            f"{count} thread{'s' if count > 1 else ''}: {c.flops / 1e9:.0f} GFLOP/s, {c.bandwidth / 1e9:.0f} GB/s, "
            f"{c.exponentials / 1e9:.1f} G exp/s"
        )
    form = "{:9s} {:14s} {:>7} {:10s} {:11s} {:>9} {:>11} {:>13} {:>7}"
    lines += ["", form.format(*head)]
    for row in rows:
        numbers = f"{row.milliseconds:.2f}", f"{row.crystals_per_second:,.0f}", f"{row.nanoseconds:.1f}"
        lines.append(
            form.format(row.model, row.work, row.threads, row.backend, row.graph, *numbers, f"{row.floor.total:.1f}")
        )
    return "\n".join(lines)
