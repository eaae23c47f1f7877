"""The CUDA kernels against the reference in float64, without a GPU: their source, compiled for the CPU.

cuda/emulation.h supplies CUDA's execution model. Indices, layouts, orders, barriers and the precision of the products
are tested so; speed and the GPU itself are not.
"""

from __future__ import annotations

import contextlib
import types

import convolution
import pytest
import torch
from convolution import relative
from cuda_problem import A100, H100, KINDS_OF_WEIGHTS, MIDDLE, TINY, Problem, sparse

import srcgcnn_fast as sf
from srcgcnn_fast.ops import cuda as backend
from srcgcnn_fast.ops import registry, triton
from srcgcnn_fast.ops.cpu import Graph, Layer

pytestmark = pytest.mark.usefixtures("on_the_emulation")


@KINDS_OF_WEIGHTS
@pytest.mark.parametrize("kind", ["plain", "weighted", "ragged", "one atom", "isolated", "no edges", "many crystals"])
def test_stack(make_batch, kind, shared):
    Problem(make_batch(kind, seed=3), 16, 41, 3, shared).check()


@pytest.mark.parametrize(("width", "n_features"), [(64, 41), (7, 41), (1, 3), (33, 5), (48, 9), (128, 60)])
def test_any_width_and_number_of_gaussians(make_batch, width, n_features):
    Problem(make_batch("isolated", seed=5), width, n_features, 2, True).check()
    Problem(make_batch("weighted", seed=5), width, n_features, 1, True).check()


@KINDS_OF_WEIGHTS
def test_generic_edge_features(make_batch, shared):
    Problem(make_batch("weighted", seed=6), 16, 23, 2, shared, features=True).check()


def test_more_layers_than_one_launch_prepares(make_batch):
    Problem(make_batch("isolated"), 8, 5, 18, False).check()


@KINDS_OF_WEIGHTS
def test_bits_do_not_depend_on_the_gpu(library, make_batch, shared):
    """Nor on the order of its warps and blocks: what fits, what is recomputed, and where the groups end, follow from
    the shared memory; the order would show a missing barrier."""
    batch = make_batch("plain", seed=4)
    batch.distance[::2] = (batch.distance[::2] * 3).round() / 3
    problem = Problem(batch, 40, 41, 2, shared)
    library.gpu(*H100)
    first = problem.check()
    for gpu, descending in ((H100, True), (A100, False), (MIDDLE, False), (TINY, True)):
        library.gpu(*gpu, descending)
        assert torch.equal(problem.found(), first)


@KINDS_OF_WEIGHTS
@pytest.mark.parametrize("gpu", [MIDDLE, TINY], ids=["three classes", "two classes"])
@pytest.mark.parametrize("kind", ["one crystal", "plain"])
def test_crystals_too_large_for_a_block(library, make_batch, kind, gpu, shared):
    library.gpu(*gpu)
    problem = Problem(make_batch(kind), 16, 41, 3, shared)
    largest = int(problem.edges.crystal_ptr.diff().max())
    assert library.cuda_scratch_size(32, [16, 3, 41, 0, int(shared), 0, 0], largest, 1) > 0  # it fits no block
    problem.check()


@pytest.mark.parametrize(("width", "largest"), [(64, 119), (128, 53)])
def test_large_blocks_with_all_their_tiles(library, make_batch, width, largest):
    """119 rows of 128 on an H100 at width 64, 53 of 64 at 128, where a small block takes 64 and 32."""
    library.gpu(*H100)
    batch = make_batch("plain", seed=9)  # 5, 1, 17, 30, 2, 64 and 3 rows
    batch.crystal_ptr = torch.tensor([0, largest, 119, 122] if largest < 119 else [0, 119, 122], dtype=torch.int32)
    Problem(batch, width, 41, 2, True).check()


@pytest.mark.parametrize("memory", [42, 45])
def test_rows_that_are_joined_have_room(library, make_batch, memory):
    """Where those before have no distance they are as many as a block's memory holds, in whole tiles of 8."""
    library.gpu(1, memory << 10)
    batch = make_batch("many crystals")
    batch.distance, batch.sender = batch.distance[:0], batch.sender[:0]
    batch.row_ptr = torch.zeros_like(batch.row_ptr)
    Problem(batch, 16, 41, 1, True).check()


