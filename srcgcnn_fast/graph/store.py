"""Prepared graphs on disk: concatenated arrays, memory-mapped, so that a data set is read and searched once."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from .. import __version__
from ..errors import InputError
from ..files import names_in, read_directory, restore
from .batch import CrystalGraph, GraphBatch, check_graphs, offsets, with_element_vectors
from .elements import element_features, with_vector
from .packing import Packer, Packing, check_sizes
from .parameters import GraphParameters
from .readers import Record, file_kind, files_elsewhere, read_inputs
from .store_writer import (
    DTYPES,
    FORMAT,
    METADATA,
    PROGRESS,
    REJECTED,
    VERSION,
    StoreWriter,
    alone,
    checksum,
    copy_store,
    id_arrays,
    mixture_arrays,
    workplace,
)

if TYPE_CHECKING:
    from .build import PackedGraphs

logger = logging.getLogger(__name__)

_CHUNK_ATOMS = 100_000
_CHUNK_CRYSTALS = 8192
_IDS = 4096
"""Names that are read together."""
_COUNTS = ("row_count", "edge_count", "atom_count", "mixed_count", "id_size")
_OPTIONAL = ("atom_features", "edge_features")  # in memory only
_NOTHING = np.zeros(0, np.float32)


@dataclass
class StoreInfo:
    """What a store says about itself; ``metadata.json`` on disk."""

    parameters: GraphParameters = field(default_factory=GraphParameters)
    targets: list[str] = field(default_factory=list)
    key: dict[str, Any] | None = None
    """What the graphs were made from; None for objects in memory alone, which beside files are a part that is None."""
    rejected: int = 0
    checksums: dict[str, int] = field(default_factory=dict)
    """CRC-32 of the values of each array."""


class _Ids(Sequence[str]):
    """n names out of one array of text, of the store at ``where``; equal to a list of the same."""

    def __init__(self, size: np.ndarray, text: np.ndarray, where: Path | None) -> None:
        self._end, self._text, self._where = np.cumsum(size, dtype=np.int64), np.asarray(text), where

    def __len__(self) -> int:
        return len(self._end)

    def __iter__(self) -> Iterator[str]:
        for begin in range(0, len(self), _IDS):
            yield from self[begin : begin + _IDS]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            first, stop, step = index.indices(len(self))
            if step != 1 or stop <= first:
                return [self[i] for i in range(first, stop, step)]
            begin = int(self._end[first - 1]) if first else 0
            text = self._text[begin : self._end[stop - 1]].tobytes()
            ends = (self._end[first:stop] - begin).tolist()
            if text.isascii():  # as nearly always: letters are where their bytes are
                letters = text.decode()
                return [letters[a:b] for a, b in zip([0, *ends], ends, strict=False)]
            return [self._decoded(text[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
        i = range(len(self))[index]
        return self._decoded(self._text[self._end[i - 1] if i else 0 : self._end[i]].tobytes())

    def _decoded(self, text: bytes) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{self._where} is damaged (an id is no text in UTF-8); prepare it again.") from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return repr(list(self))


class GraphStore:
    """n prepared graphs. ``store[i]`` is one, ``store.batch(indices)`` joins many without a loop over crystals.

    A store on disk is memory-mapped: all processes share its pages. It is pickled as its path, where the same store
    must still be when it is unpickled. Images of neighbours are not kept.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], info: StoreInfo, path: Path | None = None) -> None:
        self.path = path
        """The directory, or None for a store in memory."""
        self.parameters = info.parameters
        self.ids: Sequence[str] = _Ids(arrays["id_size"], arrays["id_text"], path)
        """One for each graph; not necessarily unique."""
        self.targets = {name: np.array(arrays["targets"][:, k]) for k, name in enumerate(info.targets)}
        """name -> (n,) float64, NaN where missing."""
        self.row_counts = np.array(arrays["row_count"])
        """(n,) int64, rows of each graph."""
        self._info = info
        self._arrays = {name: np.asarray(array) for name, array in arrays.items()}
        self._first = {name: offsets(arrays[f"{name}_count"]) for name in ("row", "edge", "atom", "mixed")}
        plain = not any(name in self._arrays for name in _OPTIONAL) and Packer.takes(self._arrays)
        self._packer = Packer(self._arrays, self._first) if plain else None

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
            InputError: there are no graphs, something else is among them, or ids or targets are not one for each graph.
        """
        if not graphs:
            raise InputError("A store needs at least one graph; from_graphs() was given none.")
        check_graphs(graphs)
        names = [str(i) for i in ids] if ids is not None else [str(i) for i in range(len(graphs))]
        columns = {name: np.asarray(values, dtype=np.float64) for name, values in (targets or {}).items()}
        for name, column in {"ids": np.array(names), **columns}.items():
            if column.shape != (len(graphs),):
                raise InputError(f"{name} has the shape {column.shape} for {len(graphs)} graphs; give one for each.")
        arrays = {name: np.concatenate([getattr(g, name) for g in graphs]) for name in ("sender", "distance")}
        arrays |= {name: np.concatenate([getattr(g, name) for g in graphs]) for name in ("weight", "atom_class")}
        numbers = np.concatenate([g.numbers for g in graphs])
        arrays["numbers"] = numbers.astype(np.uint8) if (numbers == numbers.astype(np.uint8)).all() else numbers
        arrays["degree"] = np.concatenate([np.diff(g.row_ptr) for g in graphs])
        counts = {"row_count": "n_rows", "edge_count": "n_edges", "atom_count": "n_atoms"}
        arrays |= {name: np.array([getattr(g, size) for g in graphs]) for name, size in counts.items()}
        arrays["targets"] = np.stack([*columns.values()], axis=1) if columns else np.zeros((len(graphs), 0))
        for name in _OPTIONAL:
            held = [x for x in (getattr(g, name) for g in graphs) if x is not None]
            if name == "atom_features" and 0 < len(held) < len(graphs):
                held = with_element_vectors(graphs)
            if held and len(held) < len(graphs):
                raise InputError(f"Only {len(held)} of {len(graphs)} graphs carry {name}; give it to all or to none.")
            if held:
                arrays[name] = np.concatenate(held)
        arrays |= id_arrays(names) | mixture_arrays([None] * len(graphs))
        return cls(arrays, StoreInfo(parameters or GraphParameters(), list(columns)))

    @property
    def rejected(self) -> list[tuple[str, str]]:
        """(id, reason) of each input that has no graph; on disk one JSON list a line, ``rejected.jsonl``.

        Raises:
            InputError: that file is not what was written.
        """
        if self.path is None or not self._info.rejected:
            return []
        try:
            with (self.path / REJECTED).open(encoding="utf-8") as lines:
                found = [(id, reason) for id, reason in map(json.loads, lines)]
            if len(found) != self._info.rejected:
                raise ValueError
            return found
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{self.path} is damaged or was replaced ({REJECTED} is not as it was); open or prepare it again."
            ) from error

    @property
    def n_rejected(self) -> int:
        """Inputs that have no graph."""
        return self._info.rejected

    def verify(self) -> None:
        """Read everything and compare it with the checksums taken when it was written.

        Raises:
            InputError: an array on disk is not what was written.
        """
        for name, expected in self._info.checksums.items():
            if name not in self._arrays or checksum(self._arrays[name]) != expected:
                raise InputError(f"{self.path} is damaged ({name}.npy has another checksum); prepare it again.")

    def _fingerprint(self) -> str:
        return sha256(repr(sorted(self._info.checksums.items())).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.row_counts)

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
        """Raises IndexError outside of -n to n - 1, InputError for what is no whole number."""
        if not hasattr(index, "__index__"):
            raise InputError(f"A store gives one crystal by its number, not by {index!r}; GraphStore.batch takes many.")
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no crystal {index} in a store of {len(self)}.")
        i = int(index) % len(self)
        part = {name: slice(first[i], first[i + 1]) for name, first in self._first.items()}
        take = self._take(lambda name, kind: self._arrays[name][part[kind]])
        degree = take.pop("degree")
        if self._first["mixed"][i] < self._first["mixed"][i + 1]:
            take["atom_features"] = self._mixed(take["numbers"], part["mixed"], 0)
        return CrystalGraph(**take, row_ptr=offsets(degree).astype(np.int32))

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

    def lacking(self, table: torch.Tensor) -> dict[int, int]:
        """Crystals with an element that ``table`` (U, A) has no vector for, and which.

        A vector of zeros is none. Nothing is looked up for crystals with their own atom features.
        """
        if "atom_features" in self._arrays:
            return {}
        numbers = self._arrays["numbers"]
        rows = np.flatnonzero(~with_vector(table, numbers))
        crystals = np.searchsorted(self._first["row"][1:], rows, side="right")
        return dict(zip(crystals[::-1].tolist(), numbers[rows[::-1]].tolist(), strict=True))

    def isolated(self) -> dict[int, str]:
        """Crystals with atoms without any neighbour, and the sentence about each."""
        from .symmetry import isolated_failure

        begins, degree = self._first["row"], self._arrays["degree"]
        is_alone = degree == 0
        if self.parameters.padded:  # to full lists, of what is farther than the radius
            at = np.cumsum(degree, dtype=np.int64) - degree
            is_alone[~is_alone] = self._arrays["distance"][at[~is_alone]] > self.parameters.radius
        crystals = np.searchsorted(begins[1:], np.flatnonzero(is_alone), side="right")
        found = {}
        for crystal in np.unique(crystals).tolist():
            graph = self[crystal]
            atoms = is_alone[begins[crystal] : begins[crystal + 1]][graph.atom_class]
            detail = np.array([atoms.sum(), atoms.argmax()])
            found[crystal] = isolated_failure(detail, graph.numbers[graph.atom_class], self.parameters.radius)
        return found

    @property
    def is_mixed(self) -> bool:
        """Whether some crystal has averaged sites, whose rows carry mixed built-in element vectors."""
        return int(self._first["mixed"][-1]) > 0

    def _mixed(self, numbers: np.ndarray, chosen: Any, offset: Any) -> np.ndarray:
        """Element vectors of rows, those of averaged sites mixed; ``offset`` leads to the first row of each crystal."""
        table = element_features()
        rows = self._arrays["mixed_row"][chosen] + offset
        shares = self._arrays["mixed_share"][chosen][:, None]
        try:
            features = table[numbers]
            features[rows] = 0
            np.add.at(features, rows, shares * table[self._arrays["mixed_number"][chosen]])
        except IndexError as error:
            raise InputError(f"{self.path} is damaged (averaged sites have no such atom); prepare it again.") from error
        return features

    def batch(self, indices: Any) -> GraphBatch:
        """The graphs of ``indices`` (any order, repeats allowed) as one batch, equal to ``collate`` of them.

        Raises:
            InputError: no index is given, one is not a whole number of -n to n - 1, or the batch exceeds int32.
        """
        chosen = self._checked(indices)
        packer = self._packer_of(chosen)
        return self._gathered(chosen) if packer is None else Packing(packer, chosen, _NOTHING).here()

    def packing(self, indices: Any, more: np.ndarray, pin: bool) -> Packing | None:
        """The batch of ``indices`` as a thread begins to put it together; None where NumPy must do it."""
        chosen = self._checked(indices)
        packer = self._packer_of(chosen)
        return None if packer is None else Packing(packer, chosen, more, pin).start()

    def _packer_of(self, chosen: np.ndarray) -> Packer | None:
        """Who joins these graphs, if compiled code can."""
        return None if self.is_mixed and self._arrays["mixed_count"].take(chosen).any() else self._packer

    def _gathered(self, chosen: np.ndarray) -> GraphBatch:
        """As :meth:`batch`, by NumPy: with atom or edge features, of any types."""
        counts = {name: first[chosen + 1] - first[chosen] for name, first in self._first.items()}
        ends = {name: np.cumsum(count) for name, count in counts.items()}
        check_sizes(ends["row"][-1], ends["edge"][-1])
        picked = {name: _ranges(self._first[name][chosen], counts[name], ends[name]) for name in counts}
        taken = self._take(lambda name, kind: self._arrays[name][picked[kind]])
        row_offset = (ends["row"] - counts["row"]).astype(np.int32)
        taken["sender"] = taken["sender"] + np.repeat(row_offset, counts["edge"])
        taken["atom_class"] = taken["atom_class"] + np.repeat(row_offset, counts["atom"])
        if ends["mixed"][-1]:
            offset = np.repeat(row_offset, counts["mixed"])
            taken["atom_features"] = self._mixed(taken["numbers"], picked["mixed"], offset)
        taken["row_ptr"] = offsets(taken.pop("degree")).astype(np.int32)
        taken["crystal_ptr"] = offsets(counts["row"]).astype(np.int32)
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
        least, most = int(chosen.min()), int(chosen.max())
        if least < -len(self) or most >= len(self):
            raise InputError(
                f"There is no crystal {most if most >= len(self) else least} in a store of {len(self)}; "
                f"give indices from 0 to {len(self) - 1}."
            )
        return chosen.astype(np.int64) if least >= 0 else chosen.astype(np.int64) % len(self)

    def target_array(self, names: str | Sequence[str]) -> np.ndarray:
        """(n, len(names)) float64, NaN where a crystal has no value; a text is one name.

        Raises:
            InputError: the store has no such target.
        """
        names = [names] if isinstance(names, str) else names
        for name in names:
            if name not in self.targets:
                has = ", ".join(self.targets) or "none"
                raise InputError(
                    f"{self.path or 'The store'} has no target {name}; it has {has} (of what is true or false, those "
                    "that prepare's targets name)."
                )
        return np.stack([self.targets[name] for name in names], axis=1) if names else np.zeros((len(self), 0))

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is not None:
            return _reopened, (self.path, self._fingerprint())
        return GraphStore, (self._arrays, self._info)


def packed_store(packed: PackedGraphs, parameters: GraphParameters) -> GraphStore:
    """A store in memory of graphs without averaged sites, named "0", "1", ...; a crystal that failed has no rows."""
    counts = {"row_count": packed.crystal_ptr, "edge_count": packed.edge_ptr, "atom_count": packed.atom_ptr}
    arrays = {name: np.diff(ends) for name, ends in counts.items()}
    arrays |= {name: getattr(packed, name) for name in ("weight", "sender", "atom_class")}
    arrays |= {"numbers": packed.numbers.astype(np.uint8), "distance": packed.distance.astype(np.float32)}
    arrays["degree"] = np.diff(packed.row_ptr).astype(np.int32)
    crystals = len(arrays["row_count"])
    arrays |= {"targets": np.zeros((crystals, 0))} | mixture_arrays([None] * crystals)
    return GraphStore(arrays | id_arrays(list(map(str, range(crystals)))), StoreInfo(parameters))


def _ranges(first: np.ndarray, count: np.ndarray, end: np.ndarray) -> np.ndarray:
    """first[0], first[0] + 1, ... (count[0] of them), first[1], ..."""
    return np.repeat(first - (end - count), count) + np.arange(end[-1])


# ---- reading


def open_store(path: str | os.PathLike[str]) -> GraphStore:
    """A store that :func:`prepare` wrote, memory-mapped.

    Raises:
        InputError: there is no store, it was written in another format version, or a file is missing or cut short.
    """
    return read_directory(Path(path), _opened)


def _reopened(path: Path, fingerprint: str) -> GraphStore:
    """A store that was pickled; indices that go with it mean no other's crystals."""
    store = open_store(path)
    if store._fingerprint() != fingerprint:
        raise InputError(f"{path} was replaced since it was opened; open it again.")
    return store


