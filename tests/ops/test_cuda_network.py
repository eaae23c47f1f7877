"""Whole networks in the CUDA kernels, from atomic numbers to predictions, and their precisions, without a GPU.

As in test_cuda.py: the kernels' source on an emulation of CUDA, against the reference in float64.
"""

from __future__ import annotations

import copy
import math
import types
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from convolution import relative
from cuda_problem import A100, H100, KINDS_OF_WEIGHTS, MIDDLE, TINY, Problem
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import srcgcnn_fast as sf
from srcgcnn_fast import functional
from srcgcnn_fast.ops import cpu, cuda_conv, fused, reference, registry, triton
from srcgcnn_fast.ops import cuda as backend
from srcgcnn_fast.ops import library as library_of_operators
from srcgcnn_fast.ops.cpu import Graph
from srcgcnn_fast.ops.reference import Dense

pytestmark = pytest.mark.usefixtures("on_the_emulation")


class Whole:
    """A network on a batch of graphs, in float64: a table of elements of 7 numbers, convolutions, a readout."""

    def __init__(
        self, batch, width=16, n_steps=2, shared=True, sizes=(20, 1), features=False, by_species=True, n_elements=10
    ) -> None:
        self.convolutions = Problem(batch, width, 41, n_steps, shared, features)
        g = torch.Generator().manual_seed(len(sizes))
        self.rand = lambda *s: torch.rand(*s, generator=g, dtype=torch.float64)
        self.embedding = Dense(self.rand(width, 7), self.rand(width) - 0.5)
        n = len(self.convolutions.h)
        self.species = (torch.arange(n, dtype=torch.int32) * 7 % n_elements).contiguous() if by_species else None
        self.table = self.rand(n_elements if by_species else n, 7)
        ends = (width, *sizes)
        pairs = zip(ends, sizes, strict=False)
        self.readout = [Dense((self.rand(out, i) - 0.5) * 2 / math.sqrt(i), self.rand(out) - 0.5) for i, out in pairs]
        self.graph, self.weight = self.convolutions.graph(), batch.weight.float()

    def expected(self, dtype: torch.dtype) -> torch.Tensor:
        to = lambda layer: Dense(*(None if x is None else x.to(dtype) for x in layer))  # noqa: E731
        h = torch.nn.functional.linear(self.table.to(dtype), *to(self.embedding))
        self.convolutions.h = h if self.species is None else h[self.species.long()]
        rows = self.convolutions.expected(dtype)
        layers = [to(layer) for layer in self.readout]
        return reference.readout(rows, self.weight.to(dtype), self.graph.crystal_ptr, layers)

    def found(self, graph: Graph | None = None, species: torch.Tensor | None = None, weight=None) -> torch.Tensor:
        to = lambda layer: Dense(*(None if x is None else x.float() for x in layer))  # noqa: E731
        table, embedding = self.table.float(), to(self.embedding)
        species = self.species if species is None else species
        if species is None:
            table, embedding = torch.nn.functional.linear(table, *embedding), None
        return backend.network(
            table, species, embedding, self.convolutions.float_layers(), graph or self.graph,
            self.weight if weight is None else weight, [to(layer) for layer in self.readout],
        )  # fmt: skip

    def check(self) -> torch.Tensor:
        truth, ours = self.expected(torch.float64), self.found()
        assert relative(ours, truth) < 2 * relative(self.expected(torch.float32), truth) + 3e-7
        return ours


KINDS = ["plain", "weighted", "ragged", "one atom", "isolated", "no edges", "many crystals"]


