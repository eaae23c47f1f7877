"""The kernels of csrc/cuda on tensors of the CPU.

With SRCGCNN_RACES in the environment they look for races, too; its numbers are widths of those for inference, all if it
is empty. With SRCGCNN_PTX, an architecture such as 90, what nvcc makes of them runs in the place of their source.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import tempfile
import types
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from srcgcnn_fast import capture
from srcgcnn_fast.ops import cuda as backend
from srcgcnn_fast.ops import cuda_conv

_spec = importlib.util.spec_from_file_location("emulated", Path(__file__).parent / "cuda" / "emulated.py")
assert _spec is not None and _spec.loader is not None
emulated = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(emulated)


RACES, PTX = os.environ.get("SRCGCNN_RACES"), os.environ.get("SRCGCNN_PTX")
PLACE, POOL = tempfile.TemporaryDirectory(prefix="emulated", ignore_cleanup_errors=True), ThreadPoolExecutor()
KERNELS = {"on_the_emulation": "stack", "training_on_the_emulation": "conv", "padding_library": "pad"}
place = Path(PLACE.name)


def pytest_configure(config: pytest.Config) -> None:
    """The processes of a run on several cores share what one of them compiles."""
    global place
    if hasattr(config, "workerinput"):
        place = Path(config.option.basetemp).parent / "emulated"


@functools.cache
def compiled(stem: str) -> Future[Path]:
    """The library of one file of kernels, which compilers work on from now on."""
    return POOL.submit(_compile, place / stem, emulated.KERNELS / f"{stem}.cu")


def _compile(folder: Path, source: Path) -> Path:
    import fcntl  # there is none on Windows

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = folder / emulated.LIBRARY
        widths = map(int, RACES.split()) if RACES else emulated.WIDTHS
        return library if library.exists() else emulated.build(folder, source, RACES is not None, widths, PTX)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What tests will need is compiled while others run."""
    wanted = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    if emulated.compiler() is not None and not session.config.option.collectonly:
        for name in KERNELS.keys() & wanted:
            compiled(KERNELS[name])


@pytest.fixture
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch):
    """Whatever a kernel forgets to write is NaN, not an old right answer."""

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


@pytest.fixture(scope="session")
def emulation():
    """cuda/emulated.py."""
    if emulated.compiler() is None:
        pytest.skip("the emulation needs g++")
    return emulated


@pytest.fixture(autouse=True)
def without_races():
    """Of a test's launches."""
    yield
    assert not [race for library in emulated.Emulated.looking for race in library.races()]


@pytest.fixture(scope="session")
def library(emulation):
    """The kernels for inference."""
    return emulation.Emulated(compiled("stack").result())


@pytest.fixture(scope="session")
def training_library(emulation):
    """Those for training."""
    return emulation.Emulated(compiled("conv").result())


@pytest.fixture(scope="session")
def padding_library(emulation):
    """Those that fill the batches of captured graphs."""
    return emulation.Emulated(compiled("pad").result())


@pytest.fixture
def fenced(monkeypatch: pytest.MonkeyPatch):
    """Tensors for kernels to write: what is forgotten is NaN, not an old right answer; what is written beside them is
    found at the end."""
    fence, around, filling = 32, [], types.SimpleNamespace(value=math.nan)

    def new_empty(like: torch.Tensor, *size, dtype: torch.dtype | None = None) -> torch.Tensor:
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        count, whole = shape.numel(), -(-shape.numel() // 8) * 8  # of 16 bytes, so that it is aligned wherever it ends
        block = torch.full((whole + 2 * fence,), 7, dtype=dtype or like.dtype)
        before, inside, behind = block.split([fence, count, fence + whole - count])
        around.extend((before, behind))
        inside = inside.view(shape)
        return inside.fill_(filling.value) if inside.is_floating_point() else inside

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda x: x.new_empty(x.shape))
    yield filling
    assert all((x == 7).all() for x in around)


@pytest.fixture
def on_the_emulation(library, fenced, monkeypatch: pytest.MonkeyPatch):
    """Three multiprocessors of an H100."""
    monkeypatch.setattr(backend, "native", lambda: library)
    library.gpu(3, 228 << 10)
    library.tensor_cores("Hopper")


@pytest.fixture
def training_on_the_emulation(training_library, fenced, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_conv, "native", lambda: training_library)
    training_library.gpu(3, 228 << 10)
    training_library.tensor_cores("Hopper")


@pytest.fixture
def replayed(monkeypatch) -> list[int]:
    """Graphs of training on the CPU: a replay computes anew into the same memory. Holds how many were captured."""
    captured = [0]

    def recorded(run):
        captured[0] += 1
        made, leaves = run()
        out, upstream = made.detach().clone(), torch.zeros_like(made)
        gradients = torch.autograd.grad(made, leaves, upstream)
        last = []

        def forward():
            with torch.enable_grad():
                last[:] = [run()]
            out.copy_(last[0][0].detach())

        def backward():
            for old, new in zip(gradients, torch.autograd.grad(*last.pop(), upstream), strict=True):
                old.copy_(new)

        return forward, out, backward, upstream, gradients

    monkeypatch.setattr(capture, "_DEVICE", "cpu")
    monkeypatch.setattr(capture, "_recorded_training", recorded)
    return captured
