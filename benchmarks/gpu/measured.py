"""What the workbench measures on one device; every function gives plain values.

    python benchmarks/gpu/measured.py SR-CGCNN

compiles the programs that others are compared as, and keeps them in the compiler's cache for ``run.py``.
"""

from __future__ import annotations

import copy
import gc
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import candidates  # noqa: E402
import crystals  # noqa: E402
import measure  # noqa: E402
import numpy as np  # noqa: E402
import peers  # noqa: E402
import torch  # noqa: E402

import srcgcnn_fast as sf  # noqa: E402
from srcgcnn_fast import prediction  # noqa: E402
from srcgcnn_fast.graph import GraphBatch, GraphStore  # noqa: E402
from srcgcnn_fast.ops import cuda_conv  # noqa: E402
from srcgcnn_fast.ops import triton as backend  # noqa: E402

COMPILED = ("published, compiled", "split, compiled")
EAGER = ("published", "published, TF32", "PyG CGConv")
OURS = ("native", "same graph, TF32", "same graph, bfloat16", "Triton")
CAPTURED = "published, compiled with CUDA graphs"
SIZES = {"inference": 65536, "training step": 4096}
"""Crystals of the targets."""
SMALL = 256
"""Crystals of a training step of a size that people train with."""
LEAST = 1024
"""Crystals below which a program that has too little memory is not tried."""
ROUNDS, WARM_UP = 10, 3
OUT_OF_MEMORY = "out of memory"


class Bench:
    """The device, the clock, and how much of the time is left."""

    def __init__(self, dry_run: bool, minutes: float) -> None:
        self.device, self.dry_run = "cpu" if dry_run else "cuda", dry_run
        self.begin = time.monotonic()
        self.end = self.begin + 60 * minutes

    def time_is_up(self, needed: float) -> bool:
        return time.monotonic() + needed > self.end

    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    def synchronize(self) -> None:
        if not self.dry_run:
            torch.cuda.synchronize()

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

    def size(self, n_crystals: int) -> int:
        return min(n_crystals, 8) if self.dry_run else n_crystals

    def free(self) -> None:
        gc.collect()
        if not self.dry_run:
            with suppress(RuntimeError):  # of an error that ends all work on the device, which whoever goes on meets
                torch.cuda.empty_cache()


def failure(error: BaseException) -> str:
    text = str(error).splitlines()
    return f"failed: {type(error).__name__}: {text[0][:120] if text else ''}"


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