@KINDS_OF_WEIGHTS
@pytest.mark.parametrize("cores", ["Hopper", "Ampere"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_network(library, make_batch, kind, shared, cores):
    library.tensor_cores(cores)
    seeds = range(20 if kind in ("one atom", "no edges") else 1)  # few numbers say little about roundings
    problems = [Whole(make_batch(kind, seed=3 + seed), shared=shared) for seed in seeds]
    truth, plain = (torch.cat([x.expected(dtype) for x in problems]) for dtype in (torch.float64, torch.float32))
    assert relative(torch.cat([x.found() for x in problems]), truth) < 2 * relative(plain, truth) + 3e-7


@pytest.mark.parametrize("sizes", [(), (1,), (33,), (40, 128, 31, 2), (1024, 5)], ids=str)
@pytest.mark.parametrize("gpu", [H100, TINY], ids=["in blocks", "layered"])
def test_readouts_of_any_shape(library, make_batch, gpu, sizes):
    """None: the crystals' vectors. The smallest blocks take the widest readout."""
    library.gpu(*gpu)
    Whole(make_batch("weighted"), n_steps=1, sizes=sizes).check()


def test_maps_without_bias(make_batch):
    problem = Whole(make_batch("weighted"), sizes=(40, 2))
    problem.readout = [Dense(layer.weight, None) for layer in problem.readout]
    problem.embedding = Dense(problem.embedding.weight, None)
    problem.check()


@pytest.mark.parametrize("width", [7, 64, 128])
def test_any_width(make_batch, width):
    Whole(make_batch("isolated", seed=5), width, sizes=(128, 1)).check()


def test_a_width_whose_rows_do_not_end_where_vectors_begin(library, make_batch):
    """122 rows of 65 numbers in the scratch, before what lanes read four at a time."""
    library.gpu(*MIDDLE)
    Whole(make_batch("plain"), 65, n_steps=1, sizes=()).check()


@pytest.mark.parametrize("descending", [False, True])
def test_a_table_of_more_elements_than_blocks(library, make_batch, descending):
    library.gpu(*H100, descending)
    Whole(make_batch("plain"), n_elements=300).check()


@KINDS_OF_WEIGHTS
def test_features_of_atoms_and_edges(make_batch, shared):
    Whole(make_batch("weighted"), shared=shared, by_species=False).check()
    Whole(make_batch("weighted"), shared=shared, features=True).check()


@KINDS_OF_WEIGHTS
@pytest.mark.parametrize("kind", ["one crystal", "plain"])
def test_crystals_too_large_for_a_block(library, make_batch, kind, shared):
    for gpu in (MIDDLE, TINY):
        library.gpu(*gpu)
        Whole(make_batch(kind), shared=shared).check()


@pytest.mark.parametrize("how", [0, 2], ids=["float32", "bfloat16"])
def test_bits_depend_neither_on_the_gpu_nor_on_the_rest_of_the_batch(library, make_batch, monkeypatch, how):
    with_precision(monkeypatch, how)
    batch = make_batch("weighted", seed=4)
    batch.distance[::2] = (batch.distance[::2] * 3).round() / 3
    problem = Whole(batch, 40, sizes=(40, 3))
    library.gpu(*H100)
    first = problem.found()
    for gpu, descending in ((H100, True), (A100, False), (MIDDLE, False), (TINY, True)):
        library.gpu(*gpu, descending)
        assert torch.equal(problem.found(), first)
    library.gpu(*MIDDLE)
    graph, c = problem.graph, 2  # of 40 rows
    rows = slice(*graph.crystal_ptr[c : c + 2].tolist())
    begin, stop = graph.row_ptr[rows.start], graph.row_ptr[rows.stop]
    alone = graph._replace(
        distance=graph.distance[begin:stop].clone(),
        sender=graph.sender[begin:stop] - rows.start,
        row_ptr=graph.row_ptr[rows.start : rows.stop + 1] - begin,
        crystal_ptr=graph.crystal_ptr[c : c + 2] - rows.start,
    )
    assert torch.equal(
        problem.found(alone, problem.species[rows].clone(), problem.weight[rows].clone()), first[c : c + 1]
    )


@pytest.mark.parametrize("gpu", [H100, MIDDLE, TINY], ids=["large blocks", "all", "layered"])
def test_crystals_without_rows(library, make_batch, gpu):
    """Between others and at both ends; they give what the CPU gives, and change nothing else."""
    library.gpu(*gpu)
    problem = Whole(make_batch("plain"), sizes=(20, 2))
    sound, at = problem.found(), torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 7, 7])
    out = problem.found(problem.graph._replace(crystal_ptr=problem.graph.crystal_ptr[at].contiguous()))
    filled = at.diff() > 0
    assert torch.equal(out[filled], sound)
    zero = torch.zeros(16)
    for layer in problem.readout:
        zero = torch.nn.functional.linear(torch.nn.functional.softplus(zero), *(x.float() for x in layer))
    torch.testing.assert_close(out[~filled], zero.expand(4, 2), rtol=1e-5, atol=1e-6)


