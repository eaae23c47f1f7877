"""``predict`` and ``prepare`` over shards of Parquet files, by the workers of a Ray cluster.

A shard is a run of rows of one file, and its result one file (or store) that is renamed into place when it is whole.
So a worker that dies costs the shard it had; a shard done twice has one result; and a call that is repeated does only
what is missing. Ray hands out the shards, restarts workers and tries again.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from . import __version__
from .errors import InputError, require
from .files import names_in, remove, write_text
from .graph import GraphParameters, Record, read_inputs
from .graph.store import GraphStore, existing, is_store, join_stores, prepare_part
from .prediction import predict, write_table
from .serialization import load_model, loaded, save_model

if TYPE_CHECKING:
    from .nn import CGCNN, SRCGCNN

logger = logging.getLogger(__name__)

_PLAN, _MODEL = "_shards.json", "_model"  # which readers of Parquet data sets pass over
SHARD_ROWS = 50_000


class Shard(NamedTuple):
    """Rows ``first`` to ``first + rows`` of a Parquet file; of one that cannot be read, one row that says so."""

    number: int
    source: str
    first: int
    rows: int

    @property
    def name(self) -> str:
        return f"part-{self.number:06d}"

    def records(self, targets: Sequence[str] | None) -> Iterator[Record]:
        try:
            read = read_inputs(self.source, targets=targets, skip=self.first, disorder="average")
        except InputError as error:
            read = iter([Record(Path(self.source).stem, None, {}, str(error))])
        return islice(read, self.rows)


def predict_shards(
    model: CGCNN | SRCGCNN | str | os.PathLike[str],
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    workers: int = 2,
    rows: int = SHARD_ROWS,
    isolated: Literal["error", "warn", "keep"] | None = None,
    disorder: Literal["error", "majority", "average"] | None = None,
) -> int:
    """What ``model`` predicts for every row of ``source``, as Parquet files ``part-000000.parquet`` … in ``out``.

    One row for each input, in input order from file to file, with the columns of :func:`srcgcnn_fast.predict`. The
    Ray cluster of ``RAY_ADDRESS`` or ``ray.init`` does the work, or one on this machine that is started and ended
    here. Its workers must see ``source`` and ``out`` under these paths. An interrupted call is continued by the same.

    Args:
        model: as for :func:`srcgcnn_fast.predict`; a path must be visible to the workers, too.
        source: a Parquet file, or a folder of them, taken by name; columns as ``predict`` reads them.
        out: the directory to write.
        workers: processes at a time, one core each.
        rows: of a shard, at most.
        isolated: in place of the model's own setting.
        disorder: likewise.

    Returns:
        The number of rows.

    Raises:
        InputError: Ray is not installed, source or model cannot be read, or ``out`` holds the result of another call.
    """
    shards = _shards(source, rows, ())
    held = loaded(model)
    graph = held.metadata.graph
    graph = replace(graph, isolated=isolated or graph.isolated, disorder=disorder or graph.disorder)
    folder = Path(out).absolute()
    weights = sha256(json.dumps([type(held).__name__, held.hyperparameters], sort_keys=True).encode())
    for name, value in [*held.state_dict().items(), ("element_table", held.element_table)]:
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)  # NumPy has no bfloat16
        weights.update(name.encode() + data.numpy().tobytes())
    metadata = [list(held.metadata.targets), list(held.metadata.mean), list(held.metadata.std)]
    _claim(folder, shards, {"model": [weights.hexdigest(), *metadata], "graph": asdict(graph)})
    settings = {"isolated": graph.isolated, "disorder": graph.disorder}
    if isinstance(model, str | os.PathLike):
        place = Path(model).absolute()
    else:
        place = folder / _MODEL
        save_model(model, place)
    missing = [shard for shard in shards if not (folder / f"{shard.name}.parquet").exists()]
    _run(
        _Predict,
        (str(place), str(folder), settings),
        missing,
        workers,
    )
    parquet = require("pyarrow.parquet", "Reading Parquet files", extra="io")
    for shard in shards:
        found = parquet.read_metadata(folder / f"{shard.name}.parquet").num_rows
        if found != shard.rows:
            raise RuntimeError(f"{folder / shard.name}.parquet has {found} rows for {shard.rows} inputs.")
    return sum(shard.rows for shard in shards)


def prepare_shards(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    parameters: GraphParameters | None = None,
    *,
    targets: str | Sequence[str] | None = None,
    workers: int = 2,
    rows: int = SHARD_ROWS,
) -> GraphStore:
    """:func:`srcgcnn_fast.prepare` of a Parquet file or a folder of them, by the workers of a Ray cluster.

    The shards are prepared as stores in ``PATH.parts``, joined in input order and then removed. Arguments as for
    ``prepare`` and :func:`predict_shards`. An interrupted call is continued by the same.

    Raises:
        InputError: Ray is not installed, the source cannot be read, no input became a graph, or ``path`` holds
            something else.
    """
    parameters = parameters or GraphParameters()
    targets = [targets] if isinstance(targets, str) else targets
    target, names = Path(path).absolute(), list(targets) if targets is not None else None
    folder, shards = target.parent / f"{target.name}.parts", _shards(source, rows, names)
    existing(target)  # rather than after all the work
    _claim(folder, shards, {"parameters": asdict(parameters), "targets": names})
    missing = [shard for shard in shards if not is_store(folder / shard.name)]
    _run(_Prepare, (str(folder), parameters, names), missing, workers)
    store = join_stores([folder / shard.name for shard in shards], target, source, names)
    remove(folder, target)
    return store


class _Predict:
    """A worker that predicts shards."""

    def __init__(self, model: str, out: str, settings: dict[str, Any]) -> None:
        _one_thread()
        self.model, self.out, self.settings = load_model(model), Path(out), settings

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        shard = Shard(**row)
        table = predict(self.model, shard.records(()), **self.settings)
        write_table(table, self.out / f"{shard.name}.parquet")
        return {"number": shard.number}


class _Prepare:
    """A worker that prepares shards."""

    def __init__(self, out: str, parameters: GraphParameters, targets: Sequence[str] | None) -> None:
        _one_thread()
        self.out, self.parameters, self.targets = Path(out), parameters, targets

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        shard = Shard(**row)
        prepare_part(shard.records(self.targets), self.out / shard.name, self.parameters, self.targets)
        return {"number": shard.number}


def _one_thread() -> None:
    torch.set_num_threads(1)


def _shards(source: str | os.PathLike[str], rows: int, targets: Sequence[str] | None = None) -> list[Shard]:
    if rows < 1:
        raise InputError(f"A shard of {rows} rows holds nothing; ask for at least 1.")
    parquet = require("pyarrow.parquet", "Reading Parquet files", extra="io")
    root = Path(source).absolute()
    files = [root]
    if root.is_dir():  # as read_inputs takes them
        files = sorted(x for x in root.iterdir() if re.fullmatch(r"[^.].*\.parquet", x.name, re.I) and x.is_file())
    made: list[Shard] = []
    for file in files:
        if not file.is_file():
            raise InputError(f"{source} does not exist; give a Parquet file or a folder of them.")
        try:
            read_inputs(file, targets=targets)  # which says what is wrong with it
            total = parquet.read_metadata(file).num_rows
        except Exception as error:
            if not isinstance(error, InputError):
                kind = type(error).__name__
                raise InputError(f"{file.name} is not a Parquet file ({kind}); export it again.") from error
            if not root.is_dir():
                raise
            total = 1
        for first in range(0, total, rows):
            made.append(Shard(len(made), str(file), first, min(rows, total - first)))
    if not made:
        raise InputError(f"{source} holds no rows of a Parquet file; give one that does.")
    return made


def _claim(folder: Path, shards: Sequence[Shard], settings: dict[str, Any]) -> None:
    """Take the directory for this call, or find that it is this call's already."""
    stamps = [[*shard, os.stat(shard.source).st_mtime_ns, os.stat(shard.source).st_size] for shard in shards]
    plan = json.loads(json.dumps({"package": __version__, "shards": stamps, **settings}))
    file = folder / _PLAN
    if file.exists():
        if json.loads(file.read_bytes()) != plan:
            raise InputError(f"{folder} holds the result of another call; choose another directory, or remove it.")
        return
    if folder.exists() and names_in(folder):
        raise InputError(f"{folder} holds something else; choose another directory.")
    write_text(file, json.dumps(plan))


def _run(kind: type, arguments: tuple[Any, ...], shards: Sequence[Shard], workers: int) -> None:
    """One call of a ``kind`` for every shard, by ``workers`` processes."""
    if workers < 1:
        raise InputError(f"{workers} workers do nothing; ask for at least 1.")
    if not shards:
        return
    ray = require("ray", "Work over shards", extra="ray")
    data = require("ray.data", "Work over shards", extra="ray")
    is_ours = not ray.is_initialized()
    if is_ours:
        address = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers, "include_dashboard": False}
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **address)
    quiet = logging.getLogger("ray.data")
    level = quiet.level
    try:
        quiet.setLevel(logging.ERROR)
        data.DataContext.get_current().enable_progress_bars = False
        items = data.from_items([shard._asdict() for shard in shards], override_num_blocks=len(shards))
        pool = data.ActorPoolStrategy(size=min(workers, len(shards)))
        done = items.map(kind, fn_constructor_args=arguments, num_cpus=1, compute=pool).take_all()
    finally:
        quiet.setLevel(level)
        if is_ours:
            ray.shutdown()
    logger.info("%d shards done.", len(done))
