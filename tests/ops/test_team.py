"""The threads of kernels that clang compiled: csrc/cpu/team.cpp, plain and under the thread sanitizer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("tests/ops/team.cpp", "csrc/cpu/team.cpp")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the program of the test forks")


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [(["-Wall", "-Wextra", "-Werror"], ["fork"]), (["-g", "-fsanitize=thread"], [])],
    ids=["plain, with a fork", "thread sanitizer"],
)
def test_regions_loops_and_barriers(tmp_path, flags, arguments):
    """The program checks what threads did and read; a wrong order of memory is the sanitizer's to find."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no g++ or clang++")
    program = tmp_path / "team"
    command = [compiler, "-std=c++17", "-O2", "-pthread", *flags, *SOURCES, "-o", str(program)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if "-fsanitize=thread" in flags and built.returncode and "tsan" in built.stderr:
        pytest.skip(f"{compiler} has no thread sanitizer")
    assert built.returncode == 0, built.stderr[-3000:]
    run = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines()[-1] == "done"
