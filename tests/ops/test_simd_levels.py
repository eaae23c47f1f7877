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


@pytest.fixture(scope="module")
def at_lower_levels(tmp_path_factory):
    """level -> the process, one of those side by side, that tests at this level."""
    tests, place = Path(__file__).parents[1], tmp_path_factory.mktemp("levels")
    chosen = [tests / "nn" / "test_golden.py", tests / "ops" / "test_conformance.py"]
    # Without the largest batch, which takes longer than all else; test_sanitizers.py has it at every level.
    subset = "(weighted or ragged or float64 or any_width or ends or stack) and not large-"
    options = ["-q", "-x", "-rs", "-p", "no:cacheprovider", "-k", subset]
    command = [sys.executable, "-m", "pytest", *options, *map(str, chosen)]
    # Away from a checkout, whose sources would be imported in place of the installed package.
    given = {"cwd": place, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = {
        level: subprocess.Popen(command, env={**os.environ, "SRCGCNN_FAST_SIMD": level}, **given)
        for level in LEVELS[:-1]
    }
    yield running
    for process in running.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("level", LEVELS[:-1])
def test_golden_values_and_conformance(level, at_lower_levels):
    """The same tests in a process that is held to a lower level."""
    said = at_lower_levels[level].communicate()[0]
    assert at_lower_levels[level].returncode == 0, said[-3000:]
    assert " passed" in said
    assert "backend cpu:" not in said  # the reason that a skipped backend would give


def test_an_unknown_level_is_an_error(tmp_path):
    code = "import torch, srcgcnn_fast as sf; from srcgcnn_fast.doctor import report; print(report()); sf.GatedConv(8)"
    code += "; from srcgcnn_fast.ops import registry; registry.select(torch.zeros(1))"
    environment = {**os.environ, "SRCGCNN_FAST_SIMD": "v9"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    said = "the compiled kernels do not load: SRCGCNN_FAST_SIMD=v9 is not a level of this processor; choose one of"
    assert f"  cpu          built, not usable  {said}" in run.stdout
    assert f"  CPU tensors take: none: {said}" in run.stdout
    assert "InputError" in run.stderr
