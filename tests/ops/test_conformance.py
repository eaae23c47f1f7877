"""Every backend against the reference in float64: outputs, every gradient, batch-norm buffers, on awkward graphs."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from convolution import kinds_and_modes, relative

import srcgcnn_fast as sf
from srcgcnn_fast import functional
from srcgcnn_fast.functional import BatchNorm
from srcgcnn_fast.ops import cpu, fused, reference
from srcgcnn_fast.ops.reference import Edges

FAST = [name for name in ("cpu", "triton", "cuda") if sf.backends()[name].available]
KINDS = ["plain", "weighted", "ragged", "one atom", "isolated", "no edges", "one crystal", "many crystals"]

pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.skipif(not FAST, reason="no compiled backend on this machine"),
]


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


def where(backend: str) -> str:
    return "cpu" if backend in ("cpu", "reference") else "cuda"


def dtypes(backend: str) -> tuple[torch.dtype, ...]:
    """Those that it takes."""
    return (torch.float64, torch.float32) if where(backend) == "cpu" else (torch.float32,)


def run(backend: str, batch, leaves, buffers, upstream, training: tuple[bool, bool]):
    device = where(backend)
    batch, upstream = batch.to(device), upstream.to(device)
    leaves = {name: x.detach().to(device).requires_grad_() for name, x in leaves.items()}
    buffers = [b.to(device, copy=True) for b in buffers]
    batch.cache.clear()
    bn1 = BatchNorm(leaves["gamma1"], leaves["beta1"], buffers[0], buffers[1], training[0])
    bn2 = BatchNorm(leaves["gamma2"], leaves["beta2"], buffers[2], buffers[3], training[1])
    with sf.use_backend(backend):
        out = functional.gated_conv(leaves["h"], batch, leaves["weight"], leaves["bias"], bn1, bn2)
        grads = torch.autograd.grad((out * upstream).sum(), list(leaves.values()))
    results = {"out": out.detach(), **{f"grad {k}": g for k, g in zip(leaves, grads, strict=True)}}
    for name, b in zip(("mean1", "var1", "mean2", "var2"), buffers, strict=True):
        results[name] = b
    return {name: x.cpu() for name, x in results.items()}


def compare(backend, batch, width, n_features, dtype, training, seeds=(0,), features=False):
    """In float64 to 1e-12; in float32 at most twice as far from the truth as the published formula in float32.

    The latter over several seeds, as if they were one result, where there are too few numbers to compare roundings.
    """
    squares: dict[str, list[torch.Tensor]] = {}
    for seed in seeds:
        truth = run("reference", *problem(batch, width, n_features, torch.float64, seed, features), training)
        plain = run("reference", *problem(batch, width, n_features, dtype, seed, features), training)
        got = run(backend, *problem(batch, width, n_features, dtype, seed, features), training)
        for name, expected in truth.items():
            assert got[name].shape == expected.shape and torch.isfinite(got[name]).all(), name
            if name == "grad bias" and training[0]:  # zero in exact arithmetic
                assert got[name].abs().max() <= 1e-6 * max(1.0, float(truth["grad weight"].norm()))
                continue
            parts = (got[name].double() - expected, plain[name].double() - expected, expected)
            squares.setdefault(name, []).append(torch.stack([x.square().sum() for x in parts]))
    for name, each in squares.items():
        *wrong, size = torch.stack(each).sum(0).tolist()
        ours, theirs = (math.sqrt(x / max(size, 1e-60)) for x in wrong)
        limit = 1e-12 if dtype == torch.float64 else 2 * theirs + 3e-7
        assert ours <= limit, f"{name}: relative L2 error {ours:.1e}, allowed {limit:.1e}"


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@kinds_and_modes(KINDS)
def test_gated_conv(backend, make_batch, kind, training, dtype):
    if dtype not in dtypes(backend):
        pytest.skip(f"{backend} takes float32")
    seeds = range(4) if backend == "cpu" else (0,)  # an interpreted kernel takes seconds
    compare(backend, make_batch(kind, seed=3), 16, 41, dtype, training, seeds)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("width", "n_features"), [(64, 41), (8, 41), (7, 41), (1, 3), (33, 5), (48, 9), (128, 60)])
def test_any_width_and_number_of_gaussians(backend, make_batch, width, n_features):
    for dtype in dtypes(backend):
        seeds = range(8) if width <= 8 else (0,)
        compare(backend, make_batch("weighted", seed=5), width, n_features, dtype, (True, True), seeds)


@pytest.mark.parametrize("backend", FAST)
def test_generic_edge_features(backend, make_batch):
    for dtype in dtypes(backend):
        compare(backend, make_batch("weighted", seed=6), 16, 23, dtype, (True, True), features=True)


@pytest.mark.parametrize("backend", FAST)
def test_a_hundred_thousand_edges(backend, make_batch):
    batch = make_batch("large", seed=7)
    assert batch.num_edges >= 90_000
    compare(backend, batch, 64 if backend == "cpu" else 16, 41, torch.float32, (True, True))  # or interpreted


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("features", [False, True], ids=["distance", "edge features"])
def test_gradient_of_the_edges(backend, make_batch, features):
    batch, leaves, buffers, upstream = problem(make_batch("ragged", seed=8), 12, 41, torch.float64, features=features)
    grads = []
    for name, dtype in (("reference", torch.float64), (backend, dtypes(backend)[0])):
        moved, to = batch.to(where(name), dtype), {"device": where(name), "dtype": dtype}
        edge = (moved.edge_features if features else moved.distance).detach().clone().requires_grad_()
        if features:
            moved.edge_features = edge
        else:
            moved.distance = edge
        h, weight, bias, *affine = (x.detach().to(**to) for x in leaves.values())
        state = [x.to(**to) for x in buffers]
        bn1, bn2 = BatchNorm(*affine[:2], *state[:2]), BatchNorm(*affine[2:], *state[2:])
        with sf.use_backend(name):
            out = functional.gated_conv(h, moved, weight, bias, bn1, bn2)
            grads.append(torch.autograd.grad((out * upstream.to(**to)).sum(), edge)[0].cpu())
    assert relative(grads[1], grads[0]) < (1e-12 if where(backend) == "cpu" else 1e-5)


@pytest.mark.parametrize("most", [27, 700], ids=["powers", "sums"])
def test_the_gate_is_right_at_both_ends(most):
    """Far from zero: c for large c, exp(c) for very negative c, no overflow, no NaN; as far as float32 multiplies
    powers of two (here only one of their three factors is not 1), and beyond. At -5e-8 1 + exp(c) rounds to 2."""
    ends = torch.tensor([-90.0, -30, -10, -1, -5e-8, 0, 1e-9, 1, 10, 19.9, 30, 90, 5, -5, 700, -700]).double()
    ends = ends.clamp(-most, most)
    f, c = (x.reshape(-1) for x in torch.meshgrid(ends, ends, indexing="ij"))
    width, index = f.numel(), lambda *x: torch.tensor(x, dtype=torch.int32)
    for dtype in (torch.float64, torch.float32):
        limit = torch.finfo(dtype).eps * (8 + f.abs() + c.abs())  # of the exponentials' rounded arguments
        edges = Edges(torch.ones(1, dtype=dtype), None, index(0), index(0, 1), index(0, 1))
        zero, one = torch.zeros(2 * width, dtype=dtype), torch.ones(2 * width, dtype=dtype)
        bn1 = BatchNorm(zero, torch.cat([f, c]).to(dtype), zero, one)
        bn2 = BatchNorm(None, None, zero[:width], one[:width])
        layer = fused.operator_layer(torch.zeros(2 * width, 2 * width + 1, dtype=dtype), None, bn1, bn2, width, 0)
        row_weight = torch.ones(1, dtype=dtype)
        m = cpu.conv(
            row_weight * zero[None, :width], layer, fused.with_shells(edges), cpu.Moments(row_weight, *[None] * 5)
        )[1]
        expected = torch.sigmoid(f.to(dtype).double()) * torch.nn.functional.softplus(c.to(dtype).double())
        normal = expected > 1e5 * torch.finfo(dtype).tiny  # no factor of it is denormal
        assert torch.isfinite(m).all()
        assert (((m[0] - expected).abs() / expected) < limit)[normal].all()
        assert ((m[0] - expected).abs()[~normal] < 1e-32).all()


@pytest.mark.parametrize("size", [10, 35, 45, 300])
def test_large_terms_that_cancel(size):
    """p and q far from zero, their sum near it: powers of two as factors, and sums where a factor leaves the bounds."""
    width, index = 16, lambda *x: torch.tensor(x, dtype=torch.int32)
    g = torch.Generator().manual_seed(size)
    h = torch.zeros(2, width)
    h[0, 0], h[1, 0], h[:, 1] = size, -size, torch.rand(2, generator=g)
    weight = torch.zeros(2 * width, 2 * width + 1)
    weight[:, 0], weight[:, width], weight[:, 1] = 1.0, 1.0, torch.rand(2 * width, generator=g)
    edges = Edges(torch.ones(2), None, index(1, 0), index(0, 1, 2), index(0, 2))
    found = []
    for dtype in (torch.float64, torch.float32):
        leaves = [x.to(dtype).requires_grad_() for x in (h, weight)]
        state = [f(k, dtype=dtype) for k in (2 * width, width) for f in (torch.zeros, torch.ones)]
        norms = BatchNorm(None, None, *state[:2]), BatchNorm(None, None, *state[2:])
        moved = edges._replace(distance=edges.distance.to(dtype))
        ones = torch.ones(2, dtype=dtype)
        if dtype == torch.float64:
            out = reference.gated_conv(leaves[0], moved, ones, leaves[1], None, *norms)
        else:
            moments = cpu.Moments(ones, *[None] * 5)
            out = fused.gated_convs(leaves[0], fused.with_shells(moved), moments, [(leaves[1], None, *norms)])
        found.append([x.detach() for x in (out, *torch.autograd.grad(out.sum(), leaves))])
    limit = torch.finfo(torch.float32).eps * (8 + 2 * size)  # of the exponentials' rounded arguments
    for truth, ours in zip(*found, strict=True):
        assert relative(ours, truth) < limit


@pytest.mark.parametrize("features", [False, True])
def test_moments_of_the_edges(make_batch, features):
    batch, *_ = problem(make_batch("ragged", seed=9), 8, 41, torch.float64, features=features)
    edges = Edges(batch.distance, batch.edge_features, batch.sender, batch.row_ptr, batch.crystal_ptr)
    in_degree, by_receiver, by_sender, total, gram = cpu.edge_moments(batch.weight, fused.with_shells(edges), 41)
    assert relative(total, batch.weight @ by_receiver) < 1e-13
    for a, b in zip(
        (by_receiver, by_sender, gram), reference.edge_moments(batch.weight, edges, 41, torch.float64), strict=True
    ):
        assert relative(a, b) < 1e-13
    expected = torch.zeros_like(batch.weight).index_add(0, batch.sender.long(), batch.weight[batch.receiver])
    assert relative(in_degree, expected) < 1e-15


def test_shells_are_the_distinct_distances(make_batch):
    batch = make_batch("ragged", seed=10)
    batch.distance = (batch.distance * 4).round() / 4
    shell_of, shell_distance, shell_count = cpu.edge_shells(
        batch.distance, batch.sender, batch.row_ptr, batch.crystal_ptr
    )
    edge_ptr = batch.row_ptr[batch.crystal_ptr.long()].tolist()
    for c, (begin, end) in enumerate(pairwise(edge_ptr)):
        count = int(shell_count[c])
        assert count == len(batch.distance[begin:end].unique())
        table = shell_distance[begin : begin + count]
        assert torch.equal(table[shell_of[begin:end].long()], batch.distance[begin:end])


def reorder_channels(model: torch.nn.Module, width: int, generator: torch.Generator) -> None:
    """The same network with its features in another order: every sum is the same and is rounded otherwise."""
    order = torch.randperm(width, generator=generator)
    twice = torch.cat([order, width + order])
    index = {width: order, 2 * width: twice, 2 * width + 41: torch.cat([twice, 2 * width + torch.arange(41)])}
    for x in model.state_dict().values():
        for axis, size in enumerate(x.shape):
            if size in index:
                x.copy_(x.index_select(axis, index[size]))


@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
@pytest.mark.parametrize("kind", [*KINDS, "large"])
def test_whole_stack_without_gradients(make_batch, kind, model_type):
    """The inference operator against the reference: shared and separate weights, widths that need padding.

    Where a crystal of few rows may decide the norm, over several orders of the features, by root mean square: one
    rounding of one large number says little.
    """
    batch = make_batch(kind, seed=12)
    widths = [(16, torch.float64), (64, torch.float32), (20, torch.float32)]
    for width, dtype in widths if kind != "large" else widths[2:]:  # whose crystals are shared out at any width
        generator = torch.manual_seed(1)
        model = model_type(3, atom_fea_len=width, h_fea_len=8).to(dtype).eval()
        for norm in (x for x in model.modules() if isinstance(x, torch.nn.BatchNorm1d)):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        names, errors = ("cpu", "reference") if dtype == torch.float32 else ("cpu",), []
        for _ in range(16 if batch.num_rows < 100 else 1):
            features = {}
            for name in ("truth", *names):
                model.to(torch.float64 if name == "truth" else dtype)
                batch.cache.clear()
                with torch.no_grad(), sf.use_backend("cpu" if name == "cpu" else "reference"):
                    features[name] = model.features(batch)
            errors.append([relative(features[name], features["truth"]) for name in names])
            reorder_channels(model, width, generator)
        ours, *theirs = torch.tensor(errors, dtype=torch.float64).square().mean(0).sqrt().tolist()
        assert ours < (2 * theirs[0] + 3e-7 if theirs else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_bits_do_not_depend_on_the_number_of_threads(make_batch, dtype, training):
    batch, threads, results = make_batch("many crystals", seed=11), torch.get_num_threads(), []
    arguments = problem(batch, 16, 41, dtype)
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run("cpu", *arguments, (training, training)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[k], v) for k, v in results[0].items())


@pytest.mark.skipif("cpu" not in FAST, reason="no CPU kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("place", ["distance", "atom_features", "filter", "core", "running_var"])
def test_what_is_no_number_makes_none(make_batch, place, training, dtype):
    """NaN reaches just what it reaches in the reference, in one operator and in several."""
    torch.manual_seed(0)
    batch = make_batch("plain").to(dtype=dtype)
    batch.atom_features = torch.rand(batch.num_rows, 92)
    for grad in (False, True):
        model = sf.CGCNN(2, 16, 16).to(dtype).train(training)
        weight = model.convs[0].fc_full.weight.data
        targets = {
            "distance": batch.distance[3:4],
            "atom_features": batch.atom_features[3, :1],
            "filter": weight[0, :1],
            "core": weight[16, :1],
            "running_var": model.convs[0].bn1.running_var[:1],
        }
        targets[place].fill_(math.nan)
        found = []
        for backend in ("cpu", "reference"):
            with sf.use_backend(backend), torch.set_grad_enabled(grad):
                found.append(model(batch).isnan())
        assert torch.equal(*found) and (found[0].any() or (training and place == "running_var"))


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


@pytest.mark.skipif("cpu" not in FAST, reason="no CPU kernels")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("joined", [False, True])
def test_shells_of_other_edges_are_refused_before_native_code(make_batch, joined, training):
    """Which writing through NumPy, behind the cache of the batch, leaves there."""
    batch = make_batch("plain")
    ends = [batch.crystal_ptr, torch.cat([batch.crystal_ptr[:1], batch.crystal_ptr[:1], batch.crystal_ptr[2:]])]
    batch.crystal_ptr = ends[1 - joined].clone()
    model = sf.CGCNN(1, 16, 16).train(training)
    model(batch)
    batch.crystal_ptr.numpy()[:] = ends[joined].numpy()
    with torch.set_grad_enabled(training):
        with pytest.raises(sf.InputError, match=r"the batch was written to behind its cache; call batch\.cache\.clear"):
            model(batch)
        batch.cache.clear()
        torch.testing.assert_close(model(batch), model(batch.to(dtype=torch.float32)))


@pytest.mark.skipif("cpu" not in FAST, reason="no CPU kernels")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("field", ["row_ptr", "crystal_ptr"])
@pytest.mark.parametrize("shape", [(0,), ()])
def test_pointers_without_a_place_are_refused(make_batch, field, shape, training):
    """Kernels read the first place before anything else."""
    batch = make_batch("plain")
    setattr(batch, field, torch.zeros(shape, dtype=torch.int32))
    for model in (sf.CGCNN(1, 16, 16).train(training), sf.SRCGCNN(1, 16, 16, recurrent_layer_norm=True)):
        with torch.set_grad_enabled(training), pytest.raises(sf.InputError, match=f"{field} must have one dimension"):
            model(batch)


@pytest.mark.skipif("cpu" not in FAST, reason="no CPU kernels")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("field", ["distance", "weight", "edge_features"])
def test_negated_views_are_refused(make_batch, field, training):
    """Whose memory holds the numbers with the other sign."""
    batch = make_batch("plain")
    batch.edge_features = torch.rand(batch.num_edges, 41) if field == "edge_features" else None
    setattr(batch, field, torch._neg_view(-getattr(batch, field)))
    model = sf.CGCNN(1, 16, 16).train(training)
    with torch.set_grad_enabled(training), pytest.raises(sf.InputError, match="negated view"):
        model(batch)


@pytest.mark.skipif("cpu" not in FAST, reason="no CPU kernels")
def test_widths_and_types_are_refused_before_native_code(make_batch):
    """Of a call that does not come through :mod:`srcgcnn_fast.functional`."""
    batch = make_batch("plain")
    edges = Edges(batch.distance, None, batch.sender, batch.row_ptr, batch.crystal_ptr)
    graph = fused.with_shells(edges)
    moments = cpu.Moments(batch.weight, *[None] * 5)

    def call(width: int, dtype: torch.dtype) -> None:
        c = 2 * width
        vectors = [torch.ones(k, dtype=dtype) for k in (c, c, width, width, c, c, width, width)]
        layer = cpu.Layer(torch.ones(c, c + 41, dtype=dtype), None, *vectors, 1e-5, 1e-5, False, False)
        torch.ops.srcgcnn_fast.gated_conv(torch.ones(batch.num_rows, width), *layer, *graph, *moments)

    call(16, torch.float32)
    with pytest.raises(sf.InputError, match="multiples of"):
        call(5, torch.float32)
    with pytest.raises(sf.InputError, match=r"weight must be a contiguous torch\.float32"):
        call(16, torch.float64)
    plain = graph
    for change in ({"distance": batch.distance.repeat_interleave(2)[::2]}, {"step": 0.0}):
        graph = plain._replace(**change)
        with pytest.raises(sf.InputError, match=r"distance must be a contiguous|step must be positive"):
            call(16, torch.float32)


def test_an_edge_between_crystals_is_refused(make_batch):
    batch = make_batch("plain")
    batch.sender[0] = batch.num_rows - 1
    with pytest.raises(sf.InputError, match="own crystal"):
        run("cpu", *problem(batch, 8, 41, torch.float32), (False, False))
