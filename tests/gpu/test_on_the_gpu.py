"""Every public way to a convolution on a GPU, against the reference in float64 on the CPU.

``SRCGCNN_GPU_DRY_RUN=1`` runs what can run on the CPU instead, to test these tests.
"""

from __future__ import annotations

import copy
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from convolution import kinds_and_modes
from torch import nn

import srcgcnn_fast as sf
from srcgcnn_fast import functional
from srcgcnn_fast.capture import StaticBatch
from srcgcnn_fast.functional import BatchNorm
from srcgcnn_fast.graph import CrystalGraph, GraphBatch, GraphStore
from srcgcnn_fast.nn.conv import GatedConv
from srcgcnn_fast.ops import cpu as cpu_backend
from srcgcnn_fast.ops import cuda as cuda_backend
from srcgcnn_fast.ops import cuda_conv
from srcgcnn_fast.ops import triton as triton_backend

DRY = os.environ.get("SRCGCNN_GPU_DRY_RUN") == "1"
DEVICE = "cpu" if DRY else "cuda"
BACKENDS = ["cpu"] if DRY else ["triton", "cuda"]
INFERENCE = ["cpu"] if DRY else ["triton", "cuda"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (DRY or torch.cuda.is_available()), reason="there is no CUDA device"),
]
cuda_only = pytest.mark.skipif(DRY, reason="needs a CUDA device")
KINDS = ["plain", "weighted", "ragged", "one atom", "isolated", "no edges", "one crystal", "many crystals", "large"]
each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
each_for_inference = pytest.mark.parametrize("backend", INFERENCE, indirect=True)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    assert torch.isfinite(a).all()
    return float(
        (a.detach().double().cpu() - b.detach().double().cpu()).norm()
        / b.detach().double().norm().cpu().clamp_min(1e-30)
    )


def problem(batch, width: int, n_features: int, features: bool = False):
    g = torch.Generator().manual_seed(0)
    rand = lambda *s: torch.rand(*s, generator=g, dtype=torch.float64)  # noqa: E731
    if features:
        batch.edge_features = rand(batch.num_edges, n_features)
    c = 2 * width
    leaves = [
        rand(batch.num_rows, width) * 2 + 0.3, (rand(c, c + n_features) - 0.5) / 3, rand(c) - 0.5, rand(c) + 0.5,
        rand(c) - 0.5, rand(width) + 0.5, rand(width) - 0.5,
    ]  # fmt: skip
    state = [rand(c) - 0.5, rand(c) + 0.5, rand(width) - 0.5, rand(width) + 0.5]
    upstream = (rand(batch.num_rows, width) - 0.5) * batch.weight[:, None].double()
    return batch, leaves, state, upstream