def test_bits_do_not_depend_on_what_else_is_in_the_batch(make_batch):
    batch = make_batch("plain", seed=8)
    problem = Problem(batch, 16, 41, 2, True)
    together = problem.found()
    for c, (first, end) in enumerate(zip(batch.crystal_ptr[:-1].tolist(), batch.crystal_ptr[1:].tolist(), strict=True)):
        if c in (0, 3, 5):
            begin, stop = batch.row_ptr[first], batch.row_ptr[end]
            index = torch.tensor([0, end - first], dtype=torch.int32)
            edges = problem.graph()
            alone = edges._replace(
                distance=edges.distance[begin:stop].clone(), sender=(edges.sender[begin:stop] - first).contiguous(),
                row_ptr=(edges.row_ptr[first : end + 1] - begin).contiguous(), crystal_ptr=index,
            )  # fmt: skip
            out = backend.stack(problem.h[first:end].float(), problem.float_layers(), alone)
            assert torch.equal(out, together[first:end])


@pytest.mark.parametrize("value", [-1, 10**6, "another crystal"])
@pytest.mark.parametrize("gpu", [H100, TINY], ids=["small", "large"])
def test_a_sender_outside_its_crystal_gives_nan_in_its_row_alone(library, make_batch, value, gpu):
    library.gpu(*gpu)
    problem = Problem(make_batch("plain"), 16, 41, 1, True)
    sound, graph = problem.found(), problem.graph()
    row = 30  # in a crystal of 30 rows
    graph.sender[graph.row_ptr[row] + 5] = 120 if value == "another crystal" else value
    out = problem.found(graph)
    others = torch.arange(len(out)) != row
    assert out[row].isnan().all() and torch.equal(out[others], sound[others])


@pytest.mark.parametrize("gpu", [H100, TINY], ids=["small", "large"])
def test_bad_pointers_give_nan(library, fenced, make_batch, gpu):
    library.gpu(*gpu)
    fenced.value = 0.0  # so that NaN is what a kernel wrote
    problem = Problem(make_batch("plain"), 16, 41, 1, True)
    sound, graph = problem.found(), problem.graph()
    row_ptr = graph.row_ptr.clone()
    row_ptr[30] = 10**6
    out = problem.found(graph._replace(row_ptr=row_ptr))
    others = (torch.arange(len(out)) != 29) & (torch.arange(len(out)) != 30)
    assert out[29:31].isnan().all() and torch.equal(out[others], sound[others])
    for at, value in ((3, 10**6), (0, 1), (-1, 5), (2, -7)):
        crystal_ptr = graph.crystal_ptr.clone()
        crystal_ptr[at] = value
        assert problem.found(graph._replace(crystal_ptr=crystal_ptr)).isnan().all()
    assert problem.found(graph._replace(crystal_ptr=graph.crystal_ptr[:1])).isnan().all()  # rows of no crystal


@pytest.mark.parametrize("gpu", [H100, TINY], ids=["small", "large"])
def test_rows_by_species(library, make_batch, gpu):
    library.gpu(*gpu)
    problem = Problem(make_batch("plain"), 12, 41, 2, True)
    species = torch.arange(len(problem.h), dtype=torch.int32) % 7
    table = problem.h[:7].float()
    problem.h = problem.h[:7][species.long()]
    expected = problem.check()
    assert torch.equal(backend.stack(table, problem.float_layers(), problem.graph(), species), expected)
    species[3] = 7
    out = backend.stack(table, problem.float_layers()[:1], problem.graph(), species)
    assert out[3].isnan().all() and not out[5:].isnan().any()  # a crystal of five rows


