"""The symmetry quotient and the canonical choice of neighbours: exact, and functions of the crystal alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from srcgcnn_fast.graph.build import PackedGraphs, build_packed
from srcgcnn_fast.graph.neighbors import neighbor_list
from srcgcnn_fast.graph.parameters import GraphParameters

TOLERANCE = 1e-5
COUNT = 12


def pack(crystals, **parameters) -> PackedGraphs:
    lattices, frac, numbers = zip(*crystals, strict=True)
    ptr = np.concatenate([[0], np.cumsum([len(n) for n in numbers])])
    packed = build_packed(
        np.stack(lattices), np.concatenate(frac), np.concatenate(numbers), ptr, GraphParameters(**parameters)
    )
    assert not packed.errors
    return packed


def alloy(rng, motif, repeat=3, species=(29, 79), spacing=3.1):
    """A cubic supercell with random species on the sites of ``motif``: every distance shell is degenerate."""
    cells = np.stack(np.meshgrid(*[np.arange(repeat)] * 3, indexing="ij"), -1).reshape(-1, 3)
    frac = (cells[:, None] + np.array(motif)).reshape(-1, 3) / repeat
    return np.eye(3) * spacing * repeat, frac, rng.choice(species, len(frac))


BCC = ((0, 0, 0), (0.5, 0.5, 0.5))
FCC = ((0, 0, 0), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5))


def made_up_crystals():
    """Degenerate shells (a bcc atom's 12 nearest cut the shell of 6), few and many symmetries, short rows."""
    rng = np.random.default_rng(1)
    perovskite = (np.eye(3) * 3.9, np.array([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]),
                  np.array([56, 22, 8, 8, 8]))  # fmt: skip
    sparse = (np.diag([9.0, 9.5, 10]), np.array([[0, 0, 0], [0.2, 0, 0], [0, 0.21, 0]]), np.array([8, 1, 1]))
    return [
        alloy(rng, BCC),
        alloy(rng, BCC, species=(11, 26, 42)),
        alloy(rng, FCC, repeat=2),
        alloy(rng, ((0, 0, 0),), repeat=4),
        perovskite,
        sparse,
    ]


class Network(torch.nn.Module):
    """CGCNN with shared weights and batch statistics, weighted by multiplicity, plainly in float64."""

    def __init__(self, steps=3, width=12, gaussians=41):
        super().__init__()
        torch.manual_seed(0)
        self.steps, self.width = steps, width
        self.embedding = torch.nn.Embedding(101, width)
        self.full = torch.nn.Linear(2 * width + gaussians, 2 * width)
        self.out = torch.nn.Linear(width, 1)
        self.centres = torch.arange(gaussians) * 0.2
        self.double()

    def forward(self, packed: PackedGraphs) -> torch.Tensor:
        offset = np.repeat(packed.crystal_ptr[:-1], np.diff(packed.edge_ptr))
        rows = torch.arange(len(packed.numbers))
        receiver = rows.repeat_interleave(torch.from_numpy(np.diff(packed.row_ptr)))
        sender = torch.from_numpy(packed.sender + offset)
        weight = torch.from_numpy(packed.weight).double()[:, None]
        edge_weight = weight[receiver]
        gaussians = torch.exp(-(((torch.from_numpy(packed.distance)[:, None] - self.centres) / 0.2) ** 2))
        h = self.embedding(torch.from_numpy(packed.numbers).long())
        for _ in range(self.steps):
            z = self.normalise(self.full(torch.cat([h[receiver], h[sender], gaussians], 1)), edge_weight)
            gate = torch.sigmoid(z[:, : self.width]) * torch.nn.functional.softplus(z[:, self.width :])
            message = torch.zeros_like(h).index_add(0, receiver, gate)
            h = torch.nn.functional.softplus(h + self.normalise(message, weight))
        crystal = torch.from_numpy(np.repeat(np.arange(len(packed.crystal_ptr) - 1), np.diff(packed.crystal_ptr)))
        shape = (len(packed.crystal_ptr) - 1, self.width)
        total = torch.zeros(shape[0], 1).double().index_add(0, crystal, weight)
        pooled = torch.zeros(shape).double().index_add(0, crystal, weight * h) / total
        return self.out(torch.nn.functional.softplus(pooled)).squeeze(1)

    @staticmethod
    def normalise(x, weight):
        mean = (weight * x).sum(0) / weight.sum()
        variance = (weight * (x - mean) ** 2).sum(0) / weight.sum()
        return (x - mean) / (variance + 1e-5).sqrt()


def outputs(packed: PackedGraphs) -> np.ndarray:
    with torch.no_grad():
        return Network()(packed).numpy()


def permuted(crystal, rng):
    order = rng.permutation(len(crystal[2]))
    return crystal[0], crystal[1][order], crystal[2][order]


def shifted(crystal, rng):
    return crystal[0], crystal[1] + rng.random(3), crystal[2]


def in_another_cell(crystal, rng):
    lattice, frac = crystal[:2]
    for _ in range(2):
        a, b = rng.choice(3, 2, replace=False)
        change = np.eye(3)
        change[a, b] = rng.choice([-2, -1, 1, 2])
        lattice, frac = change @ lattice, frac @ np.linalg.inv(change)
    return lattice, frac, crystal[2]


def rotated(crystal, rng):
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return crystal[0] @ rotation, crystal[1], crystal[2]


def doubled(crystal, rng):
    times = np.ones(3)
    times[rng.integers(3)] = 2
    frac = crystal[1] / times
    return crystal[0] * times[:, None], np.vstack([frac, frac + (times - 1) / 2]), np.tile(crystal[2], 2)


def jittered(crystal, rng):
    """Rounding noise of 1e-11 in the coordinates."""
    return crystal[0], crystal[1] + rng.normal(size=crystal[1].shape) * 1e-11, crystal[2]


def everything(crystal, rng):
    for change in (permuted, shifted, in_another_cell, doubled, rotated):
        crystal = change(crystal, rng)
    return crystal


CHANGES = (permuted, shifted, in_another_cell, rotated, doubled, jittered, everything)


def row_signatures(packed: PackedGraphs, crystal: int) -> list[tuple]:
    """What a graph is apart from the order of its rows: (share of atoms, number, degree), distances, senders."""
    graph = packed.graph(crystal, np.float64)
    signatures = []
    for r in range(graph.n_rows):
        edges = slice(graph.row_ptr[r], graph.row_ptr[r + 1])
        senders = np.sort(graph.numbers[graph.sender[edges]])
        key = (int(graph.numbers[r]), *senders.tolist(), round(float(graph.weight[r]) / graph.n_atoms, 9))
        signatures.append((key, np.sort(graph.distance[edges])))
    return sorted(signatures, key=lambda s: (s[0], tuple(s[1].round(3))))


def assert_invariant(crystals, change, tolerance):
    rng = np.random.default_rng(11)
    before = pack(crystals, symmetry_tolerance=tolerance)
    after = pack([change(c, rng) for c in crystals], symmetry_tolerance=tolerance)
    assert np.abs(outputs(before) - outputs(after)).max() < 1e-6
    if tolerance is not None:
        assert np.array_equal(np.diff(before.crystal_ptr), np.diff(after.crystal_ptr))
        assert np.array_equal(before.numbers, after.numbers)  # the order of the rows is canonical, too
        for b in range(len(crystals)):
            for (key, d), (other_key, e) in zip(row_signatures(before, b), row_signatures(after, b), strict=True):
                assert key == other_key
                assert np.allclose(d, e, rtol=0, atol=1e-7)


@pytest.mark.parametrize("tolerance", [TOLERANCE, None])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_graph_depends_on_the_crystal_alone(change, tolerance):
    assert_invariant(made_up_crystals(), change, tolerance)


@pytest.mark.parametrize("tolerance", [TOLERANCE, None])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_graph_depends_on_the_crystal_alone_mp(crystals_1500, change, tolerance):
    assert_invariant(crystals_1500[::15], change, tolerance)


def assert_same_network(crystals, **parameters):
    network, results = Network(), []
    upstream = torch.randn(len(crystals), generator=torch.Generator().manual_seed(1)).double()
    for tolerance in (TOLERANCE, None):
        network.zero_grad()
        y = network(pack(crystals, symmetry_tolerance=tolerance, **parameters))
        (y * upstream).sum().backward()
        results.append((y.detach(), {name: p.grad.clone() for name, p in network.named_parameters()}))
    (y, gradients), (full, full_gradients) = results
    assert (y - full).abs().max() < 1e-6 * (full.max() - full.min())
    for name, gradient in gradients.items():
        if name != "full.bias":  # zero up to rounding: batch norm follows
            assert (gradient - full_gradients[name]).norm() < 1e-6 * full_gradients[name].norm()


@pytest.mark.parametrize("padded", [False, True])
def test_quotient_equals_full_graph(padded):
    assert_same_network(made_up_crystals(), padded=padded)


def test_quotient_equals_full_graph_mp(crystals_1500):
    assert_same_network(crystals_1500[7::10])


def assert_quotient_is_sound(crystals, count=COUNT):
    """Every class: equal numbers, equal classes of neighbours, distances within the tolerance place by place."""
    quotient = pack(crystals, max_neighbors=count)
    full = pack(crystals, max_neighbors=count, symmetry_tolerance=None)
    for b, (lattice, frac, numbers) in enumerate(crystals):
        q, f = quotient.graph(b, np.float64), full.graph(b, np.float64)
        assert np.array_equal(np.bincount(q.atom_class, minlength=q.n_rows), q.weight)
        assert np.array_equal(q.numbers[q.atom_class], numbers)
        everyone = neighbor_list(lattice, frac, numbers, 8.0)
        starts = np.searchsorted(everyone.receiver, np.arange(len(numbers) + 1))
        members = {c: np.flatnonzero(q.atom_class == c) for c in range(q.n_rows)}
        for c, atoms in members.items():
            row = slice(q.row_ptr[c], q.row_ptr[c + 1])
            sorted_distances = []
            for i in atoms:
                edges = slice(f.row_ptr[i], f.row_ptr[i + 1])
                assert np.array_equal(np.sort(q.atom_class[f.sender[edges]]), np.sort(q.sender[row]))
                own = np.sort(f.distance[edges])
                nearest = everyone.distance[starts[i] : starts[i + 1]][:count]
                assert len(own) == len(nearest)
                assert (own <= nearest + TOLERANCE).all()  # nobody left out is nearer by more
                vector = (frac[f.sender[edges]] + f.image[edges] - frac[i]) @ lattice
                assert np.allclose(np.linalg.norm(vector, axis=1), f.distance[edges], rtol=0, atol=1e-9)
                sorted_distances.append(f.distance[edges])
            spread = np.ptp(sorted_distances, axis=0)
            assert (spread <= TOLERANCE).all()
            assert np.allclose(np.mean(sorted_distances, axis=0), q.distance[row], rtol=0, atol=1e-12)


def test_classes_are_sound():
    assert_quotient_is_sound(made_up_crystals())


@pytest.mark.parametrize("count", [5, 16, 17, 30, 90])
def test_classes_are_sound_whatever_the_number_of_neighbours(count):
    """Rows of candidates are stored by sixteen; from 64 neighbours on the arrays of edges grow."""
    assert_quotient_is_sound(made_up_crystals()[2:], count=count)


@pytest.mark.parametrize("tolerance", [None, TOLERANCE])
def test_many_neighbours_are_padded(tolerance):
    crystals = made_up_crystals()
    packed = pack(crystals, max_neighbors=300, radius=5.0, padded=True, symmetry_tolerance=tolerance)
    bare = pack(crystals, max_neighbors=300, radius=5.0, symmetry_tolerance=tolerance)
    assert (np.diff(packed.row_ptr) == 300).all()
    kept = packed.distance < 5.5
    assert np.array_equal(packed.distance[kept], bare.distance)
    assert np.array_equal(packed.sender[kept], bare.sender)
    assert (packed.distance[~kept] == 6.0).all()


def test_classes_are_sound_mp(crystals_1500):
    assert_quotient_is_sound(crystals_1500[3::40])


def test_drifting_distances_are_not_chained():
    """Spacings that drift by half the tolerance from atom to atom: each step would merge, the whole must not."""
    n = 40
    spacing = 2.5 + np.concatenate([np.arange(n // 2), np.arange(n // 2)[::-1]]) * TOLERANCE / 2
    z = np.concatenate([[0], np.cumsum(spacing)])
    crystal = (np.diag([6.0, 6.0, z[-1]]), np.stack([np.zeros(n), np.zeros(n), z[:-1] / z[-1]], 1), np.full(n, 14))
    assert_quotient_is_sound([crystal], count=6)
    rows = pack([crystal], max_neighbors=6).graph(0).n_rows
    assert n / 8 < rows < n


@pytest.mark.parametrize("wobble", [1e-6, 2e-6, 4e-6, 1e-5, 3e-5])
def test_nearly_symmetric_crystals_are_sound(wobble):
    """Displacements of about the tolerance: classes may split, but never merge what differs."""
    rng = np.random.default_rng(2)
    crystals = [*made_up_crystals(), alloy(rng, FCC, species=(29,)), alloy(rng, BCC, species=(26,))]
    assert_quotient_is_sound(
        [
            (lattice, frac + rng.uniform(-1, 1, frac.shape) @ np.linalg.inv(lattice) * wobble, numbers)
            for lattice, frac, numbers in crystals
        ]
    )


def test_large_random_cell_is_left_alone():
    rng = np.random.default_rng(3)
    cell = (np.diag([22.0, 24, 26]), rng.random((1000, 3)), np.full(1000, 14))
    assert pack([cell]).graph(0).n_rows > 995
    assert_quotient_is_sound([cell])


def test_rattled_crystal_keeps_every_atom():
    rng = np.random.default_rng(4)
    lattice, frac, numbers = alloy(rng, FCC, repeat=3, species=(29,), spacing=3.6)
    assert pack([(lattice, frac, numbers)]).graph(0).n_rows == 1
    rattled = frac + rng.normal(size=frac.shape) * 0.02 / 10.8
    assert pack([(lattice, rattled, numbers)]).graph(0).n_rows == len(numbers)


def test_rows_of_known_crystals():
    lattice, frac, numbers = made_up_crystals()[4]
    graph = pack([(lattice, frac, numbers)]).graph(0, np.float64)
    assert graph.numbers.tolist() == [8, 22, 56]
    assert graph.weight.tolist() == [3, 1, 1]
    assert graph.atom_class.tolist() == [2, 1, 0, 0, 0]
    titanium = slice(graph.row_ptr[1], graph.row_ptr[2])
    assert graph.sender[titanium].tolist() == [0] * 6 + [2] * 6
    assert np.allclose(graph.distance[titanium], [1.95] * 6 + [3.9 * 0.75**0.5] * 6)


def test_choice_in_the_last_shell_is_by_atomic_number():
    """CsCl, 10 neighbours: the second shell of 6 is cut; a substituted atom in it is taken or left by its number."""
    rng = np.random.default_rng(0)
    lattice, frac, _ = alloy(rng, BCC, repeat=3)
    numbers = np.where(np.arange(len(frac)) % 2, 17, 55)
    origin = np.flatnonzero((frac == 0).all(axis=1))[0]
    neighbour = np.flatnonzero((np.abs(frac - [1 / 3, 0, 0]) < 1e-9).all(axis=1))[0]
    for number, taken in ((3, True), (87, False)):
        numbers[neighbour] = number
        full = pack([(lattice, frac, numbers)], max_neighbors=10, symmetry_tolerance=None).graph(0)
        assert (neighbour in full.sender[full.row_ptr[origin] : full.row_ptr[origin + 1]]) == taken


def test_reduction_on_mp(crystals_1500):
    packed = pack(crystals_1500)
    atoms = packed.atom_ptr[-1]
    assert atoms == sum(len(c[2]) for c in crystals_1500)
    assert 2.5 < atoms / len(packed.numbers) < 2.7
    assert packed.weight.sum() == atoms