def is_store(path: str | os.PathLike[str]) -> bool:
    """Is there a store that :func:`open_store` opens, or says what is wrong with it?"""
    folder = Path(path)
    restore(folder)
    try:
        return bool(_read_metadata(folder))
    except InputError:
        return os.path.isfile(folder / "row_count.npy")


_DAMAGE = (OSError, ValueError, TypeError, KeyError, AttributeError, SyntaxError, TokenError)
"""What is raised by metadata that are none, and by NumPy for the header of an array: the last two by its parser."""


def _opened(folder: Path) -> GraphStore:
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
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in [*DTYPES, "targets"]}
        info = StoreInfo(
            GraphParameters(**metadata["parameters"]),
            metadata["targets"],
            metadata["key"],
            metadata["rejected"],
            metadata["checksums"],
        )
        _check_counts(arrays, metadata["crystals"], len(info.targets))
        return GraphStore(arrays, info, folder.resolve())
    except InputError:
        raise
    except _DAMAGE as error:
        raise InputError(f"{folder} is damaged ({type(error).__name__}: {error}); prepare it again.") from error


def _read_metadata(folder: Path) -> dict[str, Any]:
    if not os.path.exists(folder):
        raise InputError(f"{folder} does not exist; write a store there with prepare.")
    try:
        metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        metadata = None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT or "version" not in metadata:
        raise InputError(f"{folder} is not a store of prepared graphs; give one that prepare wrote.")
    return metadata