def test_a_batch_without_rows_or_crystals(make_batch):
    problem = Whole(make_batch("isolated"), sizes=(20, 2))
    none = torch.zeros(0, dtype=torch.int32)
    for n_crystals in (0, 3):
        graph = Graph(
            torch.zeros(0), None, none, none.new_zeros(1), none.new_zeros(n_crystals + 1), *[None] * 3, 0.0, 0.2
        )
        out = problem.found(graph, none, torch.zeros(0))
        assert out.shape == (n_crystals, 2) and torch.isfinite(out).all()


@pytest.mark.parametrize("gpu", [H100, MIDDLE, TINY], ids=["large blocks", "all", "layered"])
def test_bad_indices_give_nan_in_their_crystal_alone(library, fenced, make_batch, gpu):
    library.gpu(*gpu)
    fenced.value = 0.0  # so that NaN is what a kernel wrote
    problem = Whole(make_batch("plain"))
    sound, graph = problem.found(), problem.graph
    others = torch.arange(len(sound)) != 3
    sender = graph.sender.clone()
    sender[graph.row_ptr[30] + 5] = 120  # of another crystal
    species = problem.species.clone()
    species[30] = 10
    for out in (problem.found(graph._replace(sender=sender)), problem.found(species=species)):
        assert out[3].isnan().all() and torch.equal(out[others], sound[others])
    for at, value in ((3, 10**6), (0, 1), (-1, 5), (2, -7)):
        crystal_ptr = graph.crystal_ptr.clone()
        crystal_ptr[at] = value
        assert problem.found(graph._replace(crystal_ptr=crystal_ptr)).isnan().all()


