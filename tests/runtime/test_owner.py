"""Where the table lies: on the lowest module with a forward of its own that contains all layers, whatever wraps it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import memcompile
from memcompile.common.sites import VALUES_NAME
from memcompile.runtime.pool import pool_of
from tests.models import Block, Transformer, plain_ffn, tiny_gpt
from tests.planned import MEMORY, assert_same, batch

WIDTH, VOCABULARY = 32, 50


class Decoder(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, plain_ffn(WIDTH, 4 * WIDTH)) for _ in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return x


class UnderHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.head = Decoder(), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.model(tokens))


class Wrapper(nn.Module):
    """As PEFT, Lightning and losses have one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens)


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Decoder(2), Decoder(2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.encoder(tokens) + self.decoder(tokens)


MODELS: dict[str, tuple[Callable[[], nn.Module], object, str]] = {
    "a decoder under a head": (UnderHead, 2, "model"),
    "one layer only": (UnderHead, [1], "model"),
    "wrapped": (lambda: Wrapper(Wrapper(UnderHead())), 2, "inner.inner.model"),
    "a bare decoder": (Decoder, 2, ""),
    "both stacks": (EncoderDecoder, "all", ""),
    "one stack of two": (EncoderDecoder, "decoder.*", "decoder"),
    "a sequence": (lambda: nn.Sequential(Decoder(), nn.Linear(WIDTH, VOCABULARY)), 2, ""),
    "a sequence of blocks": (lambda: nn.Sequential(*Decoder().blocks), 2, ""),
    "a sequence of blocks inside": (
        lambda: Wrapper(nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Sequential(*Decoder().blocks))),
        2,
        "",
    ),
}


def planned(name: str, seed: int = 0) -> tuple[nn.Module, str]:
    make, layers, owner = MODELS[name]
    torch.manual_seed(seed)
    model = make()
    example = (torch.randn(3, 5, WIDTH),) if name == "a sequence of blocks" else (batch()[0],)
    memcompile.plan(model, memory_layers=layers, example_inputs=example, **MEMORY)
    return model, owner


@pytest.mark.parametrize("name", MODELS)
def test_where_the_table_lies_and_names_from_there(name):
    model, owner = planned(name)
    holders = [path for path, module in model.named_modules() if VALUES_NAME in module._parameters]
    assert holders == [owner]
    pool = pool_of(model)
    prefix = f"{owner}." if owner else ""
    assert pool.owner is model.get_submodule(owner) and pool.prefix == prefix
    assert pool_of(pool.owner) is pool
    for down, layer in pool.layers.items():
        assert pool.owner.get_submodule(f"{down.rpartition('.')[0]}.memory") is layer
    assert all(prefix + name in dict(model.named_parameters()) for name, _ in pool.memory_parameters())
    assert [site.down for site in pool.chosen] == [prefix + down for down in pool.layers]


@pytest.mark.parametrize("name", ["a decoder under a head", "wrapped"])
def test_a_checkpoint_of_the_owner_is_that_of_a_bare_one(name):
    model, owner = planned(name)
    bare, _ = planned("a bare decoder", seed=1)
    bare.load_state_dict(model.get_submodule(owner).state_dict())
    assert_same(dict(bare.state_dict()), dict(model.get_submodule(owner).state_dict()))
    tokens, _ = batch()
    assert torch.equal(bare(tokens), model.get_submodule(owner)(tokens))


def test_planning_again_from_a_wrapper_changes_nothing():
    inner = UnderHead()
    memcompile.plan(inner, memory_layers=2, example_inputs=(batch()[0],), **MEMORY)
    before = {name: id(p) for name, p in inner.named_parameters()}
    for model in (Wrapper(inner), Wrapper(Wrapper(inner)), inner, inner.model):
        again = memcompile.plan(model, memory_layers=2, **MEMORY)
        assert again.planned
        assert {name: id(p) for name, p in inner.named_parameters()} == before
    with pytest.raises(memcompile.PlanError, match="already has a memory planned with"):
        memcompile.plan(Wrapper(inner), **MEMORY | {"n_keys": 16})


def test_optimizers_of_the_owner_or_of_the_whole_hold_the_table():
    for part in (lambda model: model, lambda model: model.model):
        model, _ = planned("a decoder under a head")
        optimizer = torch.optim.SGD(part(model).parameters(), lr=0.1)
        before = model.model.memory_values.detach().clone()
        model(batch()[0]).square().sum().backward()
        optimizer.step()
        assert not torch.equal(model.model.memory_values, before)


# --- parts without the table ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "what"), [(lambda part: part.state_dict(), "saved"), (lambda part: copy.deepcopy(part), "copied")]
)
def test_a_part_without_its_table_is_told_once(act, what, caplog):
    model, _ = planned("a decoder under a head")
    with caplog.at_level(logging.WARNING, "memcompile"):
        for whole in (model, model.model):
            act(whole)
        assert not caplog.records
        for _ in range(2):
            act(model.model.blocks)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"memcompile: a part of a model is {what} that has memory layers, but not their table, Decoder.memory_values, "
        f"which is not {what} with it. Take the whole Decoder"
    )


def test_a_copy_of_a_part_reads_the_same_table():
    model, _ = planned("one layer only")
    block = copy.deepcopy(model.model.blocks[1])
    x = torch.randn(3, 5, WIDTH)
    assert torch.equal(block(x), model.model.blocks[1](x))
    with torch.no_grad():
        model.model.memory_values.zero_()
    assert torch.equal(block(x), model.model.blocks[1](x))


# --- checkpoints of earlier versions ----------------------------------------------------------------------------------


def as_of_an_earlier_version(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The table lay on the model that was planned, and layers were named from it."""
    pool, state = pool_of(model), dict(model.state_dict())
    state[VALUES_NAME] = state.pop(prefix + VALUES_NAME)
    plan = memcompile.runtime.state_dicts.plan_of(pool)
    plan["layers"] = [prefix + name for name in plan["layers"]]
    plan["config"]["memory_layers"] = [prefix + name for name in plan["config"]["memory_layers"]]
    entry = torch.tensor(list(memcompile.runtime.state_dicts.json.dumps(plan).encode()), dtype=torch.uint8)
    return {name: entry if name.endswith("memory._extra_state") else value for name, value in state.items()}


@pytest.mark.parametrize("within", ["", "module."])
@pytest.mark.parametrize("name", ["a decoder under a head", "wrapped"])
def test_a_checkpoint_with_the_table_on_the_planned_model_loads(name, within):
    source, owner = planned(name)
    old = as_of_an_earlier_version(source, f"{owner}.")
    model, _ = planned(name, seed=1)
    target = nn.ModuleDict({"module": model}) if within else model
    target.load_state_dict({within + key: value for key, value in old.items()})
    tokens, _ = batch()
    assert torch.equal(model(tokens), source(tokens))
    torch.manual_seed(2)
    fresh = MODELS[name][0]()
    memcompile.plan(fresh, memory=memcompile.config_from(old), example_inputs=(tokens,))
    fresh.load_state_dict(old)
    assert torch.equal(fresh(tokens), source(tokens))


def test_a_gpt_that_is_planned_whole_has_the_table_itself():
    model = tiny_gpt(layers=2)
    memcompile.plan(model, memory_layers=1, **MEMORY)
    assert isinstance(model, Transformer) and VALUES_NAME in model._parameters