def test_the_gate_is_right_at_both_ends():
    """c for large c, exp(c) for very negative c, no overflow, no NaN."""
    ends = torch.tensor([-700.0, -80, -30, -10, -1, -1e-6, 0, 1e-6, 1, 30, 700], dtype=torch.float64)
    f, c = (x.reshape(-1) for x in torch.meshgrid(ends, ends, indexing="ij"))
    n, index = len(f), lambda *x: torch.tensor(x, dtype=torch.int32)
    zero, one = torch.zeros(2 * n), torch.ones(2 * n)
    layer = Layer(
        torch.zeros(2 * n, 2 * n + 1), None, zero, torch.cat([f, c]).float(), one[:n], zero[:n], zero, one, zero[:n],
        one[:n], 0.0, 0.0, False, False,
    )  # fmt: skip
    graph = Graph(torch.ones(1), None, index(0), index(0, 1), index(0, 1), None, None, None, 0.0, 0.2)
    start = torch.full((1, n), -200.0)  # softplus keeps what is small there
    out = backend.stack(start + 200, [layer], graph)[0].double()
    gate = torch.sigmoid(f.float().double()) * torch.nn.functional.softplus(c.float().double())
    expected = torch.nn.functional.softplus(gate)
    assert torch.isfinite(out).all()
    limit = torch.finfo(torch.float32).eps * (8 + f.abs() + c.abs())
    assert ((out - expected).abs() / expected < limit).all()


@pytest.mark.parametrize("gpu", [H100, TINY], ids=["from the table", "for each edge"])
def test_the_term_of_an_edge(library, gpu):
    library.gpu(*gpu)
    convolution.term_of_an_edge(lambda h, layer, graph: backend.stack(h, [layer], graph))


@pytest.mark.parametrize("scale", [1e-20, 1e-5, 1e5, 1e20])
def test_features_and_weights_of_any_size(make_batch, scale):
    """A row, and the weights of a channel, are two numbers of 16 bits in a unit of their own."""
    problem = Problem(make_batch("weighted", seed=7), 32, 41, 1, True)
    problem.h *= scale
    problem.layers[0][0][:, : 2 * 32] /= scale
    problem.check()


def test_tf32_is_used_where_it_is_allowed(make_batch, monkeypatch):
    problem = Problem(make_batch("weighted"), 32, 41, 1, True)
    exact = problem.expected(torch.float64)
    assert relative(problem.found(), exact) < 1e-6
    monkeypatch.setattr(backend, "_precision", lambda: "tf32")
    assert 1e-5 < relative(problem.found(), exact) < 1e-3


def test_an_error_of_cuda_is_raised(library, make_batch):
    problem = Problem(make_batch("isolated"), 16, 41, 1, True)
    library.fail_once()
    with pytest.raises(RuntimeError, match="CUDA: invalid value"):
        problem.found()


def test_an_error_of_cuda_is_raised_once(library, make_batch):
    """Not by the next launch, too."""
    problem = Problem(make_batch("isolated"), 16, 41, 1, True)
    library.gpu(4, 8 << 10)  # no room for a block
    with pytest.raises(RuntimeError, match="CUDA: invalid value"):
        problem.found()
    library.gpu(*H100)
    problem.check()


def test_a_batch_without_rows(make_batch):
    problem = Problem(make_batch("isolated"), 16, 41, 1, True)
    none = torch.zeros(0, dtype=torch.int32)
    graph = Graph(torch.zeros(0), None, none, none.new_zeros(1), none.new_zeros(1), None, None, None, 0.0, 0.2)
    assert backend.stack(torch.zeros(0, 16), problem.float_layers(), graph).shape == (0, 16)


def test_bad_input_is_refused(make_batch):
    problem = Problem(make_batch("isolated"), 16, 41, 1, True)
    h, layers, graph = problem.h.float(), problem.float_layers(), problem.graph()
    with pytest.raises(sf.InputError, match="sender must be a contiguous"):
        backend.stack(h, layers, graph._replace(sender=graph.sender.long()))
    with pytest.raises(sf.InputError, match="h must be a contiguous"):
        backend.stack(h[1:], layers, graph)
    with pytest.raises(sf.InputError, match="crystal_ptr must be a contiguous"):
        backend.stack(h, layers, graph._replace(crystal_ptr=graph.crystal_ptr.long()))
    with pytest.raises(sf.InputError, match="up to 128 features, not 129"):
        backend.stack(torch.zeros(len(h), 129), layers, graph)