@pytest.mark.parametrize("how", [0, 2], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("gpu", [H100, TINY], ids=["in blocks", "layered"])
def test_an_atom_without_edges_whose_number_is_bad_gives_nan(library, make_batch, monkeypatch, gpu, how):
    """Nothing of its own [p, q] reaches it: its features themselves must be NaN."""
    library.gpu(*gpu)
    with_precision(monkeypatch, how)
    batch = make_batch("one crystal")
    batch.distance, batch.sender = batch.distance[:0], batch.sender[:0]
    batch.row_ptr = torch.zeros_like(batch.row_ptr)
    problem = Whole(batch)
    for value in (-1, 10):
        species = problem.species.clone()
        species[1] = value
        assert problem.found().isfinite().all() and problem.found(species=species).isnan().all()


def test_a_readout_that_takes_all_that_is_left_of_a_block(library, make_batch):
    """But how many rows the next crystals may have together, which follows from those before."""
    processors, words = 5, 5136
    library.gpu(processors, 4 * words + 1024)
    batch = make_batch("many crystals", seed=3)
    ends = batch.crystal_ptr[3:].tolist()
    third = max(end for end in ends if end <= int(batch.crystal_ptr[2]) + 16)
    fourth = max(end for end in ends if end <= third + 16)
    batch.crystal_ptr = torch.tensor([*batch.crystal_ptr[:3].tolist(), third, fourth, ends[-1]], dtype=torch.int32)
    Whole(batch, sizes=(1024, 1)).check()


def test_equal_rows_have_the_prediction_of_one(make_batch):
    """However many: plain sums in float32 drift, by 1e-5 for 10^4 rows."""
    problem, n = Whole(make_batch("one atom"), n_steps=1, sizes=(), by_species=False), 3_000
    problem.table = problem.table[:1].expand(n, 7)
    ends = torch.tensor([0, n - 1, n], dtype=torch.int32)
    none = torch.zeros(n + 1, dtype=torch.int32)
    problem.graph = problem.graph._replace(distance=torch.zeros(0), sender=none[:0], row_ptr=none, crystal_ptr=ends)
    many, one = problem.found(weight=torch.ones(n))
    assert one.any() and relative(many, one) < 3e-7


def test_a_bad_pointer_of_one_large_crystal_gives_nan(fenced, make_batch):
    """Which no block takes whole: its steps and its readout alone see the pointer."""
    fenced.value = 0.0
    problem = Whole(make_batch("one crystal"))
    bad = problem.graph._replace(crystal_ptr=torch.tensor([0, 149], dtype=torch.int32))
    assert problem.found().isfinite().all() and problem.found(bad).isnan().all()
    assert problem.convolutions.found(bad).isnan().all()


def with_precision(monkeypatch, how: int) -> None:
    monkeypatch.setattr(backend, "_precision", lambda: "tf32" if how else "tf32x3")
    monkeypatch.setattr(backend, "_storage", lambda: torch.bfloat16 if how == 2 else torch.float32)


@KINDS_OF_WEIGHTS
@pytest.mark.parametrize(("how", "least", "most"), [(1, 1e-5, 1e-3), (2, 1e-4, 1e-2)], ids=["tf32", "bfloat16"])
def test_less_exact_by_choice(library, make_batch, monkeypatch, how, least, most, shared):
    """Both within their digits, on all paths; a number that is stored twice, or read from the wrong place, is not."""
    with_precision(monkeypatch, how)
    for gpu, kind in ((H100, "weighted"), (MIDDLE, "plain"), (TINY, "ragged")):
        library.gpu(*gpu)
        problem = Problem(make_batch(kind), 32, 41, 2, shared)
        assert least < relative(problem.found(), problem.expected(torch.float64)) < most
    for whole in (
        Whole(make_batch("weighted"), 64, shared=shared, sizes=()),
        Whole(make_batch("weighted"), 7, features=True, sizes=()),
    ):
        assert relative(whole.found(), whole.expected(torch.float64)) < most


def test_the_precision_in_force_is_what_the_kernels_are_told(library, make_batch):
    problem, told = Whole(make_batch("isolated")), []
    for name in ("float32", "tf32", "bfloat16"):
        with sf.use_precision(name):
            problem.found()
            told.append(library.launched[3])
    assert told == [0, 1, 2]


@pytest.mark.parametrize("kind", ["weighted", "one crystal"])
@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
@pytest.mark.compiled
def test_models_arrive_at_the_kernels(make_batch, monkeypatch, model_type, kind):
    """By the way of a CUDA tensor from the model on, in place of the CPU's kernels."""
    torch.manual_seed(0)
    model = model_type(2, 32, 20, 2, n_targets=3)
    model.train()(make_batch("plain"))
    model.eval()
    batch, given = make_batch(kind), []

    class Parameters(backend.NetworkParameters):
        def run(self, *arguments):
            given.append((self, *arguments))
            return super().run(*arguments)

    monkeypatch.setattr(cpu, "NetworkParameters", Parameters)
    with torch.no_grad():
        found = model(batch)
        again = model(batch)
        with sf.use_backend("reference"):
            truth = copy.deepcopy(model).double()(batch.to(dtype=torch.float64))
    assert len(given) == 2 and given[0][2] is batch.numbers and given[0][0].embedding is not None
    assert given[0][0] is given[1][0] and torch.equal(again, found)  # laid out once
    assert relative(found, truth) < 1e-6


@pytest.mark.compiled
def test_vectors_of_crystals_by_the_network(make_batch, monkeypatch):
    """What a descriptor asks of it: no map after the mean."""
    model, batch = sf.SRCGCNN(2, 32).eval(), make_batch("weighted")
    with torch.no_grad():
        plain = model.features(batch)
        monkeypatch.setattr(fused, "takes_network", lambda *_: True)
        monkeypatch.setattr(cpu, "network", backend.network)  # of a readout without maps, which the CPU does not take
        found = model.features(batch)
    assert 0 < relative(found, plain) < 1e-6


@pytest.mark.parametrize(
    ("kind", "launches"), [("one atom", 2), ("plain", 2), ("many crystals", 8), ("one crystal", 5)]
)
def test_launches(library, make_batch, kind, launches):
    """Of one step: prepare; one size of blocks where every crystal may have a multiprocessor, two where not; a list,
    q, step and readout where there are more rows than the largest block takes; maps. What a captured graph replays."""
    library.gpu(132, 228 << 10)
    problem, before = Whole(make_batch(kind), n_steps=1), library.launches()
    problem.found()
    assert library.launches() - before == launches


class Blind(TorchDispatchMode):
    """Refuses to tell the host what a tensor holds."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        assert function._opname not in ("_local_scalar_dense", "nonzero", "equal", "_to_copy"), function
        return function(*arguments, **(options or {}))


@KINDS_OF_WEIGHTS
@pytest.mark.parametrize("features", [False, True])
def test_nothing_of_a_call_depends_on_values(make_batch, shared, features):
    """So that it neither waits for the GPU nor breaks a capture; the launchers could not wait in the emulation."""
    problem = Whole(make_batch("isolated"), shared=shared, features=features)
    to = lambda layer: Dense(*(x.float() for x in layer))  # noqa: E731
    given = (
        problem.table.float(), problem.species, to(problem.embedding), problem.convolutions.float_layers(),
        problem.graph, problem.weight, [to(layer) for layer in problem.readout],
    )  # fmt: skip
    with Blind():
        backend.network(*given)


def test_bad_input_is_refused(make_batch):
    problem = Whole(make_batch("isolated"), sizes=(20, 1))
    with pytest.raises(sf.InputError, match="row_weight must be a contiguous"):
        problem.found(weight=problem.weight[1:])
    with pytest.raises(sf.InputError, match="species must be a contiguous"):
        problem.found(species=problem.species.long())
    wide = Whole(make_batch("isolated"), sizes=(1025, 1))
    with pytest.raises(sf.InputError, match="The CUDA kernels take readouts up to 1024, not 1025"):
        wide.found()
    deep = Whole(make_batch("isolated"), sizes=(1,) * 17)
    with pytest.raises(sf.InputError, match="up to 16 layers of a readout, not 17"):
        deep.found()
    problem.readout[0] = Dense(problem.rand(20, 15), None)
    with pytest.raises(sf.InputError, match="readout's weight must be a contiguous"):
        problem.found()


def test_the_choice_for_a_network(make_batch, monkeypatch):
    """All at once where the kernels take it, part by part where not; on a machine that need not have a GPU."""

    def like(width):
        device, contiguous = torch.device("cuda"), lambda: True
        return types.SimpleNamespace(device=device, dtype=torch.float32, shape=(5, width), is_contiguous=contiguous)

    monkeypatch.setattr(registry, "triton_problem", lambda *_: None)
    monkeypatch.setattr(registry, "cuda_problem", lambda *_: None)
    assert registry.select(like(200), inference=True, width=64) == "cuda"
    assert registry.select(like(92), inference=True, width=129) == "triton"
    layer = Dense(torch.zeros(64, 92), None)
    for sizes, taken in (((128, 1), True), ((), True), ((1024, 1), True), ((1025, 1), False), ((8,) * 17, False)):
        readout = [Dense(torch.zeros(o, i), None) for i, o in zip((64, *sizes), sizes, strict=False)]
        assert fused.takes_network(like(92), layer, [None], readout) is taken
    assert not fused.takes_network(like(92), layer, [], [])
    assert not fused.takes_network(like(92), Dense(torch.zeros(92, 64).T, None), [None], [])


def fake_on_cuda(mode: FakeTensorMode, x: torch.Tensor) -> torch.Tensor:
    return FakeTensor(mode, x.detach().to("meta"), torch.device("cuda:0"))


class Exported(torch.nn.Module):
    """A model as a function of a batch's tensors, all of them on a GPU that need not be there."""

    def __init__(self, model: torch.nn.Module, mode: FakeTensorMode) -> None:
        super().__init__()
        self.model = model.eval()
        for module in model.modules():
            for name, x in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(fake_on_cuda(mode, x), requires_grad=False))
            for name, x in list(module.named_buffers(recurse=False)):
                setattr(module, name, fake_on_cuda(mode, x))

    def forward(self, *tensors):
        return self.model(sf.GraphBatch(*tensors))


