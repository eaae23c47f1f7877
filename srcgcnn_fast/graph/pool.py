"""CIF files read in processes of their own, so that one file that never ends costs its time limit and no more."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ..errors import InputError
from .crystal import Crystal

_SERVE = "from srcgcnn_fast.graph.pool import serve; serve()"


def serve() -> None:
    """The loop of a worker: a path comes in on stdin, a Crystal or the sentence of its error goes out."""
    from .cif import read_cif

    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a parser prints must not reach the replies
    requests = sys.stdin.buffer
    _send(replies, None)
    while True:
        try:
            path = pickle.load(requests)
        except EOFError:
            return
        try:
            _send(replies, read_cif(Path(path)))
        except InputError as error:
            _send(replies, str(error))


def _send(stream, value: object) -> None:  # type: ignore[no-untyped-def]
    pickle.dump(value, stream)
    stream.flush()


class _Worker:
    """One child process. ``subprocess`` and not ``multiprocessing``: that one runs the caller's script again."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(x for x in sys.path if x), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        try:
            pickle.load(self.process.stdout)  # type: ignore[arg-type]
        except EOFError:
            raise RuntimeError(f"A worker that reads CIF files ended with status {self.process.wait()}.") from None

    def read(self, path: Path, timeout: float) -> Crystal | str:
        """A Crystal, or the sentence that says why not; after the time limit the process is gone."""
        timer = threading.Timer(timeout, self.process.kill)
        start = time.monotonic()
        timer.start()
        try:
            _send(self.process.stdin, str(path))
            return pickle.load(self.process.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError, pickle.UnpicklingError):
            self.close()
            if time.monotonic() - start >= timeout:
                return f"{path.name} took longer than {timeout:g} s to read; simplify the file or raise the timeout."
            return f"{path.name} ended the process that read it (status {self.process.returncode}); check the file."
        finally:
            timer.cancel()

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
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="read-cif")
        self._local = threading.local()
        self._started: list[_Worker] = []

    def submit(self, path: Path) -> Future[Crystal | str]:
        return self._threads.submit(self._read, path)

    def _read(self, path: Path) -> Crystal | str:
        worker = getattr(self._local, "worker", None)
        if worker is None or not worker.alive:
            worker = self._local.worker = _Worker()
            self._started.append(worker)
        return worker.read(path, self.timeout)

    def close(self) -> None:
        for worker in self._started:
            worker.process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._started:
            worker.close()
