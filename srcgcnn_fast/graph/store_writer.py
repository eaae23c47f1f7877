"""What a store of prepared graphs is on disk, and how one is written: in chunks, resumable, whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from .. import __version__
from ..errors import InputError
from ..files import atomic_directory, replace_directory, sweep
from .parameters import GraphParameters
from .readers import Record

logger = logging.getLogger(__name__)

FORMAT = "srcgcnn_fast prepared graphs"
VERSION = 3
METADATA = "metadata.json"
REJECTED = "rejected.jsonl"
PROGRESS = "progress.json"
_LOCK = ".lock"
_COLUMN = "target-"
"""Beginning of the names of files that hold a target each until all are known."""
_TRIES = 100
_PIECE = 1 << 20

DTYPES: dict[str, Any] = {
    "numbers": np.uint8,  # (R,)
    "weight": np.float32,  # (R,)
    "degree": np.int32,  # (R,) edges of each row
    "sender": np.int32,  # (E,) counted within the crystal
    "distance": np.float32,  # (E,) Å
    "atom_class": np.int32,  # (A,) counted within the crystal
    "row_count": np.int64,  # (n,)
    "edge_count": np.int64,  # (n,)
    "atom_count": np.int64,  # (n,)
    "mixed_count": np.int64,  # (n,) species of averaged sites; of each that holds more or less than one full atom:
    "mixed_row": np.int32,  # (X,) counted within the crystal
    "mixed_number": np.uint8,  # (X,)
    "mixed_share": np.float32,  # (X,)
    "id_size": np.int32,  # (n,) bytes of each id
    "id_text": np.uint8,  # ids in UTF-8, one after the other
}


def id_arrays(ids: Sequence[str]) -> dict[str, np.ndarray]:
    encoded = [id.encode() for id in ids]
    text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    return {"id_size": np.array([len(x) for x in encoded], dtype=np.int32), "id_text": text}


def mixture_arrays(mixtures: Sequence[Any]) -> dict[str, np.ndarray]:
    """Of the rows' ``Mixture`` of each crystal, None where there is none: count, then row, number, share of each."""
    count = np.zeros(len(mixtures), dtype=np.int64)
    held: list[tuple[int, int, float]] = []
    for b, mixture in enumerate(mixtures):
        before = len(held)
        for row in np.flatnonzero(mixture.kind).tolist() if mixture is not None else ():
            held += [(row, number, share) for number, share in mixture.compositions[mixture.kind[row] - 1]]
        count[b] = len(held) - before
    columns = zip(*held, strict=True) if held else ((),) * 3
    return {"mixed_count": count} | {
        name: np.array(column, dtype=DTYPES[name])
        for name, column in zip(("mixed_row", "mixed_number", "mixed_share"), columns, strict=True)
    }


def checksum(array: np.ndarray, before: int = 0) -> int:
    """CRC-32 of the values, continued from that of the values before them."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, before)


# ---- where it is written


_locks: set[TextIO] = set()
"""Of this process; a fork, such as a worker of a data loader, may live longer and does not keep them."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [file.close() for file in _locks])


