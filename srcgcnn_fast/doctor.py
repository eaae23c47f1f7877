"""What is installed, what works, and why not: the text of ``srcgcnn-fast doctor``."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import __version__
from .errors import InputError
from .ops import registry

_PACKAGES = ("torch", "triton", "numpy", "numba", "safetensors", "pymatgen", "ase", "pandas", "pyarrow", "lightning")
_VARIABLES = ("SRCGCNN_FAST_BACKEND", "SRCGCNN_FAST_SIMD", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def openmp_runtimes() -> list[str]:
    """File names of the OpenMP runtimes in this process; more than one is a fault of the installation."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {line.split()[-1] for line in os.fsdecode(maps.read_bytes()).splitlines() if "/" in line}
    return sorted(p for p in paths if Path(p).name.startswith(("libgomp", "libomp", "libiomp")))


def _cuda_lines() -> list[str]:
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        return [f"none: torch is {built} and sees no device"]
    names = []
    for k in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(k)
        names.append(f"{torch.cuda.get_device_name(k)} (sm_{major}{minor})")
    return names


def _for_cpu_tensors() -> str:
    """Their backend; if a backend or SIMD level is forced that cannot run, the error that every call raises."""
    if registry.forced_backend() is None and "SRCGCNN_FAST_SIMD" not in os.environ:
        return "cpu" if registry.core is not None else "reference"
    try:
        return registry.select(torch.empty(0, 0))
    except InputError as error:
        return f"none: {error}"


def report() -> str:
    """Versions, backends, SIMD level, OpenMP runtime, threads, devices, environment: one line each."""
    core = registry.core
    lines = [f"srcgcnn_fast {__version__}  ({Path(__file__).parent})"]
    lines += [f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"]
    lines += ["", "packages"] + [f"  {name:12s} {_version(name)}" for name in _PACKAGES]
    lines += ["", "backends"]
    backends = registry.backends()
    for status in backends.values():
        state = "usable" if status.available else "built, not usable" if status.built else "not built"
        lines.append(f"  {status.name:12s} {state:18s} {status.reason}")
    lines.append(f"  CPU tensors take: {_for_cpu_tensors()}")
    if torch.cuda.is_available():
        fastest = next(name for name in ("cuda", "triton", "reference") if backends[name].available)
        lines.append(f"  CUDA tensors take: {registry.forced_backend() or fastest} (float32; other types: reference)")
    if core is not None:
        lines += ["", "compiled kernels"]
        lines += [f"  compiler     {core.compiler}", f"  CUDA         {core.cuda}"]
        lines.append(f"  threads      {core.threads or 'one, built without OpenMP'}")
        lines.append(f"  SIMD level   {core.simd_level()} (this processor has {', '.join(core.simd_levels())})")
    runtimes = openmp_runtimes()
    lines += ["", "threads", f"  torch        {torch.get_num_threads()} of {os.cpu_count()} processors"]
    lines += [f"  OpenMP       {path}" for path in runtimes]
    if len(runtimes) > 1:
        lines.append("  WARNING: more than one OpenMP runtime is loaded; reinstall torch and srcgcnn_fast with pip.")
    lines += ["", "CUDA devices"] + [f"  {line}" for line in _cuda_lines()]
    present = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    lines += (
        ["", "environment"] + [f"  {name}={value}" for name, value in present.items()] + ([] if present else ["  -"])
    )
    return "\n".join(lines)
