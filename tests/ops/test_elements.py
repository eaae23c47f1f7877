"""Features from a table: rows of one element share the first layer's products, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

import srcgcnn_fast as sf
from srcgcnn_fast import functional
from srcgcnn_fast.errors import InputError
from srcgcnn_fast.functional import BatchNorm, ConvParameters, Dense
from srcgcnn_fast.ops import cpu, fused, reference

pytestmark = pytest.mark.skipif(not sf.backends()["cpu"].available, reason="the CPU kernels are not built")
ELEMENTS = 5


def problem(batch, width: int, training: bool, layers: int = 3, n_features: int = 41, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.rand(*s, generator=g, dtype=torch.float64)  # noqa: E731
    c = 2 * width
    leaves = {"table": rand(ELEMENTS, width) * 2 + 0.3, "upstream": rand(batch.num_rows, width) - 0.5}
    parameters = []
    for t in range(layers):
        named = {
            "weight": (rand(c, c + n_features) - 0.5) / 3, "bias": rand(c) - 0.5, "gamma1": rand(c) + 0.5,
            "beta1": rand(c) - 0.5, "gamma2": rand(width) + 0.5, "beta2": rand(width) - 0.5,
        }  # fmt: skip
        leaves |= {f"{t}.{name}": x for name, x in named.items()}
        buffers = [rand(c) - 0.5, rand(c) + 0.5, rand(width) - 0.5, rand(width) + 0.5]
        parameters.append((named, buffers))
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    given = []
    for named, (m1, v1, m2, v2) in parameters:
        bn1 = BatchNorm(named["gamma1"], named["beta1"], m1, v1, training)
        bn2 = BatchNorm(named["gamma2"], named["beta2"], m2, v2, training)
        given.append(ConvParameters(named["weight"], named["bias"], bn1, bn2))
    species = torch.randint(ELEMENTS, (batch.num_rows,), generator=g, dtype=torch.int32)
    return leaves, given, species


def run(backend: str, batch, width: int, training: bool, table: bool) -> dict[str, torch.Tensor]:
    leaves, layers, species = problem(batch, width, training)
    batch.cache.clear()
    with sf.use_backend(backend):
        h = leaves["table"] if table else leaves["table"][species.long()]
        out, _ = functional.stacked_gated_conv(h, batch, layers, species=species if table else None)
        found = torch.autograd.grad((out * leaves["upstream"]).sum(), list(leaves.values()))
        with torch.no_grad():
            fixed = [x._replace(bn1=x.bn1._replace(training=False), bn2=x.bn2._replace(training=False)) for x in layers]
            infer, _ = functional.stacked_gated_conv(h, batch, fixed, species=species if table else None)
    results = {"out": out.detach(), "inference": infer, **dict(zip(leaves, found, strict=True))}
    for t, layer in enumerate(layers):
        results |= {f"{t}.mean1": layer.bn1.running_mean, f"{t}.var2": layer.bn2.running_var}
    return results


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["plain", "weighted", "one crystal", "many crystals", "large"])
@pytest.mark.parametrize("width", [16, 7])
def test_a_table_is_the_rows_that_it_stands_for(make_batch, kind, training, width):
    """Three layers as one node of autograd, in float64: outputs, all gradients, running statistics."""
    batch = make_batch(kind, seed=3).to(dtype=torch.float64)
    assert batch.num_rows >= 4 * ELEMENTS  # or the table would be expanded
    truth = run("reference", batch, width, training, table=False)
    for table in (True, False):
        got = run("cpu", batch, width, training, table)
        for name, expected in truth.items():
            if name.endswith("bias") and training:
                assert got[name].abs().max() < 1e-9
                continue
            error = float((got[name] - expected).norm() / expected.norm())
            assert error < 1e-11, f"{name}, {'table' if table else 'rows'}: {error:.1e}"


def test_second_derivatives_of_a_table(make_batch):
    """Hessian times a vector through the node of three layers, against the reference."""
    batch = make_batch("weighted", seed=5).to(dtype=torch.float64)
    products = []
    for backend in ("reference", "cpu"):
        leaves, layers, species = problem(batch, 8, True)
        with sf.use_backend(backend):
            out, _ = functional.stacked_gated_conv(leaves["table"], batch, layers, species=species)
            inputs = [leaves["table"], leaves["1.weight"], leaves["2.gamma1"]]
            first = torch.autograd.grad((out * leaves["upstream"]).sum(), inputs, create_graph=True)
            products.append(torch.autograd.grad(sum(x.square().sum() for x in first), inputs))
    for ours, truth in zip(products[1], products[0], strict=True):
        assert float((ours - truth).norm() / truth.norm()) < 1e-9


def test_results_do_not_depend_on_the_number_of_threads(make_batch):
    batch = make_batch("many crystals", seed=4).to(dtype=torch.float64)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run("cpu", batch, 16, True, table=True))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[name], x) for name, x in found[0].items())


def test_a_large_table_is_looked_up(make_batch, monkeypatch):
    """The backward's sums by its rows would take more memory than the rows of the batch."""
    batch, looked_up, lookup = make_batch("large"), [], fused.lookup
    monkeypatch.setattr(fused, "lookup", lambda *a: looked_up.append(1) or lookup(*a))
    layer = sf.CGCNN(1, 16, 16).eval()._layers()[0]
    for n, times in ((1024, 0), (1025, 1)):
        assert batch.num_rows > 4 * n
        h, species = torch.rand(n, 16), torch.randint(n, (batch.num_rows,), dtype=torch.int32)
        expected = functional.gated_conv(h[species.long()], batch, *layer)
        torch.testing.assert_close(functional.gated_conv(h, batch, *layer, species=species), expected)
        assert len(looked_up) == times


