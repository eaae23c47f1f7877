"""Every SIMD level of this processor computes the same; a level that it has not is an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import srcgcnn_fast as sf
from srcgcnn_fast.ops import registry

pytestmark = pytest.mark.skipif(not sf.backends()["cpu"].available, reason="the CPU kernels are not built")
LEVELS = registry.core.simd_levels() if registry.core is not None else []


@pytest.mark.parametrize("level", LEVELS[:-1])
def test_golden_values_and_conformance(level, tmp_path):
    """The same tests in a process that is held to a lower level."""
    tests = Path(__file__).parents[1]
    chosen = [tests / "nn" / "test_golden.py", tests / "ops" / "test_conformance.py"]
    subset = "weighted or ragged or float64 or any_width or ends or stack"
    options = ["-q", "-x", "-rs", "-p", "no:cacheprovider", "-k", subset]
    command = [sys.executable, "-m", "pytest", *options, *map(str, chosen)]
    environment = {**os.environ, "SRCGCNN_FAST_SIMD": level}
    # Away from a checkout, whose sources would be imported in place of the installed package.
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout
    assert "backend cpu:" not in run.stdout  # the reason that a skipped backend would give


def test_an_unknown_level_is_an_error(tmp_path):
    code = "import torch, srcgcnn_fast as sf; print(sf.backends()['cpu'].reason); sf.GatedConv(8)"
    code += "; from srcgcnn_fast.ops import registry; registry.select(torch.zeros(1))"
    environment = {**os.environ, "SRCGCNN_FAST_SIMD": "v9"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    assert "SRCGCNN_FAST_SIMD=v9 is not a level of this processor; choose one of" in run.stdout
    assert "InputError" in run.stderr
