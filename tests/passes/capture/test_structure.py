"""Modules that are proved to do the same, each difference that tells two apart, and that only one of them is traced."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn

from memcompile import find_ffns
from memcompile.passes.capture import trace as trace_module
from memcompile.passes.capture.structure import structure
from tests.models import HIDDEN, WIDTH, Block, plain_ffn


def block() -> nn.Module:
    return Block(WIDTH, plain_ffn(WIDTH, HIDDEN))


def changed(change):
    module = block()
    change(module)
    return module


def tie(module):
    module.ffn[2].weight = nn.Parameter(module.ffn[0].weight.t().contiguous())
    module.norm2.weight = module.norm1.weight


DIFFERENCES = {
    "an attribute": lambda m: setattr(m.attention, "heads", 8),
    "an index of its own": lambda m: setattr(m, "layer_idx", 1),
    "eval mode": lambda m: m.eval(),
    "another class": lambda m: setattr(m, "norm1", nn.RMSNorm(WIDTH)),
    "another activation": lambda m: m.ffn.__setitem__(1, nn.ReLU()),
    "a size": lambda m: setattr(m, "ffn", plain_ffn(WIDTH, HIDDEN + 1)),
    "a dtype": lambda m: m.ffn.double(),
    "a tie": tie,
    "frozen": lambda m: m.norm1.requires_grad_(False),
    "a forward of its own": lambda m: setattr(m, "forward", lambda x: x),
    "no bias": lambda m: setattr(m.norm1, "bias", None),
    "an object that cannot be compared": lambda m: setattr(m, "config", object()),
    "a buffer": lambda m: m.register_buffer("mask", torch.ones(1)),
}


def test_equal_modules():
    assert structure(block()) == structure(block())
    assert hash(structure(block())) == hash(structure(copy.deepcopy(block())))


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference(name):
    assert structure(changed(DIFFERENCES[name])) != structure(block())


def test_one_object_is_equal_to_itself():
    config = object()
    first, second = (changed(lambda m: setattr(m, "config", config)) for _ in range(2))
    assert structure(first) == structure(second)


class Dataless(nn.Module):
    """Cannot be traced on the meta device as a whole: a value decides."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for inner in self.blocks:
            x = inner(x) if x.sum() > 0 else x
        return x


def test_alike_submodules_are_traced_once():
    with torch.device("meta"):
        model = Dataless([block(), block(), changed(lambda m: setattr(m, "layer_idx", 2)), block()])
    with mock.patch.object(trace_module, "_trace_once", wraps=trace_module._trace_once) as traced:
        sites = find_ffns(model)
    assert [(s.name, s.refusal) for s in sites] == [(f"blocks.{i}.ffn", None) for i in range(4)]
    paths = [call.args[1] for call in traced.call_args_list]
    assert "blocks.0" in paths and "blocks.2" in paths
    assert "blocks.1" not in paths and "blocks.3" not in paths


def test_a_module_that_holds_itself():
    module = block()
    module.ffn.add_module("self", module.ffn)
    assert structure(module) != structure(block())
