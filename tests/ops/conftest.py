"""The kernels of csrc/cuda on tensors of the CPU; with SRCGCNN_RACES in the environment they look for races, too."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from srcgcnn_fast.ops import cuda as backend
from srcgcnn_fast.ops import cuda_conv

_spec = importlib.util.spec_from_file_location("emulated", Path(__file__).parent / "cuda" / "emulated.py")
assert _spec is not None and _spec.loader is not None
emulated = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(emulated)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory):
    """built(source): its kernels, compiled for the CPU (cuda/emulation.h)."""
    if emulated.compiler() is None:
        pytest.skip("the emulation needs g++")

    def build(source: Path, races: bool = "SRCGCNN_RACES" in os.environ):
        return emulated.Emulated(emulated.build(tmp_path_factory.mktemp("emulated"), source, races))

    return build


@pytest.fixture(autouse=True)
def without_races():
    """Of a test's launches."""
    yield
    assert not [race for library in emulated.Emulated.looking for race in library.races()]


@pytest.fixture(scope="session")
def library(built):
    """The kernels for inference."""
    return built(emulated.KERNELS / "stack.cu")


@pytest.fixture(scope="session")
def training_library(built):
    """Those for training."""
    return built(emulated.KERNELS / "conv.cu")


@pytest.fixture(scope="session")
def padding_library(built):
    """Those that fill the batches of captured graphs."""
    return built(emulated.KERNELS / "pad.cu")


@pytest.fixture
def fenced(monkeypatch: pytest.MonkeyPatch):
    """Tensors for kernels to write: what is forgotten is NaN, not an old right answer; what is written beside them is
    found at the end."""
    fence, blocks = 32, []

    def new_empty(like: torch.Tensor, *size, dtype: torch.dtype | None = None) -> torch.Tensor:
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        blocks.append(torch.full((shape.numel() + 2 * fence,), 7, dtype=dtype or like.dtype))
        inside = blocks[-1][fence:-fence].view(shape)
        return inside.fill_(float("nan")) if inside.is_floating_point() else inside

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda x: x.new_empty(x.shape))
    yield
    assert all((block[:fence] == 7).all() and (block[-fence:] == 7).all() for block in blocks)


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
