"""Side-by-side measurement: alternating rounds, medians, and what machine and commit the numbers belong to."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import srcgcnn_fast as sf


def alternate(
    candidates: dict[str, Callable[[], object]], rounds: int = 10, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of every round of every candidate, one after the other within each round."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for r in range(rounds + warm_up):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if r >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in seconds.items()}


def machine() -> dict[str, str]:
    """Processor, threads, versions and commit: what stands beside every number."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    root = Path(__file__).parent
    describe = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=root, capture_output=True, text=True, check=False
    )
    return {
        "processor": name,
        "backend": sf.backends()["cpu"].reason,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": describe.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }
