"""What each kernel takes on the GPU; with another checkout, beside what its kernels take.

    python benchmarks/gpu/kernels.py --beside ../before

builds that checkout (a folder; ``git worktree add ../before COMMIT`` makes one) into build/gpu, and runs both in turn,
twice each, in processes of their own, on the same crystals. Microseconds of a training step of 4 096 crystals and of
inference of 65 536, of both models, as quotients and as the same graph, from the profiler of PyTorch; names that only
one of the two has are kernels that were joined or parted. Where outputs and gradients of the two differ there are no
times. ``--work`` takes a part of the names that shall be measured alone; ``--dry-run`` profiles operators of the CPU.
"""

from __future__ import annotations

import argparse
import copy
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SIZES = {"training step": 4096, "inference": 65536}
WARM_UP, ROUNDS = 3, 5
LEAST = 0.005
"""Of the whole; what takes less is added up in one line."""
LIMIT = 1e-3
"""Relative L2 difference of outputs and gradients beyond which nothing is reported."""


def profiled(run: Callable[[], object], device: str) -> dict[str, dict[str, float]]:
    """Name of a kernel -> launches and microseconds of one call, on the average of some calls."""
    kind = torch.profiler.ProfilerActivity
    on_cpu = device == "cpu"
    for _ in range(WARM_UP):
        run()
    with torch.profiler.profile(activities=[kind.CPU if on_cpu else kind.CUDA]) as profile:
        for _ in range(ROUNDS):
            run()
        if not on_cpu:
            torch.cuda.synchronize()
    found: dict[str, dict[str, float]] = {}
    for event in profile.key_averages():
        if (event.device_type == torch.autograd.DeviceType.CPU) != on_cpu:
            continue
        line = found.setdefault(short(event.key), {"launches": 0.0, "us": 0.0})
        line["launches"] += event.count / ROUNDS
        line["us"] += (event.self_cpu_time_total if on_cpu else event.self_device_time_total) / ROUNDS
    if not found:
        raise RuntimeError("The profiler saw no kernel.")
    return found


def short(name: str) -> str:
    """A kernel's name without its arguments, and without its template's where they are not ours."""
    ours = re.fullmatch(r"(?:void )?srcgcnn::(?:\(anonymous namespace\)::)?(\w+(?:<[^>(]*>)?)\(.*\)", name)
    return ours.group(1) if ours else re.sub(r"^void |\(.*\)$|<.*", "", name.replace("(anonymous namespace)::", ""))


def take_from(folder: Path) -> None:
    """Import the ``srcgcnn_fast`` that lies there, and nothing that is installed, editable or not."""
    sys.path.insert(0, str(folder))
    sys.meta_path[:] = [x for x in sys.meta_path if "Redirect" not in type(x).__name__]
    import srcgcnn_fast

    if not Path(srcgcnn_fast.__file__).is_relative_to(folder):
        raise RuntimeError(f"{srcgcnn_fast.__file__} was imported instead of what lies in {folder}.")


def need_compiled() -> None:
    """Else Triton's kernels would be taken for the compiled ones."""
    import srcgcnn_fast as sf

    status = sf.backends()["cuda"]
    if not status.available:
        raise SystemExit(f"The compiled kernels cannot run: {status.reason}.")


