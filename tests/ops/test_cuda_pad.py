"""Batches copied into those of captured graphs by the kernel of csrc/cuda/pad.cu, without a GPU: as test_cuda.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cuda_problem import sparse

from srcgcnn_fast import capture
from srcgcnn_fast.capture import _FIELDS, StaticBatch, _fill, _sizes
from srcgcnn_fast.graph import GraphBatch
from srcgcnn_fast.ops import cuda, registry, triton

CPU = torch.device("cpu")
KINDS = ["plain", "weighted", "ragged", "isolated", "one atom", "no edges", "many crystals", "huge crystals"]


@pytest.fixture
def library(padding_library, monkeypatch):
    monkeypatch.setattr(capture, "_kernels", lambda device: padding_library)
    yield padding_library
    padding_library.end()
    padding_library.gpu(4, 228 << 10)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Tensors of the CPU say that they lie on a GPU."""
    monkeypatch.setattr(torch.Tensor, "get_device", lambda x: 0)


def with_features(batch: GraphBatch, atoms: bool, edges: bool) -> GraphBatch:
    if atoms:
        batch.atom_features = torch.rand(batch.num_rows, 5)
    if edges:
        batch.edge_features = torch.rand(batch.num_edges, 7)
    return batch


def poisoned(like: GraphBatch) -> StaticBatch:
    static = StaticBatch(like, CPU)
    static._there.fill_(-1)
    static._here.fill_(-1)
    return static


def check(static: StaticBatch, batch: GraphBatch) -> None:
    """Every bit, what lies between the fields too."""
    expected = poisoned(batch)
    _fill(expected.batch, batch)
    assert torch.equal(static._there, expected._there)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize(("atoms", "edges"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_one_launch_fills_a_batch_as_pytorch_does(library, on_a_gpu, make_batch, kind, atoms, edges, descending):
    batch = with_features(make_batch(kind, seed=3), atoms, edges)
    static, before = poisoned(batch), library.launches()
    library.gpu(3, 228 << 10, descending)
    static.fill(batch)
    assert library.launches() == before + 1
    check(static, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_the_cpu_is_put_together_there_and_sent_at_once(library, make_batch, kind):
    """And not before the batch of the call before has left the same place."""
    first, second = (with_features(make_batch(kind, seed=1), True, True) for _ in range(2))
    second.distance = second.distance + 1
    static, launches = poisoned(first), library.launches()
    static.fill(first)
    assert (static._there == -1).all()  # on its way
    static.fill(second)
    check(static, first)
    library.wait_for(static._way[3])
    check(static, second)
    assert library.launches() == launches


def test_what_is_on_its_way_ends_with_the_test(library, make_batch):
    """Later tests have other tensors in its place."""
    left, static = (poisoned(make_batch("plain")) for _ in range(2))
    left.fill(make_batch("plain"))
    library.end()
    for _ in range(2):  # the second waits for the first
        static.fill(make_batch("plain"))
    assert (left._there == -1).all() and not (static._there == -1).all()


@pytest.mark.parametrize("kind", ["plain", "weighted"])
def test_a_smaller_batch_leaves_nothing_of_a_larger_one(library, on_a_gpu, make_batch, kind):
    large = make_batch(kind)
    n = large.num_rows - 1
    e, static = int(large.row_ptr[n]), poisoned(large)
    assert _sizes(n, e, 1) != static._sizes  # it would have a graph of its own
    static.fill(large)
    small = GraphBatch(
        large.numbers[:n], large.weight[:n], large.sender[:e].clamp(max=n - 1), large.distance[:e],
        large.row_ptr[: n + 1], torch.tensor([0, n], dtype=torch.int32), large.atom_class,
    )  # fmt: skip
    static.fill(small)
    expected = poisoned(large)
    _fill(expected.batch, small)
    assert torch.equal(static._there, expected._there)


def spread(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x], 1)[:, 0]


@pytest.mark.parametrize(
    "change",
    [
        lambda b: {"distance": b.distance.double()},
        lambda b: {"numbers": b.numbers.long()},
        lambda b: {"weight": spread(b.weight)},
        lambda b: {"atom_features": spread(torch.rand(b.num_rows, 5, 1))[..., 0].T.contiguous().T},
    ],
    ids=["float64", "int64", "not contiguous", "features by columns"],
)
@pytest.mark.parametrize("is_on_a_gpu", [False, True])
def test_what_the_kernels_cannot_read_is_converted(library, monkeypatch, make_batch, change, is_on_a_gpu):
    batch = make_batch("weighted")
    batch = dataclasses.replace(batch, **change(batch))
    static, before = poisoned(batch), library.launches()
    if is_on_a_gpu:
        monkeypatch.setattr(torch.Tensor, "get_device", lambda x: 0)
    assert static._addresses(batch) is None
    static.fill(batch)
    assert library.launches() == before
    check(static, batch)


@pytest.mark.parametrize("field", ["weight", "distance", "row_ptr", "edge_features"])
def test_fields_of_other_sizes_reach_no_kernel(library, on_a_gpu, make_batch, field):
    batch = with_features(make_batch("plain"), True, True)
    static = poisoned(batch)
    assert static._addresses(batch) is not None
    assert static._addresses(dataclasses.replace(batch, **{field: getattr(batch, field)[:-1]})) is None
    assert static._addresses(make_batch("large")) is None


def test_launches_go_to_the_current_stream_and_errors_are_raised(library, on_a_gpu, make_batch, monkeypatch):
    monkeypatch.setattr(triton, "current_stream", lambda device: 0xABC1)
    batch = make_batch("plain")
    static = poisoned(batch)
    library.on_stream(0xABC1)
    static.fill(batch)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda x: -1)
    static.fill(batch)
    assert library.on_stream(0) == 2  # a launch, and a copy
    monkeypatch.setattr(torch.Tensor, "get_device", lambda x: 0)
    library.fail_once()
    with pytest.raises(RuntimeError, match="CUDA: invalid value"):
        static.fill(batch)


def test_offsets_beyond_two_to_the_31(library):
    """Features of 2^32 numbers; the last blocks alone run."""
    rows, to_rows, width = 2**20 - 64, 2**20, 2**12  # 64 rows are a round of all blocks
    source, target = (sparse((n, width), torch.float32) for n in (rows, to_rows))
    source[-1], target[rows:] = 7, 5
    library.only(2 * len(_FIELDS))
    try:
        library.cuda_pad(
            [0] * 6 + [source.data_ptr(), 0], [0] * 6 + [target.data_ptr(), 0],
            [rows, 0, 1, to_rows, 0, 2, width, 0, 0], 0,
        )  # fmt: skip
    finally:
        library.only()
    mine = slice(-2 * 256, None)
    assert (target[rows - 1, mine] == 7).all() and (target[rows - 1, : -2 * 256] == 0).all()
    assert (target[-1, mine] == 0).all() and (target[-1, : -2 * 256] == 5).all()


def test_the_kernels_serve_where_they_are_the_backend(monkeypatch):
    here = torch.device("cuda", 0)
    monkeypatch.setattr(registry, "cuda_problem", lambda *_: None)
    monkeypatch.setattr(cuda, "native", lambda: "kernels")
    assert capture._kernels(here) == "kernels" and capture._kernels(CPU) is None
    monkeypatch.setenv("SRCGCNN_FAST_BACKEND", "triton")
    assert capture._kernels(here) is None
    monkeypatch.setenv("SRCGCNN_FAST_BACKEND", "cuda")
    monkeypatch.setattr(registry, "cuda_problem", lambda *_: "no driver")
    assert capture._kernels(here) is None