def _check_counts(arrays: Mapping[str, np.ndarray], crystals: int, targets: int) -> None:
    rows, edges, atoms = (int(arrays[f"{name}_count"].sum()) for name in ("row", "edge", "atom"))
    shapes = {"numbers": rows, "weight": rows, "degree": rows, "sender": edges, "distance": edges, "atom_class": atoms}
    shapes |= dict.fromkeys(("mixed_row", "mixed_number", "mixed_share"), int(arrays["mixed_count"].sum()))
    shapes |= dict.fromkeys(_COUNTS, crystals) | {"id_text": int(arrays["id_size"].sum(dtype=np.int64))}
    for name, length in shapes.items():
        if arrays[name].shape != (length,) or arrays[name].dtype != DTYPES[name]:
            raise ValueError(f"{name}.npy does not fit the counts")
        if name in _COUNTS and crystals and arrays[name].min() < 0:
            raise ValueError(f"{name}.npy has counts below 0")
    is_table = arrays["targets"].shape == (crystals, targets) and arrays["targets"].dtype == np.float64
    if not is_table or int(arrays["degree"].sum(dtype=np.int64)) != edges:
        raise ValueError("targets.npy or degree.npy does not fit the counts")


# ---- writing


def prepare(
    source: Any,
    path: str | os.PathLike[str],
    parameters: GraphParameters | None = None,
    *,
    targets: str | Sequence[str] | None = None,
    append: bool = False,
    progress: bool | Callable[[int], None] | None = None,
) -> GraphStore:
    """Read crystals, build their graphs and write them to the directory ``path``, whole or not at all.

    Inputs that cannot be read or built are listed in ``rejected`` with the reason. An existing store is reused if
    source, parameters and targets are the same, and replaced otherwise. Memory stays bounded. If a preparation from
    files is interrupted or killed, the next call with the same arguments continues it (from ``.NAME.partial`` beside
    the store).

    Args:
        source: whatever :func:`srcgcnn_fast.graph.readers.read_inputs` takes.
        path: the directory of the store.
        parameters: how a crystal becomes a graph; ``GraphParameters()`` by default.
        targets: names of the targets to keep, or one name; by default all that the source has.
        append: add to the store that is there, with its parameters. A source that it contains already is not added
            again, and is refused if it has changed since. Whoever has the store open keeps the old one.
        progress: True for a progress bar, or a function that is told the number of inputs done so far.

    Raises:
        InputError: the source cannot be read, no input became a graph, a target has no value at all, ``path``
            holds something else than a store, or another process prepares the same one.
    """
    folder = Path(path).resolve()  # where a link leads to, which stays
    if not isinstance(parameters, GraphParameters | None):
        raise InputError(f"parameters is {parameters!r}; give GraphParameters(radius=6.0), for instance.")
    part = _source_key(source)
    targets = [targets] if isinstance(targets, str) else targets
    plan = _plan(folder, source, part, parameters, targets, append)
    if plan.done is not None:
        return plan.done
    with alone(folder):
        plan = _plan(folder, source, part, parameters, targets, append)  # what the writer before may have changed
        return _prepare(folder, source, plan, targets, append, progress) if plan.done is None else plan.done


