"""What people do to a model beside calling it: export, transforms, several processes."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.fx.experimental import _config

import srcgcnn_fast as sf
from srcgcnn_fast.errors import InputError
from srcgcnn_fast.graph import GraphBatch
from srcgcnn_fast.ops import registry

FIELDS = ("numbers", "weight", "sender", "distance", "row_ptr", "crystal_ptr", "atom_class")
MODELS = [sf.CGCNN, sf.SRCGCNN]


class OnTensors(nn.Module):
    """A model as a function of tensors, which is what an exported program takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors):
        return self.model(GraphBatch(*tensors))


def tensors(batch: GraphBatch) -> tuple[torch.Tensor, ...]:
    return tuple(getattr(batch, name) for name in FIELDS)


UNBOUND = {"backed_size_oblivious": True} if hasattr(_config, "backed_size_oblivious") else {}
ALONE = ["one crystal", "one atom"] if UNBOUND else []  # which programs refuse otherwise
WORKAROUND = {"check_guards": False} if torch.__version__.startswith("2.9.") else {}  # a NameError of that version
EXPORTED = f"""
        run = torch.export.load(sys.argv[1]).module(**{WORKAROUND})
"""
COMPILED = """
        run = torch._inductor.aoti_load_package(sys.argv[1])
"""


def in_parts(*sizes, **widths):
    """A model whose convolutions are operators of their own, between which others stand."""
    return sf.SRCGCNN(*sizes, recurrent_layer_norm=True, recurrent_learnable_alpha=True, **widths)


def exported(model, batch):
    dynamic = (tuple({0: torch.export.Dim.AUTO} for _ in FIELDS),)
    with _config.patch(**UNBOUND):
        return torch.export.export(OnTensors(model), tensors(batch), dynamic_shapes=dynamic)


@pytest.mark.parametrize(("model_type", "trains"), [(in_parts, False), (sf.CGCNN, True)])
def test_a_program_takes_other_numbers_of_rows_and_crystals(model_type, trains, make_batch):
    model = model_type(2, atom_fea_len=16, h_fea_len=8).eval().requires_grad_(trains)
    program = exported(model, make_batch("plain"))
    for kind in ("plain", "weighted", "many crystals", *ALONE):
        batch = make_batch(kind, seed=1)
        torch.testing.assert_close(program.module(**WORKAROUND)(*tensors(batch)), model(batch))


