"""The CUDA kernels compiled for the CPU (emulation.h), under the names of the compiled module's functions."""

from __future__ import annotations

import ctypes as c
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from srcgcnn_fast.ops import cuda_conv

HERE = Path(__file__).parent
KERNELS = HERE.parents[2] / "csrc" / "cuda"
POINTER = c.c_void_p


class Graph(c.Structure):
    _fields_ = [
        *[(name, POINTER) for name in ("distance", "edge_term", "sender", "row_ptr", "crystal_ptr")],
        *[(name, c.c_int64) for name in ("n_rows", "n_edges", "n_crystals")],
        ("n_features", c.c_int32),
        ("dmin", c.c_float),
        ("inverse_step", c.c_float),
    ]  # fmt: skip


class Layer(c.Structure):
    _fields_ = [*[(f"vector{k}", POINTER) for k in range(10)], ("eps1", c.c_double), ("eps2", c.c_double)]


class Conv(c.Structure):
    """DeviceConv of csrc/cuda/conv.h."""

    _fields_ = [
        *[(name, POINTER) for name in cuda_conv.FIELDS],
        *[(name, c.c_int64) for name in cuda_conv.SIZES],
        *[(name, c.c_float) for name in cuda_conv.NUMBERS],
    ]  # fmt: skip


class Features(c.Structure):
    _fields_ = [("data", POINTER), ("species", POINTER), ("n_table", c.c_int64)]


class Dense(c.Structure):
    _fields_ = [("weight", POINTER), ("bias", POINTER)]


class Padding(c.Structure):
    """BatchPadding of csrc/cuda/pad.h."""

    _fields_ = [("source", POINTER * 8), ("target", POINTER * 8), ("sizes", c.c_int64 * 9)]

    @classmethod
    def of(cls, source: list[int], target: list[int], sizes: list[int]) -> Padding:
        return cls((POINTER * 8)(*source), (POINTER * 8)(*target), (c.c_int64 * 9)(*sizes))


MOST_READOUT = 16


class Plan(c.Structure):
    _fields_ = [*[(f"number{k}", c.c_int32) for k in range(8)], ("readout", c.c_int32 * (MOST_READOUT + 1))]

    @classmethod
    def of(cls, numbers: list[int]) -> Plan:
        return cls(*numbers[:7], len(numbers) - 8, (c.c_int32 * (MOST_READOUT + 1))(*numbers[7:]))


def compiler() -> str | None:
    """GCC's; on a Mac that name is clang's, which has no __builtin_setjmp for Arm."""
    return shutil.which("g++") if sys.platform == "linux" else None


# What traffic.cpp counts.
TRAFFIC = ("shared", "size", "accesses", "lanes", "wavefronts", "conflicts", "sectors", "least_sectors", "lines")
WIDTHS = (32, 64, 128)  # of the kernels of stack.cu, each compiled by itself
LIBRARY = "emulated.so"


