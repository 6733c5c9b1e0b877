"""A program's own initialisation passes replaced parameters by, however it is written."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import memcompile
from memcompile import CaptureError
from tests.models import HIDDEN, WIDTH, around, plain_ffn
from tests.planned import MEMORY, batch, planned_gpt

_ARGUMENTS = {"constant_": (0.5,), "sparse_": (0.5,)}
OF_INIT = [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_") and name != "dirac_"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return planned_gpt(memory_layers=[1])


@pytest.mark.parametrize("name", OF_INIT)
def test_functions_of_nn_init(name, model):
    weight = model.blocks[1].ffn[0].weight
    assert getattr(nn.init, name)(weight, *_ARGUMENTS.get(name, ())) is weight
    getattr(nn.init, name)(weight.data, *_ARGUMENTS.get(name, ()))


def _scaled(module: nn.Linear) -> None:
    module.weight *= 0.1
    module.weight.data /= math.sqrt(2)
    module.weight.data = module.weight.data * 0.5


def _filled(module: nn.Linear) -> None:
    with torch.no_grad():
        module.weight.fill_(0.1)
        module.weight[...] = 0.0
        module.weight[0] = torch.ones(module.weight.shape[1])
        module.weight[:, :4].normal_()
        module.bias.zero_().add_(1e-3)


def _copied(module: nn.Linear) -> None:
    with torch.no_grad():
        module.weight.copy_(torch.randn_like(module.weight))
        module.weight.data = torch.empty_like(module.weight).normal_()
        module.weight.set_(torch.zeros(module.weight.size()))
        torch.randn(module.weight.shape, out=module.weight)
        module.weight.data.masked_fill_(torch.ones(module.weight.shape).bool(), 0.0)


def _in_parts(module: nn.Linear) -> None:
    for part in (*module.weight.chunk(2), *module.weight.data.split(16), *module.weight.unbind()[:2]):
        part.data.normal_()
    nn.init.orthogonal_(module.weight.t())
    nn.init.xavier_uniform_(module.weight.view(module.weight.shape))


def _frozen(module: nn.Linear) -> None:
    module.weight.requires_grad_(False)
    module.bias.requires_grad = False


WRITES: dict[str, Callable] = {
    "in place": lambda module: module.weight.data.normal_(std=0.02, generator=torch.Generator()).clamp_(-1, 1),
    "random": lambda module: module.weight.data.bernoulli_(0.5).mul_(2).sub_(1).exponential_(),
    "reset": lambda module: module.reset_parameters(),
    "scalar tensor": lambda module: module.weight.data.mul_(torch.tensor(0.5)),
    "scaled": _scaled,
    "filled": _filled,
    "copied": _copied,
    "in parts": _in_parts,
    "frozen": _frozen,
}


@pytest.mark.parametrize("name", WRITES)
def test_writes(name, model):
    module, (tokens, _) = model.blocks[1].ffn[0], batch()
    expected, weight = model(tokens), module.weight
    assert WRITES[name](module) is None or name in ("in place", "random", "scalar tensor")
    assert module.weight is weight and torch.equal(model(tokens), expected)


def _gpt(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _by_name(module: nn.Module) -> None:
    for attribute in ("weight", "bias"):
        parameter = getattr(module, attribute, None)
        if parameter is not None:
            (nn.init.orthogonal_ if parameter.dim() > 1 else nn.init.zeros_)(parameter)


def _reset(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


@pytest.mark.parametrize("initialise", [_gpt, _by_name, _reset])
def test_programs_apply_their_own(initialise):
    model, (tokens, targets) = planned_gpt(memory_layers=[1]), batch()
    before = model.blocks[0].ffn[0].weight.clone()
    model.apply(initialise)
    assert not torch.equal(model.blocks[0].ffn[0].weight, before)
    model(tokens, targets).backward()


ADDS: dict[str, Callable] = {
    "merged": lambda w, delta: w.data.add_(delta),
    "merged by an operator": lambda w, delta: w.data.__iadd__(delta),
    "masked": lambda w, delta: w.data.mul_(delta > 0),
    "averaged": lambda w, delta: w.data.lerp_(delta, 0.5),
    "a product": lambda w, delta: w.data.addmm_(delta[:, :2], delta[:2]),
    "added": lambda w, delta: w.data + delta,
    "learned": lambda w, delta: w.data.mul_(nn.Parameter(torch.ones(()))),
    "norm": lambda w, delta: w.norm(),
    "all": lambda w, delta: torch.cat([w, w]),
}


@pytest.mark.parametrize("name", ADDS)
def test_what_is_added_to_a_weight_or_read_of_it_raises(name, model):
    with pytest.raises((CaptureError, AttributeError), match=r"blocks\.1\.ffn\.0\.weight"):
        ADDS[name](model.blocks[1].ffn[0].weight, torch.ones(HIDDEN, WIDTH))


def test_a_part_of_a_weight_is_no_weight(model):
    module = model.blocks[1].ffn[0]
    assert module.weight[:4].shape == (4, WIDTH) and len(module.weight) == HIDDEN
    with pytest.raises(CaptureError, match=r"linear mixes blocks\.1\.ffn\.0\.weight"):
        nn.functional.linear(torch.ones(2, WIDTH), module.weight[:])
    with pytest.raises(CaptureError, match=r"`add` of 128 features in blocks\.1\.ffn"):
        module(torch.ones(2, WIDTH)) + module.bias[:]


def test_a_subclass_of_linear_keeps_its_class():
    class Named(nn.Linear):
        pass

    other = around(plain_ffn, layers=2)
    for layer in (other.blocks[1].ffn[0], other.blocks[1].ffn[2]):
        layer.__class__ = Named
    memcompile.plan(other, memory_layers=[1], **MEMORY)
    assert type(other.blocks[1].ffn[0]) is Named
    other.apply(_gpt)
    other(*batch()).backward()
