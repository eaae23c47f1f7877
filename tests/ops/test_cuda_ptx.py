"""What nvcc makes of the CUDA kernels, run without a GPU: cuda/ptx.py and ptx.h say how."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NAN, INFINITY, ONE = "0f7FFFFFFF", "0f7F800000", "0f3F800000"

HEAD = """
.version 9.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 words[];
"""
# Kernels of 64 threads, all of which write to out (uint64), and how they are launched.
ENTRY = """
.visible .entry _Z{length}{name}Pm(
	.param .u64 _Z{length}{name}Pm_param_0
)
.maxntid 64, 1, 1
{{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<9>;
	.reg .f32 %f<9>;
	.reg .f64 %fd<9>;
	.reg .b64 %rd<9>;
	ld.param.u64 	%rd1, [_Z{length}{name}Pm_param_0];
	cvta.to.global.u64 	%rd2, %rd1;
	mov.u32 	%r0, %tid.x;
	{text}
	ret;
}}
"""
LAUNCH = """
void {name}(unsigned long*) {{}}
extern "C" const char* run_{name}(unsigned long* out, unsigned grid, int threads, int shared, int allowed) {{
  if (allowed) cudaFuncSetAttribute({name}, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed);
  SRCGCNN_LAUNCH({name}, grid, threads, shared, nullptr, out);
  const cudaError_t error = cudaGetLastError();
  return error ? cudaGetErrorString(error) : nullptr;
}}
"""
# What leaves a word in %r1, or two in %rd3, by the PTX ISA.
WORDS = {
    "mov.u32 %r2, -7; shr.s32 %r1, %r2, 1;": -4,
    "mov.u32 %r2, -7; shr.s32 %r1, %r2, 40;": -1,
    "mov.u32 %r2, -7; shr.u32 %r1, %r2, 28;": 15,
    "mov.u32 %r2, -7; shr.u32 %r1, %r2, 32;": 0,
    "mov.u32 %r2, 1; shl.b32 %r1, %r2, 32;": 0,
    "mov.u32 %r2, 5; mov.u32 %r3, -1; bfi.b32 %r1, %r2, %r3, 4, 8;": 0xFFFFF05F,
    "mov.u32 %r2, 6; brev.b32 %r1, %r2;": 0x60000000,
    "mov.u32 %r2, 16; bfind.shiftamt.u32 %r1, %r2;": 27,
    "mov.u32 %r2, 0; bfind.shiftamt.u32 %r1, %r2;": -1,
    "mov.u32 %r2, 0x70f; popc.b32 %r1, %r2;": 7,
    "mov.u32 %r2, -7; div.s32 %r1, %r2, 2;": -3,
    "mov.u32 %r2, -7; rem.s32 %r1, %r2, 2;": -1,
    "mov.u32 %r2, -7; div.u32 %r1, %r2, 2;": 0x7FFFFFFC,
    "mov.u32 %r2, -7; min.u32 %r1, %r2, 2;": 2,
    "mov.u32 %r2, -7; min.s32 %r1, %r2, 2;": -7,
    "mov.u32 %r2, 0x40000000; mul.hi.s32 %r1, %r2, -8;": -2,
    "mov.u32 %r2, 3; mad.lo.s32 %r1, %r2, -5, 7;": -8,
    "mov.u16 %rs1, 300; mul.wide.u16 %r1, %rs1, 300;": 90000,
    "mov.u16 %rs1, 300; mul.lo.s16 %rs2, %rs1, 300; cvt.u32.u16 %r1, %rs2;": 24464,
    "mov.u32 %r2, 0x12345678; mov.b32 {%rs1, %rs2}, %r2; cvt.u32.u16 %r1, %rs1;": 0x5678,
    "mov.u16 %rs1, 1; mov.u16 %rs2, 2; mov.b32 %r1, {%rs1, %rs2};": 0x20001,
    f"mov.f32 %f1, {NAN}; mov.f32 %f2, {ONE}; min.f32 %f3, %f1, %f2; mov.b32 %r1, %f3;": 0x3F800000,
    f"mov.f32 %f1, {NAN}; mov.f32 %f2, {ONE}; max.f32 %f3, %f2, %f1; mov.b32 %r1, %f3;": 0x3F800000,
    f"mov.f32 %f1, {NAN}; cvt.rzi.s32.f32 %r1, %f1;": 0,
    "mov.f32 %f1, 0fC02CCCCD; cvt.rzi.s32.f32 %r1, %f1;": -2,
    f"mov.f32 %f1, {INFINITY}; cvt.rzi.s32.f32 %r1, %f1;": 0x7FFFFFFF,
    f"mov.f32 %f1, {ONE}; mov.f32 %f2, 0f40000000; cvt.rn.f16x2.f32 %r1, %f1, %f2;": 0x3C004000,
    f"mov.f32 %f1, {ONE}; mov.f32 %f2, 0f40000000; cvt.rn.bf16x2.f32 %r1, %f1, %f2;": 0x3F804000,
    "mov.u32 %r2, 0x3C004000; {.reg .b16 a, b; mov.b32 {a, b}, %r2; cvt.f32.f16 %f1, a; cvt.f32.f16 %f2, b;} "
    "sub.f32 %f3, %f1, %f2; mov.b32 %r1, %f3;": 0x3F800000,
    "mov.f32 %f1, 0f3F800800; mov.f32 %f2, 0fBF801000; fma.rn.f32 %f3, %f1, %f1, %f2; mov.b32 %r1, %f3;": 0x33800000,
    "mov.f32 %f1, 0f00400000; ex2.approx.ftz.f32 %f2, %f1; mov.b32 %r1, %f2;": 0x3F800000,
    "mov.f32 %f1, 0f00400000; rcp.approx.ftz.f32 %f2, %f1; mov.b32 %r1, %f2;": 0x7F800000,
    "mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x; add.s32 %r1, %r2, %r3;": 64,
    "mov.u32 %r2, -3; cvt.rn.f32.s32 %f1, %r2; mov.b32 %r1, %f1;": 0xC0400000,
    "mov.u32 %r2, words; add.s32 %r3, %r2, 8; mov.u32 %r4, -2; bar.sync 0; st.shared.u32 [%r3+4], %r4; bar.sync 0; "
    "ld.shared.u32 %r1, [words+12];": -2,
    "mov.u32 %r4, 7; st.shared.u32 [words], %r4; bar.sync 0; atom.shared.cas.b32 %r1, [words], 8, 9;": 7,
    "shfl.sync.idx.b32 %r2|%p1, %r0, 3, 31, -1; and.b32 %r1, %r2, 31;": 3,
    "shfl.sync.bfly.b32 %r2|%p1, %r0, 5, 31, -1; xor.b32 %r1, %r2, %r0;": 5,
    "and.b32 %r2, %r0, 3; setp.eq.s32 %p1, %r2, 1; vote.sync.ballot.b32 %r1, %p1, -1;": 0x22222222,
    "and.b32 %r2, %r0, 31; redux.sync.max.s32 %r1, %r2, -1;": 31,
    "and.b32 %r2, %r0, 6; redux.sync.or.b32 %r1, %r2, -1;": 6,
    "mov.u32 %r1, 1; setp.eq.s32 %p1, %r1, 1; @%p1 bra $L_1; mov.u32 %r1, 2; $L_1:": 1,
    "mov.u32 %r1, 1; setp.eq.s32 %p1, %r1, 1; @!%p1 mov.u32 %r1, 2;": 1,
}  # fmt: skip
LONGS = {
    "mov.u32 %r2, -3; mul.wide.s32 %rd3, %r2, 5;": -15,
    "mov.u32 %r2, -3; mul.wide.u32 %rd3, %r2, 5;": (2**32 - 3) * 5,
    "mov.u32 %r2, -3; cvt.s64.s32 %rd3, %r2;": -3,
    "mov.u32 %r2, -3; cvt.u64.u32 %rd3, %r2;": 2**32 - 3,
    "mov.u32 %r2, -3; st.shared.u32 [words], %r2; bar.sync 0; ld.shared.s32 %rd3, [words];": -3,
    "mov.u32 %r2, 1; mov.u32 %r3, 2; mov.b64 %rd3, {%r2, %r3};": 2**33 + 1,
    "mov.u64 %rd4, -8; shr.s64 %rd3, %rd4, 1;": -4,
    "mov.f64 %fd1, 0d4010000000000000; sqrt.rn.f64 %fd2, %fd1; rcp.rn.f64 %fd3, %fd2; mov.b64 %rd3, %fd3;": 0x3FE << 52,
    "mov.f32 %f1, 0f3F000000; cvt.f64.f32 %fd1, %f1; mov.b64 %rd3, %fd1;": 0x3FE << 52,
}  # fmt: skip
# Whether an order holds of a NaN and 1, and of 1 and 1.
ORDERS = {"eq": "01", "ne": "00", "lt": "00", "ge": "01", "num": "01"}
ORDERS |= {"equ": "11", "neu": "10", "ltu": "10", "leu": "11", "geu": "11", "gtu": "10", "nan": "10"}
for order, holds in ORDERS.items():
    for number, held in zip((NAN, ONE), holds, strict=True):
        compared = f"mov.f32 %f1, {number}; setp.{order}.f32 %p1, %f1, {ONE}; selp.u32 %r1, 1, 0, %p1;"
        WORDS[compared] = int(held)

SUM = "{%f1, %f2, %f3, %f4}"
PRODUCT = f"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {SUM}, {{%r1, %r2, %r3, %r4}}, {{%r1, %r2}}, {SUM};"
# The first half of each warp goes one way, the second half another.
HALVES = "and.b32 %r2, %r0, 16; setp.eq.s32 %p1, %r2, 0; @%p1 bra $L_1; {0} bra.uni $L_2; $L_1: {0} $L_2:"
WRONG = {
    "lanes of a warp meet at different instructions": [
        HALVES.replace("{0}", text) for text in (PRODUCT, "bar.sync 0;", "bar.warp.sync -1;")
    ],
    "not all lanes of the warp": ["bar.warp.sync 255;"],
    "lanes in parts": ["shfl.sync.idx.b32 %r2|%p1, %r0, 3, 15, -1;"],
    "beyond shared memory": ["ld.shared.u32 %r1, [words+1024];", "mov.u32 %r1, -4; st.shared.u32 [%r1], %r1;"],
    "a shared address is not aligned": ["ld.shared.v2.u32 {%r1, %r2}, [words+4];"],
    "an address is not aligned": ["ld.global.u64 %rd3, [%rd2+4];", "st.global.v4.u32 [%rd2+8], {%r0, %r0, %r0, %r0};"],
    "a copy of some bytes of its 16": ["mov.u32 %r2, words; cp.async.cg.shared.global [%r2], [%rd2], 16, 8;"],
    "a barrier that __syncthreads is not": ["bar.sync 1;"],
    "threads wait for others that do not come": ["setp.lt.s32 %p1, %r0, 32; @%p1 bra $L_1; bar.sync 0; $L_1:"],
}  # fmt: skip


# Blocks, threads, bytes of shared memory, and how many it was allowed.
REFUSED = {
    "no blocks": (0, 64, 0, 0),
    "more threads than it was compiled for": (1, 96, 0, 0),
    "more than 48 KiB that it did not ask for": (1, 64, (48 << 10) + 16, 0),
    "more than it asked for": (1, 64, 64 << 10, 60 << 10),
}  # fmt: skip
UNKNOWN = [
    "add.cc.u32 %r1, %r2, %r3;", "add.ftz.f32 %f1, %f2, %f3;", "ld.local.u32 %r1, [%rd1];", "shl.b32 %r1, %x, 2;",
    "setp.lt.and.s32 %p1, %r1, %r2, %p2;", "fma.rz.f32 %f1, %f1, %f1, %f1;", "call f;", "bra;", "mov.u32 %r1, %clock;",
    "add.s32 %r1, %r2;", "add.s32 %r1, %r2, %r3, %r4;",
]  # fmt: skip
# What two warps' accesses ask for: wavefronts and conflicts of shared memory, or sectors, the least of them, and lines.
SHARED = "shl.b32 %r1, %r0, {}; and.b32 %r1, %r1, {}; ld.shared{} [%r1];"
GLOBAL = "shl.b32 %r1, %r0, {}; cvt.u64.u32 %rd3, %r1; add.s64 %rd3, %rd2, %rd3; ld.global{} [%rd3];"
COPY = "shl.b32 %r1, %r0, 4; and.b32 %r1, %r1, 511; cp.async.cg.shared.global [%r1], [%rd2], 16, 16; "
COPY += "cp.async.commit_group; cp.async.wait_group 0;"
TRAFFIC = {
    SHARED.format(2, 127, ".u32 %r2,"): (2, 0),
    SHARED.format(3, 255, ".u32 %r2,"): (4, 2),
    SHARED.format(7, 1023, ".u32 %r2,"): (16, 14),
    SHARED.format(2, 0, ".u32 %r2,"): (2, 0),
    SHARED.format(3, 255, ".v2.u32 {%r2, %r3},"): (4, 0),
    SHARED.format(4, 511, ".v4.u32 {%r2, %r3, %r4, %r5},"): (8, 0),
    SHARED.format(5, 1023, ".v4.u32 {%r2, %r3, %r4, %r5},"): (16, 8),
    "setp.lt.s32 %p1, %r0, 40; @%p1 ld.shared.u32 %r2, [words];": (2, 0),
    "bar.sync 0; ld.shared.u32 %r2, [words]; bar.sync 0; ld.shared.u32 %r2, [words+4];": (4, 0),
    GLOBAL.format(2, ".u32 %r2,"): (8, 8, 2),
    GLOBAL.format(3, ".u32 %r2,"): (16, 8, 4),
    GLOBAL.format(7, ".u32 %r2,"): (64, 8, 64),
    GLOBAL.format(4, ".v4.u32 {%r2, %r3, %r4, %r5},"): (32, 32, 8),
    "ld.global.u32 %r2, [%rd2];": (2, 2, 2),
    COPY: (8, 0),
    COPY + " ": (2, 2, 2),
}
STORED = " cvt.u64.u32 %rd3, %r1; st.global.u64 [%rd2], %rd3;"
TEXTS = [*(text + STORED for text in WORDS), *(text + STORED.partition(";")[2] for text in LONGS)]
TEXTS += [*(text for texts in WRONG.values() for text in texts), *TRAFFIC]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@pytest.fixture(scope="module")
def kernels(emulation, tmp_path_factory):
    """The library of all of them, number by number."""
    folder = tmp_path_factory.mktemp("ptx")
    names = [f"kernel_{number}" for number in range(len(TEXTS))]
    entries = [ENTRY.format(name=name, length=len(name), text=text) for name, text in zip(names, TEXTS, strict=True)]
    (folder / "device.cpp").write_text(emulation.ptx().translated(HEAD + "".join(entries)))
    (folder / "kernels.cpp").write_text("".join(LAUNCH.format(name=name) for name in names))
    library, include = folder / "kernels.so", emulation.HERE
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-march=native", "-ffp-contract=off", "-DSRCGCNN_PTX"]
    options += ["-include", include / "emulation.h", "-I", include, "-DSRCGCNN_TRAFFIC"]
    sources = [folder / "device.cpp", folder / "kernels.cpp", include / "traffic.cpp"]
    subprocess.run([str(x) for x in [emulation.compiler(), *options, *sources, "-o", library]], check=True)
    return library


def run(library: Path, text: str, grid: int = 1, threads: int = 64, shared: int = 1024, allowed: int = 0):
    """What it wrote, or why it was not launched."""
    function = getattr(ctypes.CDLL(str(library)), f"run_kernel_{TEXTS.index(text)}")
    function.restype = ctypes.c_char_p
    out = (ctypes.c_uint64 * 1040)()
    first = -ctypes.addressof(out) % 128 // 8  # of a line of the cache
    error = function(ctypes.byref(out, 8 * first), ctypes.c_uint(grid), threads, shared, allowed)
    return out[first] if error is None else error.decode()


@pytest.mark.parametrize("text", WORDS)
def test_an_instruction_gives_the_word(text, kernels):
    assert run(kernels, text + STORED) == WORDS[text] % 2**32


@pytest.mark.parametrize("text", LONGS)
def test_an_instruction_gives_the_long_word(text, kernels):
    assert run(kernels, text + STORED.partition(";")[2]) == LONGS[text] % 2**64


@pytest.mark.parametrize("text", TRAFFIC)
def test_what_is_asked_of_the_memories_is_counted(text, kernels, emulation):
    library = emulation.Emulated(kernels)
    library.traffic()
    run(kernels, text)
    of_kernel, of_place, found = zip(*library.traffic(), strict=True)
    assert set(of_kernel) == set(of_place)  # there is no source
    names = ("wavefronts", "conflicts") if len(TRAFFIC[text]) == 2 else ("sectors", "least_sectors", "lines")
    assert tuple(sum(x[name] for x in found) for name in names) == TRAFFIC[text]
    assert sum(x["lanes"] for x in found) == 64 * (text.count("ld.") + 2 * text.count("cp.async.cg")) - 24 * text.count(
        "40"
    )


@pytest.mark.parametrize("why, text", [(why, text) for why, texts in WRONG.items() for text in texts])
def test_what_a_gpu_leaves_open_is_stopped(why, text, kernels):
    call = f"run_kernel_{TEXTS.index(text)}((ctypes.c_uint64 * 8)(), 1, 64, 1024, 0)"
    code = f"import ctypes; ctypes.CDLL({str(kernels)!r}).{call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode < 0 and why in done.stderr, done.stderr


@pytest.mark.parametrize("why", REFUSED)
def test_what_a_gpu_does_not_launch(why, kernels):
    text, word = TEXTS[list(REFUSED).index(why)], list(WORDS.values())[list(REFUSED).index(why)]
    assert str(run(kernels, text, *REFUSED[why])).startswith("invalid ")
    assert run(kernels, text, shared=64 << 10, allowed=64 << 10) == word % 2**32


@pytest.mark.parametrize("text", UNKNOWN)
def test_what_is_not_known_is_an_error(text, emulation):
    with pytest.raises(ValueError, match="kernel"):
        emulation.ptx().translated(HEAD + ENTRY.format(name="kernel", length=6, text=text))


def on_the_ptx(architecture: str, place: Path, processes: str, *names: str) -> str:
    """Tests of the emulated kernels, of what nvcc makes of them."""
    files = [str(HERE / f"test_cuda{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", processes, *files]
    environment = os.environ | {"SRCGCNN_PTX": architecture}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


@needs_nvcc
def test_batches_are_filled_by_what_nvcc_makes(emulation, tmp_path):
    assert " passed" in on_the_ptx("90", tmp_path, "0", "_pad")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_all_kernels_pass_as_nvcc_makes_them(architecture, emulation, tmp_path):
    print(on_the_ptx(architecture, tmp_path, "auto", "", "_network", "_conv"))


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(
    "work, kernel", [("training", "gate_sum<false>"), ("inference", "whole_crystals<64, 8, false>")]
)
def test_what_kernels_ask_of_the_memories(work, kernel, emulation):
    command = [sys.executable, str(HERE.parents[1] / "benchmarks" / "gpu" / "traffic.py"), work, "--crystals", "4"]
    done = subprocess.run(command, env=os.environ | {"SRCGCNN_TEST_DATA": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split("|")[2:-1] for line in done.stdout.splitlines() if line.startswith(f"| {kernel} |")]
    shared, wavefronts, conflicts, memory, sectors, least = (float(x) for x in lines[0])
    assert 0 < shared < wavefronts and 0 < memory < least <= sectors and conflicts < wavefronts / 5