@pytest.mark.parametrize(("model_type", "width"), [(sf.CGCNN, 20), (sf.SRCGCNN, 64)])
def test_an_exported_network_of_cuda_tensors_is_one_operator(make_batch, monkeypatch, model_type, width):
    monkeypatch.undo()
    monkeypatch.setattr(registry, "triton_problem", lambda *_: None)
    monkeypatch.setattr(registry, "cuda_problem", lambda *_: None)
    names = ("numbers", "weight", "sender", "distance", "row_ptr", "crystal_ptr", "atom_class")
    batch, mode = make_batch("weighted"), FakeTensorMode(allow_non_fake_inputs=True)
    given = tuple(fake_on_cuda(mode, getattr(batch, name)) for name in names)
    program = torch.export.export(Exported(model_type(2, width, n_targets=3), mode), given, strict=False)
    calls = [node for node in program.graph.nodes if "srcgcnn_fast" in str(node.target)]
    assert [str(node.target) for node in calls] == ["srcgcnn_fast.gated_conv_network.default"]
    out = next(node for node in program.graph.nodes if node.op == "output").args[0][0].meta["val"]
    assert out.device.type == "cuda" and out.shape == (batch.num_crystals, 3)


class Convolutions(torch.nn.Module):
    """The rows of a model after its convolutions."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model._convolve(*self.model._embed(batch), batch)[0]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
def test_dynamo_traces_cuda_tensors_without_a_break(make_batch, monkeypatch, model_type, training):
    """A whole network in inference, and the convolutions of one that trains, as CPU builds of torch trace no more."""
    monkeypatch.undo()
    for name in ("triton_problem", "cuda_problem"):
        answer = types.FunctionType((lambda _: None).__code__, {})
        answer._dynamo_marked_constant = True
        monkeypatch.setattr(registry, name, answer)
    torch._dynamo.reset()
    names = ("numbers", "weight", "sender", "distance", "row_ptr", "crystal_ptr", "atom_class")
    batch, mode, found = make_batch("weighted"), FakeTensorMode(allow_non_fake_inputs=True), []
    given = tuple(fake_on_cuda(mode, getattr(batch, name)) for name in names)
    model = Exported(model_type(2, 64), mode)
    if training:
        model.model = Convolutions(model.model.train())

    def seen(module, _inputs):
        found.extend(str(node.target) for node in module.graph.nodes if "srcgcnn_fast" in str(node.target))
        return module.forward

    with mode, torch.no_grad():
        out = torch.compile(model, fullgraph=True, dynamic=True, backend=seen)(*given)
    assert out.device.type == "cuda"
    operators = ["edge_moments", "gated_conv", "gated_conv"] if training else ["gated_conv_network"]
    assert [name.split("srcgcnn_fast.")[1].split("'")[0] for name in found] == operators


def parts(x: torch.Tensor, key):
    """``x[key]``, which a CPU build of torch has no such tensors for."""
    dim = 0
    for place in key if isinstance(key, tuple) else (key,):
        if isinstance(place, int):
            x = x.select(dim, place)
            continue
        x = x.unsqueeze(dim) if place is None else torch.ops.aten.slice(x, dim, place.start, place.stop)
        dim += 1
    return x


def forward_and_backward(function: type[torch.autograd.Function], constants: tuple, seen: list[str]):
    """Its ``apply``, which goes backward at once: autograd's engine needs the device."""

    def apply(*given):
        ctx = types.SimpleNamespace(set_materialize_grads=lambda _: None)
        ctx.save_for_backward = lambda *kept: setattr(ctx, "saved_tensors", kept)
        reals = [isinstance(x, torch.Tensor) and x.is_floating_point() for x in given]
        ctx.needs_input_grad = [
            real and all(x is not y for y in constants) for x, real in zip(given, reals, strict=True)
        ]
        out = function.forward(ctx, *given)
        gradients = function.backward(ctx, torch.empty_like(out))
        found = [None if g is None else (g.shape, g.dtype, g.device) for g in gradients]
        kinds = zip(given, ctx.needs_input_grad, strict=True)
        assert found == [(x.shape, x.dtype, x.device) if wanted else None for x, wanted in kinds], function
        seen.append(function.__name__)
        return out

    return staticmethod(apply)


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize(
    ("make", "at_once", "differentiates"),
    [
        (sf.CGCNN, True, {"_DeviceConvolutions"}),
        (sf.SRCGCNN, True, {"_DeviceConvolutions"}),
        (partial(sf.SRCGCNN, dropout=0.5), True, {"_DeviceConvolutions", "CrystalMean"}),
        (partial(sf.SRCGCNN, recurrent_layer_norm=True), False, {"_Lookup", "_DeviceConvolutions", "CrystalMean"}),
        (partial(sf.SRCGCNN, recurrent_learnable_alpha=True), False, {"_Lookup", "_DeviceConvolutions", "CrystalMean"}),
    ],
)
def test_whole_models_read_nothing_back_and_have_all_on_one_device(
    make_batch, monkeypatch, make, at_once, differentiates, features
):
    """Tensors that say they are on a GPU, and have no values, go through a model; no kernel is launched. What reads a
    value raises, and so does what joins tensors of two devices.
    """
    monkeypatch.undo()
    monkeypatch.setattr(FakeTensor, "__getitem__", parts)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    calls: list[str] = []

    class Native:
        def __getattr__(self, name):
            return lambda *_: calls.append(name) or (1 << 20 if name != "cuda_filter_at" else 0)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    batch = make_batch("weighted")
    names = ("numbers", "weight", "sender", "distance", "row_ptr", "crystal_ptr", "atom_class")
    tensors = {name: fake_on_cuda(mode, getattr(batch, name)) for name in names}
    if features:
        tensors["edge_features"] = fake_on_cuda(mode, torch.zeros(len(batch.sender), 41))
    given = sf.GraphBatch(**tensors)
    model = Exported(make(2, 64), mode).model
    for name in ("triton_problem", "cuda_problem"):
        monkeypatch.setattr(registry, name, lambda *_: None)
    for module in (backend, cuda_conv):
        monkeypatch.setattr(module, "native", Native)
    monkeypatch.setattr(triton, "launching", lambda device: nullcontext(0) if device.type == "cuda" else None)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda _: 16)
    monkeypatch.setattr(fused, "is_eager", lambda h, device="cpu": h.device.type == device)
    monkeypatch.setattr(fused, "_are_plain", lambda *_: True)
    monkeypatch.setattr(fused, "Tensor", FakeTensor)  # as which they pass for ordinary ones
    differentiated: list[str] = []
    constants = tuple(tensors.values())
    for function in (fused._DeviceConvolutions, fused._Lookup, fused.CrystalMean):
        monkeypatch.setattr(function, "apply", forward_and_backward(function, constants, differentiated))
    of_mean = fused._CrystalMeanBackward  # whose own gradient is the mean, and so on
    monkeypatch.setattr(of_mean, "apply", lambda *given: of_mean.forward(types.SimpleNamespace(), *given))
    with mode, torch.no_grad():
        out = model.predict(given)
        assert out.device.type == "cuda" and out.shape == (batch.num_crystals, 1)
        assert calls and ("cuda_stack" in calls) is at_once
        calls.clear(), differentiated.clear()
        out = model.train()(given)
        assert out.device.type == "cuda" and out.shape == (batch.num_crystals, 1)
    assert "cuda_conv" in calls and "cuda_stack" not in calls
    assert set(differentiated) == differentiates


