"""The kernels as other systems and compilers run them: on Arm, under an emulator; by clang, with the package's own
threads, under the thread sanitizer, too; for Windows, under Wine; and without OpenMP."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import srcgcnn_fast as sf
from srcgcnn_fast.functional import BatchNorm, gated_conv

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FLAGS = "-std=c++17 -O3 -ffp-contract=fast -Wall -Wextra -Wno-psabi -Werror -DSRCGCNN_LEVEL=portable"
SEQUENTIAL = "-Wno-unknown-pragmas -Wno-unused-parameter"
TEAM = "-Xclang -fopenmp -pthread csrc/cpu/team.cpp"
ARM = ["qemu-aarch64-static"]
WINE = "/usr/lib/wine/wine64"
MINGW = next(iter(Path("/usr/lib/gcc/x86_64-w64-mingw32").glob("*-posix")), Path("absent"))
HEADERS = f"-isystem {MINGW}/include/c++ -isystem {MINGW}/include/c++/x86_64-w64-mingw32"
WINDOWS = f"--target=x86_64-w64-mingw32 -march=x86-64-v3 -static {HEADERS} -L{MINGW}"
WINDOWS_THREADS = "-Wl,--whole-archive -lwinpthread -Wl,--no-whole-archive"
BUILDS = {
    "aarch64": ("aarch64-linux-gnu-g++", "-fno-tree-pre -fopenmp -static", ARM),
    "aarch64, clang": ("clang++-16", f"--target=aarch64-linux-gnu -static {TEAM}", ARM),
    "clang, thread sanitizer": ("clang++-16", f"-g -fsanitize=thread {TEAM}", []),
    "Windows": ("clang++-16", f"{WINDOWS} {TEAM} {WINDOWS_THREADS}", [WINE]),
    "no OpenMP": ("g++", f"-fno-tree-pre {SEQUENTIAL}", []),
}
F, K = 32, 41


@pytest.fixture(scope="module", params=BUILDS)
def program(request, tmp_path_factory):
    """The command that runs tests/ops/portable.cpp."""
    compiler, flags, runner = BUILDS[request.param]
    for tool in (compiler, *runner, *([str(MINGW)] if runner == [WINE] else [])):
        if shutil.which(tool) is None and not Path(tool).is_dir():
            packages = "g++-aarch64-linux-gnu, clang-16, qemu-user-static, wine64, g++-mingw-w64-x86-64-posix"
            pytest.skip(f"{tool} is not installed (Debian: {packages})")
    folder = tmp_path_factory.mktemp("portable")
    binary = folder / "portable.exe"
    if runner == [WINE]:
        runner = ["env", f"WINEPREFIX={folder / 'wine'}", "WINEDEBUG=-all", WINE]
    command = [compiler, *FLAGS.split(), *flags.split(), "-I", "csrc/cpu", "tests/ops/portable.cpp", "-o", str(binary)]
    built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert built.returncode == 0, built.stderr[-4000:]
    return [*runner, str(binary)]


def case(batch: sf.GraphBatch, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The arrays of the program, in its order."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    n = batch.num_rows
    return {
        "distance": batch.distance.to(dtype), "sender": batch.sender, "row_ptr": batch.row_ptr,
        "crystal_ptr": batch.crystal_ptr, "row_weight": batch.weight.to(dtype), "h": normal(n, F),
        "weight": 0.2 * normal(2 * F, 2 * F + K), "bias": normal(2 * F), "gamma1": 1 + 0.3 * normal(2 * F),
        "beta1": normal(2 * F), "gamma2": 1 + 0.3 * normal(F), "beta2": normal(F), "mean1": normal(2 * F),
        "var1": 1 + normal(2 * F) ** 2, "mean2": normal(F), "var2": 1 + normal(F) ** 2, "grad": normal(n, F),
    }  # fmt: skip


def reference(batch: sf.GraphBatch, x: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Inference; then the output of a training step and its gradients; in the order of the program's results."""
    leaves = [x[k].clone().requires_grad_() for k in ("h", "weight", "gamma1", "beta1", "gamma2", "beta2")]
    h, weight, gamma1, beta1, gamma2, beta2 = leaves

    def run(training: bool) -> torch.Tensor:
        bn1 = BatchNorm(gamma1, beta1, x["mean1"].clone(), x["var1"].clone(), training)
        bn2 = BatchNorm(gamma2, beta2, x["mean2"].clone(), x["var2"].clone(), training)
        return gated_conv(h, batch, weight, x["bias"], bn1, bn2)

    with sf.use_backend("reference"):
        out = run(True)
        gradients = torch.autograd.grad(out, leaves, x["grad"])
        return [run(False).detach(), out.detach(), *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["plain", "weighted", "isolated"])
def test_equal_to_the_reference(program, make_batch, kind, dtype):
    batch = make_batch(kind).to(dtype=torch.float64)
    x = case(batch, torch.float64)
    expected = reference(batch, x)
    header = np.array([batch.num_rows, batch.num_edges, batch.num_crystals, K, F], np.int64)
    given = header.tobytes() + b"".join(
        (v.to(dtype) if v.is_floating_point() else v).contiguous().numpy().tobytes() for v in x.values()
    )
    letter, tolerance = ("f", 3e-5) if dtype == torch.float32 else ("d", 1e-11)
    for threads in ("1", "3"):
        done = subprocess.run([*program, letter, threads], input=given, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        found = torch.frombuffer(bytearray(done.stdout), dtype=dtype).double()
        parts = found.split([y.numel() for y in expected])
        for part, y in zip(parts, expected, strict=True):
            assert float((part - y.reshape(-1)).abs().max() / y.abs().max().clamp_min(1e-300)) < tolerance
