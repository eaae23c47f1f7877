"""Prepared graphs on disk: concatenated arrays, memory-mapped, so that a data set is read and searched once."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..errors import InputError
from ..files import atomic_path
from .batch import CrystalGraph, GraphBatch
from .parameters import GraphParameters
from .readers import Record, read_inputs

logger = logging.getLogger(__name__)

FORMAT = "srcgcnn_fast prepared graphs"
VERSION = 1
_METADATA = "metadata.json"
_CHUNK_ATOMS = 100_000
_CHUNK_CRYSTALS = 8192

_DTYPES: dict[str, Any] = {
    "numbers": np.uint8,  # (R,)
    "weight": np.float32,  # (R,)
    "degree": np.int32,  # (R,) edges of each row
    "sender": np.int32,  # (E,) counted within the crystal
    "distance": np.float32,  # (E,) Å
    "atom_class": np.int32,  # (A,) counted within the crystal
    "row_count": np.int64,  # (n,)
    "edge_count": np.int64,  # (n,)
    "atom_count": np.int64,  # (n,)
}
_OPTIONAL = ("atom_features", "edge_features")  # in memory only


@dataclass
class StoreInfo:
    """What a store says about itself; ``metadata.json`` on disk."""

    parameters: GraphParameters = field(default_factory=GraphParameters)
    ids: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    key: dict[str, Any] | None = None
    """What the graphs were made from; None for objects in memory."""


class GraphStore:
    """n prepared graphs. ``store[i]`` is one, ``store.batch(indices)`` joins many without a loop over crystals.

    A store on disk is memory-mapped: its pages are shared by all processes, and a pickled store is its path.
    Images of neighbours are not kept.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], info: StoreInfo, path: Path | None = None) -> None:
        self.path = path
        """The directory, or None for a store in memory."""
        self.parameters = info.parameters
        self.ids = info.ids
        """One for each graph; not necessarily unique."""
        self.rejected = info.rejected
        """(id, reason) of each input that has no graph."""
        self.targets = {name: np.array(arrays["targets"][:, k]) for k, name in enumerate(info.targets)}
        """name -> (n,) float64, NaN where missing."""
        self.row_counts = np.array(arrays["row_count"])
        """(n,) int64, rows of each graph."""
        self._info = info
        self._arrays = {name: np.asarray(array) for name, array in arrays.items()}
        self._first = {
            name: np.concatenate([[0], np.cumsum(arrays[f"{name}_count"])]) for name in ("row", "edge", "atom")
        }

    @classmethod
    def from_graphs(
        cls,
        graphs: Sequence[CrystalGraph],
        ids: Sequence[str] | None = None,
        targets: Mapping[str, Any] | None = None,
        parameters: GraphParameters | None = None,
    ) -> GraphStore:
        """A store in memory.

        Args:
            graphs: n graphs; all or none carry their own atom or edge features.
            ids: n names, by default "0", "1", ...
            targets: name -> n numbers, NaN where missing.
            parameters: what the graphs were built with.

        Raises:
            InputError: there are no graphs, or ids or targets are not one for each graph.
        """
        if not graphs:
            raise InputError("A store needs at least one graph; from_graphs() was given none.")
        names = [str(i) for i in ids] if ids is not None else [str(i) for i in range(len(graphs))]
        columns = {name: np.asarray(values, dtype=np.float64) for name, values in (targets or {}).items()}
        for name, column in {"ids": np.array(names), **columns}.items():
            if column.shape != (len(graphs),):
                raise InputError(f"{name} has the shape {column.shape} for {len(graphs)} graphs; give one for each.")
        arrays = {name: np.concatenate([getattr(g, name) for g in graphs]) for name in ("sender", "distance")}
        arrays |= {name: np.concatenate([getattr(g, name) for g in graphs]) for name in ("weight", "atom_class")}
        arrays["numbers"] = np.concatenate([g.numbers for g in graphs])
        arrays["degree"] = np.concatenate([np.diff(g.row_ptr) for g in graphs])
        counts = {"row_count": "n_rows", "edge_count": "n_edges", "atom_count": "n_atoms"}
        arrays |= {name: np.array([getattr(g, size) for g in graphs]) for name, size in counts.items()}
        arrays["targets"] = np.stack([*columns.values()], axis=1) if columns else np.zeros((len(graphs), 0))
        for name in _OPTIONAL:
            held = [x for x in (getattr(g, name) for g in graphs) if x is not None]
            if held and len(held) < len(graphs):
                raise InputError(f"Only {len(held)} of {len(graphs)} graphs carry {name}; give it to all or to none.")
            if held:
                arrays[name] = np.concatenate(held)
        return cls(arrays, StoreInfo(parameters or GraphParameters(), names, list(columns)))

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        return f"<GraphStore {where}{len(self)} crystals, {self.n_rows} rows, {self.n_edges} edges>"

    @property
    def n_atoms(self) -> int:
        """Atoms of the full cells."""
        return int(self._first["atom"][-1])

    @property
    def n_rows(self) -> int:
        return int(self._first["row"][-1])

    @property
    def n_edges(self) -> int:
        return int(self._first["edge"][-1])

    def __getitem__(self, index: int) -> CrystalGraph:
        """Raises IndexError outside of -n to n - 1."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no crystal {index} in a store of {len(self)}.")
        i = int(index) % len(self)
        part = {name: slice(first[i], first[i + 1]) for name, first in self._first.items()}
        take = self._take(lambda name, kind: self._arrays[name][part[kind]])
        degree = take.pop("degree")
        return CrystalGraph(**take, row_ptr=np.concatenate([[0], np.cumsum(degree)]).astype(np.int32))

    def _take(self, gather: Callable[[str, str], np.ndarray]) -> dict[str, Any]:
        """Every array of a graph but row_ptr, each picked by rows, edges or atoms."""
        taken: dict[str, Any] = {name: gather(name, "row") for name in ("weight", "degree")}
        taken["numbers"] = gather("numbers", "row").astype(np.int32)
        taken |= {"sender": gather("sender", "edge"), "distance": gather("distance", "edge")}
        taken["atom_class"] = gather("atom_class", "atom")
        for name, kind in zip(_OPTIONAL, ("row", "edge"), strict=True):
            if name in self._arrays:
                taken[name] = gather(name, kind)
        return taken

    def batch(self, indices: Any) -> GraphBatch:
        """The graphs of ``indices`` (any order, repeats allowed) as one batch, equal to ``collate`` of them.

        Raises:
            InputError: no index is given, one is not a whole number of -n to n - 1, or the batch exceeds int32.
        """
        chosen = self._checked(indices)
        counts = {name: np.diff(first)[chosen] for name, first in self._first.items()}
        ends = {name: np.cumsum(count) for name, count in counts.items()}
        if max(ends["row"][-1], ends["edge"][-1]) > np.iinfo(np.int32).max:
            raise InputError(f"A batch of {ends['edge'][-1]} edges is beyond 2^31 - 1; use smaller batches.")
        picked = {name: _ranges(self._first[name][:-1][chosen], counts[name], ends[name]) for name in counts}
        taken = self._take(lambda name, kind: self._arrays[name][picked[kind]])
        row_offset = (ends["row"] - counts["row"]).astype(np.int32)
        taken["sender"] = taken["sender"] + np.repeat(row_offset, counts["edge"])
        taken["atom_class"] = taken["atom_class"] + np.repeat(row_offset, counts["atom"])
        taken["row_ptr"] = _pointer(taken.pop("degree"))
        taken["crystal_ptr"] = _pointer(counts["row"])
        for name in ("weight", "distance", *_OPTIONAL):
            if name in taken:
                taken[name] = taken[name].astype(np.float32, copy=False)
        tensors: dict[str, Any] = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in taken.items()}
        return GraphBatch(**tensors)

    def _checked(self, indices: Any) -> np.ndarray:
        chosen = np.asarray(indices)
        if chosen.size == 0:
            raise InputError("A batch needs at least one crystal; batch() was given no index.")
        if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
            raise InputError(f"Indices of a batch are whole numbers in one row, not {chosen.dtype} {chosen.shape}.")
        if chosen.min() < -len(self) or chosen.max() >= len(self):
            raise InputError(
                f"There is no crystal {chosen.max() if chosen.max() >= len(self) else chosen.min()} in a store of "
                f"{len(self)}; give indices from 0 to {len(self) - 1}."
            )
        return chosen.astype(np.int64) % len(self)

    def target_array(self, names: Sequence[str]) -> np.ndarray:
        """(n, len(names)) float64, NaN where a crystal has no value.

        Raises:
            InputError: the store has no such target.
        """
        for name in names:
            if name not in self.targets:
                has = ", ".join(self.targets) or "none"
                raise InputError(f"{self.path or 'The store'} has no target {name}; it has {has}.")
        return np.stack([self.targets[name] for name in names], axis=1) if names else np.zeros((len(self), 0))

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is not None:
            return open_store, (self.path,)
        return GraphStore, (self._arrays, self._info)


def _ranges(first: np.ndarray, count: np.ndarray, end: np.ndarray) -> np.ndarray:
    """first[0], first[0] + 1, ... (count[0] of them), first[1], ..."""
    return np.repeat(first - (end - count), count) + np.arange(end[-1])


def _pointer(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int32)


# ---- reading


def open_store(path: str | os.PathLike[str]) -> GraphStore:
    """A store that :func:`prepare` wrote, memory-mapped.

    Raises:
        InputError: there is no store, it was written in another format version, or a file is missing or cut short.
    """
    folder = Path(path)
    metadata = _read_metadata(folder)
    if metadata["version"] != VERSION:
        raise InputError(
            f"{folder} has the store format {metadata['version']}, this package reads {VERSION}; prepare it again."
        )
    try:
        for name, size in metadata["sizes"].items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != size:
                found = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
                raise InputError(f"{folder} is damaged ({name} is {found}, not {size} bytes); prepare it again.")
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in [*_DTYPES, "targets"]}
        info = StoreInfo(
            GraphParameters(**metadata["parameters"]),
            metadata["ids"],
            metadata["targets"],
            [(id, reason) for id, reason in metadata["rejected"]],
            metadata["key"],
        )
        _check_counts(arrays, len(info.ids), len(info.targets))
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{folder} is damaged ({type(error).__name__}: {error}); prepare it again.") from error
    return GraphStore(arrays, info, folder.resolve())


def _read_metadata(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise InputError(f"{folder} does not exist; write a store there with prepare.")
    try:
        metadata = json.loads((folder / _METADATA).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        metadata = None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT or "version" not in metadata:
        raise InputError(f"{folder} is not a store of prepared graphs; give one that prepare wrote.")
    return metadata


def _check_counts(arrays: Mapping[str, np.ndarray], crystals: int, targets: int) -> None:
    rows, edges, atoms = (int(arrays[f"{name}_count"].sum()) for name in ("row", "edge", "atom"))
    shapes = {"numbers": rows, "weight": rows, "degree": rows, "sender": edges, "distance": edges, "atom_class": atoms}
    shapes |= {"row_count": crystals, "edge_count": crystals, "atom_count": crystals}
    for name, length in shapes.items():
        if arrays[name].shape != (length,) or arrays[name].dtype != _DTYPES[name]:
            raise ValueError(f"{name}.npy does not fit the counts")
    if arrays["targets"].shape != (crystals, targets) or int(arrays["degree"].sum(dtype=np.int64)) != edges:
        raise ValueError("targets.npy or degree.npy does not fit the counts")


# ---- writing


def prepare(
    source: Any,
    path: str | os.PathLike[str],
    parameters: GraphParameters | None = None,
    *,
    targets: Sequence[str] | None = None,
    progress: bool | Callable[[int], None] | None = None,
) -> GraphStore:
    """Read crystals, build their graphs and write them to the directory ``path``, whole or not at all.

    What cannot be read or built is kept in ``rejected`` with its reason. A store that is there already is used as it
    is when source, parameters and targets are the same, and replaced otherwise. Memory stays bounded.

    Args:
        source: whatever :func:`srcgcnn_fast.graph.readers.read_inputs` takes.
        path: the directory of the store.
        parameters: how a crystal becomes a graph; ``GraphParameters()`` by default.
        targets: names of the targets to keep, by default all that the source has.
        progress: True for a progress bar, or a function that is told the number of inputs done so far.

    Raises:
        InputError: the source cannot be read, no input became a graph, a target has no value at all, or ``path``
            holds something else than a store.
    """
    folder, parameters = Path(path), parameters or GraphParameters()
    key = _source_key(source, parameters, targets)
    existing = _existing(folder)
    if existing is not None and key is not None and existing.get("key") == key:
        try:
            store = open_store(folder)
            logger.info("%s is prepared already: %d crystals.", folder, len(store))
            return store
        except InputError as error:
            logger.warning("Preparing again: %s", error)
    records = read_inputs(source, targets=targets)
    with atomic_path(folder) as scratch:
        scratch.mkdir()
        writer = _StoreWriter(scratch)
        try:
            for chunk in _chunks(_reported(records, progress)):
                writer.add(chunk, parameters)
        finally:
            writer.close()
        _check_result(writer, source, targets)
        info = StoreInfo(parameters, writer.ids, writer.target_names(targets), writer.rejected, key)
        writer.finish(info)
        if folder.exists():
            folder.rename(scratch.parent / "replaced")  # a directory cannot replace one that has files
    store = open_store(folder)
    _log_summary(store)
    return store


def _existing(folder: Path) -> dict[str, Any] | None:
    """The metadata of a store that may be replaced; None where nothing is there."""
    if not folder.exists():
        return None
    if folder.is_dir() and not any(folder.iterdir()):
        return None
    try:
        return _read_metadata(folder)
    except InputError:
        raise InputError(f"{folder} exists and is not a store of prepared graphs; choose another path.") from None


def _source_key(source: Any, parameters: GraphParameters, targets: Sequence[str] | None) -> dict[str, Any] | None:
    if not isinstance(source, str | os.PathLike) or not Path(source).exists():
        return None
    root = Path(source).resolve()
    with os.scandir(root if root.is_dir() else root.parent) as entries:
        found = sorted((e.name, e) for e in entries if e.is_file() and (root.is_dir() or e.name == root.name))
    stamps = [(name, entry.stat().st_size, entry.stat().st_mtime_ns) for name, entry in found]
    key = {
        "package": __version__,
        "source": str(root),
        "files": len(stamps),
        "stamps": sha256(repr(stamps).encode()).hexdigest(),
        "parameters": asdict(parameters),
        "targets": list(targets) if targets is not None else None,
    }
    return json.loads(json.dumps(key))


def _reported(records: Iterable[Record], progress: bool | Callable[[int], None] | None) -> Iterator[Record]:
    if progress is True:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            logger.info("Without tqdm there is no progress bar.")
        else:
            yield from tqdm(records, desc="prepare", unit=" crystals")
            return
    for done, record in enumerate(records, start=1):
        yield record
        if callable(progress):
            progress(done)


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    atoms = 0
    for record in records:
        chunk.append(record)
        atoms += len(record.crystal.numbers) if record.crystal else 0
        if atoms >= _CHUNK_ATOMS or len(chunk) >= _CHUNK_CRYSTALS:
            yield chunk
            chunk, atoms = [], 0
    if chunk:
        yield chunk


def _check_result(writer: _StoreWriter, source: Any, targets: Sequence[str] | None) -> None:
    where = str(source) if isinstance(source, str | os.PathLike) else "the input"
    if not writer.ids:
        if not writer.rejected:
            raise InputError(f"There are no structures in {where}; give at least one.")
        id, reason = writer.rejected[0]
        raise InputError(f"None of the {len(writer.rejected)} inputs of {where} became a graph; {name_it(id, reason)}")
    for name in targets or ():
        if all(np.isnan(row.get(name, np.nan)) for row in writer.targets):
            mend = name_it(*writer.rejected[0]) if writer.rejected else "fill it in, or choose another."
            raise InputError(f"No crystal of {where} has a value of the target {name}; {mend}")


def name_it(id: str, reason: str) -> str:
    """The reason of a rejected input, with its id in front unless it is there."""
    named = reason.startswith(id) and not reason.startswith(f"{id} of ")  # "1 of 6 atoms" names no input "1"
    return reason if named else f"{id}: {reason}"


def _log_summary(store: GraphStore) -> None:
    logger.info(
        "%s: %d crystals, %d atoms in %d rows (%.2f atoms a row), %d edges, %d rejected.",
        store.path, len(store), store.n_atoms, store.n_rows, store.n_atoms / max(store.n_rows, 1), store.n_edges,
        len(store.rejected),
    )  # fmt: skip


class _StoreWriter:
    """Appends graphs to the files of a store in a directory of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ids: list[str] = []
        self.targets: list[dict[str, float]] = []
        self.rejected: list[tuple[str, str]] = []
        self._files = {name: _NpyFile(folder / f"{name}.npy", dtype) for name, dtype in _DTYPES.items()}

    def add(self, records: Sequence[Record], parameters: GraphParameters) -> None:
        from .build import build_packed

        crystals = [record.crystal for record in records if record.crystal is not None]
        packed = None
        if crystals:
            packed = build_packed(
                np.stack([c.lattice for c in crystals]),
                np.concatenate([c.frac_coords for c in crystals]),
                np.concatenate([c.numbers for c in crystals]),
                np.concatenate([[0], np.cumsum([len(c.numbers) for c in crystals])]),
                parameters,
            )
        good: list[int] = []
        position = -1
        for record in records:
            position += record.crystal is not None
            reason = record.error if record.crystal is None or packed is None else packed.errors.get(position)
            if reason is None and record.crystal is not None:
                self.ids.append(record.id)
                self.targets.append(record.targets)
                good.append(position)
            else:
                self.rejected.append((record.id, reason or f"{record.id} has no crystal."))
        if packed is not None:
            self._append(packed, np.array(good, dtype=np.int64))

    def _append(self, packed: Any, good: np.ndarray) -> None:
        for name in ("numbers", "weight", "sender", "distance", "atom_class"):
            self._files[name].append(getattr(packed, name))  # a crystal that failed takes no room in these
        self._files["degree"].append(np.diff(packed.row_ptr))
        for name, pointer in (("row", "crystal_ptr"), ("edge", "edge_ptr"), ("atom", "atom_ptr")):
            self._files[f"{name}_count"].append(np.diff(getattr(packed, pointer))[good])

    def target_names(self, wanted: Sequence[str] | None) -> list[str]:
        return list(wanted) if wanted is not None else list(dict.fromkeys(k for row in self.targets for k in row))

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def finish(self, info: StoreInfo) -> None:
        table = np.array([[row.get(name, np.nan) for name in info.targets] for row in self.targets], dtype=np.float64)
        np.save(self.folder / "targets.npy", table.reshape(len(self.ids), len(info.targets)))
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "package_version": __version__,
            "sizes": {file.name: file.stat().st_size for file in sorted(self.folder.glob("*.npy"))},
            **asdict(info),
        }
        (self.folder / _METADATA).write_text(json.dumps(metadata), encoding="utf-8")


class _NpyFile:
    """A one-dimensional .npy file that grows; its length is written into the header on closing."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.dtype, self.length = np.dtype(dtype), 0
        self._file = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        text = f"{{'descr': {self.dtype.str!r}, 'fortran_order': False, 'shape': ({self.length},), }}"
        self._file.write(b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n")

    def append(self, array: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(array, dtype=self.dtype).data)
        self.length += len(array)

    def close(self) -> None:
        if not self._file.closed:
            self._file.seek(0)
            self._write_header()
            self._file.close()
