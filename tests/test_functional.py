"""The public operators: what they refuse, and how batch norm's state behaves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import srcgcnn_fast as sf
from srcgcnn_fast import functional
from srcgcnn_fast.functional import BatchNorm
from srcgcnn_fast.nn.conv import GatedConv
from srcgcnn_fast.ops import registry

BACKENDS = ["reference", "cpu"]


def plain_layer(conv: GatedConv, h: torch.Tensor, batch) -> torch.Tensor:
    """The layer with torch's own modules, on an unweighted graph."""
    mu = conv.dmin + conv.step * torch.arange(conv.fc_full.in_features - 2 * h.shape[1])
    e = torch.exp(-(((batch.distance[:, None] - mu) / conv.step) ** 2))
    receiver = batch.receiver
    y = conv.bn1(conv.fc_full(torch.cat([h[receiver], h[batch.sender.long()], e], 1)))
    f, c = y.chunk(2, 1)
    m = torch.zeros_like(h).index_add(0, receiver, torch.sigmoid(f) * nn.functional.softplus(c))
    return nn.functional.softplus(h + conv.bn2(m))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 0.7])
@pytest.mark.parametrize("width", [8, 16], ids=["wider in the kernels", "as wide"])
def test_batch_norm_behaves_as_users_of_torch_expect(backend, make_batch, momentum, width):
    """Training, running statistics by momentum, cumulative average, eval, statistics that are frozen or untracked."""
    torch.manual_seed(0)
    ours, theirs = GatedConv(width), GatedConv(width)
    theirs.load_state_dict(ours.state_dict())
    for conv in (ours, theirs):
        conv.bn1.momentum = conv.bn2.momentum = momentum
    for seed, mode in enumerate(["train", "train", "eval", "frozen bn1", "train", "untracked", "eval"]):
        batch = make_batch("plain", seed=seed)
        h = torch.rand(batch.num_rows, width)
        for conv in (ours, theirs):
            conv.train(mode != "eval")
            conv.bn1.train(mode in ("train", "untracked"))
            conv.bn1.track_running_stats = mode != "untracked"
        found = ours(h, batch)
        torch.testing.assert_close(found, plain_layer(theirs, h, batch), rtol=1e-5, atol=1e-5)
        assert found.is_contiguous()
        for (name, a), (_, b) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


