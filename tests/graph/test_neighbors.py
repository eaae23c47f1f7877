"""The neighbour search against brute force and against independent programs."""

from __future__ import annotations

import numpy as np
import pytest

from srcgcnn_fast.errors import InputError
from srcgcnn_fast.graph.neighbors import OK, NeighborList, kernel, neighbor_list, search, sort_many

RADII = (3.0, 5.0, 8.0)


def brute_force(lattice, frac, radius):
    """Per atom (sender, image, distance), sorted by distance, over every image that can be within the radius."""
    heights = 1 / np.linalg.norm(np.linalg.inv(lattice), axis=0)
    spread = np.ptp(frac, axis=0)
    ranges = [np.arange(-k, k + 1) for k in np.ceil(radius / heights + spread + 1).astype(int)]
    images = np.stack(np.meshgrid(*ranges, indexing="ij"), -1).reshape(-1, 3)
    moved = images.any(axis=1)
    found = []
    for i in range(len(frac)):
        distance = np.linalg.norm((frac + images[:, None] - frac[i]) @ lattice, axis=-1)
        within = (distance <= radius + 1e-8) & (moved[:, None] | (np.arange(len(frac)) != i))
        n, j = np.nonzero(within)
        order = np.argsort(distance[n, j], kind="stable")
        found.append((j[order], images[n[order]], distance[n[order], j[order]]))
    return found


def random_cell(rng, kind):
    if kind == "triclinic":
        return rng.normal(size=(3, 3)) * rng.uniform(3, 6)
    if kind == "box":
        return np.diag(rng.uniform(2, 12, 3))
    if kind == "fcc":
        return (np.ones((3, 3)) - np.eye(3)) * rng.uniform(1.5, 4)
    if kind == "slender":
        return np.diag([rng.uniform(2, 3), rng.uniform(2, 3), rng.uniform(20, 40)])
    return np.array([[1, 0, 0], [-0.5, 0.75**0.5, 0], [0, 0, 1.63]]) * rng.uniform(2.5, 6)


def skewed(lattice, frac, rng):
    """The same crystal in another, more oblique cell."""
    for _ in range(3):
        a, b = rng.choice(3, 2, replace=False)
        change = np.eye(3)
        change[a, b] = rng.integers(-3, 4)
        lattice, frac = change @ lattice, frac @ np.linalg.inv(change)
    return lattice, frac


def random_crystal(rng, kind):
    n = int(rng.choice([1, 2, 3, 5, 8, 13]))
    lattice = random_cell(rng, kind)
    while abs(np.linalg.det(lattice)) < 4 * n:
        lattice = lattice * 1.2
    on_grid = rng.random() < 0.5  # special positions: many equal distances
    frac = rng.integers(0, 4, (n, 3)) / 4 if on_grid else rng.random((n, 3))
    frac = np.unique(frac, axis=0) + rng.integers(-2, 3, 3)
    return skewed(lattice, frac, rng) if rng.random() < 0.5 else (lattice, frac)


def assert_same_neighbors(found: NeighborList, expected, lattice, frac, count):
    """Equal up to the choice within the tied last shell and up to neighbours that lie on the cutoff itself."""
    vector = (frac[found.sender] + found.image - frac[found.receiver]) @ lattice
    assert np.allclose(np.linalg.norm(vector, axis=1), found.distance, rtol=0, atol=2e-9)
    assert (np.diff(found.receiver) >= 0).all()
    for i, (j, image, distance) in enumerate(expected):
        mine = found.receiver == i
        size = len(distance) if count is None else min(count, len(distance))
        assert mine.sum() == size
        assert np.allclose(found.distance[mine], distance[:size], rtol=0, atol=2e-9)
        assert (np.diff(found.distance[mine]) >= 0).all()
        if not size:
            continue
        edge = np.inf if size == len(distance) else distance[size - 1] - 2e-6
        keys = [(int(a), *map(int, b)) for a, b in zip(found.sender[mine], found.image[mine], strict=True)]
        assert len(set(keys)) == size
        below = {key for key, d in zip(keys, found.distance[mine], strict=True) if d < edge}
        reference = zip(j[:size], image[:size], distance[:size], strict=True)
        assert below == {(int(a), *map(int, b)) for a, b, d in reference if d < edge}


@pytest.fixture(params=[None, "cpu"])
def device(request):
    """The search of this package, and nvalchemi-toolkit-ops on the CPU where it is installed."""
    if request.param is not None:
        pytest.importorskip("nvalchemiops", reason="nvalchemi-toolkit-ops is not installed (srcgcnn_fast[alchemi])")
    return request.param


