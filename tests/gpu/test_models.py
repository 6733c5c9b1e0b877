"""A planned Transformer that trains on the GPU, under torch.compile and CUDA graphs too, against float64 on the CPU.

Two runs of a memory part where one of them takes another slot at a near tie. Here the keys are scaled so that the last
slot of each head weighs less than fp32's precision: which one is taken makes no difference, and the model is as smooth
in its parameters as a dense one. That the choice itself is exact, `test_search` tells.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import memcompile
from memcompile.runtime.pool import pool_of
from tests.lowering.cases import Recorder
from tests.models import VOCABULARY, tiny_gpt
from tests.tolerance import assert_as_accurate

SHARPNESS = 200.0  # how much the half-keys are scaled
SMALLEST = torch.finfo(torch.float32).eps / 2


class Run(NamedTuple):
    losses: Tensor  # [steps]
    parameters: dict[str, Tensor]


def planned(sizes, device, dtype) -> nn.Module:
    """The same numbers for each device and dtype."""
    torch.manual_seed(0)
    model = tiny_gpt(**sizes.model)
    memcompile.plan(model, memory_layers=3, values_lr=None, **sizes.memory)
    with torch.no_grad():
        for layer in pool_of(model).layers.values():
            layer.half_keys *= SHARPNESS
    return model.to(device, dtype)


def batch(sizes, device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(VOCABULARY, (2, *sizes.batch), generator=generator)
    return tokens.to(device), targets.to(device)


def train(model: nn.Module, call: Callable[..., Tensor], data: tuple[Tensor, Tensor], steps: int) -> Run:
    """SGD: an update is linear in the gradient, and no rounding of a gradient near zero becomes a whole step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    losses = []
    for _ in range(steps):
        torch.compiler.cudagraph_mark_step_begin()
        loss = call(*data)
        loss.backward()
        losses.append(loss.detach().clone())
        optimizer.step()
        optimizer.zero_grad()
    return Run(torch.stack(losses), {name: p.detach().clone() for name, p in model.named_parameters()})


def last_weights(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """The largest weight of a head's last slot, in the last memory of the model."""
    with torch.no_grad(), Recorder() as seen:
        model(*data)
    return seen.weights[..., -1].max().item()


class Expected(NamedTuple):
    exact: Run
    plain: Run


@pytest.fixture(scope="module")
def expected(sizes):
    """In float64, and in fp32 as PyTorch's own CPU kernels round it."""
    data, runs = batch(sizes, "cpu"), []
    for dtype in (torch.float64, torch.float32):
        model = planned(sizes, "cpu", dtype)
        assert last_weights(model, data) < SMALLEST
        runs.append(train(model, model, data, sizes.steps))
        assert last_weights(model, data) < SMALLEST
    return Expected(*runs)


def scaled(run: Run, exact: Run) -> Tensor:
    """All parameters in one, each scaled to a largest number of about one: the largest error of many is a steady
    measure, where that of a bias alone is a matter of luck.
    """
    assert run.parameters.keys() == exact.parameters.keys()
    units = {name: 2.0 ** exact.parameters[name].abs().max().log2().ceil().item() for name in exact.parameters}
    return torch.cat([(parameter.cpu() / units[name]).flatten() for name, parameter in run.parameters.items()])


def assert_as_expected(run: Run, expected: Expected) -> None:
    exact, plain = expected
    assert exact.losses[-1] < 0.8 * exact.losses[0]  # it has learned
    assert_as_accurate(run.losses.cpu(), plain.losses, exact.losses, "losses")
    assert_as_accurate(*(scaled(each, exact) for each in (run, plain, exact)), "parameters")


HOW = {"eager": None, "compiled": "default", "CUDA graphs": "reduce-overhead"}


@pytest.mark.parametrize("how", HOW)
def test_training(how, expected, device, sizes):
    model, data = planned(sizes, device, torch.float32), batch(sizes, device)
    call = model
    if HOW[how]:
        call = torch.compile(model, backend="memcompile", fullgraph=True, mode=HOW[how])
    counters.clear()
    run = train(model, call, data, sizes.steps)
    if device.type == "cuda":
        assert not counters["inductor"]["cudagraph_skips"]
    assert_as_expected(run, expected)