@pytest.mark.parametrize(
    ("model_type", "load"),
    [
        pytest.param(sf.SRCGCNN, EXPORTED, id="exported SR-CGCNN"),
        pytest.param(sf.CGCNN, EXPORTED, id="exported CGCNN", marks=pytest.mark.slow),
        pytest.param(in_parts, COMPILED, id="ahead of time SR-CGCNN in parts", marks=pytest.mark.slow),
        pytest.param(sf.CGCNN, COMPILED, id="ahead of time CGCNN", marks=pytest.mark.slow),
    ],
)
def test_a_program_in_a_file_runs_in_a_process_of_its_own(model_type, load, make_batch, tmp_path):
    model = model_type(2, atom_fea_len=16, h_fea_len=8).eval().requires_grad_(False)
    program = exported(model, make_batch("plain"))
    others = [make_batch(kind, seed=1) for kind in ("many crystals", *ALONE)]
    if registry.core is not None and model_type is not in_parts:
        assert str(program.graph).count("torch.ops.srcgcnn_fast.") == 1
        assert "srcgcnn_fast.gated_conv_network" in str(program.graph)
    package = str(tmp_path / "model.pt2")
    if load == EXPORTED:
        torch.export.save(program, package)
    elif shutil.which("g++") is None:
        pytest.skip("AOTInductor needs g++")
    else:
        torch._inductor.aoti_compile_and_package(program, package_path=package)
    torch.save([(tensors(other), model(other)) for other in others], tmp_path / "cases.pt")
    code = f"""
        import sys, torch, srcgcnn_fast.functional
        cases = torch.load(sys.argv[2]){load}
        for given, expected in cases:
            torch.testing.assert_close(run(*given), expected)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), package, str(tmp_path / "cases.pt")]
    root = str(Path(sf.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr


def _layer(make_batch):
    model, batch = sf.CGCNN(1, atom_fea_len=16).double().eval().requires_grad_(False), make_batch("plain")
    h = torch.randn(3, batch.num_rows, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (lambda x: model.convs[0](x, batch)), h


def test_transforms_go_through_the_reference(make_batch):
    layer, h = _layer(make_batch)
    torch.testing.assert_close(torch.vmap(layer)(h), torch.stack([layer(x) for x in h]), rtol=1e-10, atol=1e-12)
    x = h[0].requires_grad_()
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    gradient = torch.func.grad(lambda x: layer(x).square().sum())(h[0].detach())
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    tangent = (gradient * h[1]).sum()
    forward = torch.func.jvp(lambda x: layer(x).square().sum(), (h[0].detach(),), (h[1],))[1]
    torch.testing.assert_close(forward, tangent, rtol=1e-10, atol=1e-12)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(h[0].detach(), h[1])
        found = torch.autograd.forward_ad.unpack_dual(layer(dual).square().sum()).tangent
    torch.testing.assert_close(found, tangent, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("model_type", [sf.CGCNN, sf.SRCGCNN])
def test_transforms_of_whole_models(make_batch, model_type):
    """An ensemble by ``vmap``; forces and their derivatives by ``torch.func`` from distances."""
    torch.manual_seed(0)
    models, batch = [model_type(2, 8, 8).double().eval() for _ in range(3)], make_batch("isolated")
    batch = batch.to(dtype=torch.float64)
    parameters, buffers = torch.func.stack_module_state(models)
    with torch.no_grad():
        found = torch.vmap(lambda *state: torch.func.functional_call(models[0], state, (batch,)))(parameters, buffers)
        torch.testing.assert_close(found, torch.stack([model(batch) for model in models]), rtol=1e-10, atol=1e-12)

    def energy(distance: torch.Tensor) -> torch.Tensor:
        return models[0](replace(batch, distance=distance)).sum()

    hessian = torch.autograd.functional.hessian(energy, batch.distance)
    torch.testing.assert_close(torch.func.hessian(energy)(batch.distance), hessian, rtol=1e-9, atol=1e-12)
    (slope,) = torch.autograd.grad(energy(x := batch.distance.clone().requires_grad_()), x)
    along = torch.func.jvp(energy, (batch.distance,), (torch.ones_like(slope),))[1]
    torch.testing.assert_close(along, slope.sum(), rtol=1e-10, atol=1e-12)


@pytest.mark.compiled
def test_transforms_of_a_forced_backend_are_refused(make_batch):
    layer, h = _layer(make_batch)
    with sf.use_backend("cpu"), pytest.raises(InputError, match=r"cannot take this input: torch\.func transforms"):
        torch.vmap(layer)(h)


def _in_step(rank: int, port: int, model: nn.Module, shares: list, results: list) -> None:
    """One process of two: three steps of SGD on its share under DistributedDataParallel."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        model = copy.deepcopy(model)  # what a process is given lies in shared memory
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-4)
        for _ in range(3):
            optimizer.zero_grad()
            wrapped(shares[rank]).square().mean().backward()
            optimizer.step()
        for key, x in model.state_dict().items():
            results[rank][key].copy_(x)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODELS)
def test_two_processes_train_as_one(model_type, make_batch, unused_tcp_port, monkeypatch):
    """Frozen statistics, so that two halves of a batch and the whole give the same gradients."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[1])])  # where they find this file
    torch.manual_seed(0)
    model = model_type(2, atom_fea_len=16, h_fea_len=8).double().eval()
    alone = copy.deepcopy(model)
    shares = [make_batch("plain", seed=seed) for seed in (0, 1)]
    results = [{k: x.clone().share_memory_() for k, x in model.state_dict().items()} for _ in range(2)]
    mp.spawn(_in_step, (unused_tcp_port, model, shares, results), nprocs=2)
    optimizer = torch.optim.SGD(alone.parameters(), lr=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        (sum(alone(share).square().mean() for share in shares) / 2).backward()
        optimizer.step()
    for key, expected in alone.state_dict().items():
        for result in results:
            torch.testing.assert_close(result[key], expected, rtol=1e-9, atol=1e-12)


@pytest.fixture
def unused_tcp_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
