"""install: all or nothing, in the dtype, mode and place of what it replaces, and the old weights are freed."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import memcompile
from memcompile import PlanError
from memcompile.runtime import install
from memcompile.runtime.stand_ins.replaced import ReplacedParameter, Role
from tests.models import VOCABULARY, WIDTH, tiny_gpt
from tests.planned import MEMORY, batch


def unchanged(model: nn.Module, act) -> None:
    """`act` must leave the model's parameters, modules and outputs as they are."""
    tokens, _ = batch()
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    expected = model(tokens)
    act()
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert torch.equal(model(tokens), expected)


def test_a_name_that_is_taken_changes_nothing():
    model = tiny_gpt(layers=2)
    model.memory_values = None

    def on_the_root():
        with pytest.raises(PlanError, match="Transformer already has an attribute 'memory_values': rename it"):
            memcompile.plan(model, memory_layers=2, **MEMORY)

    unchanged(model, on_the_root)
    del model.memory_values
    model.blocks[1].ffn[2].memory = "mine"

    def on_the_second_block():
        with pytest.raises(PlanError, match=r"'blocks\.1\.ffn\.2\.weight' already has an attribute 'memory'"):
            memcompile.plan(model, memory_layers=2, **MEMORY)

    unchanged(model, on_the_second_block)


def test_running_out_of_memory_half_way_changes_nothing(monkeypatch):
    model, create, created = tiny_gpt(layers=2), install.MemoryLayer, []

    def one_and_no_more(*args):
        if created:
            raise MemoryError
        created.append(create(*args))
        return created[0]

    monkeypatch.setattr(install, "MemoryLayer", one_and_no_more)

    def act():
        with pytest.raises(MemoryError):
            memcompile.plan(model, memory_layers=2, **MEMORY)

    unchanged(model, act)
    monkeypatch.undo()
    assert memcompile.plan(model, memory_layers=2, **MEMORY).planned


def test_blocks_on_different_devices_cannot_share_values():
    model = tiny_gpt(layers=2)
    model.blocks[0].ffn.to("meta")
    with pytest.raises(PlanError, match=r"'blocks\.0\.ffn' on meta, 'blocks\.1\.ffn' on cpu.*memory_layers"):
        memcompile.plan(model, memory_layers=2, **MEMORY)
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    assert model.memory_values.device.type == "cpu"


def test_the_memory_takes_dtype_device_and_mode_of_what_it_replaces():
    model = tiny_gpt(layers=2).to(torch.bfloat16)
    model.blocks[0].eval()
    with torch.device("meta"):
        other = tiny_gpt(layers=2)
    memcompile.plan(model, memory_layers=2, **MEMORY)
    memcompile.plan(other, memory_layers=2, **MEMORY)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in other.parameters()} == {"meta"}
    assert [block.ffn[2].memory.training for block in model.blocks] == [False, True]


def test_roles_of_replaced_parameters():
    model = tiny_gpt(layers=2)
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    up, _, down, _ = model.blocks[1].ffn
    roles = {p.name: (p.role, p.width) for p in (up.weight, up.bias, down.weight, down.bias)}
    assert roles == {
        "blocks.1.ffn.0.weight": (Role.UP, 4 * WIDTH),
        "blocks.1.ffn.0.bias": (Role.OTHER, 0),
        "blocks.1.ffn.2.weight": (Role.DOWN, 0),
        "blocks.1.ffn.2.bias": (Role.OTHER, 0),
    }
    assert isinstance(model.blocks[0].ffn[0].weight, nn.Parameter)
    assert not any(isinstance(p, ReplacedParameter) for p in model.parameters())


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.LBFGS])
def test_the_replaced_weights_are_freed(make):
    model, (tokens, targets) = tiny_gpt(layers=2), batch()
    optimizer = make(model.parameters(), lr=1e-3)

    def closure():
        optimizer.zero_grad()
        loss = model(tokens, targets)
        loss.backward()
        return loss

    optimizer.step(closure)  # gradients and optimizer state exist
    replaced = [weakref.ref(p) for p in model.blocks[1].ffn.parameters()]
    gradients = [weakref.ref(p.grad) for p in model.blocks[1].ffn.parameters()]
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    gc.collect()
    assert len(replaced) == 4
    assert all(reference() is None for reference in replaced + gradients)


def test_an_encoder_with_memory_keeps_padded_batches():
    def encoder() -> nn.TransformerEncoder:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True), 2)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.dense, self.memory_encoder = nn.Embedding(VOCABULARY, WIDTH), encoder(), encoder()

        def forward(self, tokens):
            return self.memory_encoder(self.dense(self.embed(tokens)))

    model = Both()
    memcompile.plan(model, memory_layers=["memory_encoder.layers.1"], **MEMORY)
    assert model.dense.use_nested_tensor
    assert not model.memory_encoder.use_nested_tensor