@pytest.mark.parametrize("selected", ["cuda", "triton"])
def test_the_operator_of_a_network_calls_the_kernels_of_the_machine(make_batch, monkeypatch, selected):
    """A program may have been traced where there were others."""
    problem, told = Whole(make_batch("weighted")), []
    to = lambda layer: [x.float() for x in layer]  # noqa: E731
    monkeypatch.setattr(registry, "select", lambda _h, **how: told.append(how) or selected)
    monkeypatch.setattr(triton, "stack", backend.stack)  # whose own kernels are not tested here
    layers = problem.convolutions.float_layers()
    dense = [x for layer in (problem.embedding, *problem.readout) for x in to(layer)]
    lists = fused._lists(layers, True)
    given = problem.table.float(), problem.species, problem.weight, dense, *lists, *problem.graph
    found, expected = library_of_operators._network_cuda(*given), problem.found()
    assert told == [{"inference": True, "width": 16}]
    assert (torch.equal if selected == "cuda" else torch.allclose)(found, expected)


@pytest.mark.compiled
def test_a_network_that_is_not_taken_goes_part_by_part(make_batch, monkeypatch):
    model, batch = sf.SRCGCNN(2, 32).eval(), make_batch("weighted")
    called: list[int] = []
    monkeypatch.setattr(fused, "network", lambda *a: called.append(1))
    monkeypatch.setattr(fused, "network_parameters", lambda *a: None)
    with torch.no_grad():
        at_once = model(batch)
        monkeypatch.setattr(functional.registry, "select", lambda *a, **k: "reference")
        model(batch)
    assert at_once is None and called == [1]
