"""The CUDA kernels through the compiler of another toolkit, without a GPU and without that toolkit's nvcc.

PyPI has NVRTC of CUDA 12.4 to 12.9, which is their compiler for device code. Unpack the wheel and name the library:

    python -m pip download --no-deps nvidia-cuda-nvrtc-cu12==12.4.127 && unzip -d nvrtc nvidia_cuda_nvrtc_cu12-*.whl
    python tests/ops/cuda/other_toolkits.py nvrtc/nvidia/cuda_nvrtc/lib/libnvrtc.so.12

Prints a line for each group of kernels and architecture. NVRTC knows no host code; for the launchers,
clang (16 is tried) reads the headers of that toolkit, which PyPI has, too:

    python -m pip download --no-deps -d wheels nvidia-cuda-nvcc-cu12==12.4.* nvidia-cuda-runtime-cu12==12.4.* \\
        nvidia-cuda-cccl-cu12==12.4.* nvidia-curand-cu12==10.3.5.*
    for wheel in wheels/*.whl; do unzip -qo $wheel -d toolkit; done
    CLANG=clang++-16 python tests/ops/cuda/other_toolkits.py toolkit/nvidia
"""

from __future__ import annotations

import ctypes as c
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CSRC = Path(__file__).parents[3] / "csrc"
FOUND = re.compile(r"'(\S+)' for '(sm_\d+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", re.DOTALL)
STDINT = """
typedef signed int int32_t; typedef unsigned int uint32_t; typedef unsigned short uint16_t; typedef long long int64_t;
typedef unsigned long long uint64_t; typedef unsigned long long uintptr_t;
#define NAN __int_as_float(0x7fffffff)
#define INT32_MAX 2147483647
"""


def inference() -> str:
    """The device code of stack.cuh, every kernel of every width."""
    text = '#include "cuda/stack.cuh"\nnamespace srcgcnn {\n'
    for width in (32, 64, 128):
        for half in ("false", "true"):
            stack = f"const Stack<{width}, {half}>"
            text += "".join(
                f"template __global__ void whole_crystals<{width}, {warps}, {half}>({stack});\n" for warps in (8, 16)
            )
            text += "".join(
                f"template __global__ void layer_of_crystals<{width}, {gate}, {half}>({stack}, int);\n"
                for gate in ("false", "true")
            )
            text += "".join(
                f"template __global__ void {name}<{width}, {half}>({stack});\n"
                for name in ("readout_of_crystals", "maps_of_crystals", "list_parts")
            )
            prepared = f"const __grid_constant__ Prepared<{width}, typename Storage<{half}>::type>"
            rest = "const __grid_constant__ Layers, int, int, const DeviceGraph, int, int"
            text += f"template __global__ void prepare<{width}, {half}>(float*, {prepared}, {rest});\n"
    return text + "}\n"


def training() -> str:
    """That of conv.cuh, gram.cuh and rows.cuh."""
    kernels = (
        (name, half) for name in ("gate_sum", "backward_receivers", "backward_senders") for half in ("false", "true")
    )
    text = "".join(f"template __global__ void {name}<{half}>(const DeviceConv);\n" for name, half in kernels)
    text += "".join(
        f"template __global__ void multiply_rows<{half}, {kept}, {relaxed}>(const __grid_constant__ RowProduct);\n"
        for half in ("false", "true")
        for kept in ("false", "true")
        for relaxed in ("false", "true")
    )
    text += "".join(
        f"template __global__ void multiply_columns<{fours}>(const __grid_constant__ ColumnProduct);\n"
        for fours in ("false", "true")
    )
    return '#include "cuda/gram.cuh"\nnamespace srcgcnn {\n' + text + "}\n"


PROGRAMS = {"inference": inference(), "training": training()}


