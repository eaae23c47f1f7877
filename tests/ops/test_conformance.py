"""Every backend against the reference in float64: outputs, every gradient, batch-norm buffers, on awkward graphs."""

from __future__ import annotations

import pytest
import torch

import srcgcnn_fast as sf
from srcgcnn_fast import functional
from srcgcnn_fast.functional import BatchNorm
from srcgcnn_fast.ops import cpu, reference
from srcgcnn_fast.ops.reference import Edges

FAST = [name for name in ("cpu", "triton", "cuda") if sf.backends()[name].available]
KINDS = ["plain", "weighted", "ragged", "one atom", "isolated", "no edges", "one crystal", "many crystals"]

pytestmark = pytest.mark.skipif(not FAST, reason="no compiled backend on this machine")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    assert torch.isfinite(a).all()
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch):
    """Whatever a kernel forgets to write is NaN, not an old right answer."""

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


def problem(batch, width: int, n_features: int, dtype: torch.dtype, seed: int = 0, features: bool = False):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.rand(*s, generator=g, dtype=torch.float64)  # noqa: E731
    batch = batch.to(dtype=dtype)
    if features:
        batch.edge_features = (rand(batch.num_edges, n_features)).to(dtype)
    c = 2 * width
    tensors = {
        "h": rand(batch.num_rows, width) * 2 + 0.3,
        "weight": (rand(c, c + n_features) - 0.5) / 3,
        "bias": rand(c) - 0.5,
        "gamma1": rand(c) + 0.5,
        "beta1": rand(c) - 0.5,
        "gamma2": rand(width) + 0.5,
        "beta2": rand(width) - 0.5,
    }
    buffers = [rand(c) - 0.5, rand(c) + 0.5, rand(width) - 0.5, rand(width) + 0.5]
    upstream = (rand(batch.num_rows, width) - 0.5) * batch.weight[:, None].double()
    leaves = {k: v.to(dtype).requires_grad_() for k, v in tensors.items()}
    return batch, leaves, [b.to(dtype) for b in buffers], upstream.to(dtype)


def run(backend: str, batch, leaves, buffers, upstream, training: tuple[bool, bool]):
    buffers = [b.clone() for b in buffers]
    batch.cache.clear()
    bn1 = BatchNorm(leaves["gamma1"], leaves["beta1"], buffers[0], buffers[1], training[0])
    bn2 = BatchNorm(leaves["gamma2"], leaves["beta2"], buffers[2], buffers[3], training[1])
    with sf.use_backend(backend):
        out = functional.gated_conv(leaves["h"], batch, leaves["weight"], leaves["bias"], bn1, bn2)
        grads = torch.autograd.grad((out * upstream).sum(), list(leaves.values()))
    results = {"out": out.detach(), **{f"grad {k}": g for k, g in zip(leaves, grads, strict=True)}}
    for name, b in zip(("mean1", "var1", "mean2", "var2"), buffers, strict=True):
        results[name] = b
    return results


def compare(backend, batch, width, n_features, dtype, training, seed=0, features=False):
    """In float64 to 1e-12; in float32 at most twice as far from the truth as the published formula in float32."""
    truth = run("reference", *problem(batch, width, n_features, torch.float64, seed, features), training)
    plain = run("reference", *problem(batch, width, n_features, dtype, seed, features), training)
    got = run(backend, *problem(batch, width, n_features, dtype, seed, features), training)
    for name, expected in truth.items():
        limit = 1e-12 if dtype == torch.float64 else 2 * relative(plain[name], expected) + 3e-7
        if name == "grad bias" and training[0]:  # zero in exact arithmetic
            assert got[name].abs().max() <= 1e-6 * max(1.0, float(truth["grad weight"].norm()))
            continue
        error = relative(got[name], expected)
        assert error <= limit, f"{name}: relative L2 error {error:.1e}, allowed {limit:.1e}"


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("training", [(True, True), (False, False), (False, True)], ids=["train", "eval", "frozen bn1"])
@pytest.mark.parametrize("kind", KINDS)
def test_gated_conv(backend, make_batch, kind, training, dtype):
    if kind in ("one atom", "no edges") and any(training):
        pytest.skip("batch norm cannot train on it; test_functional says so")
    compare(backend, make_batch(kind, seed=3), 16, 41, dtype, training)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("width", "n_features"), [(64, 41), (8, 41), (7, 41), (1, 3), (33, 5), (48, 9), (128, 60)])
def test_any_width_and_number_of_gaussians(backend, make_batch, width, n_features):
    for dtype in (torch.float64, torch.float32):
        compare(backend, make_batch("weighted", seed=5), width, n_features, dtype, (True, True))


@pytest.mark.parametrize("backend", FAST)
def test_generic_edge_features(backend, make_batch):
    for dtype in (torch.float64, torch.float32):
        compare(backend, make_batch("weighted", seed=6), 16, 23, dtype, (True, True), features=True)