class _Plan(NamedTuple):
    """What there is to do for a store."""

    parameters: GraphParameters
    key: dict[str, Any] | None
    before: tuple[int, int] = (0, 0)
    """Graphs and rejected inputs of the store that is appended to."""
    done: GraphStore | None = None
    """Nothing: the store that is there."""
    damage: InputError | None = None
    """Why not the store that is there."""


def _plan(
    folder: Path,
    source: Any,
    part: dict[str, Any] | None,
    parameters: GraphParameters | None,
    targets: Sequence[str] | None,
    append: bool,
) -> _Plan:
    there = existing(folder)
    if append:
        if there is None:
            raise InputError(f"{folder} does not exist, so nothing can be appended; prepare it first.")
        held = open_store(folder)
        if parameters not in (None, held.parameters):
            raise InputError(f"{folder} was prepared with {held.parameters}; append with the same, or leave them out.")
        parts = held._info.key["parts"] if held._info.key else [None]
        key = _key(held.parameters, targets, [*parts, part])
        if part is not None and part in parts:
            held.target_array(targets or ())  # which it must have
            logger.info("%s is in %s already.", source, folder)
            return _Plan(held.parameters, key, done=held)
        if part is not None and part["source"] in [other["source"] for other in parts if other]:
            raise InputError(
                f"{source} is in {folder} already and has changed since; prepare the whole again, or append the "
                "new crystals alone, from another path."
            )
        return _Plan(held.parameters, key, (len(held), held._info.rejected))
    parameters = parameters or GraphParameters()
    whole = None if part is None else _key(parameters, targets, [part])
    if there is not None and whole is not None and there.get("key") == whole:
        try:
            store = open_store(folder)
            logger.info("%s is prepared already: %d crystals.", folder, len(store))
            return _Plan(parameters, whole, done=store)
        except InputError as error:
            return _Plan(parameters, whole, damage=error)
    return _Plan(parameters, whole)


