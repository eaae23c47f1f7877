"""Inference and training step of both models beside the published programs' own modules, in one process.

    SRCGCNN_PEERS=… SRCGCNN_TEST_DATA=… pytest benchmarks/test_models.py --benchmark-enable --record NAME

Settings (all float32): *as shipped*, the peer's features as its loader makes them; *clean*, without their denormal
numbers; *same graph*, identical edges for both; *native*, our default graph with the symmetry quotient.
"""

from __future__ import annotations

import peers
import pytest
import torch
import workload
from measure import alternate, medians

import srcgcnn_fast as sf

MODELS = {"SR-CGCNN": sf.SRCGCNN, "CGCNN": sf.CGCNN}


def inference(model, *inputs):
    def run():
        with torch.no_grad():
            return model.eval()(*inputs)

    return run


def training_step(model, *inputs):
    generator = torch.Generator().manual_seed(0)
    target = None

    def run():
        nonlocal target
        model.train().zero_grad(set_to_none=True)
        out = model(*inputs)
        if target is None:
            target = torch.randn(out.shape, generator=generator)
        torch.nn.functional.mse_loss(out, target).backward()
        return out.detach()

    return run


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("work", ["inference", "training step"])
@pytest.mark.parametrize("kind", MODELS)
def test_beside_the_published_program(benchmark, record, kind, work, threads, n_crystals=256):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        model = MODELS[kind]()
        peer = peers.published_model(model)
        native, same = workload.batches(n_crystals)
        task = inference if work == "inference" else training_step
        candidates = {"same graph": task(model, same), "native": task(model, native)}
        if peer is not None:
            candidates["published, clean"] = task(peer, *peers.published_input(same, clean=True))
            candidates["published, as shipped"] = task(peer, *peers.published_input(same, clean=False))
            start = {k: v.clone() for k, v in model.state_dict().items()}
            results = {}
            for name, run in candidates.items():
                model.load_state_dict(start)
                peer.load_state_dict(start)
                results[name] = run()
            for name, got in results.items():  # no number from a kernel that is wrong
                torch.testing.assert_close(got, results["published, clean"], rtol=1e-3, atol=1e-4, msg=name)
        seconds = alternate(candidates)
        benchmark.pedantic(candidates["same graph"], rounds=3)
    finally:
        torch.set_num_threads(before)
    took = medians(seconds)
    row: dict[str, object] = {"model": kind, "work": work, "threads": threads, "crystals": n_crystals}
    row |= {"rows same": same.num_rows, "rows native": native.num_rows}
    row |= {f"{name}, ms": 1e3 * t for name, t in took.items()}
    if peer is None:
        row["published"] = "absent: set SRCGCNN_PEERS"
    else:
        clean, shipped = took["published, clean"], took["published, as shipped"]
        row |= {"clean / same": clean / took["same graph"], "clean / native": clean / took["native"]}
        row |= {"as shipped / native": shipped / took["native"]}
    benchmark.extra_info.update(row)
    record(row)
