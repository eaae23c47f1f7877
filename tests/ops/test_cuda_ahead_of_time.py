"""What nvcc makes of the CUDA kernels for GPUs that need not be there: registers and spills."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
]


@pytest.mark.parametrize("architecture", ["80", "90"])
def test_the_kernels_fit_the_registers_of_two_blocks(architecture):
    script = Path(__file__).parent / "cuda" / "ahead_of_time.py"
    done = subprocess.run([sys.executable, str(script), architecture], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    training = [line for line in lines if line["width"] == 0]  # and the one that pads batches
    assert len(training) == 35 and all(line["spilled"] == line["stack"] == 0 for line in training), training
    most = {"backward_receivers": 255, "edge_gram": 255, "multiply_rows": 168, "multiply_columns": 170}
    most["gram_products"] = 168
    for line in training:  # of two blocks of the Gram matrix, three of those with long sums, or four
        assert line["registers"] <= most.get(str(line["kernel"]), 128), line
    lines = [line for line in lines if line["width"]]
    # prepare, two sizes of blocks, a list and two parts of a layer, means and maps; two storages, three widths
    assert len(lines) == 48
    for line in lines:
        assert line["registers"] <= 128, line
        assert line["spilled"] == line["stack"] == 0, line
