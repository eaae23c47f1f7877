"""Everything about the GPU in one command: tests, sanitizer, then the targets, beside the other programs.

    python benchmarks/gpu/run.py --build --record gpu-h200

Needs no network and no pymatgen. ``SRCGCNN_TEST_DATA`` names real crystals, else they are made up; ``SRCGCNN_PEERS``
the published programs (benchmarks/peers.py); PyG is taken where it is installed. Prints the targets and what failed,
and writes all numbers to NAME.json and NAME.md in benchmarks/results, and logs to build/gpu. What the time does not
suffice for is left out and said to be, the targets last. ``--dry-run`` goes through every step on the CPU with tiny
sizes, to test this script; its numbers mean nothing and are not recorded.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LOGS = ROOT / "build" / "gpu"
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT)]


class Job:
    """A command that runs beside others, in a process group of its own, with its output in a file."""

    def __init__(self, name: str, *words: str, limit: float, env: dict[str, str] | None = None) -> None:
        self.name, self.begin, self.end = name, time.monotonic(), time.monotonic() + limit
        self.log = LOGS / f"{name.replace(' ', '_')}.log"
        self.process = None
        if shutil.which(words[0]) is not None:
            paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "PYTHONUNBUFFERED": "1"}
            with self.log.open("w") as out:
                self.process = subprocess.Popen(
                    words, stdout=out, stderr=subprocess.STDOUT, env=os.environ | paths | (env or {}), cwd=ROOT,
                    start_new_session=True,
                )  # fmt: skip

    def result(self, stop: bool = False) -> dict[str, Any]:
        """Exit code, seconds and last lines; a missing or slow command is a result too. ``stop``: wait no longer."""
        if self.process is None:
            return {"code": None, "seconds": 0.0, "tail": "not installed"}
        more = ""
        try:
            self.process.wait(0 if stop else max(0.0, self.end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            more = f"stopped after {time.monotonic() - self.begin:.0f} s"
        code = None if more else self.process.returncode
        lines = self.log.read_text(errors="replace").strip().splitlines()
        told = [x for x in lines if x.startswith(("FAILED", "ERROR", "========= ")) or " FAILED " in x]
        tail = [x[:160] for x in ([] if code == 0 else told[-25:]) + lines[-3:]] + [more] * bool(more)
        return {"code": code, "seconds": time.monotonic() - self.begin, "tail": "\n".join(dict.fromkeys(tail))}


def build() -> None:
    """Install this checkout, then begin anew: a process that began before does not find what was built."""
    install = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", ".")
    found = Job("build", *install, limit=240).result()
    print(f"build: {found['seconds']:.0f} s, {found['tail'].splitlines()[-1]}", flush=True)
    if found["code"] != 0:
        raise SystemExit(found["tail"])
    os.execv(sys.executable, [sys.executable, *(x for x in sys.argv if x != "--build")])


def checks(say: Callable[..., None], dry_run: bool, compiling: dict[str, Job]) -> dict[str, Any]:
    """The conformance tests on the GPU, beside them the sanitizer on small graphs and the compilation of peers."""
    found: dict[str, Any] = {}
    hangs = ("-o", "faulthandler_timeout=50")  # says where a test stands that takes longer
    pytest = (sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--durations=8", *hangs, "tests/gpu")
    small = (sys.executable, str(HERE / "small.py"))
    if dry_run:
        env = {"SRCGCNN_GPU_DRY_RUN": "1"}
        jobs = [Job("tests", *pytest, limit=900, env=env), Job("small step", *small, "cpu", "cpu", limit=300)]
        return found | {job.name: job.result() for job in jobs}
    several = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    most = "not beyond_two"
    jobs = [Job("tests", *pytest, "tests/ops/test_triton.py", *several, "-k", most, limit=190)]
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that an access beyond one tensor is not inside the next
    for tool, backend in (("memcheck", "cuda"), ("racecheck", "cuda"), ("memcheck", "triton")):
        watched = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *small, "cuda", backend)
        jobs.append(Job(f"{tool} {backend}", *watched, limit=150, env=env))
    for job in jobs:
        found[job.name] = job.result()
        say(f"{job.name}: {found[job.name]['seconds']:.0f} s\n{found[job.name]['tail']}")
    for name, job in compiling.items():
        found[name] = job.result(stop=True)
        say(f"{name}: {found[name]['seconds']:.0f} s, {found[name]['tail'].splitlines()[-1:]}")
    found["large"] = Job("large", *pytest, "-k", "beyond_two", limit=60).result()
    say(f"large: {found['large']['seconds']:.0f} s, {found['large']['tail'].splitlines()[-1:]}")
    return found


def of_kernels(dry_run: bool) -> dict[str, str]:
    """Their table, from a process of its own: nothing is measured, or lost, with a profiler that was there before."""
    import kernels
    import torch

    with tempfile.TemporaryDirectory() as folder:
        torch.save(kernels.batches(dry_run), path := Path(folder, "batches.pt"))
        words = (sys.executable, str(HERE / "kernels.py"), "--child", str(path), *["--dry-run"] * dry_run)
        done = Job("kernels", *words, limit=120).result()
        if done["code"] != 0:
            raise RuntimeError(done["tail"].splitlines()[-1])
        return {"table": kernels.table([], [torch.load(path.with_name("found.pt"))])}


def steps(bench: Any, programs: set[str]) -> dict[str, tuple[float, Callable[[], Any]]]:
    """Name -> seconds that it needs at least, and what is measured; the targets first. ``programs``: no others."""
    import candidates
    import crystals
    import measured
    import precision

    def line(kind: str, work: str, *names: str, size: int | None = None, made_up: bool = False) -> Callable[[], Any]:
        chosen = tuple(name for name in names if not programs or name in programs)
        return lambda: measured.compare(bench, kind, work, size or measured.SIZES[work], chosen, made_up)

    def effects() -> Any:
        if not bench.dry_run:
            return precision.effects("cuda", 300)
        with precision.emulated():
            return precision.effects("cpu", 2)

    found: dict[str, tuple[float, Callable[[], Any]]] = {}
    everything = (*measured.OURS, *measured.EAGER, *measured.COMPILED)
    for kind in candidates.MODELS:
        for work in measured.SIZES:
            found[f"{kind} {work}"] = 10, line(kind, work, *everything)
    small = ("same graph, captured", "native", "native, captured", "published", "published, compiled")
    for kind in candidates.MODELS:
        name = f"{kind} training step, {measured.SMALL} crystals"
        found[name] = 10, line(kind, "training step", *small, size=measured.SMALL)
    found["one crystal"] = 30, lambda: measured.latency(bench)
    found["rates"] = 10, lambda: measured.rates(bench)
    found["store"] = 10, lambda: measured.from_store(bench)
    for kind in candidates.MODELS if crystals.real() is not None else ():
        for work in measured.SIZES:
            found[f"{kind} {work}, made up"] = 6, line(kind, work, "native", made_up=True)
    found["kernels"] = 30, lambda: of_kernels(bench.dry_run)
    found["blocks"] = 5, lambda: measured.blocks(bench)
    found["ceilings"] = 5, lambda: measured.ceilings(bench)
    found["training"] = 45, lambda: measured.training(bench)
    found["SR-CGCNN inference, as shipped"] = (
        10, line("SR-CGCNN", "inference", "native", "published", "published, as shipped", size=4096)
    )  # fmt: skip
    found["SR-CGCNN training step, as shipped"] = (
        10, line("SR-CGCNN", "training step", "published", "published, as shipped")
    )  # fmt: skip
    found["precision"] = 20, effects
    found["tiles"] = 20, lambda: measured.sweep(bench)
    return found


def about(dry_run: bool) -> dict[str, str]:
    import crystals
    import measure
    import torch

    import srcgcnn_fast as sf

    found = measure.machine() | {"triton": measure._version("triton"), "crystals": crystals.source()}
    found |= {f"backend {name}": sf.backends()[name].reason for name in ("cuda", "triton")}
    if not dry_run:
        query = ("nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm", "--format=csv,noheader")
        card = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        found |= {"GPU": card, "CUDA of torch": str(torch.version.cuda)}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", metavar="NAME", help="write NAME.json and NAME.md into benchmarks/results")
    parser.add_argument("--minutes", type=float, default=8.5, help="leave out what does not fit (default 8.5)")
    parser.add_argument("--build", action="store_true", help="install this checkout first, without dependencies")
    parser.add_argument("--skip-checks", action="store_true", help="measure only")
    parser.add_argument("--program", action="append", default=[], metavar="NAME", help="compare with these alone")
    parser.add_argument("--dry-run", action="store_true", help="every step on the CPU, with tiny sizes")
    options = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    if options.build:
        build()
    begin = time.monotonic()
    say = lambda text: print(f"[{time.monotonic() - begin:4.0f} s] {text}", flush=True)  # noqa: E731
    compiling = {}
    if not options.dry_run and not options.skip_checks:
        for kind in ("SR-CGCNN", "CGCNN"):
            words = (sys.executable, str(HERE / "measured.py"), kind)
            compiling[f"compile {kind}"] = Job(f"compile {kind}", *words, limit=300)
    result: dict[str, Any] = {"name": options.record or "gpu", "command": " ".join(["python", *sys.argv])}
    result["checks"] = {} if options.skip_checks else checks(say, options.dry_run, compiling)

    import measured  # not before the build
    import report
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --dry-run goes through the steps on the CPU.")
    if not options.dry_run and not measured.sf.backends()["cuda"].available:
        raise SystemExit(f"The compiled kernels cannot run: {measured.sf.backends()['cuda'].reason}.")
    bench = measured.Bench(options.dry_run, options.minutes - (time.monotonic() - begin) / 60)
    result["machine"] = about(options.dry_run)
    result["found"], result["seconds"] = {}, {}
    for name, (needed, run) in steps(bench, set(options.program)).items():
        start = time.monotonic()
        try:
            result["found"][name] = "left out: no time" if bench.time_is_up(needed) else run()
        except Exception as error:  # the rest of the run goes on
            result["found"][name] = measured.failure(error)
        bench.free()
        result["seconds"][name] = time.monotonic() - start
        (LOGS / "result.json").write_text(json.dumps(result, indent=1) + "\n")  # what there is, should the time run out
        say("\n".join([f"{name}: {result['seconds'][name]:.1f} s", *report.step(name, result["found"][name])]))
    if options.record and not options.dry_run:
        folder = ROOT / "benchmarks" / "results"
        (folder / f"{options.record}.json").write_text(json.dumps(result, indent=1) + "\n")
        (folder / f"{options.record}.md").write_text(report.full(result))
    elif options.dry_run:
        print(report.full(result))
    print(report.short(result), flush=True)
    return 0 if all(x["code"] == 0 for k, x in result["checks"].items() if not k.startswith("compile")) else 1


if __name__ == "__main__":
    sys.exit(main())
