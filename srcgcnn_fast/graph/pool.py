"""CIF files read in processes of their own, so that a file that never ends costs its time limit and no more."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import InputError
from .crystal import AnyCrystal

# The working directory is not searched, whose files may have any names; what is printed must not reach the replies.
_SERVE = (
    "import sys; sys.path = [x for x in sys.path if x]; import os; replies = os.dup(1); os.dup2(2, 1); "
    "from srcgcnn_fast.graph.pool import serve; serve({limit}, replies, {seconds})"
)
_READY = b"\0ready\n"
MEMORY_LIMIT = 4 * 2**30
"""Bytes that a process may take to read a file; where the system has such limits (Linux)."""
_GRACE = 10.0
"""Seconds beyond its time limit after which a process ends itself, should nobody be there any more to end it."""
_LONG = 1e8
"""Seconds, which timers take."""


def serve(limit: int, output: int, seconds: float) -> None:
    """The loop of a worker: paths come in on stdin, a Crystal or the sentence of its error goes out for each.

    It ends if a file takes more than ``seconds``.
    """
    from .cif import read_carefully
    from .quick_cif import gemmi_cif, read_quickly

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other side, which may go on
    gemmi_cif()
    _limit_memory(limit)
    replies, requests = os.fdopen(output, "wb"), sys.stdin.buffer
    replies.write(_READY)
    replies.flush()
    while True:
        try:
            paths = [Path(path) for path in pickle.load(requests)]
        except EOFError:
            return
        for path in paths:
            _end_in(seconds)
            found: AnyCrystal | str | None = read_quickly(path)
            if found is None:
                _send(replies, None)  # the other side then knows which file takes so long
                try:
                    found = read_carefully(path)
                except InputError as error:
                    found = str(error)
                except MemoryError:
                    found = f"{path.name} needs more than {limit / 2**30:g} GiB of memory to read; simplify the file."
            pickle.dump(found, replies)
        replies.flush()
        _end_in(0)


def _end_in(seconds: float) -> None:
    """Whatever this process does then, where the system has such timers; 0 takes it back."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _limit_memory(limit: int) -> None:
    try:
        from resource import RLIMIT_DATA, setrlimit
    except ImportError:
        return
    with contextlib.suppress(OSError, ValueError):
        setrlimit(RLIMIT_DATA, (limit, limit))


def _send(stream: Any, value: object) -> None:
    pickle.dump(value, stream)
    stream.flush()


class _Worker:
    """One child process. ``subprocess`` and not ``multiprocessing``: that one runs the caller's script again."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        places = [x or os.getcwd() for x in sys.path]  # where this process finds its modules
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVE.format(limit=MEMORY_LIMIT, seconds=min(timeout + _GRACE, _LONG))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        self._deadline = float("inf")
        threading.Thread(target=self._watch, daemon=True, name="time-limit-of-a-reader").start()

    def wait_until_ready(self) -> None:
        """Whatever was printed before its first line."""
        lines = iter(self.process.stdout.readline, b"")  # type: ignore[union-attr]
        if not any(line.endswith(_READY) for line in lines):
            raise RuntimeError(f"A process that reads CIF files ended with status {self.process.wait()}.")

    def _watch(self) -> None:
        """End the process once a file is over its time."""
        while self.alive:
            time.sleep(min(0.2, self.timeout / 4))
            if time.monotonic() > self._deadline:
                self.process.kill()

    def read(self, paths: Sequence[Path]) -> list[AnyCrystal | str]:
        """A Crystal or the sentence that says why not for each path, in order.

        Fewer where the process ended at a file of many and nobody knows which; the rest is then read one by one.
        """
        found: list[AnyCrystal | str] = []
        is_certain = len(paths) == 1
        start = time.monotonic()
        try:
            self._deadline = start + self.timeout
            _send(self.process.stdin, [str(path) for path in paths])
            while len(found) < len(paths):
                reply = pickle.load(self.process.stdout)  # type: ignore[arg-type]
                start = time.monotonic()
                self._deadline = start + self.timeout
                if reply is not None:
                    found.append(reply)
                is_certain = reply is None or len(paths) == 1
        except (EOFError, OSError, pickle.UnpicklingError):
            late = time.monotonic() - start >= self.timeout
            self.close()
            name = paths[len(found)].name
            if is_certain:
                found.append(
                    f"{name} took longer than {self.timeout:g} s to read; simplify the file or raise the timeout."
                    if late
                    else f"{name} ended the process that read it (status {self.process.returncode}); check the file."
                )
        finally:
            self._deadline = float("inf")
        return found

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # a request that the dead process never took
                stream.close()  # type: ignore[union-attr]


class CifPool:
    """At most ``workers`` child processes, started when the work asks for them; close it after use."""

    def __init__(self, timeout: float, workers: int) -> None:
        self.timeout = timeout
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="read-cif", initializer=self._start)
        self._local = threading.local()
        self._started: list[_Worker] = []

    def submit(self, paths: Sequence[Path]) -> Future[list[AnyCrystal | str]]:
        """A Crystal or the sentence of its error for each path; can be cancelled until a process is free for it."""
        return self._threads.submit(self._read, paths)

    def _start(self) -> None:
        with contextlib.suppress(RuntimeError):  # said again, and passed on, when there is something to read
            self._worker()

    def _worker(self) -> _Worker:
        worker = getattr(self._local, "worker", None)
        if worker is None or not worker.alive:
            worker = self._local.worker = _Worker(self.timeout)
            self._started.append(worker)
            worker.wait_until_ready()
        return worker

    def _read(self, paths: Sequence[Path]) -> list[AnyCrystal | str]:
        found = self._worker().read(paths)
        while len(found) < len(paths):
            found += self._worker().read(paths[len(found) :][:1])
        return found

    def close(self) -> None:
        for worker in self._started:
            worker.process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._started:
            worker.close()