def times(given: dict[str, dict[str, torch.Tensor]], device: str, work: str = "") -> dict[str, Any]:
    """Each work -> its kernels, and what came out: outputs, then gradients. ``given``: from :func:`batches`."""
    import srcgcnn_fast as sf
    from srcgcnn_fast.ops import triton

    made = lambda parts: sf.GraphBatch(**{name: x.to(device) for name, x in parts.items()})  # noqa: E731
    found: dict[str, Any] = {}
    for kind, network in (("SR-CGCNN", sf.SRCGCNN), ("CGCNN", sf.CGCNN)):
        torch.manual_seed(0)
        base = network()
        with torch.no_grad(), sf.use_backend("reference"):
            base.train()(sf.GraphBatch(**given["warm up"]))
        for task in SIZES:
            for form in ("same graph", "native"):
                name = f"{kind} {task}, {form}"
                if work not in name:
                    continue
                batch = made(given[f"{task}, {form}"])
                model = copy.deepcopy(base).to(device).train(task != "inference")
                outs = []

                def run(batch: Any = batch, model: torch.nn.Module = model, outs: list[Any] = outs) -> None:
                    batch.cache.clear()  # a batch is new in every round
                    triton._transposed.clear()
                    model.zero_grad(set_to_none=True)
                    with torch.set_grad_enabled(model.training):
                        out = model(batch)
                    if model.training:
                        out.square().mean().backward()
                    outs[:] = [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

                kernels = profiled(run, device)
                out = torch.cat([x.flatten().double().cpu() for x in outs])
                found[name] = {"kernels": kernels, "out": out, "rows": batch.numbers.shape[0]}
                del batch, run
    return found


def table(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    """Each work's kernels as a table; ``before`` may be empty."""
    text: list[str] = []
    for name, first in now[0].items():
        columns = {"before": [x[name] for x in before], "now": [x[name] for x in now]}
        sums = {k: [sum(y["us"] for y in x["kernels"].values()) for x in xs] for k, xs in columns.items() if xs}
        text += ["", f"### {name}, {first['rows']} rows", ""]
        heading = len(text)
        for k, (one, *others) in sums.items():
            again = "".join(f" (again {x:.0f})" for x in others)
            text.append(f"* {k}: {one:.0f} µs{again}, {1e3 * one / first['rows'] / 3:.2f} ns a row and step")
        if before:
            expected, out = (columns[k][0]["out"] for k in ("before", "now"))
            apart = float((out - expected).norm() / expected.norm()) if out.shape == expected.shape else float("nan")
            if not apart <= LIMIT:
                text = [
                    *text[:heading],
                    f"Not reported: outputs and gradients differ by {apart:.0e}, relative L2 norm.",
                ]
                continue
            text.append(f"* outputs and gradients differ by {apart:.0e}, relative L2 norm")
        best = {k: _best(xs) for k, xs in columns.items() if xs}
        text += ["", "| kernel | launches | " + " | ".join(f"µs {k}" for k in best) + " |"]
        text.append("| --- | --- |" + " --- |" * len(best))
        most = lambda name, best=best: max(b[name][1] for b in best.values() if name in b)  # noqa: E731
        names = sorted({name for b in best.values() for name in b}, key=most, reverse=True)
        rest = dict.fromkeys(best, 0.0)
        for kernel in names:
            pair = {k: b.get(kernel) for k, b in best.items()}
            if most(kernel) < LEAST * max(x[0] for x in sums.values()):
                for k, x in pair.items():
                    rest[k] += x[1] if x else 0.0
                continue
            launches = " → ".join(dict.fromkeys(f"{x[0]:.3g}" for x in pair.values() if x))
            text.append(f"| `{kernel}` | {launches} | " + " | ".join(_cell(x) for x in pair.values()) + " |")
        text.append("| the rest | | " + " | ".join(f"{x:.0f}" for x in rest.values()) + " |")
    return "\n".join(text) + "\n"


def _best(runs: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Kernel -> launches, and the least of the runs' microseconds."""
    names = {name for run in runs for name in run["kernels"]}
    lines = {name: [run["kernels"][name] for run in runs if name in run["kernels"]] for name in names}
    return {name: (x[0]["launches"], min(y["us"] for y in x)) for name, x in lines.items()}


def _cell(found: tuple[float, float] | None) -> str:
    return "–" if found is None else f"{found[1]:.0f}" if found[1] >= 10 else f"{found[1]:.1f}"


def batches(dry_run: bool) -> dict[str, dict[str, torch.Tensor]]:
    """The batches of all works, as plain tensors, which any version of the package takes."""
    sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT)]
    import crystals

    parts = ("numbers", "weight", "sender", "distance", "row_ptr", "crystal_ptr", "atom_class")
    plain = lambda batch: {name: getattr(batch, name) for name in parts}  # noqa: E731
    found = {"warm up": plain(crystals.batches(64, "cpu", seed=1)[0])}
    for task, size in SIZES.items():
        native, same = crystals.forms(8 if dry_run else size, "cpu")
        found |= {f"{task}, native": plain(native), f"{task}, same graph": plain(same)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="another version of the sources")
    parser.add_argument("--work", default="", metavar="PART", help="only works whose names hold this")
    parser.add_argument("--dry-run", action="store_true", help="operators of the CPU, tiny sizes")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = "cpu" if options.dry_run else "cuda"
    if options.child:
        if options.build:
            take_from(options.build)
        if not options.dry_run:
            need_compiled()
        found = times(torch.load(options.child), device, options.work)
        torch.save(found, options.child.with_name("found.pt"))
        return
    built = ROOT / "build" / "gpu" / "beside"
    if options.beside:
        build = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade"]
        build += ["--no-build-isolation"] * bool(find_spec("scikit_build_core"))  # which needs no network
        subprocess.run([*build, "--target", str(built), str(options.beside.resolve())], check=True)
    runs: dict[str, list[dict[str, Any]]] = {"before": [], "now": []}
    failed = ""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(batches(options.dry_run), path := Path(folder, "batches.pt"))
        words = [sys.executable, "-P", __file__, "--child", str(path), "--work", options.work]
        words += ["--dry-run"] * options.dry_run
        for which in ("now", "before", "before", "now") if options.beside else ("now", "now"):
            command = [*words, "--build", str(built)] if which == "before" else words
            if subprocess.run(command).returncode:
                failed = f"The kernels {'of --beside' if which == 'before' else 'of this build'} did not run."
                break
            runs[which].append(torch.load(path.with_name("found.pt")))
    if runs["now"]:  # what there is, should a later run have failed
        print(table(runs["before"], runs["now"]))
    if failed:
        raise SystemExit(failed)


if __name__ == "__main__":
    main()