def test_the_choice_of_a_backend(monkeypatch):
    """What a call on a CUDA tensor takes, on a machine that need not have a GPU."""
    like = lambda dtype=torch.float32, width=64: types.SimpleNamespace(  # noqa: E731
        device=torch.device("cuda"), dtype=dtype, shape=(5, width)
    )
    said: list[tuple[str, str]] = []
    monkeypatch.setattr(registry, "_say_once", lambda reason, instead="reference": said.append((reason, instead)))
    monkeypatch.setattr(registry, "triton_problem", lambda *_: None)
    monkeypatch.setattr(registry, "cuda_problem", lambda *_: None)
    assert registry.select(like(), inference=True) == "cuda"
    assert registry.select(like()) == "cuda" and registry.select(like(width=500)) == "cuda" and not said
    assert registry.select(like(width=129), inference=True) == "triton"
    assert "up to 128 features in inference, not 129" in said[-1][0] and said[-1][1] == "Triton"
    assert registry.select(like(torch.float64), inference=True) == "reference" and said[-1][1] == "reference"
    monkeypatch.setattr(registry, "cuda_problem", lambda *_: "the driver is too old")
    assert registry.select(like(), inference=True) == "triton" and said[-1] == ("the driver is too old", "Triton")
    said.clear()
    assert registry.select(like()) == "triton" and said[-1] == ("the driver is too old", "Triton")
    monkeypatch.setattr(registry, "triton_problem", lambda *_: "there is no Triton")
    assert registry.select(like(), inference=True) == "reference" and said[-1] == ("there is no Triton", "reference")
    monkeypatch.setattr(registry, "_require", lambda *_: None)
    monkeypatch.setenv("SRCGCNN_FAST_BACKEND", "cuda")
    with pytest.raises(sf.InputError, match="cannot take this input: the driver is too old"):
        registry.select(like(), inference=True)
    monkeypatch.setattr(registry, "cuda_problem", lambda *_: None)
    assert registry.select(like(), inference=True) == "cuda"
    assert registry.select(like()) == "cuda"
    with pytest.raises(sf.InputError, match="exist in the reference only"):
        registry.select(like(), edge_statistics_grad=True)


@pytest.mark.parametrize("index", [0, 1])
def test_launches_go_to_the_device_of_the_tensors_and_its_current_stream(monkeypatch, index):
    """Also where the thread's current device is another; on the CPU there is no stream."""
    entered: list[str] = []

    @contextlib.contextmanager
    def device(given):
        entered.append(f"enter {given}")
        yield
        entered.append("leave")

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 100 + index, raising=False)
    expected = [] if index == 1 else ["enter cuda:0"]
    with triton.launching(torch.device("cuda", index)) as stream:
        assert stream == 100 + index and entered == expected
    assert entered == expected + ["leave"] * len(expected)
    with triton.launching(torch.device("cpu")) as stream:
        assert stream == 0 and len(entered) == 2 * len(expected)


@pytest.mark.parametrize("features", [False, True])
def test_every_launch_goes_to_that_stream(library, make_batch, monkeypatch, features):
    """Those of large crystals, too, and what clears the findings."""
    library.gpu(*MIDDLE)
    problem, on = Problem(make_batch("plain"), 16, 41, 2, False, features=features), []
    monkeypatch.setattr(
        triton, "launching", lambda device: contextlib.nullcontext(0xABC0 + len(on.append(device) or on))
    )
    library.on_stream(0xABC1)
    before = library.launches()
    problem.found()
    assert on == [torch.device("cpu")]  # once for all layers
    memsets = 4 if features else 2  # findings, once a call of `prepare`, and counters, once a call of `stack`
    assert library.on_stream(0) == library.launches() - before + memsets > 5


