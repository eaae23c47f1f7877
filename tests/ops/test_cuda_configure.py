"""What CMake decides about the CUDA kernels: architectures, and a sentence wherever they are not built."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEFAULT = {"80,code=[sm_80]", "90,code=[compute_90,sm_90]"}
OLD = "#undef __CUDACC_VER_MAJOR__\n#define __CUDACC_VER_MAJOR__ 11\n"
TOOLKIT = "install the CUDA toolkit 12.4 or newer, put nvcc on PATH or set CUDACXX"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
    pytest.mark.skipif(shutil.which("cmake") is None, reason="CMake is not installed"),
]


@pytest.fixture
def configure(tmp_path: Path):
    """configure(definitions, environment) -> (what CMake said on one line, the compilers' commands)."""
    nanobind = pytest.importorskip("nanobind", reason="the build needs nanobind: pip install nanobind")

    def run(definitions: list[str], environment: dict[str, str]) -> tuple[str, str]:
        given = [
            "CMAKE_EXPORT_COMPILE_COMMANDS=ON", "SKBUILD_PROJECT_VERSION=0", f"Python_EXECUTABLE={sys.executable}",
            f"nanobind_DIR={nanobind.cmake_dir()}", *definitions,
        ]  # fmt: skip
        command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), *(f"-D{x}" for x in given)]
        inherited = {k: v for k, v in os.environ.items() if k not in ("CUDAARCHS", "SRCGCNN_CUDA")}
        done = subprocess.run(command, capture_output=True, text=True, env=inherited | environment)
        commands = tmp_path / "build" / "compile_commands.json"
        assert (done.returncode == 0) == commands.exists(), done.stderr
        return " ".join((done.stdout + done.stderr).split()), commands.read_text() if commands.exists() else ""

    return run


@pytest.mark.parametrize(
    ("definitions", "environment", "expected"),
    [
        ([], {}, DEFAULT),
        (["SRCGCNN_CUDA=ON", "CMAKE_CUDA_ARCHITECTURES=90a"], {}, {"90a,code=[compute_90a,sm_90a]"}),
        ([], {"CUDAARCHS": "80-virtual;100-real"}, {"80,code=[compute_80]", "100,code=[sm_100]"}),
    ],
    ids=["default", "definition", "environment"],
)
def test_architectures(configure, definitions, environment, expected):
    _, commands = configure(definitions, environment)
    assert set(re.findall(r"generate-code=arch=compute_([^\" \\]+)", commands)) == expected
    assert commands.count("csrc/cuda/stack.cu -o") == 3 and "SRCGCNN_WITH_CUDA" in commands


@pytest.mark.parametrize("asked", ["AUTO", "ON"])
@pytest.mark.parametrize(
    ("definition", "reason", "advice"),
    [
        ("CMAKE_CUDA_COMPILER=NOTFOUND", "no nvcc was found", TOOLKIT),
        (
            "refused",
            "/[^ ]+/nvcc compiles nothing here",
            "set CUDAHOSTCXX to an older C[+][+] compiler, which it may need, or install all of its toolkit",
        ),
        ("CMAKE_CUDA_COMPILER=old", "nvcc 11.0.[0-9]+ is older than 12.4", TOOLKIT),
        ("WIN32=1", "there are no CUDA kernels for Windows", "use Linux, or WSL"),
        (
            "CMAKE_CUDA_ARCHITECTURES=75;90",
            "CMAKE_CUDA_ARCHITECTURES names 75, and the kernels need 80 or newer",
            "leave it out",
        ),
    ],
    ids=["no nvcc", "C++ compiler", "old nvcc", "Windows", "old GPU"],
)
def test_why_they_are_not_built(configure, tmp_path, definition, reason, advice, asked):
    """Left out with the reason, which the package keeps; demanded, an error with the advice."""
    if definition.endswith("old"):
        header, compiler = tmp_path / "old.h", tmp_path / "nvcc"
        header.write_text(OLD)
        compiler.write_text(f'#!/bin/sh\nexec {shutil.which("nvcc")} -include {header} "$@"\n')
        compiler.chmod(0o755)
        definition = f"CMAKE_CUDA_COMPILER={compiler}"
    away = [f"CMAKE_IGNORE_PATH={Path(shutil.which('nvcc')).parent}"] if definition.endswith("NOTFOUND") else []
    given, environment = [definition], {}
    if definition.endswith("refused"):
        given, environment = [], {"CUDAHOSTCXX": shutil.which("false")}
    said, commands = configure([f"SRCGCNN_CUDA={asked}", *given, *away], environment)
    if asked == "ON":
        assert not commands
        assert re.search(rf"SRCGCNN_CUDA=ON, but {reason}: {advice}, or configure with SRCGCNN_CUDA=AUTO\.", said)
    else:
        assert re.search(rf"Building for the CPU only \(SRCGCNN_CUDA=AUTO\): {reason}\.", said)
        assert re.search(rf"SRCGCNN_CUDA_BUILD=[\\\" ]*not built: {reason}", commands)
        assert "csrc/cuda/" not in commands and "SRCGCNN_WITH_CUDA" not in commands
