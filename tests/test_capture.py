"""Padding of batches to the sizes that CUDA graphs are captured for; the graphs themselves are in tests/gpu."""

from __future__ import annotations

import contextlib
import gc
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import srcgcnn_fast as sf
from srcgcnn_fast import capture
from srcgcnn_fast.capture import CapturedModel, StaticBatch, _fill, _next_size, sizes
from srcgcnn_fast.ops import fused, triton

CPU = torch.device("cpu")


def test_sizes_are_few_and_hold_what_they_must(make_batch):
    assert [_next_size(n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 64, 65, 96, 97)] == [
        1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 16, 64, 96, 96, 128,
    ]  # fmt: skip
    for kind in ("plain", "weighted", "no edges", "one crystal"):
        batch = make_batch(kind)
        rows, edges, crystals = sizes(batch)
        assert batch.num_rows < rows < 1.5 * batch.num_rows + 3 and batch.num_crystals < crystals
        assert batch.num_edges <= edges <= rows * (batch.num_edges / batch.num_rows + 1)
    for n, e in ((4095, 164_000), (4095, 4095 * 12), (65_535, 65_535 * 40 + 3), (7, 50), (1, 3), (0, 0), (100, 0)):
        for parts in (2, 8):
            rows, edges, _ = capture._sizes(n, e, 1, parts)
            assert n < rows and e <= edges and edges - e <= 5 * (rows - n) * (edges // rows)


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
@pytest.mark.parametrize("kind", ["plain", "weighted", "ragged", "isolated", "one atom", "no edges"])
def test_padding_changes_no_prediction(make_batch, kind, model_type, features):
    torch.manual_seed(0)
    model = model_type(atom_fea_len=16, orig_atom_fea_len=5 if features else 92, nbr_fea_len=7 if features else 41)
    batch = make_batch(kind)
    if features:
        batch.atom_features = torch.rand(batch.num_rows, 5)
        batch.edge_features = torch.rand(batch.num_edges, 7)
    static = StaticBatch(batch, CPU)
    static.fill(batch)
    assert (static.batch.num_rows, static.batch.num_edges, static.batch.num_crystals) == sizes(batch)
    with torch.no_grad():
        expected, found = model.eval()(batch), model(static.batch)
    assert found.isfinite().all()
    torch.testing.assert_close(found[: batch.num_crystals], expected, rtol=2e-5, atol=2e-6)


def test_nothing_is_left_of_the_batch_before(make_batch):
    model = sf.SRCGCNN(atom_fea_len=16).eval()
    large, small = make_batch("plain", seed=1), make_batch("one atom", seed=2)
    with torch.device("meta"):
        static = StaticBatch(large, CPU)
    with torch.no_grad():
        static.fill(large)
        static.fill(small)
        found = model(static.batch)
        static.batch.cache.clear()
        static.fill(large)
        torch.testing.assert_close(model(static.batch)[: large.num_crystals], model(large), rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(found[:1], model(small), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["plain", "ragged", "one atom", "no edges"])
def test_a_batch_on_the_device_is_padded_as_one_on_the_cpu(make_batch, kind):
    batch = make_batch(kind)
    ours, on_device = StaticBatch(batch, CPU), StaticBatch(batch, CPU)
    on_device._there.fill_(-1)
    ours.fill(batch)
    _fill(on_device.batch, batch)
    for name in ("numbers", "weight", "sender", "distance", "row_ptr", "crystal_ptr"):
        assert torch.equal(getattr(ours.batch, name), getattr(on_device.batch, name)), name


def test_no_two_parts_of_a_static_batch_share_memory(make_batch):
    static = StaticBatch(make_batch("plain"), CPU)
    fields = ("numbers", "weight", "sender", "distance", "row_ptr", "crystal_ptr")
    for k, name in enumerate(fields):
        getattr(static.batch, name).fill_(k + 1)
    for k, name in enumerate(fields):
        assert (getattr(static.batch, name) == k + 1).all()
        assert getattr(static.batch, name).data_ptr() % 64 == 0


def test_a_model_on_the_cpu_is_refused():
    with pytest.raises(sf.InputError, match=r"needs a model on a CUDA device, not on cpu; call model\.predict"):
        CapturedModel(sf.SRCGCNN())


def test_a_model_of_float64_is_refused(replayed):
    with pytest.raises(sf.InputError, match=r"the model is float64; call model\.predict"):
        CapturedModel(sf.SRCGCNN().double())


@pytest.fixture
def replayed(monkeypatch) -> list[int]:
    """Graphs on the CPU: a replay computes anew into the same memory. Holds how many were captured."""
    captured = [0]

    def recorded(run):
        captured[0] += 1
        out = run()
        return torch.inference_mode()(lambda: out.copy_(run())), out

    monkeypatch.setattr(capture, "_DEVICE", "cpu")
    monkeypatch.setattr(capture, "_recorded", recorded)
    return captured


def model_with_units(model_type=sf.SRCGCNN, **options):
    torch.manual_seed(0)
    model = model_type(atom_fea_len=16, **options).eval()
    n = len(model.metadata.std)
    model.metadata.std, model.metadata.mean = tuple(1.1 + k for k in range(n)), tuple(-3.7 * k - 1 for k in range(n))
    return model


@pytest.mark.parametrize("options", [{}, {"n_targets": 3}, {"classification": True}], ids=["one", "three", "classes"])
@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
def test_calls_give_what_predict_gives(replayed, make_batch, model_type, options):
    """In the targets' units, in memory that no later call writes, with a graph for each size alone."""
    model = model_with_units(model_type, **options)
    captured, kept = CapturedModel(model), []
    for kind, seed in (("plain", 1), ("one atom", 0), ("plain", 2), ("one atom", 3), ("weighted", 1), ("plain", 3)):
        batch = make_batch(kind, seed)
        with torch.no_grad():
            kept.append((captured(batch), model.predict(batch)))
        assert not kept[-1][0].requires_grad
    for found, expected in kept:
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)
    assert replayed == [3]


def test_units_and_weights_are_those_of_the_moment(replayed, make_batch):
    model, batch = model_with_units(), make_batch("weighted")
    captured = CapturedModel(model)
    captured(batch)
    with torch.no_grad():
        model.fc_out.bias += 1
        model.metadata.std = (7.5,)
        torch.testing.assert_close(captured(batch), model.predict(batch), rtol=2e-5, atol=2e-6)
        model.metadata.mean = (-2.5,)
        torch.testing.assert_close(captured(batch), model.predict(batch), rtol=2e-5, atol=2e-6)
        with torch.inference_mode():
            torch.testing.assert_close(captured(batch), model.predict(batch), rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(captured(batch), model.predict(batch).detach(), rtol=2e-5, atol=2e-6)
    assert replayed == [1]
    model.metadata.std, model.metadata.mean = (1.0, 2.0), (0.0, 0.0)
    with pytest.raises(sf.InputError, match="The metadata has 2 targets for 1 outputs"):
        captured(batch)
    with pytest.raises(sf.InputError, match="A captured model predicts only"):
        CapturedModel(model.train())(batch)


def test_a_model_that_moved_is_refused(replayed, make_batch):
    """Its graphs would read memory that is not its own any more."""
    model, batch = model_with_units(), make_batch("plain")
    captured = CapturedModel(model)
    captured(batch)
    model.load_state_dict(model.state_dict())  # in place
    captured(batch)
    with pytest.raises(sf.InputError, match="has moved, and its CUDA graphs have not; make a new CapturedModel"):
        model.double() and captured(batch)
    model = model_with_units()
    captured, held = CapturedModel(model), model.fc_out  # which is kept, or another may take its place in memory
    model.fc_out = torch.nn.Linear(*held.weight.shape[::-1])
    with pytest.raises(sf.InputError, match="has moved, and its CUDA graphs have not"):
        captured(batch)


def test_the_last_graphs_are_kept(replayed, monkeypatch, make_batch):
    monkeypatch.setattr(capture, "_MOST_GRAPHS", 2)
    captured = CapturedModel(model_with_units())
    for kind in ("plain", "one atom", "plain", "weighted", "plain"):  # the third keeps the first one's
        captured(make_batch(kind))
    assert replayed == [3] and len(captured._graphs) == 2
    captured(make_batch("one atom"))
    assert replayed == [4]


def test_batches_with_features_have_graphs_of_their_own(replayed, make_batch):
    model = model_with_units(orig_atom_fea_len=92)
    captured, batch = CapturedModel(model), make_batch("plain")
    with torch.no_grad():
        for features in (None, torch.rand(batch.num_rows, 92), None):
            batch.atom_features = features
            torch.testing.assert_close(captured(batch), model.predict(batch), rtol=2e-5, atol=2e-6)
    assert replayed == [2]


def test_a_capture_does_not_take_on_the_callers_modes(replayed, monkeypatch, make_batch):
    """Else a later capture fails in some versions of PyTorch, and weights that autocast converted are those of then."""
    recorded, modes = capture._recorded, []

    def watched(run):
        modes.append((torch.is_inference_mode_enabled(), torch.is_autocast_cache_enabled(), gc.isenabled()))
        return recorded(run)

    monkeypatch.setattr(capture, "_recorded", watched)
    captured = CapturedModel(model_with_units())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        captured(make_batch("plain"))
        assert torch.is_inference_mode_enabled() and torch.is_autocast_cache_enabled() and gc.isenabled()
    assert modes == [(False, False, False)]


def test_threads_take_turns(replayed, monkeypatch, make_batch):
    recorded, model = capture._recorded, model_with_units()

    def slow(run):
        replay, out = recorded(run)
        return lambda: (time.sleep(0.02), replay()), out

    monkeypatch.setattr(capture, "_recorded", slow)
    captured, batches = CapturedModel(model), [make_batch("plain", seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(captured, batches))
    for x, batch in zip(found, batches, strict=True):
        torch.testing.assert_close(x, model.predict(batch).detach(), rtol=2e-5, atol=2e-6)
    assert replayed == [1]


def test_another_stream_waits_for_the_one_before(replayed, monkeypatch, make_batch):
    """Whose graph may still read its batch; and the memory of all is given back when it is done."""
    batches, said = [make_batch(kind) for kind in ("plain", "one atom")], []
    stream = types.SimpleNamespace(
        wait_stream=lambda other: said.append(("waits for", other)), synchronize=lambda: said.append("ends")
    )
    captured = CapturedModel(model_with_units())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    captured(batches[0])
    assert said == []
    monkeypatch.setattr(triton, "current_stream", lambda _: 7)
    for batch in batches:
        captured(batch)
    assert said == [("waits for", None)]
    del captured
    gc.collect()  # these replays hold it
    assert said[1:] == ["ends"]


class Pretended:
    """CUDA's streams and graphs: says what was done, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[object] = []
        names = ("current", "aside", "stream")
        self.streams = [types.SimpleNamespace(name=name, wait_stream=self.wait(name)) for name in names]
        graph = types.SimpleNamespace(replay=lambda: None, pool=lambda: "pool")
        for name, function in (
            ("current_stream", lambda: self.streams[0]), ("stream", lambda x: self.enter(x.name)),
            ("CUDAGraph", lambda: graph), ("graph", lambda _, **how: self.enter("capture", how)),
            ("get_rng_state", lambda: "random"), ("set_rng_state", self.said.append),
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, function)

    def wait(self, name: str):
        return lambda other: self.said.append(f"{name} waits for {other.name}")

    @contextlib.contextmanager
    def enter(self, *what: object):
        self.said += what
        yield
        self.said.append("done")


def test_graphs_are_captured_on_a_stream_that_nothing_ran_on(monkeypatch):
    """Both of a training step on one, whose memory they share; what runs before draws no random numbers."""
    cuda, weight = Pretended(monkeypatch), torch.ones(3, requires_grad=True)
    how = {"stream": cuda.streams[2], "capture_error_mode": "thread_local"}
    around = ["aside waits for current", "aside", "run", "run", "done", "current waits for aside"]

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        cuda.said.append("run")
        return 2 * weight, [weight]

    _, out = capture._recorded(lambda: run()[0], *cuda.streams[1:])
    assert cuda.said == [*around, "capture", how, "run", "done"] and torch.equal(out, torch.full((3,), 2.0))
    cuda.said.clear()
    _, out, _, upstream, gradients = capture._recorded_training(run, *cuda.streams[1:])
    assert cuda.said == [
        *around, "random", "capture", how, "run", "done", "capture", {"pool": "pool", **how}, "done",
    ]  # fmt: skip
    assert not out.requires_grad and out.shape == upstream.shape == gradients[0].shape


def test_ones_and_zeros_that_are_kept_serve_a_capture(monkeypatch):
    """Where each would be a launch more at every replay."""
    key = 3, torch.float32, torch.device("cuda", 0)
    monkeypatch.setitem(fused._kept_constants, key, (torch.ones(3), torch.zeros(3)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert fused._constants(*key) is fused._kept_constants[key]