def _prepare(
    folder: Path,
    source: Any,
    plan: _Plan,
    targets: Sequence[str] | None,
    append: bool = False,
    progress: bool | Callable[[int], None] | None = None,
    may_lack: bool = False,
) -> GraphStore:
    """``may_lack``: graphs, and values of targets."""
    parameters, key, before = plan[:3]
    if plan.damage is not None:
        logger.warning("Preparing again: %s", plan.damage)
    may_resume = key is not None and None not in key["parts"]  # objects in memory may be others the next time
    with workplace(folder, key if may_resume else None) as scratch:
        if append and not (scratch / PROGRESS).exists():
            copy_store(folder, scratch, key)
        writer = StoreWriter(scratch, key)
        if writer.done:
            logger.warning("Continuing after the %d inputs that an earlier call prepared.", writer.done)
        try:
            records = read_inputs(source, targets=targets, skip=writer.done, disorder=parameters.disorder)
            for chunk in _chunks(_reported(records, progress, writer.done)):
                writer.add(chunk, parameters)
        finally:
            writer.close()
        if not may_lack:
            _check_result(writer, source, targets, *before)
        writer.finish(parameters, targets)
    store = open_store(folder)
    _log_summary(store)
    return store


def prepare_part(
    source: Any, path: str | os.PathLike[str], parameters: GraphParameters, targets: Sequence[str] | None
) -> GraphStore:
    """:func:`prepare` of some of the inputs of :func:`join_stores`, which may be those without graph or target.

    Several processes may make the same part; it is there whole.
    """
    return _prepare(Path(path).resolve(), source, _Plan(parameters, None), targets, may_lack=True)


