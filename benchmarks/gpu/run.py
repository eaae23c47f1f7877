"""Everything about the GPU in one command: tests, sanitizer, ceilings, then times and memory beside the other programs.

    python benchmarks/gpu/run.py --record gpu-h200

Needs no network, no pymatgen and no data. ``SRCGCNN_PEERS`` names the published programs (benchmarks/peers.py); PyG is
taken where it is installed. Writes NAME.json and NAME.md into benchmarks/results. ``--dry-run`` goes through every step
on the CPU with tiny sizes, to test this script; its numbers mean nothing and are not recorded.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT)]

import candidates  # noqa: E402
import measure  # noqa: E402
import peers  # noqa: E402
import precision  # noqa: E402
import torch  # noqa: E402
from crystals import batches, graphs  # noqa: E402

import srcgcnn_fast as sf  # noqa: E402
from srcgcnn_fast.ops import triton as backend  # noqa: E402

PEERS = (
    "Triton", "reference", "published", "published, TF32", "published, as shipped", "published, compiled",
    "published, compiled with CUDA graphs", "split, compiled", "PyG CGConv",
)  # fmt: skip
LESS_EXACT = ("same graph, TF32", "same graph, bfloat16")
"""Ours in less than float32."""
SIZES = {"inference": (65536, 4096, 256, 262144), "training step": (4096, 32768, 256)}
"""Crystals; those of the targets first, and compiled peers at those alone: each compilation takes most of a minute."""
ROUNDS, WARM_UP = 10, 3


class Bench:
    """The device, the clock, and how much of the time is left."""

    def __init__(self, dry_run: bool, minutes: float) -> None:
        self.device, self.dry_run = "cpu" if dry_run else "cuda", dry_run
        self.end = time.monotonic() + 60 * minutes

    def time_is_up(self, needed: float) -> bool:
        return time.monotonic() + needed > self.end

    def seconds(self, run: Callable[[], object]) -> float:
        if self.dry_run:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def peak(self, run: Callable[[], object]) -> int:
        """Bytes that the allocator held at most during a call, beyond those before it."""
        if self.dry_run:
            run()
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def command(*words: str, env: dict[str, str] | None = None, limit: float = 300) -> dict[str, Any]:
    """Exit code and last lines of a command; a missing or slow one is a result too."""
    if shutil.which(words[0]) is None:
        return {"code": None, "tail": f"{words[0]} is not installed"}
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=limit, env=os.environ | (env or {}), cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        return {"code": None, "tail": f"took more than {limit:.0f} s"}
    return {"code": done.returncode, "tail": "\n".join((done.stdout + done.stderr).strip().splitlines()[-6:])}


def checks(bench: Bench) -> dict[str, Any]:
    """The conformance tests on the GPU, and the sanitizer on small graphs."""
    env = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    if bench.dry_run:
        env["SRCGCNN_GPU_DRY_RUN"] = "1"
    tests = ["tests/gpu"] if bench.dry_run else ["tests/gpu", "tests/ops/test_triton.py"]
    limit = 900 if bench.dry_run else 300  # which may share its machine
    found = {
        "tests": command(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, env=env, limit=limit)
    }
    if bench.dry_run:
        found["small step"] = command(sys.executable, str(HERE / "small.py"), "cpu", env=env)
        return found
    env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # so that an access beyond one tensor is not inside the next
    for tool in ("memcheck", "racecheck"):
        watched = ("--tool", tool, "--error-exitcode", "9", sys.executable, str(HERE / "small.py"), "cuda")
        found[tool] = command("compute-sanitizer", *watched, env=env, limit=120)
    return found


def ceilings(bench: Bench) -> dict[str, float]:
    """What the card does at best: bytes per second of a copy, operations per second of products, exponentials."""
    n = 1 << (12 if bench.dry_run else 28)
    side = 64 if bench.dry_run else 8192
    x, y = torch.rand(n, device=bench.device), torch.empty(n, device=bench.device)
    a, b = (torch.randn(side, side, device=bench.device) for _ in range(2))
    small = torch.rand(n >> 6, device=bench.device)
    best = lambda run: min(bench.seconds(run) for _ in range(12))  # noqa: E731
    found = {
        "copy, bytes/s": 8 * n / best(lambda: y.copy_(x)),
        "exp, 1/s": 16 * len(small) / best(lambda: repeat_exp(small)),
    }
    for name, relaxed in (("float32", False), ("TF32", True)):
        torch.backends.cuda.matmul.allow_tf32 = relaxed
        found[f"product {name}, operations/s"] = 2 * side**3 / best(lambda: a @ b)
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


def repeat_exp(x: torch.Tensor) -> torch.Tensor:
    for _ in range(16):
        x = torch.exp(x)
    return x


def base_model(kind: str) -> torch.nn.Module:
    """With running statistics that are those of crystals."""
    torch.manual_seed(0)
    model = candidates.MODELS[kind]()
    with torch.no_grad(), sf.use_backend("reference"):
        model.train()(batches(64, "cpu", seed=1)[0])
    return model


def candidate(bench: Bench, kind: str, name: str, native: Any, same: Any) -> candidates.Candidate | str:
    """The program on the device, or why it is absent."""
    model = copy.deepcopy(base_model(kind)).to(bench.device)
    if name == "Triton":  # ours takes the compiled kernels of csrc/cuda where they are built
        if bench.dry_run:
            return "absent: needs a GPU"
        return candidates.Candidate(model, (same,), lambda: sf.use_backend("triton"), target=_target(bench, same))
    form, _, how = name.partition(", ")
    if form in ("published", "split", "PyG CGConv") and bench.dry_run and how.startswith("compiled"):
        how = "clean"  # the compiler is not what a dry run tests
    if form == "published" and how != "as shipped":
        peer = peers.published_model(model)
        if peer is None:
            return "absent: set SRCGCNN_PEERS"
        inputs = (*peers.published_input(same, clean=True)[:3], peers.segments(same))
        made = candidates.Candidate(peers.with_segment_mean(peer), inputs)
    else:
        made = candidates._form(form, how, model, native, same)
    if isinstance(made, str):
        return made
    made.model.to(bench.device)
    made.target = _target(bench, same)
    if how.startswith("compiled"):
        mode = "reduce-overhead" if how.endswith("graphs") else None
        made.call = torch.compile(made.model, dynamic=False, fullgraph=True, mode=mode)
    return made


def _target(bench: Bench, same: Any) -> torch.Tensor:
    return torch.randn(same.num_crystals, 1, generator=torch.Generator().manual_seed(1)).to(bench.device)


def one(bench: Bench, made: candidates.Candidate, work: str, how: str, rounds: int = ROUNDS) -> dict[str, Any]:
    """Median seconds and peak bytes of one program; a batch is new to ours in every round."""

    def run() -> torch.Tensor:
        backend._transposed.clear()
        return made.run(work)()

    with sf.use_precision(how):
        for _ in range(WARM_UP):
            out = run()
        peak = bench.peak(run)
        found = {"seconds": [bench.seconds(run) for _ in range(rounds)], "peak": peak, "out": out.float().cpu()}
        if work != "inference":
            found["out"] = torch.cat([found["out"].flatten(), made.gradient().float().cpu()])
        return found


def exactness(name: str) -> str:
    return {"TF32": "tf32", "bfloat16": "bfloat16"}.get(name.rpartition(", ")[2], "float32")


def compare(bench: Bench, kind: str, work: str, n_crystals: int) -> dict[str, Any]:
    """Ours beside every peer: two visits each, ours first and last, so that a drifting clock shows."""
    native, same = batches(n_crystals, bench.device)
    line: dict[str, Any] = {
        "model": kind,
        "work": work,
        "crystals": n_crystals,
        "atoms": same.num_rows,
        "rows": native.num_rows,
    }
    oracle = None
    for name in ("same graph", "native", *LESS_EXACT, *PEERS, "same graph again"):
        if bench.time_is_up(20) and name not in ("same graph", "same graph again"):
            line[name] = "left out: no time"
            continue
        if "compiled" in name and not bench.dry_run and n_crystals != SIZES[work][0]:
            line[name] = "–"
            continue
        try:
            how, plain = exactness(name), name.removesuffix(" again")
            if how != "float32":
                plain = plain.rpartition(", ")[0]
            made = candidate(bench, kind, plain, native, same)
            found = made if isinstance(made, str) else one(bench, made, work, how)
        except torch.OutOfMemoryError:
            found = "out of memory"
        except Exception as error:  # a peer that fails is a result, not the end
            found = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        if isinstance(found, dict):
            out = found.pop("out")
            oracle = out if oracle is None else oracle
            error = float((out - oracle).norm() / oracle.norm()) if out.shape == oracle.shape else float("nan")
            found |= {"ms": 1e3 * statistics.median(found["seconds"]), "difference": error}
            if not name.startswith("PyG") and not error < (5e-2 if how != "float32" else 1e-3):
                found = f"refused: its numbers differ by {error:.1e}"  # CGConv is another network
        line[name] = found
        made = None
        gc.collect()
        if not bench.dry_run:
            torch.cuda.empty_cache()
    return line


TILES = [
    backend.Tile(2, 4, 64, 4),
    backend.Tile(4, 4, 64, 8),
    backend.Tile(4, 4, 64, 4),
    backend.Tile(4, 4, 32, 4),
    backend.Tile(8, 2, 64, 4),
    backend.Tile(4, 4, 64, 4, by_dot=True),
    backend.Tile(4, 4, 32, 4, by_dot=True),
    backend.Tile(8, 4, 32, 4, by_dot=True),
]


def sweep(bench: Bench) -> list[dict[str, Any]]:
    """Other tiles for the three kernels that matter: a training step and an inference of SR-CGCNN with each."""
    size = 8 if bench.dry_run else 4096
    _, same = batches(size, bench.device)
    found, kept = [], dict(backend.TILES)
    for name in ("gate_sum", "backward_rows", "backward_senders"):
        for tile in TILES:
            if bench.time_is_up(60):
                break
            if (name == "backward_rows" or tile.by_dot) and tile.rows * tile.degree < 16:
                continue
            backend.TILES[name] = tile
            work = "inference" if name == "gate_sum" else "training step"
            line: dict[str, Any] = {"kernel": name, "tile": list(tile), "work": work, "ms": None}
            try:
                made = candidate(bench, "SR-CGCNN", "same graph" if bench.dry_run else "Triton", same, same)
                assert not isinstance(made, str)
                line["ms"] = 1e3 * statistics.median(one(bench, made, work, "float32", rounds=5)["seconds"])
            except Exception as error:
                line["work"] = str(error)[:80]
            found.append(line)
        backend.TILES.update(kept)
    return found


def small_batches(bench: Bench) -> dict[str, float]:
    """Milliseconds from a batch on the CPU to its predictions on the CPU, plain and as a replayed CUDA graph."""
    model, found = base_model("SR-CGCNN").to(bench.device).eval(), {}
    calls: dict[str, Callable[[Any], torch.Tensor]] = {"plain": lambda batch: model.predict(batch.to(bench.device))}
    if not bench.dry_run:
        calls["captured"] = sf.CapturedModel(model)
    for n_crystals in (1, 64):
        given = batches(n_crystals, "cpu", seed=3)[0]
        for name, call in calls.items():
            seconds = []
            with torch.no_grad():
                for _ in range(WARM_UP + 20):
                    given.cache.clear()
                    start = time.perf_counter()
                    call(given).cpu()
                    seconds.append(time.perf_counter() - start)
            found[f"{name}, {n_crystals} crystals"] = 1e3 * statistics.median(seconds[WARM_UP:])
    return found


def training(bench: Bench) -> dict[str, Any]:
    """Epochs from packed graphs by ``fit``: crystals a second, and the share of time without a batch to train on."""
    from srcgcnn_fast.graph import GraphStore
    from srcgcnn_fast.training import GraphDataModule, Recipe, fit

    found: dict[str, Any] = {}
    made = graphs(64 if bench.dry_run else 32768)
    values = torch.randn(len(made), generator=torch.Generator().manual_seed(0)).numpy()
    store = GraphStore.from_graphs(made, targets={"y": values})
    for size in (8,) if bench.dry_run else (256, 4096):
        torch.manual_seed(0)
        data = GraphDataModule(store, "y", batch_size=size)
        with tempfile.TemporaryDirectory() as folder:
            recipe = Recipe(epochs=3)
            history = fit(sf.SRCGCNN(), data, folder, recipe, accelerator="cpu" if bench.dry_run else "gpu").history
        found[f"batches of {size}"] = {k: history[-1][k] for k in ("crystals_per_second", "data_wait")}
    return found


def attempt(bench: Bench, what: Callable[[], Any], needed: float) -> Any:
    """What ``what`` finds, or one line on why it does not."""
    if bench.time_is_up(needed):
        return "left out: no time"
    try:
        return what()
    except Exception as error:  # the rest of the run goes on
        return f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"


def exactness_of_models(bench: Bench) -> list[dict[str, Any]]:
    if not bench.dry_run:
        return precision.effects("cuda", 300)
    with precision.emulated():
        return precision.effects("cpu", 2)


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    names = ("same graph", "native", *LESS_EXACT, *PEERS)
    text = [f"# {result['name']}", "", f"`{result['command']}`", ""]
    text += [f"* {k}: {v}" for k, v in result["machine"].items()]
    text += ["", "## Checks", ""] + [
        f"* {k}: {'passed' if v['code'] == 0 else v['tail']}" for k, v in result["checks"].items()
    ]
    text += ["", "## Ceilings", ""] + [f"* {k}: {v:.3g}" for k, v in result["ceilings"].items()]
    text += [
        "", "## Times and memory", "",
        "Milliseconds (median of 10 rounds), how many times ours on the same graph, peak MiB beyond the input.",
        "Peers have a vectorised pooling and, but for *as shipped*, no denormal features; whole models.", "",
        "| model | work | crystals | atoms | ns per atom and step | " + " | ".join(names) + " |",
        "| --- " * (len(names) + 5) + "|",
    ]  # fmt: skip
    for line in result["lines"]:
        ours = line["same graph"]["ms"] if isinstance(line["same graph"], dict) else float("nan")
        cells = [
            line["model"],
            line["work"],
            str(line["crystals"]),
            str(line["atoms"]),
            f"{ours * 1e6 / line['atoms'] / 3:.2f}",
        ]
        for name in names:
            x = line[name]
            cells.append(
                x if isinstance(x, str) else f"{x['ms']:.3g} ({x['ms'] / ours:.2f}×), {x['peak'] / 2**20:.0f} MiB"
            )
        text.append("| " + " | ".join(cells) + " |")
    found = result["precision"]
    text += ["", "## Precision", "", found if isinstance(found, str) else precision.table(found)]
    for title, key in (
        ("Small batches, ms with both transfers", "small batches"),
        ("Training from a store", "training"),
    ):
        text += ["", f"## {title}", ""]
        text += [result[key]] if isinstance(result[key], str) else [f"* {k}: {v}" for k, v in result[key].items()]
    text += ["", "## Tiles", ""]
    text += ["| kernel | rows, edges, channels, warps, filter by tl.dot | work | ms |", "| --- | --- | --- | --- |"]
    text += [f"| {x['kernel']} | {x['tile']} | {x['work']} | {x['ms']} |" for x in result["tiles"]]
    return "\n".join(text) + "\n"


def about(bench: Bench) -> dict[str, str]:
    found = measure.machine() | {"triton": measure._version("triton")}
    found |= {f"backend {name}": sf.backends()[name].reason for name in ("cuda", "triton")}
    if not bench.dry_run:
        card = command("nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm", "--format=csv,noheader")
        found |= {"GPU": card["tail"], "CUDA of torch": str(torch.version.cuda)}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", metavar="NAME", help="write NAME.json and NAME.md into benchmarks/results")
    parser.add_argument("--minutes", type=float, default=10, help="leave out what does not fit (default 10)")
    parser.add_argument("--build", action="store_true", help="install this checkout first, without dependencies")
    parser.add_argument("--dry-run", action="store_true", help="every step on the CPU, with tiny sizes")
    options = parser.parse_args()
    bench = Bench(options.dry_run, options.minutes)
    if not bench.dry_run and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --dry-run goes through the steps on the CPU.")
    built = {}
    if options.build:
        install = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", ".")
        built = {"build": command(*install)}
    result: dict[str, Any] = {"name": options.record or "gpu", "command": " ".join(["python", *sys.argv])}
    result["machine"] = about(bench)
    result["checks"] = built | checks(bench)
    result["ceilings"] = ceilings(bench)
    sizes = {"inference": (4, 8), "training step": (4,)} if bench.dry_run else SIZES
    result["lines"] = []
    for k, work, kind in itertools.product(range(4), sizes, candidates.MODELS):
        if k < len(sizes[work]) and not bench.time_is_up(30):
            result["lines"].append(compare(bench, kind, work, sizes[work][k]))
    result["precision"] = attempt(bench, lambda: exactness_of_models(bench), 20)
    result["small batches"] = attempt(bench, lambda: small_batches(bench), 20)
    result["training"] = attempt(bench, lambda: training(bench), 60)
    result["tiles"] = sweep(bench)
    print(table(result))
    if options.record and not bench.dry_run:
        folder = ROOT / "benchmarks" / "results"
        (folder / f"{options.record}.json").write_text(json.dumps(result, indent=1) + "\n")
        (folder / f"{options.record}.md").write_text(table(result))
    return 0 if all(x["code"] == 0 for k, x in result["checks"].items() if k in ("tests", "small step")) else 1


if __name__ == "__main__":
    sys.exit(main())