@cache
def _base_model(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = candidates.MODELS[kind]()
    with torch.no_grad(), sf.use_backend("reference"):
        model.train()(crystals.batches(64, "cpu", seed=1)[0])
    return model


def base_model(kind: str) -> Any:
    """With running statistics that are those of crystals."""
    return copy.deepcopy(_base_model(kind))


def candidate(bench: Bench, kind: str, name: str, native: Any, same: Any) -> candidates.Candidate | str:
    """The program on the device, or why it is absent."""
    model = base_model(kind).to(bench.device)
    target = torch.randn(same.num_crystals, 1, generator=torch.Generator().manual_seed(1)).to(bench.device)
    if name == "Triton":  # ours takes the compiled kernels of csrc/cuda where they are built
        if bench.dry_run:
            return "absent: needs a GPU"
        return candidates.Candidate(model, (same,), lambda: sf.use_backend("triton"), target=target)
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
    made.target = target
    if how == "captured" and not bench.dry_run:
        made.call = sf.CapturedTraining(made.model)  # type: ignore[arg-type]
    if how.startswith("compiled"):
        torch._dynamo.reset()
        mode = "reduce-overhead" if how.endswith("graphs") else None
        made.call = torch.compile(made.model, dynamic=False, fullgraph=True, mode=mode)
    return made


def one(bench: Bench, made: candidates.Candidate, work: str, how: str, rounds: int = ROUNDS) -> dict[str, Any]:
    """Median milliseconds and peak bytes of one program; a batch is new to ours in every round."""

    def run() -> torch.Tensor:
        backend._transposed.clear()
        return made.run(work)()

    with sf.use_precision(how):
        for _ in range(WARM_UP):
            out = run()
        made._forget()  # so that the step, not the state before it, counts what it makes
        made.model.zero_grad(set_to_none=True)
        backend._transposed.clear()
        if isinstance(made.call, sf.CapturedTraining):
            made.call._graphs.clear()  # a graph's memory is asked for when it is captured
        peak = bench.peak(run)
        seconds = [bench.seconds(run) for _ in range(rounds)]
        found = {"seconds": seconds, "ms": 1e3 * statistics.median(seconds), "peak": peak, "out": out.float().cpu()}
        if work != "inference":
            found["out"] = torch.cat([found["out"].flatten(), made.gradient().float().cpu()])
        return found


def _named(name: str) -> tuple[str, str]:
    """Program and precision."""
    plain, _, last = name.rpartition(", ")
    how = {"TF32": "tf32", "bfloat16": "bfloat16"}.get(last)
    return (plain, how) if how else (name.removesuffix(" again"), "float32")


def _attempt(bench: Bench, kind: str, name: str, work: str, forms: tuple[Any, Any]) -> dict[str, Any] | str:
    plain, how = _named(name)
    try:
        made = candidate(bench, kind, plain, *forms)
        return made if isinstance(made, str) else one(bench, made, work, how)
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY
    except Exception as error:  # a peer that fails is a result, not the end
        return failure(error)
    finally:
        made = None
        bench.free()


def _fitting(bench: Bench, kind: str, name: str, work: str, n_crystals: int, made_up: bool) -> dict[str, Any] | str:
    """A program that had too little memory, at the largest half, quarter … that it has enough for; ours beside it."""
    while (n_crystals := n_crystals // 2) >= LEAST and not bench.time_is_up(20):
        forms = crystals.forms(n_crystals, bench.device, made_up)
        found = _attempt(bench, kind, name, work, forms)
        if found != OUT_OF_MEMORY:
            ours = _attempt(bench, kind, "same graph", work, forms)
            if isinstance(found, dict) and isinstance(ours, dict):
                found |= {"crystals": n_crystals, "ours": ours["ms"], "ours peak": ours["peak"]}
                _check(found, name, ours["out"])
            return found
        del forms
    return OUT_OF_MEMORY


def _check(found: dict[str, Any], name: str, expected: torch.Tensor) -> None:
    """How far its numbers are from ours, in place of the numbers."""
    out, limit = found.pop("out"), 1e-3 if _named(name)[1] == "float32" else 5e-2
    found["difference"] = float((out - expected).norm() / expected.norm()) if out.shape == expected.shape else None
    if not name.startswith("PyG") and not (found["difference"] or 0) < limit:  # CGConv is another network
        found["refused"] = f"its numbers differ by {found['difference']:.1e}"


def compare(
    bench: Bench, kind: str, work: str, n_crystals: int, names: tuple[str, ...], made_up: bool = False
) -> dict[str, Any]:
    """Ours beside ``names``, ours first and last, so that a drifting clock shows."""
    forms = crystals.forms(bench.size(n_crystals), bench.device, made_up)
    line: dict[str, Any] = {
        "model": kind, "work": work, "crystals": forms[0].num_crystals, "atoms": forms[1].num_rows,
        "rows": forms[0].num_rows, "source": crystals.source(made_up),
    }  # fmt: skip
    expected = None
    for name in ("same graph", *names, "same graph again"):
        if bench.time_is_up(15 + 25 * name.endswith("compiled")):
            line[name] = "left out: no time"
            continue
        found = _attempt(bench, kind, name, work, forms)
        if found == OUT_OF_MEMORY and name in (*EAGER, *COMPILED):
            found = _fitting(bench, kind, name, work, bench.size(n_crystals), made_up)
        if isinstance(found, dict) and "out" in found:
            expected = found["out"] if expected is None else expected
            _check(found, name, expected)
        line[name] = found
    return line


def latency(bench: Bench, kind: str = "SR-CGCNN", atoms: int = 25) -> dict[str, Any]:
    """Microseconds for one crystal of ``atoms`` atoms, alternating: resident on the device, and from CPU to CPU."""
    store = crystals.real()
    given = crystals.graphs(64) if store is None else [store[i] for i in range(256)]
    chosen = min(given, key=lambda graph: (abs(graph.n_atoms - atoms), graph.n_rows))
    native = sf.collate([chosen])
    same, model = crystals.expand_quotient(native), base_model(kind).to(bench.device).eval()
    captured = model.predict if bench.dry_run else sf.CapturedModel(model)
    programs: dict[str, tuple[Callable[..., torch.Tensor], Any]] = {
        "same graph, captured": (captured, same), "native, captured": (captured, native),
        "same graph, plain": (model.predict, same),
    }  # fmt: skip
    for name in ("published", "published, compiled", CAPTURED):
        made = candidate(bench, kind, name, native, same)
        if not isinstance(made, str):
            made.model.eval()
            programs[name] = made._forward, made.inputs
    found: dict[str, Any] = {"atoms": chosen.n_atoms, "rows": chosen.n_rows, "resident": {}, "from the CPU": {}}

    def run(call: Callable[..., torch.Tensor], inputs: Any, device: str) -> torch.Tensor:
        with torch.no_grad():
            out = _call(call, inputs, bench.device).to(device)
        bench.synchronize()
        return out

    for where, device in (("resident", bench.device), ("from the CPU", "cpu")):
        calls = {name: partial(run, call, _moved(x, device), device) for name, (call, x) in programs.items()}
        seconds = measure.alternate(calls, rounds=3 if bench.dry_run else 100, warm_up=2 if bench.dry_run else 20)
        found[where] = {name: 1e6 * t for name, t in measure.medians(seconds).items()}
    outs = {name: run(call, _moved(x, "cpu"), "cpu") for name, (call, x) in programs.items()}
    expected = outs["same graph, captured"]
    found["difference"] = {name: float((x - expected).norm() / expected.norm()) for name, x in outs.items()}
    return found


def _moved(inputs: Any, device: str) -> Any:
    return tuple(_moved(x, device) for x in inputs) if isinstance(inputs, tuple) else inputs.to(device)


def _call(call: Callable[..., torch.Tensor], inputs: Any, device: str) -> torch.Tensor:
    """Of inputs wherever they are; CapturedModel moves a batch itself."""
    if isinstance(inputs, GraphBatch):
        inputs.cache.clear()
        return call(inputs if isinstance(call, sf.CapturedModel) else inputs.to(device))
    return call(*_moved(inputs, device))


def rates(bench: Bench, n_crystals: int = 262144) -> dict[str, Any]:
    """Native crystals a second from a batch on the device, and as many as they would be with 25 atoms each."""
    native, same = crystals.forms(bench.size(n_crystals), bench.device)
    found: dict[str, Any] = {"crystals": native.num_crystals, "atoms": same.num_rows, "source": crystals.source()}
    del same
    for kind in candidates.MODELS:
        model = base_model(kind).to(bench.device)
        for how in ("float32", "bfloat16"):
            seconds = statistics.median(one(bench, candidates.Candidate(model, (native,)), "inference", how)["seconds"])
            found[f"{kind}, {how}"] = {
                "crystals/s": found["crystals"] / seconds, "25-atom crystals/s": found["atoms"] / 25 / seconds
            }  # fmt: skip
    return found


def _store(n_crystals: int) -> GraphStore:
    store = crystals.real()
    given = crystals.graphs(n_crystals) if store is None else [store[i] for i in crystals.drawn(n_crystals)]
    values = torch.randn(n_crystals, generator=torch.Generator().manual_seed(0)).numpy()
    return GraphStore.from_graphs(given, targets={"y": values})


def from_store(bench: Bench, n_crystals: int = 65536) -> dict[str, Any]:
    """``predict`` of a store: crystals a second end to end, and those of each part alone."""
    store, model = _store(bench.size(n_crystals)), base_model("SR-CGCNN").to(bench.device).eval()
    found: dict[str, Any] = {"crystals": len(store)}

    def rate(run: Callable[[], object], rounds: int = 3) -> float:
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            run()
            bench.synchronize()
            seconds.append(time.perf_counter() - start)
        return len(store) / statistics.median(seconds)

    for rows in (20_000, 200_000):
        places = [np.arange(*cut) for cut in prediction._cuts(store.row_counts, rows)]
        here = [store.batch(place) for place in places]
        if not bench.dry_run:
            here = [batch.pin_memory() for batch in here]
        there = [batch.to(bench.device) for batch in here]

        def compute(there: list[GraphBatch] = there) -> None:
            for batch in there:
                batch.cache.clear()
                with torch.inference_mode():
                    model.predict(batch)

        found[f"batches of {rows} rows"] = {
            "end to end": rate(partial(sf.predict, model, store, batch_atoms=rows)),
            "packing": rate(lambda places=places: [store.batch(place) for place in places]),
            "pinned copies": rate(lambda here=here: [x.to(bench.device, non_blocking=True) for x in here]),
            "computing": rate(compute),
        }
    return found


def training(bench: Bench) -> dict[str, Any]:
    """Epochs from packed graphs by ``fit``: crystals a second, and the share of time without a batch to train on."""
    from srcgcnn_fast.training import GraphDataModule, Recipe, fit

    found: dict[str, Any] = {}
    store = _store(64 if bench.dry_run else 32768)
    accelerator = "cpu" if bench.dry_run else "gpu"
    for size, captured in [(8, False)] if bench.dry_run else itertools.product((256, 4096), (False, True)):
        torch.manual_seed(0)
        data = GraphDataModule(store, "y", batch_size=size)
        with tempfile.TemporaryDirectory() as folder:
            recipe = Recipe(epochs=3)
            history = fit(sf.SRCGCNN(), data, folder, recipe, accelerator=accelerator, captured=captured).history
        name = f"batches of {size}" + ", captured" * captured
        found[name] = {k: history[-1][k] for k in ("crystals_per_second", "data_wait")}
    return found


def blocks(bench: Bench) -> dict[str, float]:
    """Milliseconds of a training step of SR-CGCNN, with other numbers of blocks that share out its rows."""
    _, same = crystals.forms(bench.size(SIZES["training step"]), bench.device)
    found, kept = {}, cuda_conv.PROGRAMS
    try:
        for count in (132, 264, 396, 528):
            cuda_conv.PROGRAMS = count
            made = candidate(bench, "SR-CGCNN", "same graph", same, same)
            assert not isinstance(made, str)
            found[str(count)] = one(bench, made, "training step", "float32")["ms"]
    finally:
        cuda_conv.PROGRAMS = kept
    return found


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
    """Other tiles for the three large kernels of Triton: a training step and an inference of SR-CGCNN with each."""
    _, same = crystals.forms(bench.size(4096), bench.device)
    found, kept = [], dict(backend.TILES)
    for name in ("gate_sum", "backward_rows", "backward_senders"):
        for tile in TILES:
            if bench.time_is_up(15):
                break
            if (name == "backward_rows" or tile.by_dot) and tile.rows * tile.degree < 16:
                continue
            backend.TILES[name] = tile
            work = "inference" if name == "gate_sum" else "training step"
            line: dict[str, Any] = {"kernel": name, "tile": list(tile), "work": work, "ms": None}
            try:
                made = candidate(bench, "SR-CGCNN", "same graph" if bench.dry_run else "Triton", same, same)
                assert not isinstance(made, str)
                line["ms"] = one(bench, made, work, "float32", rounds=5)["ms"]
            except Exception as error:
                line["work"] = failure(error)[:80]
            found.append(line)
        backend.TILES.update(kept)
    return found


def compile_peers(kind: str) -> None:
    """Each program once, in the order of their worth; what it costs in memory is no reason not to keep it compiled."""
    bench = Bench(dry_run=not torch.cuda.is_available(), minutes=10)
    if not bench.dry_run:
        torch.cuda.set_per_process_memory_fraction(0.3)
    for name in COMPILED:
        if name != COMPILED[0] and kind == "SR-CGCNN":
            print(latency(bench), flush=True)
        for work, size in (*SIZES.items(), *[("training step", SMALL)] * (name == COMPILED[0])):
            forms = crystals.forms(bench.size(size), bench.device)
            found = _attempt(bench, kind, name, work, forms)
            print(
                f"{bench.elapsed():4.0f} s", kind, name, work, size, found if isinstance(found, str) else "done",
                flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    compile_peers(sys.argv[1])
