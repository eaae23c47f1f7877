"""What the CUDA kernels touch, without a GPU: no array of theirs has anything behind it (cuda/pages.cpp)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NOT_BETWEEN_PAGES = "begin_anywhere"  # says itself how its arrays are aligned


@pytest.fixture(scope="module")
def between_pages(emulation, tmp_path_factory):
    """between_pages(arguments): Python in another process, whose tensors end where a page does."""
    library = tmp_path_factory.mktemp("pages") / "pages.so"
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([emulation.compiler(), *options, HERE / "cuda" / "pages.cpp", "-o", library], check=True)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"LD_PRELOAD": str(library)}
        command = [sys.executable, *arguments]  # not from the root, whose sources would be imported
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=library.parent)

    return run


@pytest.mark.parametrize(("index", "is_there"), [(6, True), (7, False)])
def test_what_is_behind_a_tensor_cannot_be_read(between_pages, index, is_there):
    read = f"ctypes.c_float.from_address(x.data_ptr() + 4 * {index}).value"
    done = between_pages("-c", f"import ctypes, torch; x = torch.ones(7); print({read})")
    assert (done.returncode == 0) == is_there
    assert ("1.0" in done.stdout) == is_there


def run_tests(between_pages, *options: str, files: str) -> None:
    paths = [str(HERE / f"test_cuda{name}.py") for name in files.split(" ")]
    done = between_pages("-m", "pytest", "-q", "-p", "no:cacheprovider", *paths, *options)
    assert done.returncode == 0 and " passed" in done.stdout, (done.stdout + done.stderr)[-5000:]


def test_the_kernels_read_nothing_behind_their_arrays(between_pages):
    """Some; the slow test takes all."""
    names = "test_any_width or test_maps_without_bias or bad_indices"
    run_tests(between_pages, "-k", names, files="_network _conv")


@pytest.mark.slow
def test_no_kernel_reads_anything_behind_its_arrays(between_pages):
    run_tests(between_pages, "-k", f"not {NOT_BETWEEN_PAGES}", files=" _network _conv _pad")