class Compiler:
    """NVRTC."""

    def __init__(self, library: str) -> None:
        self._library = c.CDLL(library)
        self._library.nvrtcGetErrorString.restype = c.c_char_p

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, f"nvrtc{name}")(*arguments)
        if code:
            raise RuntimeError(f"nvrtc{name}: {self._library.nvrtcGetErrorString(code).decode()}")

    @property
    def version(self) -> str:
        major, minor = c.c_int(), c.c_int()
        self._call("Version", c.byref(major), c.byref(minor))
        return f"{major.value}.{minor.value}"

    def compiled(self, source: str, architecture: str) -> str:
        """What the compiler says about the kernels of ``source``.

        Raises:
            RuntimeError: they do not compile.
        """
        program = c.c_void_p()
        headers = {"stdint.h": STDINT}
        contents, names = ((c.c_char_p * len(headers))(*(x.encode() for x in y)) for y in (headers.values(), headers))
        self._call("CreateProgram", c.byref(program), source.encode(), b"kernels.cu", len(headers), contents, names)
        flags = ["--std=c++17", f"--gpu-architecture={architecture}", f"--include-path={CSRC}"]
        flags += [f"--include-path={CSRC / 'cuda'}", "--device-as-default-execution-space", "--ptxas-options=-v"]
        try:
            self._call("CompileProgram", program, len(flags), (c.c_char_p * len(flags))(*(x.encode() for x in flags)))
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{self._log(program)}") from None
        return self._log(program)

    def _log(self, program: c.c_void_p) -> str:
        size = c.c_size_t()
        self._call("GetProgramLogSize", program, c.byref(size))
        log = c.create_string_buffer(size.value)
        self._call("GetProgramLog", program, log)
        return log.value.decode()


LATER_THAN_CLANG = """
__device__ unsigned __reduce_max_sync(unsigned, unsigned); __device__ int __reduce_max_sync(unsigned, int);
__device__ unsigned __reduce_min_sync(unsigned, unsigned); __device__ int __reduce_min_sync(unsigned, int);
__device__ unsigned __reduce_or_sync(unsigned, unsigned);
"""


def launchers(packages: Path) -> None:
    """Compile the host side of every source against the headers in PACKAGE/include, for each width.

    Raises:
        CalledProcessError: one does not compile, or is warned of.
    """
    with tempfile.TemporaryDirectory() as folder:
        toolkit, declared = Path(folder, "toolkit"), Path(folder, "later.h")
        declared.write_text(LATER_THAN_CLANG)
        for package in packages.iterdir():
            for part in ("include", "nvvm", "bin"):
                if (package / part).is_dir():
                    shutil.copytree(package / part, toolkit / part, dirs_exist_ok=True)
        version = re.search(r"CUDART_VERSION +(\d+)", (toolkit / "include/cuda_runtime_api.h").read_text())
        assert version is not None
        flags = [
            "-x",
            "cuda",
            f"--cuda-path={toolkit}",
            "--cuda-host-only",
            "-std=c++17",
            f"-I{CSRC}",
            "-Wall",
            "-Werror",
        ]
        flags += ["-Wno-unknown-cuda-version", "-Wno-unknown-attributes", "-include", str(declared)]
        sources = sorted((CSRC / "cuda").glob("*.cu"))
        for source in sources:
            for width in (32, 64, 128):
                command = [os.environ.get("CLANG", "clang++"), *flags, f"-DSRCGCNN_WIDTH={width}", "-c", str(source)]
                subprocess.run([*command, "-o", os.devnull], check=True)
    number = int(version.group(1))
    print(
        f"CUDA {number // 1000}.{number % 1000 // 10}: launchers of {len(sources)} sources compile, by their host side"
    )


if __name__ == "__main__":
    if Path(sys.argv[1]).is_dir():
        launchers(Path(sys.argv[1]))
        sys.exit()
    compiler = Compiler(sys.argv[1])
    for name, source in PROGRAMS.items():
        for architecture in ("sm_80", "sm_90", "compute_90"):
            log = compiler.compiled(source, architecture)
            found = [(kernel, int(spilled), int(registers)) for kernel, _, spilled, registers in FOUND.findall(log)]
            spills = {kernel: spilled for kernel, spilled, _ in found if spilled}
            most = max((registers for *_, registers in found), default=0)
            said = f", {len(found)} kernels, up to {most} registers, spills: {spills or 'none'}" if found else ""
            print(f"CUDA {compiler.version}, {name}, {architecture}: compiles{said}", flush=True)
