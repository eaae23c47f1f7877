"""Races between the threads of the CUDA kernels, without a GPU: cuda/races.h says what counts as one."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# Two blocks of 64 threads; those of block 1 have the memory from 512 on.
KERNEL = """
namespace srcgcnn {{
void kernel_{number}(float* all) {{
  SRCGCNN_SHARED(shared);
  [[maybe_unused]] const int t = int(threadIdx.x), block = int(blockIdx.x);
  [[maybe_unused]] float* mine = all + 512 * block;
  [[maybe_unused]] float* four = shared + 4 * t;
  [[maybe_unused]] float x = 0;
  {text}
}}
}}  // namespace srcgcnn
extern "C" void run_{number}(float* all) {{ SRCGCNN_LAUNCH(srcgcnn::kernel_{number}, 2, 64, 1024, nullptr, all); }}
"""
COUNTER = "int* n = (int*)shared; if (t == 0) *n = 0; __syncthreads(); atomicAdd(n, 1); "
COPY = "device::copy_async(four, mine + 4 * t, true); device::commit_copies(); "
WAIT = "device::wait_for_copies<0>(); "
SEVERAL = "shared[t] = t; "
# What is done, what is missing, what follows.
RACES = {
    "between warps": (SEVERAL, "__syncthreads();", "mine[t] = shared[63 - t];"),
    "a warp's barrier between warps": (SEVERAL + "__syncwarp(); ", "__syncthreads();", "mine[t] = shared[63 - t];"),
    "between lanes": (SEVERAL + "__shfl_sync(kAllLanes, t, 0); ", "__syncwarp();", "mine[t] = shared[t ^ 1];"),
    "over what others read": ("x = mine[t]; ", "__syncthreads();", "mine[63 - t] = x;"),
    "over what lanes read": ("x = mine[t ^ 1]; ", "__syncwarp();", "mine[t] = x;"),
    "over what an earlier warp read": (
        "mine[t] = shared[t < 32 ? 40 : 41]; ", "__syncthreads();", "if (t == 40) shared[40] = 1;",
    ),
    "another number in the same place": ("", "if (t == 0)", "mine[0] = t;"),
    "between blocks": ("__syncthreads(); ", "if (block == 0)", "all[t] = block;"),
    "a block that reads another's": ("all[t + 64 * block] = t; ", "if (!block)", "mine[t + 128] = all[t];"),
    "over what another block read": ("x = all[t + 128 * block]; mine[t + 64] = x; ", "if (block == 0)", "all[t] = 1;"),
    "bytes of a word": ("auto* n = (unsigned char*)shared; ", "if (t % 2 == 0)", "n[t / 2] = t;"),
    "a counter": (COUNTER, "__syncthreads();", "mine[t] = *n;"),
    "a copy that has not come": (COPY, WAIT, "mine[t + 256] = four[0]; " + WAIT),
    "a copy that another lane waited for": (COPY + WAIT, "__syncwarp();", "mine[t + 256] = shared[4 * (t ^ 1)];"),
    "a copy over what is read": (
        SEVERAL + "__syncthreads(); x = shared[t ^ 1]; ", "__syncthreads();", COPY + WAIT + "mine[t + 256] = x;",
    ),
    "a copy of what is written": ("mine[4 * (t ^ 1)] = 1; ", "__syncwarp();", COPY + WAIT),
}  # fmt: skip
FINE = {
    "the same number in the same place": "mine[0] = 1;",
    "a counter of all blocks": "atomicAdd((int*)all, t);",
    "bytes side by side": "((unsigned char*)shared)[t] = t;",
    "own numbers": "mine[t] = 1; mine[t] += shared[t]; shared[t] = mine[t];",
}


@pytest.fixture(scope="module")
def races_of(emulation, tmp_path_factory):
    """races_of(text): those of a kernel, one of the texts above."""
    texts = [before + cure + " " + after for before, cure, after in RACES.values()]
    texts += [before + after for before, _, after in RACES.values()] + [*FINE.values()]
    source = tmp_path_factory.mktemp("races") / "kernels.cu"
    kernels = [KERNEL.format(number=number, text=text) for number, text in enumerate(texts)]
    source.write_text('#include "device.cuh"\n' + "".join(kernels))
    library = emulation.Emulated(emulation.build(source.parent, source, races=True))

    def races(text: str) -> list[str]:
        library.run(f"run_{texts.index(text)}", (ctypes.c_float * 1024)())
        return library.races()

    return races


@pytest.mark.parametrize("name", RACES)
def test_a_race_is_found_and_where(name, races_of):
    before, cure, after = RACES[name]
    found = races_of(before + after)
    assert found and all("kernels.cu" in race for race in found)
    assert not races_of(before + cure + " " + after)


@pytest.mark.parametrize("name", FINE)
def test_what_is_no_race(name, races_of):
    assert not races_of(FINE[name])


def look_for_races(place: Path, *options: str, files: str, widths: str = "") -> None:
    """Not from the root, whose sources would be imported in the place of what is installed."""
    paths = [str(HERE / f"test_cuda{name}.py") for name in files.split(" ")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths, *options]
    environment = os.environ | {"SRCGCNN_RACES": widths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=place)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:]


def test_the_kernels_have_none(emulation, tmp_path):
    """Some; the slow test takes all."""
    names = "test_stack and many and recurrent or test_convolution and popular-train"
    names += " or test_whole_networks and SRCGCNN-table"
    look_for_races(tmp_path, "-k", names, files=" _conv", widths="32")


@pytest.mark.slow
def test_none_of_the_kernels_has_any(emulation, tmp_path):
    look_for_races(tmp_path, files=" _network _conv _pad")