def join_stores(
    parts: Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
    source: Any = None,
    targets: Sequence[str] | None = None,
) -> GraphStore:
    """One store of the crystals of several, in their order, written whole or not at all; the parts stay.

    Args:
        source: what they were prepared from, for errors to name.
        targets: that must have a value somewhere.

    Raises:
        InputError: there are no parts, or they were prepared differently; or as :func:`prepare`.
    """
    folder = Path(path).resolve()
    stores = [open_store(part) for part in parts]
    if not stores:
        raise InputError("There are no stores to join; give at least one.")
    for store in stores:
        if store.parameters != stores[0].parameters:
            raise InputError(f"{store.path} and {stores[0].path} hold different graphs; prepare them alike.")
    with alone(folder), workplace(folder, None) as scratch:
        existing(folder)
        writer = StoreWriter(scratch, None)
        try:
            for store in stores:
                writer.add_store(store)
        finally:
            writer.close()
        _check_result(writer, source, targets, 0, 0)
        writer.finish(stores[0].parameters, targets)
    return open_store(folder)


def existing(folder: Path) -> dict[str, Any] | None:
    """The metadata of a store that may be replaced; None where nothing is there.

    Raises:
        InputError: something else is there.
    """
    return read_directory(folder, _existing)


def _existing(folder: Path) -> dict[str, Any] | None:
    if not folder.exists():
        return None
    if folder.is_dir() and not names_in(folder):
        return None
    try:
        return _read_metadata(folder)
    except InputError:
        raise InputError(f"{folder} exists and is not a store of prepared graphs; choose another path.") from None


