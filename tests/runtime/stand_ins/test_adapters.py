"""Adapters, hooks and exchanged modules inside a replaced FFN raise; around it they have their effect."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memcompile
from memcompile import CaptureError
from tests.models import HIDDEN, WIDTH, around
from tests.planned import MEMORY, batch


class Gated(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Lora(nn.Module):
    """As PEFT's: what its base gives, and a product of two small matrices."""

    def __init__(self, base: nn.Module, width_in: int, width_out: int) -> None:
        super().__init__()
        self.base, self.a, self.b = base, nn.Linear(width_in, 2, bias=False), nn.Linear(2, width_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.b(self.a(x))


def _bias(module: nn.Module, size: int) -> None:
    module.bias = nn.Parameter(torch.ones(size))


WRAPPED: dict[str, Callable] = {
    "LoRA on a gate": lambda ffn: setattr(ffn, "gate", Lora(ffn.gate, WIDTH, HIDDEN)),
    "frozen LoRA": lambda ffn: setattr(ffn, "up", Lora(ffn.up, WIDTH, HIDDEN).requires_grad_(False)),
    "LoRA on the down-projection": lambda ffn: setattr(ffn, "down", Lora(ffn.down, HIDDEN, WIDTH)),
    "another up-projection": lambda ffn: setattr(ffn, "up", nn.Linear(WIDTH, HIDDEN)),
    "another down-projection": lambda ffn: setattr(ffn, "down", nn.Linear(HIDDEN, WIDTH)),
    "a bias": lambda ffn: _bias(ffn.gate, HIDDEN),
    "a bias of the output": lambda ffn: _bias(ffn.down, WIDTH),
    "one gate scaled": lambda ffn: ffn.up.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)),
    "hook on the output": lambda ffn: ffn.gate.register_forward_hook(lambda module, inputs, output: output * 0),
    "hook on the input": lambda ffn: ffn.down.register_forward_pre_hook(lambda module, inputs: (inputs[0].tanh(),)),
    "weight": lambda ffn: setattr(ffn.up, "forward", lambda x: F.linear(x, ffn.up.weight * 0, ffn.up.bias)),
    "merged": lambda ffn: ffn.up.weight.data.add_(torch.ones(HIDDEN, WIDTH)),
}


def _changed(model: nn.Module, change: Callable) -> nn.Module:
    change(model.blocks[1].ffn)
    return model


@pytest.mark.parametrize("name", WRAPPED)
def test_adapters_hooks_and_exchanged_modules(name):
    model, (tokens, _) = around(Gated, layers=2), batch()
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    model(tokens)
    with pytest.raises(CaptureError, match=r"blocks\.1\.ffn"):
        _changed(model, WRAPPED[name])(tokens)


class CastingLinear(nn.Linear):
    """Casts its input, as layers do whose weights have a precision of their own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class CastingGated(Gated):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden)
        self.gate.__class__ = self.up.__class__ = self.down.__class__ = CastingLinear


@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16])
def test_each_projection_may_cast_the_input_for_itself(before):
    model, (tokens, targets) = around(CastingGated, layers=2), batch()
    ffns = [block.ffn for block in model.blocks]
    for ffn in ffns:
        ffn.to(before)
        ffn.register_forward_hook(lambda module, inputs, output: output.float())
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    for dtype in (torch.bfloat16, torch.float32):
        for ffn in ffns:
            ffn.to(dtype)
        model.memory_values.data = model.memory_values.data.to(dtype)
        assert model(tokens, targets).isfinite()


@pytest.mark.filterwarnings("ignore:For backward hooks to be called")
def test_backward_hooks_on_its_modules_change_nothing():
    model, (tokens, targets) = around(Gated, layers=2), batch()
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    expected, seen = model(tokens, targets), []
    for module in model.modules():
        module.register_full_backward_hook(lambda module, inputs, outputs: seen.append(module))
    loss = model(tokens, targets)
    loss.backward()
    assert torch.equal(loss, expected) and model.blocks[1].ffn.down.memory in seen


OUTSIDE: dict[str, Callable] = {
    "hook on the block": lambda ffn: ffn.register_forward_hook(lambda module, inputs, output: output + 1),
    "hook on the down-projection": lambda ffn: ffn.down.register_forward_hook(lambda m, inputs, output: 2 * output),
    "hook on the memory": lambda ffn: ffn.down.memory.register_forward_hook(lambda m, inputs, output: -output),
    "its input": lambda ffn: ffn.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_added_outside_of_it_has_its_effect(name):
    model, (tokens, _) = around(Gated, layers=2), batch()
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    expected = model(tokens)
    OUTSIDE[name](model.blocks[1].ffn)
    assert not torch.equal(model(tokens), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_knows_its_operations(duplicate):
    model = around(Gated, layers=2)
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    twin, (tokens, _) = duplicate(model), batch()
    assert torch.equal(twin(tokens), model(tokens))
    twin.blocks[1].ffn.gate.register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.raises(CaptureError, match="was not part of the FFN"):
        twin(tokens)
    model(tokens)