@pytest.mark.parametrize("backend", FAST)
def test_a_hundred_thousand_edges(backend, make_batch):
    batch = make_batch("large", seed=7)
    assert batch.num_edges >= 90_000
    compare(backend, batch, 64, 41, torch.float32, (True, True))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("features", [False, True], ids=["distance", "edge features"])
def test_gradient_of_the_edges(backend, make_batch, features):
    batch, leaves, buffers, upstream = problem(make_batch("ragged", seed=8), 12, 41, torch.float64, features=features)
    grads = []
    for name in ("reference", backend):
        edge = (batch.edge_features if features else batch.distance).detach().clone().requires_grad_()
        if features:
            batch.edge_features = edge
        else:
            batch.distance = edge
        bn1 = BatchNorm(leaves["gamma1"], leaves["beta1"], *buffers[:2])
        bn2 = BatchNorm(leaves["gamma2"], leaves["beta2"], *buffers[2:])
        with sf.use_backend(name):
            out = functional.gated_conv(leaves["h"], batch, leaves["weight"], leaves["bias"], bn1, bn2)
            grads.append(torch.autograd.grad((out * upstream).sum(), edge)[0])
    assert relative(grads[1], grads[0]) < 1e-12


def test_the_gate_is_right_at_both_ends(make_batch):
    """Far from zero: c for large c, exp(c) for very negative c, no overflow, no NaN."""
    batch = make_batch("one atom")
    edges = Edges(batch.distance.double(), None, batch.sender, batch.row_ptr, batch.crystal_ptr)
    ends = torch.tensor([-700.0, -90, -30, -10, -1, -1e-9, 0, 1e-9, 1, 10, 30, 90, 700], dtype=torch.float64)
    f, c = (x.reshape(1, -1) for x in torch.meshgrid(ends, ends, indexing="ij"))
    p = torch.cat([f, c], 1)
    zero = torch.zeros_like(p)
    w_e = torch.zeros(41, p.shape[1], dtype=torch.float64)
    for dtype, limit in ((torch.float64, 4e-15), (torch.float32, 1e-6)):
        e = edges._replace(distance=edges.distance.to(dtype))
        got = cpu.gate_sum(p.to(dtype), zero.to(dtype), w_e.to(dtype), e)
        expected = reference.gate_sum(p, zero, w_e, edges)
        normal = expected > 1e5 * torch.finfo(dtype).tiny  # no factor of it is denormal
        assert torch.isfinite(got).all()
        assert ((got - expected).abs() / expected)[normal].max() < limit
        assert (got - expected).abs()[~normal].max() < 1e-32


@pytest.mark.parametrize("transpose", [False, True])
def test_neighbor_sum_and_edge_moments(make_batch, transpose):
    batch = make_batch("ragged", seed=9).to(dtype=torch.float64)
    edges = Edges(batch.distance, None, batch.sender, batch.row_ptr, batch.crystal_ptr)
    h = torch.rand(batch.num_rows, 5, dtype=torch.float64)
    assert relative(cpu.neighbor_sum(h, edges, transpose), reference.neighbor_sum(h, edges, transpose)) < 1e-14
    for got, expected in zip(
        cpu.edge_moments(batch.weight, edges, 41, torch.float64),
        reference.edge_moments(batch.weight, edges, 41, torch.float64),
        strict=True,
    ):
        assert relative(got, expected) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_do_not_depend_on_the_number_of_threads(make_batch, dtype):
    batch = make_batch("many crystals", seed=11)
    threads, results = torch.get_num_threads(), []
    edges = Edges(batch.distance.to(dtype), None, batch.sender, batch.row_ptr, batch.crystal_ptr)
    g = torch.Generator().manual_seed(0)
    p, q, grad = (torch.rand(batch.num_rows, k, generator=g, dtype=dtype) for k in (32, 32, 16))
    w_e = torch.rand(41, 32, generator=g, dtype=dtype)
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(
                [
                    cpu.gate_sum(p, q, w_e, edges),
                    *cpu.gate_sum_backward(grad, p, q, w_e, edges, True),
                    *cpu.edge_moments(batch.weight.to(dtype), edges, 41, dtype),
                ]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("sender", -1, "an edge's sender must be a row of the receiver's own crystal"),
        ("sender", 10**6, "an edge's sender must be a row of the receiver's own crystal"),
        ("row_ptr", 10**6, "row_ptr must"),
        ("crystal_ptr", 10**6, "crystal_ptr must"),
    ],
)
def test_bad_indices_are_refused_before_native_code(make_batch, field, value, says):
    batch = make_batch("plain")
    array = getattr(batch, field).clone()
    array[len(array) // 2] = value
    setattr(batch, field, array)
    batch, leaves, buffers, upstream = problem(batch, 8, 41, torch.float32)
    with pytest.raises(sf.InputError, match=says):
        run("cpu", batch, leaves, buffers, upstream, (False, False))


def test_an_edge_between_crystals_is_refused(make_batch):
    batch = make_batch("plain")
    batch.sender[0] = batch.num_rows - 1
    with pytest.raises(sf.InputError, match="own crystal"):
        run("cpu", *problem(batch, 8, 41, torch.float32), (False, False))