KINDS = {
    "as the weights": lambda x: x,
    "float64": lambda x: x.double(),
    "strided": lambda x: torch.stack([x, x], 1)[:, 0],
}


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_running_statistics_of_any_kind_move(backend, make_batch, kind):
    """In the type they have, wherever they lie, and such that autograd knows."""
    torch.manual_seed(0)
    ours, theirs = GatedConv(16), GatedConv(16)
    theirs.load_state_dict(ours.state_dict())
    for norm in (ours.bn1, ours.bn2):
        norm.running_mean, norm.running_var = KINDS[kind](norm.running_mean), KINDS[kind](norm.running_var)
    batch, buffers = make_batch("plain"), list(ours.buffers())
    h, versions, kinds = torch.rand(batch.num_rows, 16), [x._version for x in buffers], [x.dtype for x in buffers]
    torch.testing.assert_close(ours(h, batch), plain_layer(theirs, h, batch), rtol=1e-5, atol=1e-5)
    for k, (found, expected) in enumerate(zip(ours.buffers(), theirs.buffers(), strict=True)):
        assert found is buffers[k] and found.dtype == kinds[k] and found._version > versions[k]
        torch.testing.assert_close(found.to(expected.dtype), expected, rtol=1e-5, atol=1e-6)
    if backend == "reference":  # torch's own norms evaluate with statistics of their type only
        return
    expected = plain_layer(theirs.eval(), h, batch)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(ours.eval()(h, batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.compiled
def test_running_statistics_of_whole_numbers_are_refused(make_batch):
    batch, conv = make_batch("plain"), GatedConv(16).eval()
    conv.bn2.running_var = conv.bn2.running_var.long()
    with pytest.raises(sf.InputError, match=r"var2 must be .* not torch\.int64"):
        conv(torch.rand(batch.num_rows, 16), batch)


@pytest.mark.compiled
def test_nothing_moves_where_a_layer_is_refused(make_batch):
    batch = make_batch("plain")
    layers = [sf.CGCNN(1, 16, 8).train()._layers()[0] for _ in range(2)]
    layers[1] = layers[1]._replace(bn2=layers[1].bn2._replace(running_var=torch.ones(15)))
    with pytest.raises(sf.InputError, match="running_var2 must be"):
        functional.stacked_gated_conv(torch.rand(batch.num_rows, 16), batch, layers)
    assert not any(norm.running_mean.any() for layer in layers for norm in layer[2:])


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_without_running_statistics(backend, make_batch):
    torch.manual_seed(0)
    batch, conv = make_batch("plain"), GatedConv(8).eval()
    conv.bn1, conv.bn2 = (nn.BatchNorm1d(k, track_running_stats=False).eval() for k in (16, 8))
    h = torch.rand(batch.num_rows, 8)
    torch.testing.assert_close(conv(h, batch), plain_layer(conv, h, batch), rtol=1e-5, atol=1e-5)


def test_norms_without_parameters_are_of_the_type_of_the_call(make_batch):
    torch.manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.float64):
        batch, conv = make_batch("plain").to(dtype=dtype), GatedConv(8).to(dtype).eval()
        conv.bn1, conv.bn2 = (nn.BatchNorm1d(k, affine=False, dtype=dtype).eval() for k in (16, 8))
        h = torch.rand(batch.num_rows, 8, dtype=dtype)
        torch.testing.assert_close(conv(h, batch), plain_layer(conv, h, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [sf.CGCNN, sf.SRCGCNN])
def test_a_model_without_running_statistics_infers_with_those_of_the_batch(make_batch, kind):
    torch.manual_seed(0)
    model, batch = kind(atom_fea_len=16, h_fea_len=8), make_batch("plain")
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if isinstance(norm, nn.BatchNorm1d):
                setattr(module, name, nn.BatchNorm1d(norm.num_features, track_running_stats=False))
    expected = model.eval()(batch)
    with torch.no_grad():
        torch.testing.assert_close(model(batch), expected)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_norms_that_cannot_run_are_refused(backend, make_batch):
    batch, weight, h = make_batch("plain"), torch.rand(32, 73), torch.rand(make_batch("plain").num_rows, 16)
    none, still = BatchNorm(None, None, None, None), BatchNorm(None, None, torch.zeros(16), torch.ones(16))
    moves = BatchNorm(None, None, torch.zeros(32), torch.ones(32), True, None)  # type: ignore[arg-type]
    dense = functional.Dense(torch.rand(16, 16), None)
    for norm, says in ((none, "without running statistics needs training=True"), (moves, "momentum must be a number")):
        layer = functional.ConvParameters(weight, None, norm, still)
        with torch.no_grad(), pytest.raises(sf.InputError, match=says):
            functional.stacked_gated_conv(h, batch, [layer])
        with torch.no_grad(), pytest.raises(sf.InputError, match=says):
            functional.network(h, batch, dense, [layer], [dense])


def test_inference_leaves_nothing_that_training_could_not_use(make_batch):
    """Ones and zeros in place of what norms lack are kept, and those made in inference mode serve training, too."""
    torch.manual_seed(0)
    conv = GatedConv(112)
    conv.bn1, conv.bn2 = (nn.BatchNorm1d(k, affine=False) for k in (224, 112))  # which no other test asks for
    batch = make_batch("plain")
    h = torch.rand(batch.num_rows, 112)
    with torch.inference_mode():
        conv.eval()(h, batch)
    batch.cache.clear()
    torch.testing.assert_close(conv.train()(h, batch), plain_layer(conv, h, batch), rtol=1e-5, atol=1e-5)
    conv(h, batch).sum().backward()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_weights_stand_for_copies(backend, make_batch):
    """A row of weight w counts as w atoms in both batch norms: two copies of a batch equal doubled weights."""
    torch.manual_seed(0)
    batch = make_batch("weighted", seed=1)
    heavier = batch.to()
    heavier.weight = 2 * batch.weight
    conv = GatedConv(8).train()
    h = torch.rand(batch.num_rows, 8)
    torch.testing.assert_close(conv(h, batch), conv(h, heavier), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_an_empty_batch(backend, empty_batch):
    conv = GatedConv(8).eval()
    assert conv(torch.zeros(0, 8), empty_batch).shape == (0, 8)
    with pytest.raises(sf.InputError, match="cannot train on a single"):
        conv.train()(torch.zeros(0, 8), empty_batch)


def test_single_atoms_train_only_with_company(make_batch):
    batch = make_batch("one atom")
    conv = GatedConv(8).train()
    with pytest.raises(sf.InputError, match="single atom or edge"):
        conv(torch.rand(1, 8), batch)
    batch.weight.fill_(4)  # four equivalent atoms: their statistics exist
    assert torch.isfinite(conv(torch.rand(1, 8), batch)).all()
    integers = {"numbers": [8, 9], "sender": [1], "row_ptr": [0, 1, 1], "crystal_ptr": [0, 2], "atom_class": [0, 1]}
    fields = {name: torch.tensor(values, dtype=torch.int32) for name, values in integers.items()}
    fields |= {"distance": torch.tensor([2.0]), "weight": torch.tensor([1.0, 5.0])}  # no edge into the heavier row
    with pytest.raises(sf.InputError, match="single atom or edge"):
        conv(torch.rand(2, 8), sf.GraphBatch(**fields))
    fields["weight"] = fields["weight"].flip(0)
    assert torch.isfinite(conv(torch.rand(2, 8), sf.GraphBatch(**fields))).all()
    assert all(torch.isfinite(x).all() for x in conv.buffers())


@pytest.mark.parametrize(
    ("h", "weight", "says"),
    [
        ((5, 8), (16, 57), "atom_fea must be"),
        ((None, 8), (16, 16), "weight must be"),
        ((None, 8), (8, 57), "weight must"),
    ],
)
def test_shapes_that_do_not_fit(make_batch, h, weight, says):
    batch = make_batch("plain")
    bn1, bn2 = (BatchNorm(None, None, torch.zeros(k), torch.ones(k)) for k in (16, 8))
    with pytest.raises(sf.InputError, match=says):
        functional.gated_conv(torch.rand(h[0] or batch.num_rows, h[1]), batch, torch.rand(*weight), None, bn1, bn2)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_numbers_of_rows_steps_and_gates_that_do_not_fit(backend, make_batch):
    batch, n = make_batch("plain"), make_batch("plain").num_rows
    h, weight, rows = torch.rand(n, 8), torch.rand(16, 57), functional.Dense
    norm1, norm2 = (BatchNorm(torch.ones(c), torch.zeros(c), torch.zeros(c), torch.ones(c)) for c in (16, 8))
    for wrong in (torch.rand(n - 1, 8), torch.rand(n + 1, 8), torch.rand(n)):
        with pytest.raises(sf.InputError, match=f"N = {n} rows of the batch"):
            functional.crystal_mean(wrong, batch)
    for steps, alpha, says in ((3, None, "not 2, 3 and no gates"), (2, torch.zeros(5), r"gates of shape \(5,\)")):
        with pytest.raises(sf.InputError, match=says):
            functional.recurrent_gated_conv(h, batch, weight, None, [norm1] * 2, [norm2] * steps, alpha=alpha)
    layer = functional.ConvParameters(weight, None, norm1, norm2)
    for embedding, readout, says in (
        (rows(torch.rand(8, 4), None), [], "takes 4 features, but is given 8"),
        (rows(torch.rand(8, 8), torch.rand(3)), [], r"to 8 features has a bias of shape \(3,\)"),
        (rows(torch.rand(8, 8), None), [rows(torch.rand(3, 8), torch.rand(4))], "bias"),
    ):
        with pytest.raises(sf.InputError, match=says):
            functional.network(h, batch, embedding, [layer], readout)


def test_edge_features_of_another_width(make_batch):
    batch = make_batch("plain")
    batch.edge_features = torch.rand(batch.num_edges, 7)
    with pytest.raises(sf.InputError, match="7 edge features"):
        GatedConv(8)(torch.rand(batch.num_rows, 8), batch)


def test_autocast_computes_in_float32(make_batch):
    torch.manual_seed(0)
    batch, model = make_batch("plain"), sf.SRCGCNN(atom_fea_len=8, h_fea_len=8).eval()
    plain = model.features(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model.features(batch)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, plain, rtol=2e-2, atol=2e-2)  # the embedding ran in bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_autocast_leaves_models_of_other_types_theirs(make_batch, dtype):
    torch.manual_seed(0)
    batch, model = make_batch("plain"), sf.SRCGCNN(atom_fea_len=8, h_fea_len=8).to(dtype).eval()
    plain = model.features(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model.features(batch)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed, plain, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("h", "weight"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_features_and_weights_of_two_types_are_refused(backend, make_batch, h, weight, training):
    """The kernels took one type from the one and read the other's memory as such."""
    batch = make_batch("plain")
    conv = GatedConv(16).to(weight).train(training)
    with pytest.raises(sf.InputError, match="convert one to the other's type"):
        conv(torch.rand(batch.num_rows, 16, dtype=h), batch)


def test_half_precision_counts_beyond_its_largest_number(make_batch):
    """A batch of 100 000 edges: sums of float16 end at 65 504."""
    torch.manual_seed(0)
    batch, conv = make_batch("large"), GatedConv(8)
    h = torch.rand(batch.num_rows, 8)
    half = GatedConv(8).half()
    half.load_state_dict(conv.state_dict())
    assert batch.num_edges > 65_504
    torch.testing.assert_close(half(h.half(), batch).float(), conv(h, batch), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(half.bn1.running_var.float(), conv.bn1.running_var, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("training", [False, True])
def test_tracing_is_refused(make_batch, training):
    """A trace would hold what the kernels computed for its example."""
    batch, model = make_batch("plain"), sf.CGCNN(1, 8, 8).train(training)
    with torch.no_grad():
        model(batch)
        with pytest.raises(sf.InputError, match=r"torch\.export"):
            torch.jit.trace(lambda distance: model(replace(batch, distance=distance)), batch.distance)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("training", [False, True])
def test_what_a_batch_keeps_is_of_one_basis_and_type(backend, make_batch, training):
    torch.manual_seed(0)
    shared, bases = make_batch("plain"), ({}, {"dmin": 0.5}, {"step": 0.3}, {"nbr_fea_len": 30})
    convs = [*(GatedConv(8, **basis) for basis in bases), GatedConv(8).double()]
    for conv in convs:
        conv.train(training)
        h = torch.rand(shared.num_rows, 8, dtype=conv.fc_full.weight.dtype)
        torch.testing.assert_close(conv(h, shared), conv(h, make_batch("plain")))


def test_a_stack_has_a_layer(make_batch):
    batch = make_batch("plain")
    with pytest.raises(sf.InputError, match="at least one"):
        functional.stacked_gated_conv(torch.rand(batch.num_rows, 8), batch, [])


def test_a_forced_backend_never_falls_back(make_batch):
    with pytest.raises(sf.InputError, match="There is no backend 'fast'"), sf.use_backend("fast"):
        pass
    unavailable = next(name for name, status in sf.backends().items() if not status.available)
    with pytest.raises(sf.InputError, match="cannot run here"), sf.use_backend(unavailable):
        pass
    if sf.backends()["cpu"].available:
        conv, batch = GatedConv(8).half(), make_batch("plain")
        with sf.use_backend("cpu"), pytest.raises(sf.InputError, match=r"float32 and float64, not torch\.float16"):
            conv.eval()(torch.rand(batch.num_rows, 8).half(), batch)


def test_a_backend_that_is_forced_within_another():
    with sf.use_backend("reference"):
        with sf.use_backend("reference"):
            pass
        assert registry.forced_backend() == "reference"


def test_environment_forces_a_backend(monkeypatch, make_batch):
    batch, conv = make_batch("plain"), GatedConv(8).eval()
    monkeypatch.setenv("SRCGCNN_FAST_BACKEND", "nonsense")
    with pytest.raises(sf.InputError, match="nonsense"):
        conv(torch.rand(batch.num_rows, 8), batch)


def test_gradient_accumulation(make_batch):
    torch.manual_seed(0)
    model, batches = sf.CGCNN(2, atom_fea_len=8, h_fea_len=8), [make_batch("plain", seed=s) for s in (1, 2)]
    single = []
    for batch in batches:
        model.zero_grad()
        model(batch).sum().backward()
        single.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    for batch in batches:
        model(batch).sum().backward()
    for p, a, b in zip(model.parameters(), *single, strict=True):
        torch.testing.assert_close(p.grad, a + b, rtol=1e-4, atol=1e-5)
