"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import TypeVar

from .errors import InputError

_T = TypeVar("_T")

_TRIES = 100
"""To rename a directory that other processes rename, too."""
_READS = 10
"""Of a directory that others replace meanwhile."""
_OF_FILE_MANAGERS = (".DS_Store", ".directory", "Thumbs.db", "desktop.ini")
"""What Finder, Dolphin and Explorer leave in a folder that somebody has looked at."""


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; what was written there replaces ``path`` on success.

    On an exception the temporary file (or directory) is removed and ``path`` stays as it was.

    Raises:
        InputError: the directory of ``path`` cannot be created or written, or ``path`` cannot be replaced.
    """
    with _written(Path(path), os.replace) as temporary:
        yield temporary


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """As :func:`atomic_path`, a new directory, which replaces one at ``path`` with all that is there."""
    with _written(Path(path), replace_directory) as temporary:
        temporary.mkdir()
        yield temporary


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, whatever the locale has, whole or not at all.

    Raises:
        InputError: as of :func:`atomic_path`.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(in_utf8(text), encoding="utf-8")


@contextmanager
def _written(target: Path, replace: Callable[[Path, Path], None]) -> Iterator[Path]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise InputError(
            f"Cannot write {target}: {error.strerror or error}; choose a directory that you may write to."
        ) from error
    try:
        temporary = scratch / target.name
        yield temporary
        try:
            replace(temporary, target)
        except OSError as error:
            raise InputError(f"Cannot write {target}: {error.strerror or error}; choose another name.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def names_in(folder: Path) -> list[str]:
    """What is in ``folder``, sorted, without what file managers leave there."""
    return sorted(set(os.listdir(folder)).difference(_OF_FILE_MANAGERS))


def replace_directory(new: Path, target: Path) -> None:
    """Rename ``new`` to ``target``, be there a directory or none.

    The system does not replace a directory that has files, so the old one goes aside first; where a process is killed
    in between, :func:`restore` finds it.

    Raises:
        OSError: that is not possible; ``target`` is as it was.
    """
    aside = _aside(target)
    for tries in range(_TRIES):
        try:
            if target.exists():
                remove(aside, target)
                os.rename(target, aside)
            os.rename(new, target)
            break
        except OSError:  # another process may have put one there, or back
            if tries == _TRIES - 1 or not new.exists():
                restore(target)
                raise
    with suppress(OSError):  # the new one is there
        remove(aside, target)


def restore(path: str | os.PathLike[str]) -> None:
    """Put back the directory that a process killed within :func:`replace_directory` left aside, if one did."""
    if os.path.exists(path):
        return
    with suppress(OSError, ValueError, RuntimeError):  # none was aside, another process has put one there, or no path
        target = Path(path).resolve()
        os.rename(_aside(target), target)


def read_directory(path: Path, read: Callable[[Path], _T]) -> _T:
    """What ``read`` makes of a directory that others may replace meanwhile, of the old one or of the new one alone.

    Raises:
        InputError: that of ``read``, or others replace it every time.
    """
    for tries in range(_READS):
        restore(path)
        before, problem = _identity(path), None
        try:
            found = read(path)
        except (InputError, OSError) as error:
            problem = error
        same = _identity(path) == before  # else another process has replaced it meanwhile, and this is half of each
        if same and (problem is None or tries > 1):  # it may have been aside for a moment
            break
    if problem is not None:
        raise problem
    if not same:
        raise InputError(f"{path} is being replaced all the time; read it when nobody writes it any more.")
    return found


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        about = os.stat(path)
    except OSError:
        return None
    return about.st_dev, about.st_ino, about.st_ctime_ns  # a new one may have the number of one that was removed


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}.set-aside"


def remove(folder: Path, target: Path) -> None:
    """Remove ``folder``, if it is there, which lies beside ``target``: under another name, so that nobody takes what is
    left for a whole one if this is interrupted, and :func:`sweep` finds it.
    """
    if folder.exists():
        gone = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        os.rename(folder, gone / target.name)
        shutil.rmtree(gone, ignore_errors=True)


def in_utf8(text: str) -> str:
    """Text that UTF-8 holds, as files do: the name of a file, or a word of the command line, may be any bytes."""
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a character, which JSON may spell out
        data = text.encode("utf-8", "backslashreplace")
    return data.decode("utf-8", "backslashreplace")


def sweep(path: str | os.PathLike[str]) -> None:
    """Remove what processes killed inside :func:`atomic_path` left beside ``path``; nobody else may write it now."""
    target = Path(path)
    for scratch in target.parent.glob(f".{escape(target.name)}." + 8 * "[a-z0-9_]"):  # as tempfile names them
        with suppress(OSError):
            if os.listdir(scratch) in ([], [target.name]):  # else it is somebody's, with eight letters by chance
                shutil.rmtree(scratch, ignore_errors=True)
