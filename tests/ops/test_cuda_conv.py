"""The CUDA kernels for training against the reference in float64, without a GPU: their source, compiled for the CPU.

cuda/emulation.h supplies CUDA's execution model; what it shows, and what not, is said there and in test_cuda.py.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from srcgcnn_fast.ops import cuda_conv as backend


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(__file__).parent / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


emulated, convolution = load("cuda/emulated.py"), load("convolution.py")
compare, relative, NAMES, TRAINING = convolution.compare, convolution.relative, convolution.NAMES, convolution.TRAINING
pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="the emulation needs g++")


class Problem(convolution.Problem):
    backend = backend


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory):
    return emulated.Emulated(emulated.build(tmp_path_factory.mktemp("emulated"), "conv"))


@pytest.fixture(autouse=True)
def on_the_emulation(library, monkeypatch: pytest.MonkeyPatch):
    """The kernels on tensors of the CPU; whatever one forgets to write is NaN, not an old right answer."""

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    monkeypatch.setattr(backend, "native", lambda: library)
    library.gpu(3, 228 << 10)


@pytest.mark.parametrize("training", TRAINING, ids=["train", "eval", "frozen bn1"])
@pytest.mark.parametrize("kind", ["twelve", "weighted", "ragged", "isolated", "one atom", "no edges"])
def test_convolution(kind, training):
    if kind in ("one atom", "no edges") and any(training):
        pytest.skip("batch norm cannot train on it; test_functional says so")
    seeds = range(5) if kind in ("isolated", "one atom") else range(1)  # few numbers say little about roundings
    compare([Problem(kind, 16, 41, seed=seed) for seed in seeds], training)
