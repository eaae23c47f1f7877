"""Inference and training step of both models beside other programs, in one process, round by round.

    SRCGCNN_PEERS=… SRCGCNN_TEST_DATA=… pytest benchmarks --benchmark-enable --record NAME

Settings (all float32): *as shipped*, the peer's features as its loader makes them; *clean*, without their denormal
numbers; *same graph*, identical edges for all; *native*, our default graph with the symmetry quotient.
"""

from __future__ import annotations

import time

import candidates as field
import measure
import peers
import pytest
import workload

ROUNDS = {1: 50, 16: 20, 256: 10, 2048: 3}
NOTE = (
    "Milliseconds, medians of alternating rounds ({rounds} of them for batches of {sizes} crystals), each line in a "
    "process of its own; a number behind a time: how many times longer than ours on the same graph / on our native "
    "graph. A batch is new to ours in every round; edge features of the others are made beforehand. Clean: peers' "
    "features below 1e-30 are zero, torch.set_flush_denormal(True) in the calling thread (False for ours and as "
    "shipped). A training step is forward, loss and backward. Compiled: torch.compile, default mode, dynamic=False, "
    "with one operator for the pooling in place of the published loop. PyG CGConv has one batch norm per layer: "
    "another, lighter network."
)


def entrants(crystals: int, threads: int) -> list[str]:
    """Who takes part: compilers only at 256 crystals; fewer where a round takes many seconds."""
    if crystals > 256:
        return [*field.OURS, field.ORACLE, *(["split"] if threads > 1 else [])]
    if crystals == 256 and threads == 1:
        return [*field.OURS, field.ORACLE, "PyG CGConv", "published, compiled", "split, compiled"]
    return [*field.OURS, *field.EAGER, *(field.COMPILED if crystals == 256 else ())]


@pytest.mark.parametrize("work", field.WORK)
@pytest.mark.parametrize("kind", field.MODELS)
@pytest.mark.parametrize("threads", [1, 2], ids=lambda n: f"{n}threads")
@pytest.mark.parametrize("crystals", ROUNDS, ids=lambda n: f"{n}crystals")
def test_beside_others(benchmark, record, kind, work, threads, crystals):
    if work != "inference" and crystals == 1:
        pytest.skip("a training step needs more than one crystal")
    raw = measure.in_fresh_process(measured, kind, work, threads, crystals)
    with measure.threads(threads):
        benchmark.pedantic(field.make(kind, "native", *workload.batches(crystals)).run(work), rounds=3)
    benchmark.extra_info.update(raw)
    sizes = ", ".join(map(str, ROUNDS))
    note = NOTE.format(rounds=", ".join(map(str, ROUNDS.values())), sizes=sizes)
    record(f"{work}, {threads} thread{'s' if threads > 1 else ''}", shown(raw), note)


def measured(kind: str, work: str, threads: int, crystals: int) -> dict:
    with measure.threads(threads):
        native, same = workload.batches(crystals)
        made = {name: field.make(kind, name, native, same) for name in entrants(crystals, threads)}
        if isinstance(made[field.ORACLE], str):  # something must say what is right
            made["reference"] = field.make(kind, "reference", native, same)
        absent = {name: why for name, why in made.items() if isinstance(why, str)}
        entered = {name: one for name, one in made.items() if not isinstance(one, str)}
        outputs, first = {}, {}
        for name, one in entered.items():
            start = time.perf_counter()
            outputs[name] = one.run(work)()
            first[name] = time.perf_counter() - start
        # The first call was the warm-up.
        field.gate(work, entered, outputs)  # no number from what is wrong
        seconds = measure.alternate({name: one.run(work) for name, one in entered.items()}, ROUNDS[crystals], 0)
    raw = {"model": kind, "work": work, "threads": threads, "crystals": crystals, "rows": same.num_rows}
    raw |= {"rows native": native.num_rows, "denormals per edge": peers.denormals_per_edge(same)}
    raw |= {"seconds": measure.medians(seconds), "rounds": seconds, "absent": absent}
    return raw | {"first call, s": {name: s for name, s in first.items() if "compiled" in name}}


def shown(raw: dict) -> dict:
    took = raw["seconds"]
    row = {"model": raw["model"], "crystals": raw["crystals"], "atoms": raw["rows"], "rows native": raw["rows native"]}
    row |= {f"ours, {name}": 1e3 * took[name] for name in field.OURS}
    for name in (*field.EAGER, *field.COMPILED):
        if name in took:
            ratios = [f"{took[name] / took[ours]:.3g}" for ours in ("same graph", "native")]
            row[name] = f"{1e3 * took[name]:.3g} ({' / '.join(ratios)})"
        elif name in raw["absent"]:
            row[name] = raw["absent"][name]
    row["compile, s"] = " / ".join(f"{s:.0f}" for s in raw["first call, s"].values())
    return row
