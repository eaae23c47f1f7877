"""What is for a GPU, as dry runs on a CPU: so that it does not fall behind while no GPU is at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_tests_for_a_gpu():
    """From the root, which processes that tests start need; without an editable install it is the sources that run."""
    found = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", SRCGCNN_GPU_DRY_RUN="1")
    assert " passed" in found


def test_everything_that_the_workbench_measures():
    found = run("benchmarks/gpu/run.py", "--dry-run", "--skip-checks", "--minutes", "10")
    assert "Precision" in found
    wrong = [line for line in found.splitlines() if "failed" in line or "left out" in line or "differ by" in line]
    assert not wrong


def test_what_precision_does_to_published_checkpoints():
    if "SRCGCNN_TEST_DATA" not in os.environ:
        pytest.skip("the checkpoints are in the test data: set SRCGCNN_TEST_DATA")
    found = run("benchmarks/gpu/precision.py", "--crystals", "4")
    assert found.count("| bfloat16 |") == 2 and "Emulated on the CPU" in found


def test_kernels_of_two_builds():
    found = run(
        "benchmarks/gpu/kernels.py", "--dry-run", "--beside", str(ROOT), "--work", "SR-CGCNN training step, native",
        SRCGCNN_CUDA="OFF",
    )  # fmt: skip
    assert "gradients differ by 0e+00" in found and "| µs before | µs now |" in found and "_Convolutions" in found


@pytest.mark.parametrize(("other", "reported"), [(1.0, True), (1.01, False), (float("nan"), False)])
def test_kernels_with_other_results_have_no_times(other, reported):
    code = f"""if True:
        import sys; sys.path[:0] = ['benchmarks/gpu']; import kernels, torch
        made = lambda x: dict(work=dict(kernels=dict(k=dict(launches=1, us=5.0)), out=torch.tensor([1, x]), rows=4))
        print(kernels.table([made(1.0)], [made(float('{other}'))]))
    """
    assert ("| `k` |" in run("-c", code)) is reported


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void srcgcnn::whole_crystals<64, 8, false>(srcgcnn::Stack<64, false>)", "whole_crystals<64, 8, false>"),
        ("srcgcnn::edge_gram(srcgcnn::DeviceConv)", "edge_gram"),
        ("void at::native::reduce_kernel<128, 4, at::native::ReduceOp<float> >(at::Op)", "at::native::reduce_kernel"),
        ("Memset (Device)", "Memset"),
    ],
)
def test_names_of_kernels(name, short):
    assert (
        run(
            "-c", f"import sys; sys.path[:0] = ['benchmarks/gpu']; import kernels; print(kernels.short({name!r}))"
        ).strip()
        == short
    )


def test_kernels_without_those_that_are_compiled_are_not_measured():
    """Triton's would stand in their place."""
    wrong = "import sys; sys.path[:0] = ['benchmarks/gpu']; import kernels; kernels.need_compiled()"
    done = subprocess.run([sys.executable, "-c", wrong], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("The compiled kernels cannot run: ")


def test_kernels_of_runs_before_one_that_fails_are_told():
    code = """if True:
        import sys; sys.path[:0] = ['benchmarks/gpu']; import kernels, torch
        from pathlib import Path
        from types import SimpleNamespace
        run = dict(work=dict(kernels=dict(k=dict(launches=1, us=5.0)), out=torch.tensor([1.0, 2.0]), rows=4))
        codes = [0, 1]
        def child(words):
            torch.save(run, Path(words[words.index('--child') + 1]).with_name('found.pt'))
            return SimpleNamespace(returncode=codes.pop(0))
        kernels.subprocess.run, kernels.batches = child, lambda _: {}
        sys.argv = ['kernels.py']
        try:
            kernels.main()
        except SystemExit as end:
            print(end)
    """
    found = run("-c", code)
    assert "| `k` | 1 | 5.0 |" in found and found.endswith("The kernels of this build did not run.\n")


def test_an_error_that_ends_a_device_leaves_the_report_what_came_before():
    """Whatever asks the device afterwards raises, the giving back of its memory too."""
    code = """if True:
        import sys; sys.path[:0] = ['benchmarks/gpu', 'benchmarks']; import measured, torch
        def lost(*_, **__):
            raise RuntimeError('an illegal memory access was encountered')
        bench = measured.Bench(False, 1.0)
        measured.candidate = torch.cuda.empty_cache = lost
        found = measured._attempt(bench, 'CGCNN', 'native', 'inference', (None, None))
        bench.free()
        print(found)
    """
    assert run("-c", code) == "failed: RuntimeError: an illegal memory access was encountered\n"


def test_what_failed_before_a_command_was_stopped_is_told():
    code = """if True:
        import sys; sys.path[:0] = ['benchmarks/gpu']; import run
        run.LOGS.mkdir(parents=True, exist_ok=True)
        said = "import time; print('[gw0] [ 5%] FAILED tests/a.py::test_b', *'12345', sep='\\\\n'); time.sleep(60)"
        print(run.Job('slow', sys.executable, '-c', said, limit=3).result())
    """
    found = run("-c", code)
    assert "FAILED tests/a.py::test_b" in found and "stopped after 3 s" in found and "'code': None" in found