@contextmanager
def alone(folder: Path, taken: str | None = None) -> Iterator[None]:
    """One writer of ``folder`` at a time; ends with the process, however that ends.

    Raises:
        InputError: somebody writes there now, for which ``taken`` is the sentence, or nobody may.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    path = folder.parent / f".{folder.name}{_LOCK}"
    with ExitStack() as stack:
        for _ in range(_TRIES):
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(path.open("w"))
            except OSError as error:
                raise _refusal(folder, error) from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    taken or f"{folder} is being prepared by another process; wait for it, or choose another path."
                ) from None
            except OSError as error:  # file systems without locks
                logger.debug("%s cannot be locked: %s", path, error)
                break
            with suppress(OSError):  # its owner may have removed it since it was opened
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    sweep(folder)
                    break
        _locks.add(file)
        try:
            yield
        finally:
            _locks.discard(file)
            path.unlink(missing_ok=True)


def _refusal(folder: Path, error: OSError) -> InputError:
    return InputError(f"Cannot write {folder}: {error.strerror or error}; choose a directory that you may write to.")


@contextmanager
def workplace(folder: Path, key: dict[str, Any] | None) -> Iterator[Path]:
    """A directory beside ``folder`` that replaces it on success; for a writer :func:`alone`.

    With a ``key`` (what is being prepared) it stays after an interruption, and an equal key finds it again; without
    one, and after an InputError, it is removed.

    Raises:
        InputError: the directory cannot be written, or ``folder`` cannot be replaced.
    """
    if folder == Path.cwd() or folder in Path.cwd().parents:
        raise InputError(f"{folder} is where this command runs, and would be replaced; run it from another directory.")
    with atomic_directory(folder) if key is None else _resumed(folder, key) as scratch:
        yield scratch
    with suppress(OSError):  # the store is there
        for file in (folder / PROGRESS, *folder.glob(f"{_COLUMN}*.npy")):
            file.unlink(missing_ok=True)


@contextmanager
def _resumed(folder: Path, key: dict[str, Any]) -> Iterator[Path]:
    scratch = folder.parent / f".{folder.name}.partial"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir(exist_ok=True)
    except OSError as error:
        raise _refusal(folder, error) from error
    if _read_progress(scratch).get("key") != key:
        for file in scratch.iterdir():
            file.unlink()
    try:
        yield scratch
    except BaseException as error:
        if isinstance(error, InputError) or not (scratch / PROGRESS).is_file():
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    try:
        replace_directory(scratch, folder)
    except OSError as error:
        raise _refusal(folder, error) from error


def _read_progress(scratch: Path) -> dict[str, Any]:
    try:
        return json.loads((scratch / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def copy_store(folder: Path, scratch: Path, key: dict[str, Any] | None) -> None:
    """Begin with the graphs of the store ``folder``."""
    metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    sums, files = metadata["checksums"], {}
    for name in DTYPES:
        shutil.copy(folder / f"{name}.npy", scratch)
        files[name] = [len(np.load(folder / f"{name}.npy", mmap_mode="r")), sums[name]]
    table = np.load(folder / "targets.npy")
    for k in range(table.shape[1]):
        column = _NpyFile(scratch / f"{_COLUMN}{k}.npy", np.float64)
        column.append(table[:, k])
        column.close()
        files[f"{_COLUMN}{k}"] = [column.length, column.checksum]
    shutil.copy(folder / REJECTED, scratch)
    files[REJECTED] = [metadata["rejected"], (folder / REJECTED).stat().st_size]
    _write_progress(scratch, key, 0, files, metadata["targets"], None)


def _write_progress(
    scratch: Path,
    key: dict[str, Any] | None,
    done: int,
    files: dict[str, list[int]],
    targets: Sequence[str],
    first_rejected: tuple[str, str] | None,
) -> None:
    content = {"key": key, "done": done, "files": files, "targets": list(targets), "first_rejected": first_rejected}
    new = scratch / f"{PROGRESS}.new"
    new.write_text(json.dumps(content), encoding="utf-8")
    os.replace(new, scratch / PROGRESS)


# ---- what is written


class StoreWriter:
    """Appends graphs to the files of a store; where a workplace holds progress, it goes on from there."""

    def __init__(self, folder: Path, key: dict[str, Any] | None) -> None:
        self.folder, self.key = folder, key
        progress = _read_progress(folder)
        self.done: int = progress.get("done", 0)
        """Inputs that are dealt with."""
        files = progress.get("files", {})
        self._files = {
            name: _NpyFile(folder / f"{name}.npy", dtype, *files.get(name, ())) for name, dtype in DTYPES.items()
        }
        self._columns = {
            name: _NpyFile(folder / f"{_COLUMN}{k}.npy", np.float64, *files[f"{_COLUMN}{k}"])
            for k, name in enumerate(progress.get("targets", ()))
        }
        self.rejected, size = files.get(REJECTED, (0, 0))
        first = progress.get("first_rejected")
        self.first_rejected: tuple[str, str] | None = (first[0], first[1]) if first else None
        self._reasons = (folder / REJECTED).open("r+b" if size else "wb")
        self._reasons.truncate(size)
        self._reasons.seek(size)

    @property
    def crystals(self) -> int:
        return self._files["row_count"].length

    def has_values(self, target: str) -> bool:
        return target in self._columns and self._columns[target].has_numbers()

    def add(self, records: Sequence[Record], parameters: GraphParameters) -> None:
        from .build import build_crystals

        crystals = [record.crystal for record in records if record.crystal is not None]
        packed = build_crystals(crystals, parameters) if crystals else None
        kept: list[Record] = []
        good: list[int] = []
        position = -1
        for record in records:
            position += record.crystal is not None
            reason = record.error if record.crystal is None or packed is None else packed.errors.get(position)
            if reason is None and record.crystal is not None:
                kept.append(record)
                good.append(position)
            else:
                self._reject(record.id, reason or f"{record.id} has no crystal.")
        if packed is not None:
            self._append(packed, np.array(good, dtype=np.int64), kept)
        self.done += len(records)
        self._save()

    def add_store(self, store: Any) -> None:
        """All of another store, its arrays read in pieces."""
        self._backfill(store.targets, self.crystals)
        for name, file in self._files.items():
            array = np.load(store.path / f"{name}.npy", mmap_mode="r")
            for begin in range(0, len(array), _PIECE):
                file.append(array[begin : begin + _PIECE])
        for name, column in self._columns.items():
            column.append(store.targets.get(name, np.full(len(store), np.nan)))
        for id, reason in store.rejected:
            self._reject(id, reason)

    def _backfill(self, targets: Iterable[str], before: int) -> None:
        """A column for each of these targets; the crystals before have no value of a new one."""
        for name in targets:
            if name not in self._columns:
                path = self.folder / f"{_COLUMN}{len(self._columns)}.npy"
                self._columns[name] = _NpyFile(path, np.float64)
                self._columns[name].append(np.full(before, np.nan))

    def _reject(self, id: str, reason: str) -> None:
        self.first_rejected = self.first_rejected or (id, reason)
        self.rejected += 1
        self._reasons.write(json.dumps([id, reason], ensure_ascii=False).encode() + b"\n")

    def _append(self, packed: Any, good: np.ndarray, kept: Sequence[Record]) -> None:
        before = self.crystals
        for name in ("numbers", "weight", "sender", "distance", "atom_class"):
            self._files[name].append(getattr(packed, name))  # a crystal that failed takes no room in these
        self._files["degree"].append(np.diff(packed.row_ptr))
        for name, pointer in (("row", "crystal_ptr"), ("edge", "edge_ptr"), ("atom", "atom_ptr")):
            self._files[f"{name}_count"].append(np.diff(getattr(packed, pointer))[good])
        for name, array in id_arrays([record.id for record in kept]).items():
            self._files[name].append(array)
        for name, array in mixture_arrays([packed.mixtures.get(b) for b in good.tolist()]).items():
            self._files[name].append(array)
        self._backfill(dict.fromkeys(name for record in kept for name in record.targets), before)
        for name, column in self._columns.items():
            column.append(np.array([record.targets.get(name, np.nan) for record in kept]))

    def _save(self) -> None:
        """What an interrupted preparation can go on from."""
        if self.key is None:
            return
        columns = {f"{_COLUMN}{k}": column for k, column in enumerate(self._columns.values())}
        files = {name: [file.length, file.checksum] for name, file in {**self._files, **columns}.items()}
        self._reasons.flush()
        files[REJECTED] = [self.rejected, self._reasons.tell()]
        _write_progress(self.folder, self.key, self.done, files, list(self._columns), self.first_rejected)

    def close(self) -> None:
        for file in (*self._files.values(), *self._columns.values()):
            file.close()
        self._reasons.close()

    def finish(self, parameters: GraphParameters, targets: Sequence[str] | None) -> None:
        """Complete the store; after :meth:`close`."""
        names = list(dict.fromkeys([*(targets or ()), *self._columns])) if targets is not None else list(self._columns)
        table = np.full((self.crystals, len(names)), np.nan)
        for k, name in enumerate(names):
            if name in self._columns:
                table[:, k] = np.load(self._columns[name].path)
        np.save(self.folder / "targets.npy", table)
        sums = {name: file.checksum for name, file in self._files.items()} | {"targets": checksum(table)}
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "package_version": __version__,
            "crystals": self.crystals,
            "rejected": self.rejected,
            "targets": names,
            "parameters": asdict(parameters),
            "sizes": {f"{name}.npy": (self.folder / f"{name}.npy").stat().st_size for name in sums},
            "checksums": sums,
            "key": self.key,
        }
        (self.folder / METADATA).write_text(json.dumps(metadata), encoding="utf-8")


class _NpyFile:
    """A one-dimensional .npy file that grows; its length is written into the header on closing.

    It is open while it is written to alone: a store may have more targets than a process may have files open.
    """

    _HEADER = 128

    def __init__(self, path: Path, dtype: Any, length: int = 0, checksum: int = 0) -> None:
        self.path, self.dtype, self.length, self.checksum = path, np.dtype(dtype), length, checksum
        end = self._HEADER + length * self.dtype.itemsize
        if length and path.stat().st_size < end:
            raise InputError(f"{path.parent} is damaged ({path.name} is cut short); remove it and prepare again.")
        with path.open("r+b" if length else "wb") as file:
            file.write(self._header())
            file.truncate(end)

    def _header(self) -> bytes:
        text = f"{{'descr': {self.dtype.str!r}, 'fortran_order': False, 'shape': ({self.length},), }}"
        return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"

    def append(self, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array, dtype=self.dtype)
        if len(data):
            with self.path.open("ab") as file:
                file.write(data.data)
            self.checksum = checksum(data, self.checksum)
            self.length += len(data)

    def has_numbers(self) -> bool:
        return bool(np.isfinite(np.load(self.path)).any())

    def close(self) -> None:
        with self.path.open("r+b") as file:
            file.write(self._header())