def test_species_outside_the_table_are_an_error(make_batch):
    batch = make_batch("one crystal", seed=4).to(dtype=torch.float64)
    leaves, layers, species = problem(batch, 8, False)
    for row in (17, 0):
        species[row] = ELEMENTS
        says = rf"Row {row} .* number 5, but .* holds 0 to 4; correct"
        with sf.use_backend("cpu"), pytest.raises(InputError, match=says):
            functional.stacked_gated_conv(leaves["table"], batch, layers, species=species)
    with pytest.raises(InputError, match="species int32"):
        functional.stacked_gated_conv(leaves["table"], batch, layers, species=species.long())


def test_mean_of_a_crystal(make_batch):
    """Weighted by the atoms that a row stands for; differentiable twice."""
    batch = make_batch("weighted", seed=2).to(dtype=torch.float64)
    h = torch.rand(batch.num_rows, 3, dtype=torch.float64, requires_grad=True)
    expected = [
        (batch.weight[a:b, None] * h[a:b]).sum(0) / batch.weight[a:b].sum()
        for a, b in zip(batch.crystal_ptr[:-1].tolist(), batch.crystal_ptr[1:].tolist(), strict=True)
    ]
    torch.testing.assert_close(functional.crystal_mean(h, batch), torch.stack(expected))
    assert torch.autograd.gradcheck(lambda x: functional.crystal_mean(x, batch), h)
    assert torch.autograd.gradgradcheck(lambda x: functional.crystal_mean(x, batch).square(), h)


def equal_rows(n: int) -> sf.GraphBatch:
    """A crystal of n copper atoms, each its own neighbour, and one without atoms."""
    index = torch.arange(n + 1, dtype=torch.int32)
    ends = torch.tensor([0, n, n], dtype=torch.int32)
    return sf.GraphBatch(index[:n] * 0 + 29, torch.ones(n), index[:n], torch.full((n,), 2.5), index, ends, index[:n])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_equal_rows_have_their_own_mean(dtype):
    """However many: sums in float32 drift by 1e-4, those in float16 overflow. Without rows it is zero."""
    batch, epsilon = equal_rows(40_000), max(torch.finfo(dtype).eps, 1e-11)
    rows = (3 * torch.rand(1, 20, generator=torch.Generator().manual_seed(0))).to(dtype)
    h = rows.expand(batch.num_rows, 20).contiguous().requires_grad_()
    compiled = torch.compile(functional.crystal_mean, backend="eager", fullgraph=True)
    for mean in (functional.crystal_mean, compiled, lambda h, b: reference.crystal_mean(h, b.weight, b.crystal_ptr)):
        found = mean(h, batch)
        torch.testing.assert_close(found[:1], rows, rtol=2 * epsilon, atol=0)
        assert not found[1].any()
        (gradient,) = torch.autograd.grad(found.sum(), h)
        torch.testing.assert_close(gradient.double(), torch.full(h.shape, 1 / 40_000).double(), rtol=epsilon, atol=1e-7)
    if dtype in cpu.DTYPES:
        layers = [Dense(torch.ones(1, 20, dtype=dtype), None)]
        out = functional.readout(h, batch, layers)
        torch.testing.assert_close(out, functional.readout(rows, equal_rows(1), layers), rtol=8 * epsilon, atol=0)


@pytest.mark.parametrize("grad", [False, True])
def test_a_large_supercell_has_the_value_of_its_cell(grad):
    torch.manual_seed(0)
    model = sf.CGCNN(1, 16, 20, 1).eval()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(equal_rows(40_000)), model(equal_rows(1)), rtol=3e-6, atol=1e-7)