def build(
    folder: Path,
    source: Path,
    races: bool = False,
    widths: Iterable[int] = WIDTHS,
    architecture: str | None = None,
    traffic: bool = False,
) -> Path:
    """A library with the kernels of one file, those of stack.cu for some widths; looking for `races` (races.h).

    With an `architecture` ("90") its kernels are what nvcc makes of them (ptx.py), and the compiler's is the rest; it
    may then count their `traffic` (traffic.h).
    """
    library, objects, running = folder / LIBRARY, [], []
    usual = [compiler(), "-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
    # -O2 compiles twice as long, more than its code would save; fmaf is an instruction, but nothing else becomes one.
    options = ["-O1", "-march=native", "-ffp-contract=off"]
    # A GPU refuses addresses that are not aligned; of PTX, ptx.h looks at each. Its functions of thousands of variables
    # compile in less time without these.
    fast = ["-fno-tree-dse", "-fno-tree-pta", "-fira-region=one", "-fira-algorithm=priority"]
    checks = (
        ["-DSRCGCNN_PTX", *fast] if architecture else ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    )
    if races:
        checks += ["-DSRCGCNN_RACES", "-fsanitize=thread", "-fno-gnu-unique", "-g1"]
        objects.append(folder / "races.o")
        running.append([*usual, "-O2", "-c", HERE / "races.cpp", "-o", objects[-1]])
    if traffic:
        checks.append("-DSRCGCNN_TRAFFIC")
    parts: Iterable[int] = widths if source.stem == "stack" else (0,)
    sources = {f"{source.stem}{width}": (source, width) for width in parts}
    if architecture:
        device = {name: folder / f"{name}.ptx" for name in sources}
        nvcc = ["nvcc", "-std=c++17", "-O3", "-lineinfo", f"-arch=compute_{architecture}", "-ptx", source]
        _run([*nvcc, f"-DSRCGCNN_WIDTH={width}", "-o", device[name]] for name, (_, width) in sources.items())
        for name, code in device.items():
            code.with_suffix(".cpp").write_text(ptx().translated(code.read_text()))
            sources[f"{name}_device"] = (code.with_suffix(".cpp"), 0)
    if traffic:
        sources["traffic"] = (HERE / "traffic.cpp", 0)
    for name, (kernels, width) in sources.items():
        objects.append(folder / f"{name}.o")
        include = [f"-DSRCGCNN_WIDTH={width}", "-include", HERE / "emulation.h", "-I", HERE, "-I", KERNELS]
        running.append([*usual, *options, *checks, *include, "-x", "c++", "-c", kernels, "-o", objects[-1]])
    _run(running)
    subprocess.run([str(compiler()), "-shared", *map(str, objects), "-o", str(library)], check=True)
    return library


def _run(commands: Iterable[list[Any]]) -> None:
    """All at once."""
    running = [subprocess.Popen(list(map(str, x)), stderr=subprocess.PIPE, text=True) for x in commands]
    for process in running:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors


@functools.cache
def ptx() -> Any:
    """ptx.py, which is no package's."""
    spec = importlib.util.spec_from_file_location("ptx", HERE / "ptx.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Emulated:
    """What ``srcgcnn_fast._core`` offers with a CUDA build, on addresses of this machine's memory."""

    looking: ClassVar[list[Emulated]] = []  # for races

    def __init__(self, library: Path) -> None:
        self._library = c.CDLL(str(library))
        if hasattr(self._library, "emulated_races"):
            self.looking.append(self)

    def gpu(self, processors: int, shared_per_processor: int, descending: bool = False) -> None:
        self._library.emulated_gpu(processors, shared_per_processor)
        self._library.emulated_order(int(descending))

    def run(self, name: str, *arguments: Any) -> None:
        getattr(self._library, name)(*arguments)

    def races(self) -> list[str]:
        """Those since the last call, of a library that looks for them: what happened, and where in the source."""
        self._library.emulated_races.restype = c.c_char_p
        found = self._library.emulated_races().decode()
        codes = re.findall("0x[0-9a-f]+", found)
        command = ["addr2line", "-spi", "-e", self._library._name, *(hex(int(code, 16) - 1) for code in codes)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout if codes else ""
        sources = iter(re.sub(r"\n \(inlined by\) ", " < ", lines).splitlines())
        return [re.sub("0x[0-9a-f]+", lambda _: f"[{next(sources)}]", line) for line in found.splitlines()]

    def traffic(self) -> list[tuple[str, str, dict[str, int]]]:
        """Of each instruction since the last call: the kernel, where it is in the source, and what it asked for."""
        self._library.emulated_traffic.restype = c.c_char_p
        found = []
        for line in self._library.emulated_traffic().decode().splitlines():
            place, *numbers = line.split("\t")
            source, kernel = re.fullmatch(r"(.*) \(instruction \d+ of (\w+)\)", place).groups()
            found.append((kernel, source, dict(zip(TRAFFIC, map(int, numbers), strict=True))))
        return found

    def tensor_cores(self, of: str) -> None:
        self._library.emulated_tensor_cores(*{"Hopper": (25, 1), "Ampere": (24, 2)}[of])

    def launches(self) -> int:
        return self._library.emulated_launches()

    def on_stream(self, stream: int) -> int:
        """Launches and memsets on the stream that was named before; counts those on this one from now on."""
        return self._library.emulated_stream(POINTER(stream))

    def only(self, last_blocks: int = 2**32 - 1) -> None:
        """Launches run their last blocks alone."""
        self._library.emulated_blocks(c.c_uint(last_blocks))

    def fail_once(self) -> None:
        self._library.emulated_error()

    def _call(self, name: str, width: int, result: Any, *arguments: Any) -> Any:
        function = getattr(self._library, f"srcgcnn_cuda_{name}_{width}")
        function.restype = result
        found = function(*arguments)
        if result is c.c_char_p and found is not None:
            raise RuntimeError(f"CUDA: {found.decode()}")
        return found

    def cuda_prepared_size(self, width, plan) -> int:
        return self._call("prepared_size", width, c.c_int64, c.byref(Plan.of(plan)))

    def cuda_filter_at(self, width, plan) -> int:
        return self._call("filter_at", width, c.c_int64, c.byref(Plan.of(plan)))

    def cuda_scratch_size(self, width, plan, n_rows: int, n_crystals: int) -> int:
        size = c.c_int64()
        counts = c.c_int64(n_rows), c.c_int64(n_crystals)
        self._call("scratch_size", width, c.c_char_p, c.byref(size), c.byref(Plan.of(plan)), *counts)
        return size.value

    def cuda_prepare(self, width, prepared, plan, layers, eps, ends, index, sizes, basis, stream) -> None:
        given = (Layer * len(layers))(*(Layer(*x, *e) for x, e in zip(layers, eps, strict=True)))
        first, *others = [Dense(*x) for x in zip(ends[1::2], ends[2::2], strict=True)]
        graph = Graph(*index, *sizes, *basis)
        self._call("prepare", width, c.c_char_p, POINTER(prepared), c.byref(Plan.of(plan)), given, POINTER(ends[0]),
                   c.byref(first), (Dense * len(others))(*others), c.byref(graph), POINTER(stream))  # fmt: skip

    def cuda_stack(self, width, out, scratch, rows, row_weight, prepared, plan, index, sizes, basis, stream) -> None:
        self.launched = plan
        graph = Graph(*index, *sizes, *basis)
        self._call("stack", width, c.c_char_p, POINTER(out), POINTER(scratch), c.byref(Features(*rows)),
                   POINTER(row_weight), POINTER(prepared), c.byref(Plan.of(plan)), c.byref(graph),
                   POINTER(stream))  # fmt: skip

    def cuda_conv(self, name, pointers, sizes, numbers, stream) -> None:
        function = getattr(self._library, f"srcgcnn_cuda_{name}")
        function.restype = c.c_char_p
        error = function(c.byref(Conv(*pointers, *sizes, *numbers)), POINTER(stream))
        if error is not None:
            raise RuntimeError(f"CUDA: {error.decode()}")

    def _padded(self, name: str, given: Padding, *arguments: Any) -> None:
        function = getattr(self._library, f"srcgcnn_cuda_{name}")
        function.restype = c.c_char_p
        error = function(c.byref(given), *arguments)
        if error is not None:
            raise RuntimeError(f"CUDA: {error.decode()}")

    def cuda_pad(self, source, target, sizes, stream) -> None:
        self._padded("pad", Padding.of(source, target, sizes), POINTER(stream))

    def cuda_send(self, source, target, sizes, there, here, size, event, stream) -> None:
        at = (POINTER(there), POINTER(here), c.c_int64(size), POINTER(event), POINTER(stream))
        self._padded("send", Padding.of(source, target, sizes), *at)

    def wait_for(self, event: int) -> None:
        """Until the copies that it was recorded after have come."""
        self._library.emulated_wait(POINTER(event))

    def end(self) -> None:
        """Copies that nobody has waited for never come: where they would, there may be something else by then."""
        self._library.emulated_end()

    def cuda_space(self, pointers, sizes, which: int) -> int:
        function = self._library.srcgcnn_cuda_space
        function.restype = c.c_int64
        return function(c.byref(Conv(*pointers, *sizes)), which)
