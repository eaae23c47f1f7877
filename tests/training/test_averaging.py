"""The moving average of the weights, beside PyTorch's, to the bit."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from srcgcnn_fast import SRCGCNN
from srcgcnn_fast.training import GraphDataModule, Recipe, TrainingModule
from srcgcnn_fast.training.averaging import ExponentialAverage
from srcgcnn_fast.training.fit import _moving_average

CPU = torch.device("cpu")


def moved(model: torch.nn.Module, step: int) -> None:
    """As a step of training may: all but the embedding, some weights by nothing, and the batch counters."""
    g = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            if not x.is_floating_point():
                x += 1
            elif not name.startswith(("embedding", "element_table")):
                x += torch.randn(x.shape, generator=g) * (torch.rand(x.shape, generator=g) < 0.7)


def ramped(decay: float, average: torch.Tensor, now: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """PyTorch's, of a decay that is small at first; numbers that are equal stay."""
    moved = get_ema_avg_fn(min(decay, (1 + int(n)) / (10 + int(n))))(average, now, n)
    return torch.where(average == now, average, moved)


@pytest.mark.parametrize("decay", [0.3, 0.99])  # the first is reached after three updates
def test_bits_are_those_of_pytorchs(decay):
    torch.manual_seed(0)
    model = SRCGCNN(atom_fea_len=8, h_fea_len=8)
    ours = ExponentialAverage(model, decay, CPU)
    theirs = AveragedModel(model, avg_fn=partial(ramped, decay), use_buffers=True)
    for step in range(5):
        moved(model, step)
        ours.update_parameters(model)
        theirs.update_parameters(model)
        found, expected = ours.state_dict(), theirs.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], x) and found[name].dtype == x.dtype for name, x in expected.items())
    assert torch.equal(ours.module.embedding.weight, model.embedding.weight)
    assert not torch.equal(ours.module.fc_out.weight, model.fc_out.weight)


def test_an_average_goes_on_from_its_state():
    model = SRCGCNN(atom_fea_len=8)
    whole = ExponentialAverage(model, 0.9, CPU)
    for step in range(2):
        moved(model, step)
        whole.update_parameters(model)
    resumed = ExponentialAverage(model, 0.9, CPU)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    moved(model, 2)
    for each in (whole, resumed):
        each.update_parameters(model)
    assert all(torch.equal(resumed.state_dict()[name], x) for name, x in whole.state_dict().items())


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))


def test_nothing_is_read_back_and_operations_are_few():
    model = SRCGCNN(atom_fea_len=8)
    average = ExponentialAverage(model, 0.99, CPU)
    average.update_parameters(model)
    with Operations() as seen:
        average.update_parameters(model)
    assert "_local_scalar_dense" not in seen.names
    views = ("view", "detach", "split_with_sizes", "alias", "_unsafe_view")
    assert len([name for name in seen.names if name not in views]) <= 20


def test_the_average_is_where_the_model_will_be(alloys):
    """Lightning moves a model to the GPU after the hook that makes the average."""
    module = TrainingModule(SRCGCNN(atom_fea_len=8), GraphDataModule(alloys, "energy"), Recipe())
    callback = _moving_average(0.9)
    callback.setup(SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta"))), module, "fit")
    assert all(x.is_meta for x in callback._average_model.state_dict().values())
    assert module.model.fc_out.weight.device == CPU
    assert callback.state_key == "WeightAveraging"  # of older checkpoints