def _key(parameters: GraphParameters, targets: Sequence[str] | None, parts: list[Any]) -> dict[str, Any]:
    names = list(targets) if targets is not None else None
    return {"package": __version__, "parameters": asdict(parameters), "targets": names, "parts": parts}


def _source_key(source: Any) -> dict[str, Any] | None:
    if not isinstance(source, str | os.PathLike) or not os.path.exists(source):
        return None
    root = Path(source).resolve()
    found: list[tuple[str, Any]] = [(root.name, root)]
    if root.is_dir():
        with os.scandir(root) as entries:
            files = [e for e in entries if e.is_file() and (e.name == "id_prop.csv" or file_kind(e.name))]
        found = sorted((e.name, e) for e in files)
        found += [(str(path), path) for path in files_elsewhere(root)]
    stamps = [(name, entry.stat().st_size, entry.stat().st_mtime_ns) for name, entry in found]
    return {"source": str(root), "files": len(stamps), "stamps": sha256(repr(stamps).encode()).hexdigest()}


def _reported(
    records: Iterable[Record], progress: bool | Callable[[int], None] | None, before: int
) -> Iterator[Record]:
    if progress is True:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            logger.info("Without tqdm there is no progress bar.")
        else:
            pause = 0.1 if sys.stderr.isatty() else 10  # s; a log file need not hold every step
            yield from tqdm(records, desc="prepare", unit=" crystals", initial=before, mininterval=pause)
            return
    for done, record in enumerate(records, start=before + 1):
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


def _check_result(
    writer: StoreWriter, source: Any, targets: Sequence[str] | None, crystals: int, rejected: int
) -> None:
    """Has the source given graphs and targets, beside the ``crystals`` and ``rejected`` that there were before?"""
    where = str(source) if isinstance(source, str | os.PathLike) else "the input"
    if writer.crystals == crystals:
        if writer.first_rejected is None:
            raise InputError(f"There are no structures in {where}; give at least one.")
        reason = name_it(*writer.first_rejected)
        raise InputError(f"None of the {writer.rejected - rejected} inputs of {where} became a graph; {reason}")
    for name in targets or ():
        if not writer.has_values(name):
            advice = name_it(*writer.first_rejected) if writer.first_rejected else "fill it in, or choose another."
            raise InputError(f"No crystal of {where} has a value of the target {name}; {advice}")


def name_it(id: str, reason: str) -> str:
    """The reason of a rejected input, with its id in front unless it is there."""
    named = reason.startswith(id) and not reason.startswith(f"{id} of ")  # "1 of 6 atoms" names no input "1"
    return reason if named else f"{id}: {reason}"


def _log_summary(store: GraphStore) -> None:
    logger.info(
        "%s: %d crystals, %d atoms in %d rows (%.2f atoms a row), %d edges, %d rejected.",
        store.path, len(store), store.n_atoms, store.n_rows, store.n_atoms / max(store.n_rows, 1), store.n_edges,
        store.n_rejected,
    )  # fmt: skip