@pytest.mark.parametrize("reads_out", [False, True], ids=["rows", "means"])
@pytest.mark.parametrize("given", [False, True], ids=["distance", "edge features"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_offsets_beyond_two_to_the_31(library, reads_out, given, half):
    """The last crystals of 2^24 rows and more, in a block and layer by layer, against the same crystals alone."""
    width, k, n, large = 128, 41, 45, 40  # a crystal that no block has room for, and one of five rows
    library.gpu(1 << 24, (68 if half else 104) << 10)  # so many blocks that each has one task
    rand = lambda *s: torch.rand(*s, generator=torch.Generator().manual_seed(3))  # noqa: E731
    index = lambda x: torch.as_tensor(x, dtype=torch.int32)  # noqa: E731
    sender = torch.where(
        torch.arange(3 * n) < 3 * large, torch.arange(3 * n) * 7 % large, large + torch.arange(3 * n) % 5
    )
    vectors = [rand(256), rand(256) + 0.5, rand(256) - 0.5, rand(128) + 0.5, rand(128) - 0.5, rand(256) - 0.5]
    vectors += [rand(256) + 0.5, rand(128) + 4, rand(128) * 20 + 5]
    weight, h, distance = (rand(256, 256 + k) - 0.5) / 3, rand(n, width) * 2, rand(3 * n) * 7 + 1
    term = (rand(3 * n, 2 * width) - 0.5).to(torch.bfloat16 if half else torch.float32)
    plan = [width, 1, k, 2 if half else 0, 1, 0, 0, *([width] if reads_out else [])]
    found = []
    for before, first in ((0, 0), (2**24 + 3, (2**23 if given else 2**24) + 1)):  # rows and edges before these
        rows, edges = before + n, first + 3 * n
        row_ptr = sparse(rows + 1, torch.int32)
        row_ptr[max(before - 100, 0) :] = first  # no row that is computed has all the edges before
        row_ptr[before:] = index(torch.arange(n + 1) * 3 + first)
        tensors = {
            "h": (h, rows), "distance": (distance, edges), "sender": (index(sender) + before, edges),
            "term": (term, edges), "weight": (torch.ones(n), rows),
        }  # fmt: skip
        far = {}
        for name, (x, size) in tensors.items():
            far[name] = sparse((size, *x.shape[1:]), x.dtype)
            far[name][-len(x) :] = x
        crystal_ptr = index(([0, before - 3] if before else []) + [before, before + large, rows])
        graph = [0 if given else far["distance"].data_ptr(), far["term"].data_ptr() if given else 0]
        graph += [x.data_ptr() for x in (far["sender"], row_ptr, crystal_ptr)]
        given_graph = (graph, (rows, edges, len(crystal_ptr) - 1, k), (0.0, 5.0))
        prepared = torch.zeros(library.cuda_prepared_size(width, plan))
        layer = [x.data_ptr() for x in (weight, *vectors)]
        library.cuda_prepare(width, prepared.data_ptr(), plan, [layer], [(1e-5, 1e-5)], [0, 0, 0], *given_graph, 0)
        scratch = sparse(library.cuda_scratch_size(width, plan, rows, len(crystal_ptr) - 1), torch.float32)
        out = sparse((len(crystal_ptr) - 1 if reads_out else rows, width), torch.float32)
        try:
            if before:
                library.only(last_blocks=3)  # of rows: 48; of crystals: these two, and one of three rows
            row_weight = far["weight"].data_ptr() if reads_out else 0
            library.cuda_stack(
                width, out.data_ptr(), scratch.data_ptr(), (far["h"].data_ptr(), 0, rows), row_weight,
                prepared.data_ptr(), plan, *given_graph, 0,
            )  # fmt: skip
        finally:
            library.only()
        found.append(out[-2 if reads_out else -n :].clone())
    assert found[0].abs().min() > 1e-3 and torch.equal(*found)


@pytest.fixture
def machine(monkeypatch):
    """machine(driver, built, image) pretends that there is a GPU, and says which CUDA it and the kernels have."""

    def pretend(driver: int, built: int, image: str = "") -> None:
        names = {"cuda": "nvcc 13.0", "threads": "OpenMP", "simd_level": lambda: "x86-64-v3"}
        facts = {"cuda_versions": lambda: (driver, built), "cuda_image_problem": lambda: image}
        monkeypatch.setattr(registry, "core", types.SimpleNamespace(**names, **facts))
        for name, value in (("is_available", True), ("current_device", 0), ("get_device_capability", (8, 6))):
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA RTX A4000")
        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
        registry._device_problem.cache_clear()

    monkeypatch.setattr(registry, "triton_problem", lambda *_: None)
    yield pretend
    registry._device_problem.cache_clear()


def test_a_driver_that_is_too_old_falls_back_to_triton_and_says_so(machine, monkeypatch):
    said: list[tuple[str, str]] = []
    monkeypatch.setattr(registry, "_say_once", lambda reason, instead="reference": said.append((reason, instead)))
    reason = (
        "the driver supports CUDA up to 12.4, but the kernels were built with 13.0; update the driver, or reinstall "
        "with an older CUDA toolkit"
    )
    machine(12040, 13000)
    like = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(5, 64))
    assert sf.backends()["cuda"].reason == reason and not sf.backends()["cuda"].available
    assert registry.select(like, inference=True) == "triton" and said == [(reason, "Triton")]
    assert not registry.trains_compiled(like)
    machine(13000, 12040)
    assert registry.cuda_problem() is None  # drivers take what older toolkits built
    machine(12040, 12090)
    assert registry.cuda_problem() is None  # and other minor versions


def test_kernels_that_were_not_built_for_the_gpu_say_how_to_build_them(machine):
    machine(13000, 13000, "no kernel image is available for execution on the device")
    assert sf.backends()["cuda"].reason == (
        "the kernels were not built for NVIDIA RTX A4000, sm_86 (no kernel image is available for execution on the "
        "device); reinstall with -C cmake.define.CMAKE_CUDA_ARCHITECTURES=86"
    )


def on_gpu(index: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(device=torch.device("cuda", index), dtype=torch.float32, shape=(5, 64))


def test_the_gpu_of_a_tensor_decides_not_the_current_one(machine, monkeypatch):
    """Of two, the first is too old for both backends."""
    monkeypatch.undo()
    machine(13000, 13000)
    capability, current = [(7, 5), (9, 0)], [0]

    @contextlib.contextmanager
    def device(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    monkeypatch.setattr(registry.core, "cuda_image_problem", lambda: "" if current[0] else "no kernel image")
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda k: capability[k])
    registry._triton_problem.cache_clear()
    for _ in range(2):
        assert registry.select(on_gpu(1), inference=True) == "cuda" and registry.trains_compiled(on_gpu(1))
        assert registry.select(on_gpu(0), inference=True) == "reference" and not registry.trains_compiled(on_gpu(0))
    assert "has 7.5" in registry.triton_problem() and "has 7.5" not in str(registry.triton_problem(1))
    with pytest.raises(sf.InputError, match="not built for NVIDIA"), sf.use_backend("cuda"):
        pass
    registry._triton_problem.cache_clear()


def test_an_error_that_passes_is_not_kept_and_leaves_the_other_backends_alone(machine, monkeypatch):
    machine(13000, 13000)

    def fails(*_):
        raise RuntimeError("CUDA: out of memory\nhere")

    with monkeypatch.context() as full:
        full.setattr(registry.core, "cuda_image_problem", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            registry.select(on_gpu(0), inference=True)
        assert sf.backends()["cuda"].reason == "CUDA does not start (CUDA: out of memory)"
    assert registry.cuda_problem() is None
    monkeypatch.setattr(torch.cuda, "current_device", fails)  # as in the child of a process that has used CUDA
    with sf.use_backend("reference"), sf.use_backend("cpu"):
        assert not sf.backends()["cuda"].available


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_backend_says_so():
    status = sf.backends()["cuda"]
    assert not status.available
    assert status.reason == ("torch sees no CUDA device" if status.built else registry.cuda_problem())
    with pytest.raises(sf.InputError, match="cannot run here"), sf.use_backend("cuda"):
        pass