@pytest.mark.parametrize("kind", ["triclinic", "box", "fcc", "slender", "hexagonal"])
def test_brute_force(kind, device):
    rng = np.random.default_rng(sum(map(ord, kind)))
    atoms = 0
    for _ in range(25):
        lattice, frac = random_crystal(rng, kind)
        radius = float(rng.choice(RADII))
        count = [None, 1, 6, 12, 24][rng.integers(5)]
        expected = brute_force(lattice, frac, radius)
        if any((np.abs(d - radius) < 1e-6).any() for _, _, d in expected):
            radius += 1e-3
            expected = brute_force(lattice, frac, radius)
        found = neighbor_list(lattice, frac, np.full(len(frac), 6), radius, count, device=device)
        assert_same_neighbors(found, expected, lattice, frac, count)
        atoms += len(frac)
    assert atoms > 50


@pytest.mark.parametrize("count", [None, 12])
def test_brute_force_through_bins(count, device):
    rng = np.random.default_rng(5)
    lattice = np.array([[11.0, 0, 0], [3, 12, 0], [-2, 1, 10]])
    frac = rng.random((120, 3)) * 2 - 0.5
    found = neighbor_list(lattice, frac, np.full(120, 6), 5.0, count, device=device)
    assert_same_neighbors(found, brute_force(lattice, frac, 5.0), lattice, frac, count)


@pytest.mark.parametrize(("n", "count"), [(5000, None), (5000, 12), pytest.param(50_000, 12, marks=pytest.mark.slow)])
def test_large_cell_against_kd_tree(n, count, device):
    from scipy.spatial import cKDTree

    rng = np.random.default_rng(0)
    radius = 5.0
    lattice = np.array([[45.0, 0, 0], [12, 40, 0], [-8, 5, 42]]) * (n / 5000) ** (1 / 3)
    frac = rng.random((n, 3))
    images = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3, indexing="ij"), -1).reshape(-1, 3)
    ghosts = (frac + images[:, None]).reshape(-1, 3) @ lattice
    home = np.flatnonzero(~images.any(axis=1))[0] * n
    found = neighbor_list(lattice, frac, np.full(n, 6), radius, count, device=device)
    starts = np.searchsorted(found.receiver, np.arange(n + 1))
    for i, near in enumerate(cKDTree(ghosts).query_ball_point(frac @ lattice, radius)):
        near = np.setdiff1d(near, home + i)
        distance = np.sort(np.linalg.norm(ghosts[near] - frac[i] @ lattice, axis=1))[:count]
        mine = slice(starts[i], starts[i + 1])
        assert np.allclose(found.distance[mine], distance, rtol=0, atol=1e-9)
        if count is None:
            senders = near % n
            assert np.array_equal(np.sort(found.sender[mine]), np.sort(senders))


@pytest.mark.parametrize("count", [16, 32, None])
def test_images_of_rows_that_are_full(count):
    """Rows in memory are not in the order of the atoms: their radii end at different times."""
    rng = np.random.default_rng(13)
    for _ in range(300):
        n = int(rng.integers(3, 30))
        lattice, frac = np.diag(rng.uniform(4, 12, 3)), rng.random((n, 3))
        found = neighbor_list(lattice, frac, np.full(n, 6), 8.0, count)
        vector = (frac[found.sender] + found.image - frac[found.receiver]) @ lattice
        assert np.allclose(np.linalg.norm(vector, axis=1), found.distance, rtol=0, atol=2e-9)


@pytest.mark.parametrize("slack", [1e-5, 0.4, 2.5])  # the last with more than a block of ROW
def test_candidates_hold_the_whole_tied_shell(slack):
    """Among them all that lie within ``slack`` of the last neighbour, wherever the first radius ended."""
    rng = np.random.default_rng(9)
    for _ in range(25):
        # a cluster and lone atoms: their radii end up all over the place
        lattice = skewed(np.diag(rng.uniform(11, 16, 3)), np.zeros((1, 3)), rng)[0]
        frac = np.vstack([rng.random((12, 3)) * 0.25, rng.random((8, 3))])
        count = int(rng.integers(1, 20))
        ptr = np.array([0, len(frac)])
        status, _, _, first, size, _, _, distance = search(lattice[None], frac, ptr, 8.0, count, slack, False)
        assert status[0] == OK
        for i, (_, _, expected) in enumerate(brute_force(lattice, frac, 8.0)):
            limit = expected[:count].max(initial=0.0) + slack
            if (np.abs(expected - limit) < 1e-9).any() or (np.abs(expected - 8.0) < 1e-6).any():
                continue  # on the limit itself either answer is right
            assert size[i] == (expected <= limit).sum()
            assert np.allclose(distance[first[i] :][: size[i]], expected[: size[i]], rtol=0, atol=2e-9)