def results(name: str, given, training: tuple[bool, bool], dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Output, gradients (of the edges too where statistics are fixed), and running statistics."""
    batch, leaves, state, upstream = given
    batch = batch.to(device, dtype)
    leaves = [x.to(device, dtype).clone().requires_grad_() for x in leaves]
    state = [x.to(device, dtype).clone() for x in state]
    wanted = list(leaves)
    if not training[0]:
        edge = "distance" if batch.edge_features is None else "edge_features"
        setattr(batch, edge, getattr(batch, edge).clone().requires_grad_())
        wanted.append(getattr(batch, edge))
    h, weight, bias, g1, b1, g2, b2 = leaves
    with sf.use_backend(name):
        out = functional.gated_conv(
            h,
            batch,
            weight,
            bias,
            BatchNorm(g1, b1, *state[:2], training[0]),
            BatchNorm(g2, b2, *state[2:], training[1]),
        )
        gradients = torch.autograd.grad((out * upstream.to(device, dtype)).sum(), wanted, allow_unused=True)
    return [x for x in (out, *gradients, *state) if x is not None]


def conforms(name: str, given, training: tuple[bool, bool]) -> None:
    """At most twice as far from float64 as the published formula in float32 on the CPU."""
    truth = results("reference", given, training, torch.float64, "cpu")
    plain = results("reference", given, training, torch.float32, "cpu")
    ours = results(name, given, training, torch.float32, DEVICE)
    bias = 3  # output, h, weight, bias
    for k, (x, y, exact) in enumerate(zip(ours, plain, truth, strict=True)):
        if k == bias and training[0]:  # zero in exact arithmetic
            assert x.abs().max() <= 1e-6 * max(1.0, float(truth[2].norm()))
        else:
            assert difference(x, exact) <= 3 * difference(y, exact) + 5e-7, f"number {k} of the results"


@each_backend
@kinds_and_modes(KINDS)
def test_convolution(backend, make_batch, kind, training):
    conforms(backend, problem(make_batch(kind, seed=3), 16, 41), training)


@each_backend
@pytest.mark.parametrize(("width", "n_features"), [(64, 41), (8, 41), (7, 41), (33, 5), (48, 9), (128, 60), (200, 130)])
def test_any_width_and_number_of_gaussians(backend, make_batch, width, n_features):
    conforms(backend, problem(make_batch("weighted", seed=5), width, n_features), (True, True))


@each_backend
@pytest.mark.parametrize("training", [(True, True), (False, False)], ids=["train", "eval"])
def test_generic_edge_features(backend, make_batch, training):
    conforms(backend, problem(make_batch("weighted", seed=6), 16, 23, features=True), training)


def model_and_batch(model_type, make_batch, kind: str = "large"):
    torch.manual_seed(0)
    model = model_type().to(DEVICE)
    with torch.no_grad():
        for _ in range(3):
            model.train()(make_batch(kind, seed=1).to(DEVICE))
    return model, make_batch(kind, seed=2).to(DEVICE)


@each_for_inference
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
def test_inference_of_whole_models(backend, make_batch, model_type, kind):
    """One crystal has 150 rows, more than a block of csrc/cuda takes; the others fit."""
    model, _ = model_and_batch(model_type, make_batch)
    batch = make_batch(kind, seed=2).to(DEVICE)
    with torch.no_grad():
        ours = model.eval().features(batch)
        batch.cache.clear()
        with sf.use_backend("reference"):
            plain = model.features(batch)
            batch.cache.clear()
            exact = model.double().features(batch)
    assert difference(ours, exact) <= 2 * difference(plain, exact) + 3e-7


@each_for_inference
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("brings", ["nothing", "atoms", "edges"])
@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
def test_predictions_of_whole_models(backend, make_batch, monkeypatch, model_type, brings, kind):
    """From atomic numbers to predictions: in one call of the compiled kernels, part by part elsewhere."""
    torch.manual_seed(0)
    model = model_type(2, 48, 40, 3, n_targets=5).to(DEVICE)
    with torch.no_grad():
        model.train()(make_batch("large", seed=1).to(DEVICE))
    model.eval()
    batch, calls = make_batch(kind, seed=2), []
    if brings == "atoms":
        batch.atom_features = torch.rand(batch.num_rows, 92)
    if brings == "edges":
        batch.edge_features = torch.rand(batch.num_edges, 41)
    batch, native = batch.to(DEVICE), cpu_backend if DRY else cuda_backend
    at_once = native.NetworkParameters.run
    monkeypatch.setattr(native.NetworkParameters, "run", lambda *a: calls.append(1) or at_once(*a))
    with torch.no_grad():
        ours = model(batch)
        batch.cache.clear()
        with sf.use_backend("reference"):
            plain = model(batch)
            exact = copy.deepcopy(model).double()(batch.to(dtype=torch.float64))
    assert calls == [1] * (backend != "triton")
    assert difference(ours, exact) <= 3 * difference(plain, exact) + 1e-6


@cuda_only
@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize(("name", "least", "most"), [("tf32", 1e-6, 2e-3), ("bfloat16", 1e-5, 2e-2)])
@pytest.mark.parametrize("kind", ["weighted", "one crystal", "large"])
@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
def test_less_exact_inference_by_choice(backend, make_batch, model_type, kind, name, least, most):
    model, _ = model_and_batch(model_type, make_batch)
    batch = make_batch(kind, seed=2).to(DEVICE)
    with torch.no_grad(), sf.use_precision(name):
        ours = model.eval().features(batch)
    with torch.no_grad(), sf.use_backend("reference"):
        exact = model.double().features(batch.to(dtype=torch.float64))
    assert least < difference(ours, exact) < most


@each_for_inference
def test_crystals_without_rows(backend, make_batch):
    """As a captured batch is padded with: they change nothing else."""
    model, batch = model_and_batch(sf.SRCGCNN, make_batch, "plain")
    with torch.no_grad():
        expected = model.eval()(batch)
        batch.cache.clear()
        ends = batch.crystal_ptr[-1:].expand(3)
        batch.crystal_ptr = torch.cat([batch.crystal_ptr, ends]).contiguous()
        assert torch.equal(model(batch)[: len(expected)], expected)


@each_for_inference
@pytest.mark.parametrize("features", [False, True], ids=["distance", "edge features"])
@pytest.mark.parametrize(("width", "n_features"), [(64, 41), (7, 41), (33, 5), (128, 60)])
def test_inference_of_any_width(backend, make_batch, width, n_features, features):
    batch, leaves, state, _ = problem(make_batch("weighted", seed=5), width, n_features, features)

    def run(name: str, dtype: torch.dtype, device: str) -> torch.Tensor:
        h, weight, bias, g1, b1, g2, b2, *rest = (x.to(device, dtype) for x in (*leaves, *state))
        norms = BatchNorm(g1, b1, *rest[:2]), BatchNorm(g2, b2, *rest[2:])
        with torch.no_grad(), sf.use_backend(name):
            return functional.gated_conv(h, batch.to(device, dtype), weight, bias, *norms)

    exact, plain = (run("reference", dtype, "cpu") for dtype in (torch.float64, torch.float32))
    assert difference(run(backend, torch.float32, DEVICE), exact) <= 2 * difference(plain, exact) + 5e-7


@each_for_inference
@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
def test_bits_of_inference_repeat(backend, make_batch, model_type):
    model, batch = model_and_batch(model_type, make_batch)
    found = []
    with torch.no_grad():
        for _ in range(3):
            batch.cache.clear()
            found.append(model.eval().features(batch))
    assert all(torch.equal(found[0], again) for again in found[1:])


@each_for_inference
def test_compiled_inference(backend, make_batch):
    torch._dynamo.reset()
    model, batch = model_and_batch(sf.SRCGCNN, make_batch, "weighted")
    how = "aot_eager" if DRY else "inductor"
    with torch.no_grad():
        compiled = torch.compile(model.eval(), fullgraph=True, backend=how, dynamic=True)
        torch.testing.assert_close(compiled(batch), model(batch), rtol=1e-4, atol=1e-5)


@cuda_only
@each_for_inference
@pytest.mark.parametrize("kind", ["plain", "one crystal"])
def test_a_captured_inference_replays_on_other_edges(backend, make_batch, kind):
    model, _ = model_and_batch(sf.SRCGCNN, make_batch, "plain")
    model.eval()
    first, second = (make_batch(kind, seed=s).to(DEVICE) for s in (1, 2))
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(first)
        torch.cuda.current_stream().wait_stream(stream)
        first.cache.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(first)
        expected = model(second).clone()
        for name in ("sender", "distance", "numbers", "weight"):
            getattr(first, name).copy_(getattr(second, name))
        graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(captured, expected, rtol=1e-5, atol=1e-6)


def training_step_of(model):
    """step(batch) -> outputs, gradients and running statistics by name; always from the same state."""
    start = {k: v.clone() for k, v in model.state_dict().items()}

    def step(batch) -> dict[str, torch.Tensor]:
        model.load_state_dict(start)
        model.train().zero_grad()
        batch.cache.clear()
        out = model(batch)
        out.square().sum().backward()
        found = {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters()}
        return {"output": out.detach(), **found, **{name: x.clone() for name, x in model.named_buffers()}}

    return step


@each_backend
@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
def test_bits_repeat(backend, make_batch, model_type):
    """Of training steps of whole models; with few rows, and with so many that the element table is looked up late."""
    model, _ = model_and_batch(model_type, make_batch)
    step = training_step_of(model)
    for kind in ("plain", "weighted", "large"):
        batch = make_batch(kind, seed=2).to(DEVICE)
        first = step(batch)
        for _ in range(3):
            again = step(batch)
            assert [name for name in first if not torch.equal(first[name], again[name])] == [], kind


@each_backend
def test_equal_rows_have_the_mean_of_one(backend):
    """However many: plain sums in float32 drift by 7e-5."""

    def copper(n: int) -> GraphBatch:
        """A crystal of n atoms, each its own neighbour."""
        index = torch.arange(n + 1, dtype=torch.int32)
        whole = torch.tensor([0, n], dtype=torch.int32)
        batch = GraphBatch(index[:n] * 0 + 29, torch.ones(n), index[:n], torch.full((n,), 2.5), index, whole, index[:n])
        return batch.to(DEVICE)

    torch.manual_seed(0)
    many, one, rows = copper(40_000), copper(1), torch.rand(1, 64, device=DEVICE)
    mean = functional.crystal_mean(rows.expand(40_000, 64).contiguous().requires_grad_(), many)
    assert difference(mean, rows) < 3e-7
    model = sf.SRCGCNN().to(DEVICE).eval()
    for is_training in (False, True):
        with torch.set_grad_enabled(is_training):
            assert difference(model.features(many), model.features(one)) < 2e-6


@each_backend
@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
def test_training_steps_of_whole_models(backend, make_batch, monkeypatch, model_type):
    """All channels at once backward, and chunks in turn, as in batches of more than 65 536 rows."""
    model, batch = model_and_batch(model_type, make_batch)
    double = model_type().double().to(DEVICE)
    double.load_state_dict(model.state_dict())
    step = training_step_of(model)
    ours = [step(batch)]
    with monkeypatch.context() as patch:
        patch.setattr(cuda_conv, "AT_ONCE", 1)
        ours.append(step(batch))
    with sf.use_backend("reference"):
        plain = step(batch)
        exact = training_step_of(double)(batch.to(dtype=torch.float64))
    for name, truth in exact.items():
        assert name.endswith("fc_full.bias") or not truth.any() or difference(plain[name], truth) < 1e-4
        if not truth.is_floating_point() or name.endswith("fc_full.bias"):  # whose gradient is zero in exact arithmetic
            continue
        for found in ours:
            assert difference(found[name], truth) <= 2 * difference(plain[name], truth) + 1e-6, name


@cuda_only
def test_memory_of_a_training_step():
    """Of 100 000 rows of F numbers: at most 12 at its peak."""
    n, width = 100_000, 64
    torch.manual_seed(0)
    model = sf.SRCGCNN().to(DEVICE).train()
    index = lambda *x: torch.arange(*x, dtype=torch.int32)  # noqa: E731
    batch = sf.GraphBatch(
        torch.randint(1, 90, (n,), dtype=torch.int32), torch.ones(n), torch.randint(0, n, (12 * n,), dtype=torch.int32),
        torch.rand(12 * n) * 4 + 2, index(0, 12 * n + 1, 12), index(0, n + 1, 20), index(n) // 20,
    ).to(DEVICE)  # fmt: skip
    with sf.use_backend("cuda"):
        for _ in range(2):
            batch.cache.clear()
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(batch).square().mean().backward()
    assert torch.cuda.max_memory_allocated() - before < 12 * n * width * 4


@each_backend
@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
def test_torch_knows_of_nothing_that_varies(backend, make_batch, monkeypatch, model_type):
    """Its deterministic mode refuses or replaces what does, and fills new memory with NaN: it changes no bit."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which it refuses all products
    model, batch = model_and_batch(model_type, make_batch)
    step = training_step_of(model)
    plain = step(batch)
    torch.use_deterministic_algorithms(True)
    try:
        strict = step(batch)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [name for name in plain if not torch.equal(plain[name], strict[name])] == []


@each_backend
@pytest.mark.parametrize("training", [False, True])
def test_compile_full_graph(backend, make_batch, training):
    torch._dynamo.reset()
    model, _ = model_and_batch(sf.SRCGCNN, make_batch, "weighted")
    model.train(training)
    start, found = {k: v.clone() for k, v in model.state_dict().items()}, []
    how = "aot_eager" if DRY else "inductor"
    for call in (model, torch.compile(model, fullgraph=True, backend=how, dynamic=True)):
        model.load_state_dict(start)
        for seed in (1, 2):
            model.zero_grad()
            out = call(make_batch("weighted", seed=seed).to(DEVICE))
            out.sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@each_for_inference
def test_autocast_runs_convolutions_in_float32(backend, make_batch):
    model, batch = model_and_batch(sf.SRCGCNN, make_batch, "plain")
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        out, _ = model.eval()._convolve(*model._embed(batch), batch, False)
    assert out.dtype == torch.float32


@cuda_only
@each_backend
@pytest.mark.parametrize("training", [False, True])
def test_a_captured_step_replays_on_other_edges(backend, make_batch, training):
    """A CUDA graph of one step, then other edges in the same tensors: it must not use what followed from the first."""
    model, _ = model_and_batch(sf.SRCGCNN, make_batch, "plain")
    model.train(training)
    first, second = (make_batch("plain", seed=s).to(DEVICE) for s in (1, 2))  # same sizes, other senders and distances
    parameters = list(model.parameters())

    def step(batch):
        batch.cache.clear()
        out = model(batch)
        return out, *torch.autograd.grad(out.square().sum(), parameters)

    start = {k: v.clone() for k, v in model.state_dict().items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(first)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(first)
    model.load_state_dict(start)
    expected = [x.detach().clone() for x in step(second)]
    model.load_state_dict(start)
    for name in ("sender", "distance", "numbers", "weight"):
        getattr(first, name).copy_(getattr(second, name))
    graph.replay()
    torch.cuda.synchronize()
    for ours, truth in zip(captured, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)


@cuda_only
@each_for_inference
def test_another_stream_and_another_device(backend, make_batch):
    model, batch = model_and_batch(sf.SRCGCNN, make_batch, "plain")
    with torch.no_grad():
        expected = model.eval()(batch)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            batch.cache.clear()
            again = model(batch)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(again, expected)


@cuda_only
@each_backend
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_device_while_the_first_is_current(backend, make_batch):
    """A training step there: launches, memory and the kept index are those of the tensors' device."""
    model, batch = model_and_batch(sf.SRCGCNN, make_batch, "plain")
    other, found = copy.deepcopy(model).to("cuda:1"), []
    for device, where in (("cuda:0", model), ("cuda:1", other), ("cuda:0", model)):
        where.zero_grad()
        out = where.eval()(batch.to(device))
        out.sum().backward()
        found.append([out.detach().cpu(), *(p.grad.cpu() for p in where.parameters())])
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


@cuda_only
@each_for_inference
def test_inference_does_not_wait_for_the_gpu(backend, make_batch):
    model, batch = model_and_batch(sf.SRCGCNN, make_batch, "plain")
    model.eval()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch.cache.clear()
        with torch.no_grad():
            model(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cuda_only
@each_backend
def test_nothing_waits_for_the_gpu(backend, make_batch):
    model, batch = model_and_batch(sf.SRCGCNN, make_batch, "plain")
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch.cache.clear()
        model.train()(batch).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class OnTensors(nn.Module):
    """A model as a function of tensors, which is what an exported program takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors):
        return self.model(GraphBatch(*tensors))


def tensors(batch: GraphBatch) -> tuple[torch.Tensor, ...]:
    names = ("numbers", "weight", "sender", "distance", "row_ptr", "crystal_ptr", "atom_class")
    return tuple(getattr(batch, name) for name in names)


@each_backend
@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
def test_an_exported_program_takes_other_batches(backend, make_batch, model_type, tmp_path):
    model, _ = model_and_batch(model_type, make_batch, "weighted")
    model.eval().requires_grad_(False)
    first, second = (make_batch("weighted", seed=s).to(DEVICE) for s in (1, 2))
    dynamic = (tuple({0: torch.export.Dim.AUTO} for _ in tensors(first)),)
    program = torch.export.export(OnTensors(model), tensors(first), dynamic_shapes=dynamic)
    operator = "gated_conv_stack" if backend == "triton" else "gated_conv_network"
    assert f"srcgcnn_fast.{operator}" in str(program.graph)
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (first, second):
        torch.testing.assert_close(again(*tensors(batch)), model(batch), rtol=1e-5, atol=1e-6)


def _a_process_of_two(rank: int, where: str, batches: list, model: nn.Module, out: str) -> None:
    several = where == "cuda" and torch.cuda.device_count() > 1
    device = torch.device("cuda", rank if several else 0) if where == "cuda" else torch.device("cpu")
    dist.init_process_group("nccl" if several else "gloo", init_method=f"file://{out}.init", rank=rank, world_size=2)
    try:
        if where == "cuda":
            torch.cuda.set_device(device)
        model = nn.parallel.DistributedDataParallel(model.to(device).eval())
        model(batches[rank].to(device)).sum().backward()
        if rank == 1:
            torch.save([p.grad.cpu() for p in model.parameters()], out)
    finally:
        dist.destroy_process_group()


def test_distributed_gradients_are_the_mean_of_both_processes(make_batch, tmp_path):
    """With fixed statistics, so that no process depends on the other; on two GPUs, or both on one."""
    model, _ = model_and_batch(sf.SRCGCNN, make_batch, "plain")
    model.eval()
    batches = [make_batch("plain", seed=s) for s in (1, 2)]
    expected = [torch.zeros_like(p, device="cpu") for p in model.parameters()]
    for batch in batches:
        model.zero_grad()
        model(batch.to(DEVICE)).sum().backward()
        for total, p in zip(expected, model.parameters(), strict=True):
            total += p.grad.cpu() / 2
    model.zero_grad()
    out = tmp_path / "gradients.pt"
    mp.spawn(_a_process_of_two, (DEVICE, batches, model.cpu(), str(out)), nprocs=2)
    for ours, truth in zip(torch.load(out), expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-6)


LIMITS = {"float32": (0.0, 1e-6), "tf32": (1e-5, 3e-3), "bfloat16": (1e-4, 2e-2)}
"""Relative L2 error of a model's crystal vectors, at least and at most."""


@cuda_only
@each_for_inference
@pytest.mark.parametrize("precision", LIMITS)
def test_precision_is_what_was_chosen(backend, make_batch, precision):
    model, batch = model_and_batch(sf.SRCGCNN, make_batch)
    with torch.no_grad(), sf.use_precision(precision):
        ours = model.eval().features(batch)
    with torch.no_grad(), sf.use_backend("reference"):
        exact = model.double().features(batch)
    least, most = LIMITS[precision]
    assert least <= difference(ours, exact) <= most


@cuda_only
@each_backend
@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("features", [False, True])
def test_precision_of_a_training_step(backend, make_batch, precision, features):
    given = problem(make_batch("large", seed=6), 64, 41, features)
    with sf.use_precision(precision):
        ours = results(backend, given, (True, True), torch.float32, DEVICE)
    truth = results("reference", given, (True, True), torch.float64, "cpu")
    least, most = LIMITS[precision]
    for k in (0, 2):  # the output, and the gradient of the weight
        assert least <= difference(ours[k], truth[k]) <= 3 * most + (precision == "float32") * 1e-5


@cuda_only
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("training", [(True, True), (False, False)], ids=["train", "eval"])
def test_the_filter_from_all_gaussians(backend, make_batch, monkeypatch, training):
    for name in ("gate_sum", "backward_rows", "backward_senders"):
        monkeypatch.setitem(triton_backend.TILES, name, triton_backend.Tile(8, 4, 32, 4, by_dot=True))
    conforms(backend, problem(make_batch("weighted", seed=3), 64, 41), training)


@cuda_only
@each_backend
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 60 * 2**30,
    reason="needs 60 GiB of GPU memory",
)
def test_rows_beyond_two_to_the_31_numbers(backend):
    """The last rows of 8.4 million, 256 numbers each, against the same rows alone; forward, backward and inference."""
    n, width, tail = 2**23 + 4096, 64, 512
    torch.manual_seed(0)
    layers = nn.ModuleList([sf.GatedConv(width, 41)]).to(DEVICE).eval()
    small = torch.rand(tail, width, device=DEVICE)
    ring = torch.arange(tail, device=DEVICE, dtype=torch.int32).roll(1)
    distance = torch.rand(tail, device=DEVICE) * 4 + 1

    def batch_of(rows: int) -> GraphBatch:
        """One edge a row: the last ``tail`` rows form a ring, the others receive from themselves."""
        sender = torch.arange(rows, device=DEVICE, dtype=torch.int32)
        sender[-tail:] = ring + (rows - tail)
        d = torch.full((rows,), 2.0, device=DEVICE)
        d[-tail:] = distance
        ptr = torch.arange(rows + 1, device=DEVICE, dtype=torch.int32)
        ends = torch.tensor([0, rows], device=DEVICE, dtype=torch.int32)
        return GraphBatch(sender[:rows] * 0 + 1, torch.ones(rows, device=DEVICE), sender, d, ptr, ends, sender[:0])

    found = []
    for rows in (tail, n):
        h = torch.zeros(rows, width, device=DEVICE)
        h[-tail:] = small
        h.requires_grad_()
        out = functional.stacked_gated_conv(h, batch_of(rows), [layers[0].parameters_of_call()])[0]
        gradient = torch.autograd.grad(out[-tail:].square().sum(), h)[0]
        with torch.no_grad():
            inferred = functional.stacked_gated_conv(h, batch_of(rows), [layers[0].parameters_of_call()])[0]
        found.append([x[-tail:].detach().clone() for x in (out, gradient, inferred)])
        del h, out, gradient, inferred
        torch.cuda.empty_cache()
    for alone, far in zip(*found, strict=True):
        torch.testing.assert_close(far, alone, rtol=1e-5, atol=1e-6)


@each_backend
@pytest.mark.parametrize("trains", [False, True])
def test_features_may_begin_at_any_number(backend, make_batch, trains):
    """Kernels read rows of 64 four numbers at a time, where these lie so."""
    torch.manual_seed(0)
    batch, conv, found = make_batch("weighted").to(DEVICE), GatedConv(64).to(DEVICE).train(trains), []
    given = torch.rand(batch.num_rows, 64, device=DEVICE)
    for first in range(2):
        h = torch.empty(given.numel() + first, device=DEVICE)[first:].view_as(given).copy_(given).requires_grad_()
        out = conv(h, batch)
        found.append([out, *torch.autograd.grad(out.square().mean(), [h, *conv.parameters()])])
    for aligned, other in zip(*found, strict=True):
        torch.testing.assert_close(other, aligned, rtol=1e-4, atol=1e-5)


@cuda_only
@each_backend
@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
def test_captured_predictions(backend, make_batch, model_type):
    """Batches of all sizes through one object, from the CPU and from the GPU, sizes that share a graph included."""
    model, _ = model_and_batch(model_type, make_batch)
    captured = sf.CapturedModel(model.eval())
    kinds = [("plain", 1), ("one atom", 0), ("plain", 2), ("weighted", 3), ("plain", 4), ("one crystal", 0)]
    for kind, seed in kinds:
        batch = make_batch(kind, seed=seed)
        with torch.no_grad():
            expected = model.predict(batch.to(DEVICE))
        for given in (batch, batch.to(DEVICE)):
            torch.testing.assert_close(captured(given), expected, rtol=2e-5, atol=2e-6)
    assert len(captured._graphs) <= 5


@cuda_only
@each_backend
@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
def test_captured_training(backend, make_batch, model_type):
    """Steps over batches of several sizes, from the CPU and from the GPU, two of which add up their gradients."""
    kinds, found = [("plain", 1), ("weighted", 3), ("plain", 2), ("plain", 1), ("large", 1), ("weighted", 1)], []
    for captured in (False, True):
        model, _ = model_and_batch(model_type, make_batch)
        call = sf.CapturedTraining(model.train()) if captured else model.train()
        optimizer, outs = torch.optim.SGD(model.parameters(), 1e-3), []
        for k, (kind, seed) in enumerate(kinds):
            batch = make_batch(kind, seed=seed)
            outs.append(call(batch if captured and k % 2 else batch.to(DEVICE)))  # whose graphs live on
            outs[-1].square().mean().backward()
            if k != 1:
                optimizer.step()
                optimizer.zero_grad()
        found.append({**model.state_dict(), **{f"out{k}": out.detach() for k, out in enumerate(outs)}})
    assert 2 <= len(call._graphs) <= len(kinds)
    for name, expected in found[0].items():
        if not name.endswith("fc_full.bias"):  # whose gradient is zero in exact arithmetic
            torch.testing.assert_close(
                found[1][name], expected, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


@cuda_only
def test_captured_training_follows_what_is_frozen_or_replaced(make_batch):
    """Norms that stop, weights that stop, a parameter at another address, other settings: each has its own graphs."""
    torch.manual_seed(0)
    model, batch = sf.SRCGCNN(2, 20).to(DEVICE).train(), make_batch("weighted").to(DEVICE)
    call = sf.CapturedTraining(model)
    for change in (
        lambda: None,
        lambda: model.recurrent_bn1s[0].eval(),
        lambda: model.embedding.requires_grad_(False),
        lambda: setattr(model.fc_out, "weight", nn.Parameter(2 * model.fc_out.weight.detach())),
        lambda: setattr(model.embedding.weight, "data", 2 * model.embedding.weight.detach()),  # which is frozen
        lambda: setattr(model.recurrent_bn2s[0], "momentum", 0.5),
    ):
        change()
        graphs, found = len(call._graphs), []
        for given in (model, call):
            model.zero_grad()
            for norm in (*model.recurrent_bn1s, *model.recurrent_bn2s):
                norm.reset_running_stats()  # in place
            given(batch).sum().backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            found.append([x.clone() for x in (*gradients, *model.buffers())])
        assert len(call._graphs) == graphs + 1
        for expected, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@cuda_only
def test_captures_of_all_kinds_in_one_process(make_batch):
    """Predictions captured in inference mode, then training; calls on streams of the caller's and from threads."""
    model, _ = model_and_batch(sf.SRCGCNN, make_batch, "plain")
    trained, plain = copy.deepcopy(model), copy.deepcopy(model)
    batches = [make_batch("plain", seed=s) for s in range(8)]
    with torch.inference_mode():
        captured = sf.CapturedModel(model.eval())
        captured(batches[0])
    step = sf.CapturedTraining(trained.train())
    outs = [call(batches[0].to(DEVICE)) for call in (step, plain.train())]
    torch.testing.assert_close(*outs, rtol=1e-3, atol=1e-4)
    for out in outs:
        out.sum().backward()
    torch.testing.assert_close(trained.fc_out.weight.grad, plain.fc_out.weight.grad, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        expected = [model.predict(batch.to(DEVICE)) for batch in batches]
    streams, found = [torch.cuda.Stream() for _ in range(3)], []
    for k, batch in enumerate(batches):
        with torch.cuda.stream(streams[k % 3]):
            found.append(captured(batch))
    torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as threads:
        found += threads.map(lambda batch: captured(batch).cpu().to(DEVICE), batches)
    assert len(captured._graphs) == 1
    for ours, truth in zip(found, 2 * expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=2e-5, atol=2e-6)


@cuda_only
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_captures_on_two_devices(make_batch):
    """The first one's being current, and having captured before."""
    model, batch = model_and_batch(sf.SRCGCNN, make_batch, "plain")
    found = []
    for device in ("cuda:0", "cuda:1"):
        here = copy.deepcopy(model).to(device)
        predicted = sf.CapturedModel(here.eval())(batch.to(device))
        out = sf.CapturedTraining(here.train())(batch.to("cpu"))
        out.sum().backward()
        found.append([x.detach().cpu() for x in (predicted, out, here.fc_out.weight.grad)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@cuda_only
def test_a_captured_dropout_depends_on_the_seed_alone(make_batch):
    """Whether a graph was there before or not; each step draws anew."""
    torch.manual_seed(0)
    step = sf.CapturedTraining(sf.CGCNN(1, 16, 32, 2, classification=True).to(DEVICE).train())
    batch, found = make_batch("plain").to(DEVICE), []
    for _ in range(2):
        torch.manual_seed(3)
        found.append([step(batch).detach() for _ in range(2)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(*found[0])


@cuda_only
def test_a_captured_step_under_autocast_follows_its_weights(make_batch):
    """And not what autocast made of them when the graph was captured."""
    torch.manual_seed(0)
    model = sf.SRCGCNN().to(DEVICE).train()
    step, batch = sf.CapturedTraining(model), make_batch("plain").to(DEVICE)
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            found, expected = step(batch), model(batch)
        assert difference(found, expected) < 2e-2
        with torch.no_grad():
            model.fc_out.weight *= 3
            model.fc_out.bias += 1


@cuda_only
@each_backend
@pytest.mark.parametrize("features", [False, True])
def test_batches_of_captured_graphs_are_filled_alike_from_either_side(backend, make_batch, features):
    """To the bit, by the compiled kernel and by PyTorch's, what lies between the fields too."""
    for kind in ("plain", "one atom", "weighted", "large", "no edges"):
        batch = make_batch(kind)
        if features:
            batch.atom_features = torch.rand(batch.num_rows, 5)
            batch.edge_features = torch.rand(batch.num_edges, 7)
        filled = []
        for device in (torch.device("cpu"), torch.device("cuda", torch.cuda.current_device())):
            for given in {"cpu": batch, device.type: batch.to(device)}.values():
                static = StaticBatch(batch, device)
                assert (static._kernels is not None) == (device.type == "cuda" and backend == "cuda")
                static._there.fill_(-1)
                static._here.fill_(-1)
                static.fill(given)
                filled.append(static._there.cpu())
        assert len(filled) == 3 and all(torch.equal(x, filled[0]) for x in filled[1:])


@each_for_inference
@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
def test_a_model_that_moved_or_changed_predicts_as_a_new_one(backend, make_batch, model_type):
    """What it keeps between calls belongs to a place and to values that may change there."""
    model, batch = model_and_batch(model_type, make_batch)
    with torch.no_grad():
        first = model.eval().predict(batch)
        assert torch.equal(model.predict(batch), first)
        with sf.use_backend("reference" if DRY else "cpu"):
            on_cpu = model.to("cpu").predict(batch.to("cpu"))
        assert difference(first, on_cpu) < 1e-5
        assert torch.equal(model.to(DEVICE).predict(batch), first)
        model.fc_out.weight *= 2
        changed = model.predict(batch)
        assert torch.equal(changed, copy.deepcopy(model).predict(batch)) and difference(changed, first) > 1e-3


def salts(count: int) -> list[tuple]:
    rng = np.random.default_rng(0)
    places = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    return [
        (np.eye(3) * rng.uniform(4, 6), places + rng.normal(0, 0.02, (4, 3)), rng.integers(1, 84, 4))
        for _ in range(count)
    ]


def graphs_of(count: int) -> list[CrystalGraph]:
    """Graphs from no neighbour search, which each process of the tests would compile for 20 s."""
    rng, found = np.random.default_rng(0), []
    for n in rng.integers(1, 9, count):
        edges = rng.integers(0, n, 12 * n), np.sort(rng.uniform(2, 8, (n, 12)), axis=1).ravel()
        numbers, atoms = rng.integers(1, 84, n), np.arange(n)
        arrays = (numbers, np.ones(n), *edges, np.arange(0, 12 * n + 1, 12), atoms)
        types = np.int32, np.float32, np.int32, np.float32, np.int32, np.int32
        found.append(CrystalGraph(*(x.astype(kind) for x, kind in zip(arrays, types, strict=True))))
    return found


@pytest.mark.parametrize("captured", [False, pytest.param(True, marks=cuda_only)])
@pytest.mark.parametrize("packed", [False, True])
def test_prediction_from_structures_and_from_a_store(packed, captured):
    torch.manual_seed(0)
    model, inputs = sf.SRCGCNN(), GraphStore.from_graphs(graphs_of(40)) if packed else salts(40)
    expected = sf.predict(model, inputs)["target"]
    found = sf.predict(model.to(DEVICE), inputs, batch_atoms=50, captured=captured)["target"]
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("workers", [0, 1])
def test_training_from_a_store(tmp_path, monkeypatch, workers, precision):
    """Prefetched batches train as the CPU does; the log tells the share of time without data."""
    from srcgcnn_fast.graph.packing import Packing
    from srcgcnn_fast.training import GraphDataModule, Recipe, fit

    if workers and precision != "float32":
        pytest.skip("one precision is enough for the workers")
    rng = np.random.default_rng(1)
    store = GraphStore.from_graphs(graphs_of(160), targets={"y": rng.normal(size=160)})
    losses, sent, on = [], [], Packing.on
    monkeypatch.setattr(Packing, "on", lambda *a: sent.append(1) or on(*a))
    for accelerator in ("cpu", "cpu" if DRY else "gpu"):
        torch.manual_seed(0)
        data = GraphDataModule(store, "y", batch_size=16, num_workers=workers)
        out = tmp_path / f"{accelerator} {len(losses)}"
        result = fit(sf.SRCGCNN(), data, out, Recipe(epochs=3), accelerator=accelerator, precision=precision)
        losses.append([row["train_loss"] for row in result.history])
        assert all(0 <= row["data_wait"] < 1 for row in result.history)
    assert len(sent) == (0 if DRY or workers else 3 * (8 + 1))  # batches of three epochs, in one copy each
    np.testing.assert_allclose(losses[1], losses[0], rtol={"float32": 2e-3, "tf32": 2e-2, "bfloat16": 5e-2}[precision])


@cuda_only
def test_training_by_captured_steps(tmp_path):
    from srcgcnn_fast.training import GraphDataModule, Recipe, fit

    rng, losses = np.random.default_rng(1), []
    store = GraphStore.from_graphs(graphs_of(160), targets={"y": rng.normal(size=160)})
    for captured in (False, True):
        torch.manual_seed(0)
        data = GraphDataModule(store, "y", batch_size=16)
        recipe = Recipe(epochs=3, ema=0.9, gradient_clip=1.0)
        result = fit(sf.SRCGCNN(), data, tmp_path / str(captured), recipe, accelerator="gpu", captured=captured)
        losses.append([[row["train_loss"], row["val_mae"]] for row in result.history])
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-3)


@cuda_only
def test_batches_come_whole_while_the_device_is_busy(monkeypatch):
    """With the memory of earlier batches, pinned and on the device, used again."""
    from srcgcnn_fast.graph import packing
    from srcgcnn_fast.training import GraphDataModule

    store = GraphStore.from_graphs(graphs_of(300), targets={"y": np.arange(300.0)})
    data = GraphDataModule(store, "y", batch_size=8)
    plain, ahead = data.loader("train"), data.loader("train")
    ahead.device = torch.device("cuda", 0)
    monkeypatch.setattr(packing, "_LEAST_EDGES", 400)  # some batches by a thread, some not
    busy = torch.rand(4096, 4096, device="cuda")
    sums = []
    for graphs, target, index in ahead:
        busy = (busy @ busy).clamp(0, 1)
        sums.append([graphs.distance.double().sum(), graphs.sender.double().sum(), target.sum(), index.sum()])
    assert len(sums) == len(plain)
    for found, (graphs, target, index) in zip(sums, plain, strict=True):
        expected = [graphs.distance.double().sum(), graphs.sender.double().sum(), target.sum(), index.sum()]
        torch.testing.assert_close(
            torch.stack([x.double().cpu() for x in found]), torch.stack([x.double() for x in expected])
        )
