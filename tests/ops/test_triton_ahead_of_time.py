"""What the compiler makes of the Triton kernels for GPUs that need not be there: registers, spills, 128-bit loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from srcgcnn_fast.ops.triton import problem

PROBLEM = problem()
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
# Most registers that let the stated number of warps of a kernel stay on a multiprocessor of 65 536.
MOST_REGISTERS = {"gate_sum": 80, "backward_senders": 128, "backward_rows": 255, "edge_gram": 255}
GATHERS = {"gate_sum", "backward_rows", "backward_senders", "neighbor_sum", "finish", "backward_finish", "correct_rows"}


def compiled(*arguments: str) -> list[dict]:
    """The report of triton_ahead_of_time.py, in a process without the interpreter."""
    script = Path(__file__).with_name("triton_ahead_of_time.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(report: list[dict], most: dict[str, int] = MOST_REGISTERS) -> None:
    from triton import __version__

    version = tuple(map(int, __version__.split(".")[:2]))
    old = version < (3, 4)  # whose compiler spills a little here and there
    for line in report:
        limit = most.get(line["kernel"], 168)
        assert line["registers"] <= limit or old, line
        few = {(3, 7): 3, (3, 8): 4}.get(version, 0)  # numbers its compiler keeps in memory, of 80 to 255 registers
        assert (line["spills"] <= few and line["stack"] <= 4 * few) or old, line
        assert line["wide_loads"] > 0 or line["kernel"] not in GATHERS, line
        assert line["shared"] <= 48 * 1024, line


def test_a_training_step_and_inference_compile_for_hopper():
    report = compiled("--training-and-inference", "90")
    assert {"gate_sum", "backward_rows", "backward_senders", "edge_gram"} <= {line["kernel"] for line in report}
    check(report)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_every_launch_compiles(architecture):
    report = compiled(architecture)
    assert len(report) >= 25
    check(report)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--dot",), ("--bfloat16",), ("--dot", "--bfloat16")], ids=" ".join)
def test_the_filter_by_dot_and_bfloat16_compile(flags):
    report = compiled("--training-and-inference", *flags, "80", "90", "100")
    assert len(report) >= 3 * 11
    check(report, MOST_REGISTERS | {"gate_sum": 184} if "--dot" in flags else MOST_REGISTERS)
