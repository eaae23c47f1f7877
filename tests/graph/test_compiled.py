"""Compiled kernels on disk: used again, and never older than the files that they are compiled from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

from numba.core.caching import NullCache
from numba.core.dispatcher import Dispatcher

from srcgcnn_fast.graph import compiled, symmetry  # noqa: F401

PACKAGE = {
    "__init__.py": "",
    "vectors.py": "import numba\nfrom .compiled import kept_on_disk\n"
    "jit = numba.njit\nkernel = lambda function: kept_on_disk(jit(function))\n",
    "helper.py": "from .vectors import jit\n\n@jit\ndef term(x):\n    return x + 1\n",
    "entry.py": "from .helper import term\nfrom .vectors import kernel\n\n@kernel\ndef run(x):\n    return term(x)\n",
    "other.py": "A = 1\n",
}
CALL = "from kernels.entry import run; print(run(1), sum(run.stats.cache_hits.values()))"


def test_a_changed_helper_is_compiled_again(tmp_path: Path):
    """With an entry point's file that did not change, and times and sizes as they were: as after an upgrade."""
    package = tmp_path / "kernels"
    package.mkdir()
    shutil.copy(compiled.__file__, package)

    def write(name: str, text: str) -> None:
        (package / name).write_text(text)
        os.utime(package / name, (10**9, 10**9))

    def run() -> list[str]:
        environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
        command = [sys.executable, "-B", "-c", CALL]  # without .pyc files, which go by time and size
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.split()

    for name, text in PACKAGE.items():
        write(name, text)
    assert run() == ["2", "0"]
    assert run() == ["2", "1"]
    write("other.py", "A = 2\n")
    assert run() == ["2", "1"]
    write("helper.py", PACKAGE["helper.py"].replace("+ 1", "+ 2"))
    assert run() == ["3", "0"]
    assert run() == ["3", "1"]


@pytest.mark.parametrize("ending", ["nbi", "nbc"])
def test_damaged_files_are_compiled_anew(tmp_path: Path, ending: str):
    """As a full disk or a killed process leaves them."""
    package = tmp_path / "kernels"
    package.mkdir()
    shutil.copy(compiled.__file__, package)
    for name, text in PACKAGE.items():
        (package / name).write_text(text)

    def run() -> list[str]:
        environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
        done = subprocess.run(
            [sys.executable, "-c", CALL], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert ("is damaged" in done.stderr) == damaged
        return done.stdout.split()

    damaged = False
    run()
    (file,) = package.glob(f"__pycache__/*.{ending}")
    file.write_bytes(file.read_bytes()[:100])
    damaged = True
    assert run() == ["2", "0"]
    damaged = False
    assert run() == ["2", "1"]


def test_no_compilation_is_one_sentence():
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    command = [sys.executable, "-c", "import srcgcnn_fast.graph.neighbors"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "InputError: NUMBA_DISABLE_JIT is set" in done.stderr


def test_the_graph_kernels_are_kept_so():
    modules = [module for name, module in sys.modules.items() if name.startswith("srcgcnn_fast.graph.")]
    compiles = {x for module in modules for x in vars(module).values() if isinstance(x, Dispatcher)}
    assert len(compiles) > 20
    assert {Path(x.py_func.__code__.co_filename).name for x in compiles} <= set(compiled.sources())
    kept = [x._cache._cache_file for x in compiles if not isinstance(x._cache, NullCache)]
    assert len(kept) >= 2 and all(file._source_stamp[1] == compiled.sources() for file in kept)
