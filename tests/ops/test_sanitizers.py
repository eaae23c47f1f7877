"""The kernel tests under the address and undefined-behaviour sanitizers, at every SIMD level of this processor.

The thread sanitizer is left out: it does not know the barriers of GCC's OpenMP runtime and sees a race at each of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from srcgcnn_fast.ops import registry

ROOT = Path(__file__).parents[2]
LEVELS = registry.core.simd_levels() if registry.core is not None else []
FLAGS = "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-omit-frame-pointer"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LEVELS, reason="the CPU kernels are not built"),
    pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers are preloaded as on Linux"),
]

# The arguments of the kernel `edge_shells` for one row with 20 edges; {size} is that of its first output.
OVERRUN = """
import torch
from srcgcnn_fast.ops.registry import core
index = lambda *x: torch.tensor(x, dtype=torch.int32)
distance, sender, row_ptr, crystal_ptr = torch.rand(20), torch.zeros(20, dtype=torch.int32), index(0, 20), index(0, 1)
shell_of, shell_distance, shell_count = torch.empty({size}, dtype=torch.int32), torch.empty(20), index(0)
graph = [distance, None, sender, row_ptr, crystal_ptr, None, None, None]
addresses = [0 if x is None else x.data_ptr() for x in graph]
outputs = [x.data_ptr() for x in (shell_of, shell_distance, shell_count)]
core.edge_shells_f32(*outputs, addresses, (1, 20, 1, 1), (0.0, 1.0), 1)
print("done at", core.simd_level(), core.__file__)
"""


def _runtime(compiler: str) -> str:
    """The sanitizers' libraries; with them the C++ one, whose exceptions the first would otherwise not find."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    paths = [
        subprocess.run([compiler, f"-print-file-name={n}"], capture_output=True, text=True).stdout.strip()
        for n in names
    ]
    for name, path in zip(names, paths, strict=True):
        if not Path(path).is_absolute():
            pytest.skip(f"{compiler} has no {name}")
    return " ".join(paths)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory):
    """sanitized(level, arguments) runs Python on a copy of the package whose kernels carry the sanitizers."""
    nanobind = pytest.importorskip("nanobind", reason="building the kernels needs nanobind: pip install nanobind")
    cmake, compiler = shutil.which("cmake"), shutil.which("g++")
    if cmake is None or compiler is None:
        pytest.skip("building the kernels with sanitizers needs cmake and g++")
    folder = tmp_path_factory.mktemp("sanitized")
    shutil.copytree(
        ROOT / "srcgcnn_fast", folder / "srcgcnn_fast", ignore=shutil.ignore_patterns("_core*", "__pycache__")
    )
    options = {
        "CMAKE_BUILD_TYPE": "RelWithDebInfo",
        "CMAKE_CXX_COMPILER": compiler,
        "CMAKE_CXX_FLAGS": f"{FLAGS} -DSRCGCNN_NO_POOL",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": folder / "srcgcnn_fast",
        "Python_EXECUTABLE": sys.executable,
        "SKBUILD_PROJECT_VERSION": "0",
        "SRCGCNN_CUDA": "OFF",
        "nanobind_DIR": nanobind.cmake_dir(),
    }
    configure = [cmake, "-S", ROOT, "-B", folder / "build", *(f"-D{k}={v}" for k, v in options.items())]
    for command in (configure, [cmake, "--build", folder / "build", "--target", "_core", "--parallel", "2"]):
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        assert built.returncode == 0, (built.stdout + built.stderr)[-4000:]
    environment = {
        **os.environ,
        "LD_PRELOAD": _runtime(compiler),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter keeps what it allocates
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "2",
    }

    def run(level: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        level_too = {**environment, "SRCGCNN_FAST_SIMD": level}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=folder, env=level_too, capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize("level", LEVELS)
def test_an_overrun_is_seen(sanitized, level):
    """Or else the test below could not fail."""
    right = sanitized(level, "-c", OVERRUN.format(size=20))
    assert right.returncode == 0, right.stderr[-3000:]
    assert f"done at {level}" in right.stdout
    assert "sanitized" in right.stdout, "an editable installation hides the copy; install the package as usual"
    wrong = sanitized(level, "-c", OVERRUN.format(size=19))
    assert wrong.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in wrong.stderr
    assert f"srcgcnn::{level}::ShellFinder<float>" in wrong.stderr


@pytest.mark.parametrize("level", LEVELS)
def test_kernel_tests_are_clean(sanitized, level):
    names = (
        "ops/test_conformance.py",
        "ops/test_elements.py",
        "ops/test_library.py",
        "ops/test_readout.py",
        "nn/test_golden.py",
    )
    tests = [ROOT / "tests" / name for name in names]
    # -s: what a sanitizer says before it ends the process must not be in a file of pytest's.
    options = ["-q", "-x", "-s", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    run = sanitized(level, "-m", "pytest", *options, *map(str, tests))
    assert run.returncode == 0, (run.stdout[-3000:] + run.stderr)[-8000:]
    assert " passed" in run.stdout
    assert "runtime error" not in run.stdout + run.stderr
    assert "AddressSanitizer" not in run.stderr
    print(f"\n{level}: {run.stdout.splitlines()[-1]}")
