"""The kernel tests under the address and undefined-behaviour sanitizers, at every SIMD level of this processor, and
under the thread sanitizer.

That one takes clang: of GCC's OpenMP runtime it does not know the barriers, and would see a race at each of them; those
of ``csrc/cpu/team.cpp`` are compiled with it.
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
CLANG = "clang++-16"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LEVELS, reason="the CPU kernels are not built"),
    pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers are preloaded as on Linux"),
]

# The arguments of the kernel `edge_shells` for one row with 20 edges; {size} is that of its first output.
ARGUMENTS = """
import torch
from threading import Thread
from srcgcnn_fast.ops.registry import core
index = lambda *x: torch.tensor(x, dtype=torch.int32)
distance, sender, row_ptr, crystal_ptr = torch.rand(20), torch.zeros(20, dtype=torch.int32), index(0, 20), index(0, 1)
shell_of, shell_distance, shell_count = torch.empty({size}, dtype=torch.int32), torch.empty(20), index(0)
graph = [distance, None, sender, row_ptr, crystal_ptr, None, None, None]
addresses = [0 if x is None else x.data_ptr() for x in graph]
outputs = [x.data_ptr() for x in (shell_of, shell_distance, shell_count)]
arguments = *outputs, addresses, (1, 20, 1, 1), (0.0, 1.0), 1
"""
DONE = 'print("done at", core.simd_level(), core.__file__)'
OVERRUN = f"{ARGUMENTS}\ncore.edge_shells_f32(*arguments)\n{DONE}"
# Two threads that write to the same arrays; the kernel releases Python's lock.
RACE = f"""{ARGUMENTS.format(size=20)}
threads = [Thread(target=lambda: [core.edge_shells_f32(*arguments) for _ in range(100)]) for _ in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
{DONE}"""


def _libraries(compiler: str, *names: str) -> str:
    """Paths of a compiler's libraries, to be preloaded."""
    paths = [
        subprocess.run([compiler, f"-print-file-name={n}"], capture_output=True, text=True).stdout.strip()
        for n in names
    ]
    for name, path in zip(names, paths, strict=True):
        if not Path(path).is_absolute():
            pytest.skip(f"{compiler} has no {name}")
    return " ".join(paths)


def _built(folder: Path, compiler: str, flags: str, preloaded: tuple[str, ...], variables: dict[str, str]):
    """run(level, arguments) runs Python on a copy of the package, in `folder`, with kernels of these flags."""
    nanobind = pytest.importorskip("nanobind", reason="building the kernels needs nanobind: pip install nanobind")
    cmake, compiler_path = shutil.which("cmake"), shutil.which(compiler)
    if cmake is None or compiler_path is None:
        pytest.skip(f"building the kernels with sanitizers needs cmake and {compiler}")
    shutil.copytree(
        ROOT / "srcgcnn_fast", folder / "srcgcnn_fast", ignore=shutil.ignore_patterns("_core*", "__pycache__")
    )
    options = {
        "CMAKE_BUILD_TYPE": "RelWithDebInfo",
        "CMAKE_CXX_COMPILER": compiler_path,
        "CMAKE_CXX_FLAGS": f"{flags} -DSRCGCNN_NO_POOL",
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
        **os.environ, **variables, "LD_PRELOAD": _libraries(compiler_path, *preloaded), "PYTHONPATH": str(folder)
    }  # fmt: skip

    def run(level: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        level_too = {**environment, "SRCGCNN_FAST_SIMD": level}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=folder, env=level_too, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory):
    """With the address and undefined-behaviour sanitizers."""
    variables = {
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter keeps what it allocates
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }
    libraries = ("libasan.so", "libubsan.so", "libstdc++.so.6")  # without the last the first finds no exceptions of C++
    return _built(tmp_path_factory.mktemp("sanitized"), "g++", FLAGS, libraries, variables)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory):
    """With the thread sanitizer, which looks at the kernels alone."""
    variables = {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1", "OMP_NUM_THREADS": "3"}
    flags = "-fsanitize=thread -shared-libsan -fno-omit-frame-pointer"
    folder = tmp_path_factory.mktemp("sanitized")
    return _built(folder, CLANG, flags, ("libclang_rt.tsan-x86_64.so",), variables)


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


def _kernel_tests(run, level: str) -> subprocess.CompletedProcess[str]:
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
    done = run(level, "-m", "pytest", *options, *map(str, tests))
    assert done.returncode == 0, (done.stdout[-3000:] + done.stderr)[-8000:]
    assert " passed" in done.stdout
    print(f"\n{level}: {done.stdout.splitlines()[-1]}")
    return done


@pytest.mark.parametrize("level", LEVELS)
def test_kernel_tests_are_clean(sanitized, level):
    run = _kernel_tests(sanitized, level)
    assert "runtime error" not in run.stdout + run.stderr
    assert "AddressSanitizer" not in run.stderr


def test_a_race_is_seen(watched):
    """Or else the test below could not fail."""
    run = watched(LEVELS[-1], "-c", RACE)
    assert "sanitized" in run.stdout, "an editable installation hides the copy; install the package as usual"
    assert "ThreadSanitizer: data race" in run.stderr
    assert "ShellFinder<float>" in run.stderr


def test_kernel_tests_have_no_race(watched):
    """At one level: the threads do the same at each."""
    run = _kernel_tests(watched, LEVELS[-1])
    assert "ThreadSanitizer" not in run.stdout + run.stderr
