"""No memory trains on tensors without numbers: `to_empty()` and `from_pretrained` draw it as `plan()` does."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import memcompile
from memcompile.runtime.layer import MemoryLayer
from tests.models import tiny_gpt
from tests.planned import MEMORY, batch, planned_gpt


def memory_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if "memory" in name}


def poisoned(tensors: dict[str, Tensor]) -> None:
    """What `to_empty()` leaves may be anything."""
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.fill_(math.nan)


@pytest.fixture
def empty_is_nan(monkeypatch):
    empty_like = torch.empty_like

    def nan_like(*args, **kwargs):
        empty = empty_like(*args, **kwargs)
        return empty.fill_(math.nan) if empty.is_floating_point() and not empty.is_sparse else empty

    monkeypatch.setattr(torch, "empty_like", nan_like)


def on_meta(**options) -> nn.Module:
    with torch.device("meta"):
        return planned_gpt(**options)


def initialise(model: nn.Module) -> None:
    """A program's own, which knows its own modules."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm)):
            module.reset_parameters()


def losses_of(model: nn.Module) -> list[float]:
    """Five steps on one batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens, targets = batch()
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(tokens, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def all_at_once(model: nn.Module) -> None:
    model.to_empty(device="cpu")


def block_by_block(model: nn.Module) -> None:
    for block in model.blocks:
        block.to_empty(device="cpu")
    for module in (model, *(m for name, m in model.named_children() if name != "blocks")):
        module.to_empty(device="cpu", recurse=False)


def module_by_module(model: nn.Module) -> None:
    for module in model.modules():
        module.to_empty(device="cpu", recurse=False)


def through_a_wrapper(model: nn.Module) -> None:
    nn.Sequential(model).to_empty(device="cpu")


ORDERS = [all_at_once, block_by_block, module_by_module, through_a_wrapper]


@pytest.mark.parametrize("options", [{}, {"placement": "add"}, {"values_grad": "sparse"}, {"qk_norm": True}])
@pytest.mark.parametrize("order", ORDERS)
def test_a_model_from_the_meta_device(order, options, empty_is_nan):
    model = on_meta(**options)
    order(model)
    initialise(model)
    drawn, twin = memory_of(model), memory_of(planned_gpt(**options))
    for name, parameter in drawn.items():
        assert not parameter.isnan().any(), name
        spread = [p.detach().std().item() for p in (parameter, twin[name])]
        assert spread[0] == pytest.approx(spread[1], rel=0.5), name
    losses = losses_of(model)
    assert losses[-1] < losses[0]


def test_a_model_that_was_trained_is_drawn_anew(empty_is_nan):
    model, (tokens, targets) = planned_gpt(values_grad="sparse"), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, targets).backward()
        optimizer.step()
    model.to_empty(device="cpu")
    torch.manual_seed(4)
    memcompile.reset_parameters(model)
    expected = {name: p.clone() for name, p in memory_of(model).items()}
    torch.manual_seed(4)
    model.to_empty(device="cpu")
    assert all(torch.equal(p, expected[name]) for name, p in memory_of(model).items())


def test_a_checkpoint_is_loaded_after_it():
    saved = planned_gpt(memory_layers=[0, 1])
    model, (tokens, _) = on_meta(memory_layers=[0, 1]), batch()
    model.to_empty(device="cpu")
    model.load_state_dict(saved.state_dict())
    assert torch.equal(model(tokens), saved(tokens))
    late = on_meta(memory_layers=[0, 1])
    late.load_state_dict(saved.state_dict(), assign=True)
    assert torch.equal(late(tokens), saved(tokens))


def test_another_model_stays():
    model, other = planned_gpt(seed=1), planned_gpt(seed=2)
    before = {name: p.clone() for name, p in other.named_parameters()}
    model.to_empty(device="cpu")
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())


# --- classes of transformers that plan in their __init__ ------------------------------------------------------------


@pytest.fixture(scope="module")
def planning_class() -> tuple[type, Callable]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip

    class WithMemory(transformers.LlamaForCausalLM):
        def __init__(self, config) -> None:
            super().__init__(config)
            memcompile.plan(self, memory_layers=[1], **MEMORY)

    torch.manual_seed(0)
    return WithMemory, lambda: transformers.LlamaForCausalLM(config)


def test_from_pretrained_draws_what_a_dense_checkpoint_lacks(planning_class, tmp_path, empty_is_nan):
    with_memory, dense = planning_class
    dense().save_pretrained(tmp_path / "dense")
    model = with_memory.from_pretrained(tmp_path / "dense")
    memory = memory_of(model)
    assert memory and not any(p.isnan().any() for p in memory.values())
    values, half_keys = model.model.memory_values, model.model.layers[1].mlp.down_proj.memory.half_keys
    assert values.std().item() == pytest.approx(values.shape[1] ** -0.5, rel=0.2)
    assert half_keys.abs().max().item() <= 8**-0.5 and half_keys.std() > 0
    tokens = batch()[0]
    model(tokens, labels=tokens).loss.backward()
    # A checkpoint that has the memory is loaded, and what is built off the meta device is drawn once.
    with torch.no_grad():
        values.mul_(3)
    model.save_pretrained(tmp_path / "memory")
    loaded = with_memory.from_pretrained(tmp_path / "memory")
    assert all(torch.equal(p, memory[name]) for name, p in memory_of(loaded).items())
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)


def test_a_second_initialisation_keeps_a_trained_memory(planning_class):
    with_memory, dense = planning_class
    model = with_memory(dense().config)
    poisoned(memory_of(model))
    model.init_weights()  # its other modules are initialised already, too
    assert all(p.isnan().all() for p in memory_of(model).values())


def test_layers_are_modules_with_an_initialisation_of_their_own():
    model = tiny_gpt(layers=2)
    memcompile.plan(model, memory_layers=2, **MEMORY)
    for module in model.modules():
        if isinstance(module, MemoryLayer):
            poisoned(dict(module.named_parameters()))
            module.reset_parameters()
    assert not any(p.isnan().any() for p in model.parameters())
