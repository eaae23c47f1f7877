from __future__ import annotations

import numpy as np
import pytest
import torch

from srcgcnn_fast.interop.gaussians import distances_from_gaussians


def gaussians(distance, dmin=0.0, step=0.2, k=41, var=None):
    mu = dmin + step * np.arange(k)
    fea = np.exp(-(((np.asarray(distance)[..., None] - mu) / (var or step)) ** 2))
    return torch.from_numpy(fea)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("dmin", "step", "k"), [(0, 0.2, 41), (0.7, 0.1, 60), (2, 0.5, 3)])
@pytest.mark.parametrize("threads", [1, 2])
def test_gaussians_give_their_distances(dtype, dmin, step, k, threads):
    rng = np.random.default_rng(0)
    distance = rng.uniform(dmin, dmin + step * (k - 1), 20000)
    distance[::3] = distance[1::3][: len(distance[::3])]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = distances_from_gaussians(gaussians(distance, dmin, step, k).to(dtype))
    finally:
        torch.set_num_threads(before)
    assert found is not None and found.dtype == dtype
    error = np.abs(found.numpy() * step + dmin - distance).max()
    assert error < (2e-7 * distance.max() if dtype == torch.float32 else 1e-13)
    rebuilt = torch.exp(-((found[:, None].double() - torch.arange(k)) ** 2))
    rounding = float(found.abs().max()) * torch.finfo(dtype).eps  # of the distance itself
    tolerance = rounding + (3e-7 if dtype == torch.float32 else 1e-14)
    assert float((rebuilt - gaussians(distance, dmin, step, k)).abs().max()) < tolerance


@pytest.mark.parametrize("distance", [9.0, 8.4, -0.3, 20.0, 0.0, 8.0])
def test_distances_beyond_the_first_and_last_centre(distance):
    """Padding stands at 9 Å, where all 41 features are next to nothing."""
    fea = gaussians([1.0, distance, distance, 3.3]).float()
    found = distances_from_gaussians(fea)
    rebuilt = torch.exp(-((found[:, None].double() - torch.arange(41)) ** 2))
    assert float((rebuilt - fea).abs().max()) < 2e-6


def test_denormal_numbers_may_have_been_removed():
    fea = gaussians(np.linspace(0.5, 8, 1000)).float()
    clean = torch.where(fea < 1e-30, 0.0, fea)
    assert torch.equal(distances_from_gaussians(clean), distances_from_gaussians(fea))


def one_more(fea: torch.Tensor, edge: int, k: int, value: float) -> torch.Tensor:
    return fea.index_put((torch.tensor([edge]), torch.tensor([k])), torch.tensor(value))


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f + 1e-6,
        lambda f: f * (1 + 1e-5),
        lambda f: f.half().float(),
        lambda f: torch.rand_like(f),
        lambda f: f[:, torch.randperm(41, generator=torch.Generator().manual_seed(0))],
        lambda f: -f,
        lambda f: f.index_fill(1, torch.tensor([40]), 0.5),
        lambda f: one_more(f, 0, 40, 1e-6),  # far from the distance of its edge
        lambda f: one_more(f, 0, 40, -1e-6),
        lambda f: one_more(f, 999, 0, 1e-6),
        lambda f: f.index_fill(0, torch.tensor([999]), torch.nan),
        lambda f: f.index_fill(0, torch.tensor([999]), torch.inf),
        lambda f: f.masked_fill(torch.arange(41) == 3, torch.nan),
        lambda f: f.bfloat16(),
        lambda f: f[:, :2],
        lambda f: f[:0],
    ],
)
def test_what_is_not_exactly_gaussian_is_not_taken_for_it(change):
    fea = gaussians(np.linspace(1, 7, 1000)).float()
    assert distances_from_gaussians(fea) is not None
    assert distances_from_gaussians(change(fea).contiguous()) is None


@pytest.mark.parametrize(
    "fea",
    [
        gaussians(np.linspace(1, 7, 100), var=0.25),
        gaussians(np.linspace(1, 7, 100)).float().double(),
        gaussians(np.linspace(1, 7, 100), dmin=0.05)[:, ::2],
    ],
    ids=["another width", "rounded to float32", "every other"],
)
def test_other_gaussians(fea):
    assert distances_from_gaussians(fea.contiguous()) is None
