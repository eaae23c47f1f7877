"""Side-by-side measurement: alternating rounds, medians, and what machine and commit the numbers belong to."""

from __future__ import annotations

import gc
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import srcgcnn_fast as sf

_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS", "SRCGCNN_FAST_SIMD")


def alternate(
    candidates: dict[str, Callable[[], object]], rounds: int = 10, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of every round of every candidate, one after the other within each round."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    gc.freeze()  # a garbage collection within a round passes over the objects of the test runner
    try:
        for r in range(rounds + warm_up):
            for name, run in candidates.items():
                start = time.perf_counter()
                run()
                if r >= warm_up:
                    seconds[name].append(time.perf_counter() - start)
    finally:
        gc.unfreeze()
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in seconds.items()}


def in_fresh_process(measurement: Callable[..., Any], *arguments: Any) -> Any:
    """Its result, from a process that has done nothing else.

    Plain PyTorch allocates tensors of tens of MiB in every step. What the C library does about them depends on what the
    process freed before, and changes the time of the same program by a factor of two.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(measurement, *arguments).result()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with this number of threads; compiled code is made for it, and none is reused from before."""
    import torch._inductor.config

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    torch._dynamo.reset()
    try:
        with torch._inductor.config.patch({"cpp.threads": count}):
            yield
    finally:
        torch.set_num_threads(before)


def machine() -> dict[str, str]:
    """Processor, versions, environment and commit: what stands beside every number."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    says = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = says.get("model name", platform.processor())
    if "cpu family" in says:  # AMD EPYC alone may be any of several generations
        name += f" (family {says['cpu family']}, model {says['model']})"
    words = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        describe = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:  # no git
        describe = ""
    present = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ] or ["no thread setting"]
    if hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR):
        present.append(f"real-time priority {os.sched_getparam(0).sched_priority}")
    return {
        "processor": f"{name}, {os.cpu_count()} cores",
        "backend": sf.backends()["cpu"].reason,
        "torch": torch.__version__,
        "torch-geometric": _version("torch-geometric"),
        "python": platform.python_version(),
        "environment": ", ".join(present),
        "commit": describe.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