def test_against_pymatgen(small_1500):
    pymatgen = pytest.importorskip("pymatgen.core")
    rows = small_1500.iloc[::150]
    assert len(rows) == 10
    for row in rows.itertuples():
        lattice = np.reshape(row.lattice, (3, 3))
        frac = np.reshape(row.frac_coords, (-1, 3))
        structure = pymatgen.Structure(lattice, row.atomic_numbers, frac)
        i, j, image, distance = structure.get_neighbor_list(8.0, exclude_self=True)
        found = neighbor_list(lattice, frac, row.atomic_numbers, 8.0)
        theirs, mine = (
            {(int(a), int(b), *map(int, c)): d for a, b, c, d in zip(*columns, strict=True)}
            for columns in (
                (i, j, image.round(), distance),
                (found.receiver, found.sender, found.image, found.distance),
            )
        )
        shared = theirs.keys() & mine.keys()
        assert len(shared) > 50
        assert max(abs(theirs[key] - mine[key]) for key in shared) < 2e-6
        different = [d for side, other in ((theirs, mine), (mine, theirs)) for k, d in side.items() if k not in other]
        assert all(abs(d - 8.0) < 1e-6 for d in different)  # on the cutoff itself only


def test_image_of_itself_counts_and_the_atom_does_not():
    found = neighbor_list(np.diag([3.0, 20, 20]), [[0.3, 0.2, 0.1]], [29], 4.0)
    assert found.sender.tolist() == [0, 0]
    assert sorted(found.image.tolist()) == [[-1, 0, 0], [1, 0, 0]]
    assert np.allclose(found.distance, 3.0)


def test_a_cluster_far_from_its_images():
    """The only cell that counts is the one at home."""
    found = neighbor_list(np.diag([30.0, 40, 50]), [[0.5, 0.5, 0.5], [0.55, 0.5, 0.5]], [8, 8], 3.0)
    assert found.sender.tolist() == [1, 0]
    assert not found.image.any()
    assert np.allclose(found.distance, 1.5)


def test_far_away_coordinates_wrap():
    lattice = np.array([[4.0, 0, 0], [1, 5, 0], [0, 1, 6]])
    frac = np.array([[1e6, -1e6, 3e5], [0.5, 0.5, 0.25], [-2e6 + 0.25, 7, 0.75]])
    found = neighbor_list(lattice, frac, [11, 17, 3], 6.0)
    near = neighbor_list(lattice, frac % 1.0, [11, 17, 3], 6.0)
    assert np.allclose(found.distance, near.distance, rtol=0, atol=1e-8)
    vector = (frac[found.sender] - frac[found.receiver] + found.image) @ lattice
    assert np.allclose(np.linalg.norm(vector, axis=1), found.distance, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("lattice", "frac", "radius", "word"),
    [
        (np.eye(3) * 4, [[0, 0, 0], [0.5, 0.5, 0.5], [1.00001, 0, -1]], 8.0, "sites 1 .* and 3 "),
        (np.ones((3, 3)), [[0, 0, 0]], 8.0, "singular"),
        (np.diag([4, 4, 1e-5]), [[0, 0, 0]], 8.0, "singular"),
        (np.eye(3) * 4, [[0, 0, np.nan]], 8.0, "NaN"),
        (np.full((3, 3), np.inf), [[0, 0, 0]], 8.0, "infinite"),
        (np.eye(3) * 4, [[0, 0]], 8.0, "shapes"),
        (np.eye(3) * 4, [[0, 0, 0]], 1e4, "smaller radius"),
        (np.eye(3) * 4, [[0, 0, 0]], -1.0, "positive"),
    ],
)
def test_unusable_input_is_named(lattice, frac, radius, word, device):
    with pytest.raises(InputError, match=word):
        neighbor_list(lattice, frac, np.full(len(frac), 11), radius, device=device)


def test_without_a_cache_directory(monkeypatch, caplog):
    """An install and a home that cannot be written: compiled in memory, with a warning."""
    from numba.core.caching import CacheImpl

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    assert kernel(_successor)(1) == 2
    assert "cannot be kept on disk" in caplog.text


def _successor(x):
    return x + 1


@pytest.mark.parametrize("count", [2.5, "3", True, 0])
def test_a_number_of_neighbors_is_a_whole_one(count):
    with pytest.raises(InputError, match="a whole number of at least 1, or None"):
        neighbor_list(np.eye(3) * 4, [[0, 0, 0]], [29], 5.0, max_neighbors=count)


@pytest.mark.parametrize("order", ["any", "sorted", "backwards"])
@pytest.mark.parametrize("kinds", [2, 50, 10**6])
def test_more_neighbours_than_are_ranked_are_sorted_by_distance_and_number(order, kinds):
    rng = np.random.default_rng(kinds)
    for count in (0, 1, 2, 3, 15, 16, 17, 130, 1000):
        key, index = rng.integers(0, kinds, count + 5).astype(float), rng.permutation(count + 5)
        if order != "any":
            key.sort()
            key = key if order == "sorted" else key[::-1].copy()
        before, within = (key.copy(), index.copy()), slice(3, 3 + count)
        sort_many(key, index, 3, count)
        right = np.lexsort((before[1][within], before[0][within])) + 3
        right = np.concatenate([np.arange(3), right, np.arange(3 + count, 5 + count)])
        assert (key == before[0][right]).all() and (index == before[1][right]).all()
