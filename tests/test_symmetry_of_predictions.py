"""The symmetry quotient and the canonical graph, seen from the models: same numbers, fewer atoms, no dependence on
the order of atoms, the origin or the cell."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import srcgcnn_fast as sf
from srcgcnn_fast.interop.upstream import expand_quotient


def models():
    torch.manual_seed(0)
    return [sf.CGCNN(3), sf.SRCGCNN(3)]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_atoms_and_edges_become_about_two_and_a_half_times_fewer(crystals_1500):
    native = sf.collate(sf.build_graphs(crystals_1500, isolated="keep"), torch.float64)
    full = expand_quotient(native)
    assert 2.4 < full.num_rows / native.num_rows < 2.9
    assert 2.4 < full.num_edges / native.num_edges < 2.9


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_quotient_and_full_graph_train_alike(backend, crystals_1500):
    """Outputs, losses, every gradient and the batch-norm buffers, in float64."""
    chosen = crystals_1500[: 1500 if backend == "cpu" else 50]
    quotient = sf.collate(sf.build_graphs(chosen, isolated="keep"), torch.float64).to(dtype=torch.float64)
    full = expand_quotient(quotient)
    assert full.num_rows > 2 * quotient.num_rows
    target = torch.randn(len(chosen), 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for model in models():
        model.double()
        start = {k: v.clone() for k, v in model.state_dict().items()}
        results = []
        for batch in (full, quotient):
            model.load_state_dict(start)
            model.train().zero_grad()
            out = model(batch)
            loss = torch.nn.functional.mse_loss(out, target)
            loss.backward()
            values = {"out": out.detach(), "loss": loss.detach()}
            values |= {f"grad {k}": p.grad.clone() for k, p in model.named_parameters() if "fc_full.bias" not in k}
            values |= {k: b.clone() for k, b in model.named_buffers() if "running" in k}
            values["eval"] = model.eval()(batch).detach()
            results.append(values)
        for name, expected in results[0].items():
            assert relative(results[1][name], expected) < 1e-5, name


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_predictions_do_not_depend_on_how_the_crystal_is_written(backend, crystals_1500, data_dir):
    """Order of atoms, origin, another primitive cell, a supercell: below 1e-5 eV/atom, with a trained model."""
    model = sf.load_model(data_dir / "upstream" / "formation-energy-per-atom.pth.tar")
    rng = np.random.default_rng(3)
    chosen = [c for c in crystals_1500 if len(c[2]) <= 24][:150]

    def predict(variants) -> torch.Tensor:
        with torch.no_grad():
            return model.predict(sf.collate(sf.build_graphs(variants, isolated="keep")))[:, 0]

    def permuted(lattice, frac, numbers):
        order = rng.permutation(len(numbers))
        return lattice, frac[order], numbers[order]

    def shifted(lattice, frac, numbers):
        return lattice, frac + rng.random(3), numbers

    def other_cell(lattice, frac, numbers):
        change = np.array([[1, 1, 0], [0, 1, 0], [1, 0, 1]])
        return change @ lattice, frac @ np.linalg.inv(change), numbers

    def supercell(lattice, frac, numbers):
        half = np.concatenate([frac * [0.5, 1, 1], frac * [0.5, 1, 1] + [0.5, 0, 0]])
        return lattice * [[2], [1], [1]], half, np.concatenate([numbers, numbers])

    expected = predict(chosen)
    for change in (permuted, shifted, other_cell, supercell):
        got = predict([change(*c) for c in chosen])
        assert float((got - expected).abs().max()) < 1e-5, change.__name__
