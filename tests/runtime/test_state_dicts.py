"""Checkpoints: readable names, the plan inside, dense weights accepted, another plan refused before any copy."""

from __future__ import annotations

import copy
import io
import json
import logging

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import memcompile
from memcompile import MemoryConfig, OptionError, PlanError
from memcompile.runtime import state_dicts
from memcompile.runtime.pool import pool_of
from tests.models import tiny_gpt
from tests.planned import MEMORY, assert_same, batch, planned_gpt
from tests.runtime.saved import LAYER, by_torch_save, snapshot

PLAN = "blocks.1.ffn.2.memory._extra_state"


def encoded(plan: object) -> Tensor:
    return torch.tensor(list(json.dumps(plan).encode()), dtype=torch.uint8)


def by_safetensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return load_safetensors(save_safetensors(state))


def test_names_in_a_state_dict():
    planned, dense = planned_gpt().state_dict(), tiny_gpt(layers=2).state_dict()
    gone = {f"blocks.1.ffn.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert set(planned) == set(dense) - gone | {"memory_values", *LAYER}


@pytest.mark.parametrize("through", [by_torch_save, by_safetensors])
@pytest.mark.parametrize("assign", [False, True])
def test_round_trip_into_a_model_planned_from_the_checkpoint(through, assign):
    source, (tokens, _) = planned_gpt(layers=4, memory_layers=[1, -1], qk_norm=True, values_lr=None), batch()
    state = through(source.state_dict())
    config = memcompile.config_from(state)
    assert config.memory_layers == ("blocks.1.ffn.2.weight", "blocks.3.ffn.2.weight")
    assert (config.n_keys, config.qk_norm, config.values_lr) == (8, True, None)

    torch.manual_seed(1)
    model = tiny_gpt(layers=4)
    memcompile.plan(model, memory=config)
    assert not torch.equal(model(tokens), source(tokens))
    model.load_state_dict(state, strict=True, assign=assign)
    assert_same(snapshot(model), snapshot(source))
    assert torch.equal(model(tokens), source(tokens))
    assert pool_of(model).values is model.memory_values
    if assign:
        assert model.memory_values.data_ptr() == state["memory_values"].data_ptr()


def test_a_config_survives_its_own_round_trip():
    config = memcompile.config_from(planned_gpt().state_dict())
    assert config == memcompile.config_from(planned_gpt(memory_layers=["blocks.1.ffn"]).state_dict())
    assert config == MemoryConfig(
        memory_layers=["blocks.1.ffn.2.weight"], value_dim=32, **MemoryConfig().form, **MEMORY
    )


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_dense_checkpoint_leaves_the_memory_as_it_is(assign, wrapped, caplog):
    torch.manual_seed(1)
    dense = tiny_gpt(layers=2).state_dict()
    given = dict(dense)
    model = planned_gpt()
    before = snapshot(model)
    target, prefix = (nn.ModuleDict({"inner": model}), "inner.") if wrapped else (model, "")
    with caplog.at_level(logging.WARNING, "memcompile"):
        target.load_state_dict({prefix + name: value for name, value in dense.items()}, strict=True, assign=assign)
    (record,) = [r for r in caplog.records if r.name.startswith("memcompile")]
    assert "dense checkpoint" in record.getMessage()
    assert "4 weights of replaced FFNs (blocks.1.ffn) are not used" in record.getMessage()
    assert_same(dense, given)

    after = snapshot(model)
    memory = {"memory_values", *LAYER}
    assert_same({n: after[n] for n in memory}, {n: before[n] for n in memory})
    assert_same({n: after[n] for n in set(after) - memory}, {n: dense[n] for n in set(after) - memory})
    assert all(p.requires_grad for p in model.parameters())


def test_a_checkpoint_with_memory_says_how_to_plan_an_unplanned_model():
    planned, model = planned_gpt(), tiny_gpt(layers=2)
    state, before = planned.state_dict(), snapshot(model)
    for strict in (True, False):
        with pytest.raises(PlanError, match=r"plan it first.*memcompile\.config_from\(state_dict\)"):
            model.load_state_dict(state, strict=strict)
    assert_same(snapshot(model), before)


OTHER_PLANS = {
    "n_keys": ({"n_keys": 16}, "n_keys=16 (here 8)"),
    "heads": ({"heads": 1}, "heads=1 (here 2)"),
    "top_k": ({"top_k": 2}, "top_k=2 (here 4)"),
    "gate": ({"gate": False}, "gate=False (here True)"),
    "variant": ({"variant": "pkm"}, "variant='pkm' (here 'memory+')"),
    "query_norm": ({"query_norm": "batch"}, "query_norm='batch' (here 'none')"),
    "weighting": ({"weighting": "sigmoid"}, "weighting='sigmoid' (here 'softmax')"),
    "tables": ({"tables": "separate"}, "tables='separate' (here 'shared')"),
    "qk_norm": ({"qk_norm": True}, "qk_norm=True (here False)"),
    "placement": ({"placement": "add"}, "placement='add' (here 'replace')"),
    "layers": ({"memory_layers": [0]}, "layers ['blocks.0.ffn.2.weight'] (here ['blocks.1.ffn.2.weight'])"),
}


@pytest.mark.parametrize("name", OTHER_PLANS)
def test_another_plan_is_refused_before_anything_is_copied(name):
    options, message = OTHER_PLANS[name]
    state = planned_gpt(seed=1, **options).state_dict()
    model = planned_gpt(seed=0)
    before = snapshot(model)
    with pytest.raises(PlanError) as raised:
        model.load_state_dict(state)
    assert message in str(raised.value)
    assert "memcompile.plan(model, memory=memcompile.config_from(state_dict))" in str(raised.value)
    assert_same(snapshot(model), before)


def test_options_of_training_are_no_part_of_the_plan():
    model = planned_gpt(values_lr=None, balance_loss=0.1)
    model.load_state_dict(planned_gpt(values_lr=1e-2).state_dict())
    config = pool_of(model).config
    assert (config.values_lr, config.balance_loss) == (None, 0.1)


GOOD_PLAN = {"memcompile": 1, "config": {}, "layers": []}
DAMAGED = {
    "cut off": lambda entry: entry[:-5],
    "empty": lambda entry: entry[:0],
    "averaged": lambda entry: entry.float() * 0.5,
    "on meta": lambda entry: entry.to("meta"),
    "text": lambda entry: "plan",
    "not UTF-8": lambda entry: torch.full_like(entry, 255),
    "a list": lambda entry: encoded([1]),
    "no format": lambda entry: encoded({}),
    "no config": lambda entry: encoded({"memcompile": 1}),
    "no layers": lambda entry: encoded({"memcompile": 1, "config": {}}),
    "format in words": lambda entry: encoded(GOOD_PLAN | {"memcompile": "one"}),
    "config is a number": lambda entry: encoded(GOOD_PLAN | {"config": 3}),
    "layers are null": lambda entry: encoded(GOOD_PLAN | {"layers": None}),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_plan_is_refused_before_anything_is_copied(name):
    state = dict(planned_gpt(seed=1).state_dict())
    state[PLAN] = DAMAGED[name](state[PLAN])
    model = planned_gpt(seed=0)
    before = snapshot(model)
    with pytest.raises(PlanError, match=r"plan in the checkpoint \(memory\._extra_state\) is damaged"):
        model.load_state_dict(state)
    assert_same(snapshot(model), before)
    with pytest.raises(PlanError, match="is damaged"):
        memcompile.config_from(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_a_checkpoint_that_was_cast_as_a_whole_loads(dtype):
    """Programs that halve a checkpoint cast everything in it."""
    model = planned_gpt(seed=1)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    assert memcompile.config_from(state) == memcompile.config_from(model.state_dict())
    other = planned_gpt(seed=0)
    other.load_state_dict(state)
    assert_same(snapshot(other), {n: t.to(dtype).float() for n, t in snapshot(model).items()})


def test_a_plan_of_a_later_version_asks_for_an_upgrade():
    state = dict(planned_gpt().state_dict())
    state[PLAN] = encoded(GOOD_PLAN | {"memcompile": 3})
    with pytest.raises(PlanError, match="format 3, this memcompile reads 2: upgrade it"):
        planned_gpt().load_state_dict(state)


OF_FORMAT_2 = [{"variant": "pkm"}, {"variant": "peer"}, {"query_norm": "batch"}, {"weighting": "sigmoid"}]
OF_FORMAT_2 += [{"variant": "peer", "query_norm": "none"}, {"tables": "separate"}]


@pytest.mark.parametrize("options", OF_FORMAT_2, ids=str)
def test_a_reader_of_format_1_refuses_what_it_does_not_know(options, monkeypatch):
    model, state = planned_gpt(), planned_gpt(seed=1, **options).state_dict()
    assert memcompile.config_from(state).form == MemoryConfig(**options).form
    planned_gpt(**options).load_state_dict(state)
    monkeypatch.setattr(state_dicts, "FORMAT", 1)
    for read in (memcompile.config_from, model.load_state_dict):
        with pytest.raises(PlanError, match="format 2, this memcompile reads 1: upgrade it"):
            read(state)


@pytest.mark.parametrize("options", [{}, {"variant": "memory"}, {"gate": False}, {"balance_loss": 0.1}], ids=str)
def test_what_format_1_means_is_written_in_it(options, monkeypatch):
    model, state = planned_gpt(**options), planned_gpt(seed=1, **options).state_dict()
    monkeypatch.setattr(state_dicts, "FORMAT", 1)
    model.load_state_dict(state)
    assert torch.equal(model.memory_values, state["memory_values"])


def test_a_dense_state_dict_has_no_config():
    with pytest.raises(PlanError, match="holds no memory"):
        memcompile.config_from(tiny_gpt(layers=2).state_dict())
    with pytest.raises(PlanError, match="pass what it has under 'model'"):
        memcompile.config_from({"step": 3, "optimizer": {}, "model": planned_gpt().state_dict()})
    with pytest.raises(OptionError):
        MemoryConfig.from_dict({"n_key": 3})


def test_missing_memory_keys_are_strict_errors():
    state = dict(planned_gpt().state_dict())
    del state["memory_values"]
    with pytest.raises(RuntimeError, match="memory_values"):
        planned_gpt().load_state_dict(state)


class Tied(nn.Module):
    """Its logits are by the embedding of its tokens, as those of GPT-2 are."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = tiny_gpt()
        self.transformer.head.weight = self.transformer.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.transformer(tokens)


@pytest.mark.parametrize("name", ["transformer.head.weight", "transformer.tokens.weight"])
def test_a_tied_weight_is_loaded_by_one_of_its_names(name):
    model, other = Tied(), nn.Sequential(Tied())
    for planned in (model, other[0]):
        memcompile.plan(planned, memory_layers=1, **MEMORY)
    saved = model.state_dict()
    del saved[name]
    other.load_state_dict({f"0.{key}": value for key, value in saved.items()})
    assert_same(snapshot(other[0]), snapshot(model))
    del saved["transformer.norm.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "transformer.norm.weight"\.'):
        model.load_state_dict(saved)
    del saved[next(key for key in ("transformer.head.weight", "transformer.tokens.weight") if key in saved)]
    with pytest.raises(RuntimeError, match=r"transformer\.head\.weight"):
        model.load_state_dict(saved)


def test_a_whole_model_through_torch_save():
    model, (tokens, targets) = planned_gpt(), batch()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(tokens), model(tokens))
    loaded(tokens, targets).backward()
    loaded.load_state_dict(model.state_dict())
    with pytest.raises(PlanError):
        loaded.load_state_dict(planned_gpt(heads=1).state_dict())


def test_an_exponential_average_of_the_model():
    model, (tokens, targets) = planned_gpt(), batch()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    average.update_parameters(model)  # the first takes the parameters themselves
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(tokens, targets).backward()
    optimizer.step()
    average.update_parameters(model)
    for name, parameter in average.module.named_parameters():
        new = model.get_parameter(name)
        torch.testing.assert_close(parameter, 0.75 * start[name] + 0.25 * new, rtol=1e-6, atol=1e-7)
    assert pool_of(average.module) is not pool_of(model)

    state = by_torch_save(average.state_dict())
    assert memcompile.config_from(state) == memcompile.config_from(model.state_dict())
    other = AveragedModel(planned_gpt(seed=2))
    other.load_state_dict(state)
    assert torch.equal(other(tokens), average(tokens))


def test_distributed_checkpoint_state_dicts():
    (tokens, targets) = batch()

    def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = planned_gpt(seed=seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model(tokens, targets).backward()
        optimizer.step()
        return model, optimizer

    (source, source_optimizer), (target, target_optimizer) = trained(0), trained(1)
    state = get_model_state_dict(source)
    assert list(state) == list(source.state_dict())
    set_model_state_dict(target, state)
    assert torch.equal(target(tokens), source(tokens))

    model_state, optimizer_state = copy.deepcopy(get_state_dict(source, source_optimizer))
    assert "memory_values" in optimizer_state["state"]
    set_state_dict(target, target_optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    for model, optimizer in ((source, source_optimizer), (target, target_optimizer)):
        model.zero_grad()
        model(tokens, targets).backward()
        optimizer.step()
    assert_same(snapshot(target), snapshot(source))


def test_a_copied_model_trains_on_its_own():
    model, (tokens, targets) = planned_gpt(), batch()
    twin, before = copy.deepcopy(model), snapshot(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.5)
    twin(tokens, targets).backward()
    optimizer.step()
    moved = before["memory_values"] - twin.memory_values.detach()
    torch.testing.assert_close(moved, 1e-3 * twin.memory_values.grad, rtol=0, atol=1e-7)
    assert moved.any()
    assert_same(snapshot(model), before)
    assert model.memory_values.grad is None


def test_a_strangers_memory_is_not_ours():
    class Memory(nn.Module):
        def get_extra_state(self):
            return torch.tensor([[1, 2, 3]], dtype=torch.uint8)

        def set_extra_state(self, state):
            self.loaded = state

    model = nn.Module()
    model.memory, model.long_memory = Memory(), Memory()
    model.load_state_dict(model.state_dict())
    assert torch.equal(model.memory.loaded, model.long_memory.loaded)


@pytest.mark.parametrize("variant", ["memory+", "memory"])
def test_a_plan_from_before_placements_and_variants(variant):
    state = dict(planned_gpt(seed=1, variant=variant).state_dict())
    plan = json.loads(bytes(state[PLAN].tolist()))
    for later in ("placement", "variant", "query_norm", "weighting", "tables", "balance_loss"):
        del plan["config"][later]
    state[PLAN] = encoded(plan)
    for options in ({"variant": variant}, {"gate": variant == "memory+"}):
        model = planned_gpt(**options)
        model.load_state_dict(state)
        assert torch.equal(model.memory_values, state["memory_values"])
    config = memcompile.config_from(state)
    assert (config.placement, config.form) == ("replace", MemoryConfig(variant=variant).form)


def test_parameters_of_a_captured_graph_load_without_a_plan():
    """A rewritten graph has the same parameters, and no extra state."""
    model, other = planned_gpt(seed=0), planned_gpt(seed=1)
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("_extra_state")}
    other.load_state_dict(state)
    assert all(torch.equal(other.state_dict()[name], value) for name, value in state.items())
