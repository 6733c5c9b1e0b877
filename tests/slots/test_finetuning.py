"""Finetuning of slots is TF-IDF by hand, with any row rule, accumulated, compiled, resumed; nothing else moves."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import memcompile
from memcompile.errors import OptionError, PlanError
from memcompile.runtime.pool import pool_of
from tests.models import tiny_gpt
from tests.planned import batch, planned_gpt
from tests.runtime.table.stepping import snapshot
from tests.slots.test_counting import found_by_hand

OLD = [batch(seed)[0] for seed in (10, 11, 12, 13)]


def model_of(**options: object) -> nn.Module:
    return planned_gpt(**{"n_keys": 16, "memory_layers": 2, "top_k": 2} | options).double()


def best_by_hand(model: nn.Module, batches: list[torch.Tensor], top_t: int) -> set[int]:
    """The slots that a step may move."""
    was_training = model.training
    model.eval()
    in_background = sum((found_by_hand(model, tokens)[0] > 0).int() for tokens in OLD)
    model.train(was_training)
    hits = sum(found_by_hand(model, tokens)[0] for tokens in batches)
    scores = {
        i: hits[i].item() * math.log((len(OLD) + 1) / (in_background[i].item() + 1))
        for i in hits.nonzero()[:, 0].tolist()
    }
    return set(sorted(scores, key=lambda i: (-round(scores[i], 9), i))[:top_t])


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> set[int]:
    """The rows that are not as they were; nothing else may have moved."""
    now = model.state_dict()
    assert all(torch.equal(now[name], before[name]) for name in before if name != "memory_values")
    return set((now["memory_values"] != before["memory_values"]).any(1).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("values_grad", ["dense", "sparse"])
@pytest.mark.parametrize("rule", ["row_adamw", "lazy_adam", "row_wise_adagrad", "row_sgd"])
def test_a_step_moves_the_slots_of_the_highest_scores(rule, values_grad):
    model = model_of(values_optimizer=rule, values_grad=values_grad, values_lr=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    model(*batch()).backward()
    optimizer.step()  # others than the chosen rows have momentum and weight decay to do
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    memcompile.flush(model)
    parts = [batch(seed) for seed in (1, 2)]
    before, top_t = snapshot(model), 7
    expected = best_by_hand(model, [tokens for tokens, _ in parts], top_t)
    with memcompile.finetune_slots(model, background=OLD, top_t=top_t):
        for part in parts:  # accumulated
            model(*part).backward()
        with torch.no_grad():
            model(OLD[0])  # an evaluation does not count
        optimizer.step()
        assert moved(model, before) == expected
    assert all(p.requires_grad for p in model.parameters())


def test_what_moves_is_a_step_of_the_masked_gradient():
    model = model_of(values_lr=0.1, values_grad="sparse")
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), weight_decay=0.0) for m in (model, twin)]
    with memcompile.finetune_slots(model, background=OLD, top_t=5):
        for step in range(4):
            rows = sorted(best_by_hand(twin, [batch(step)[0]], 5))
            for m, optimizer in zip((model, twin), optimizers, strict=True):
                optimizer.zero_grad()
                m(*batch(step)).backward()
            mask = torch.zeros(len(twin.memory_values), 1, dtype=torch.float64)
            mask[rows] = 1
            for p in twin.parameters():
                p.grad = p.grad.to_dense() * mask if p is twin.memory_values else None
            for optimizer in optimizers:
                optimizer.step()
    torch.testing.assert_close(snapshot(model), snapshot(twin), rtol=1e-12, atol=1e-12)


def test_a_compiled_training():
    model = model_of(values_lr=0.1).float()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    compiled, before = torch.compile(model, backend="memcompile", fullgraph=True), snapshot(model)
    with memcompile.finetune_slots(compiled, background=OLD, top_t=6):
        compiled(*batch()).backward()
        optimizer.step()
    assert len(moved(model, before)) == 6


def test_the_background_is_in_the_checkpoint():
    model = model_of()
    with memcompile.finetune_slots(model, background=OLD, top_t=1):
        pass
    hits = model.state_dict()["memory_background_hits"]
    assert hits.dtype is torch.int32 and hits.max() <= len(OLD) and hits.any()
    resumed = model_of()
    resumed.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(resumed.parameters(), lr=0.1)
    expected, before = best_by_hand(resumed, [batch()[0]], 7), snapshot(resumed)
    with memcompile.finetune_slots(resumed, top_t=7):
        resumed(*batch()).backward()
        optimizer.step()
    assert moved(resumed, before) == expected
    resumed.load_state_dict(model_of().state_dict())  # of a checkpoint without one
    assert torch.equal(resumed.state_dict()["memory_background_hits"], hits)


def test_what_was_frozen_stays_frozen_and_modes_stay():
    model = model_of(dropout=0.1)
    model.blocks[0].requires_grad_(False)
    model.blocks[1].eval()
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad and p is not model.memory_values else None
    block = memcompile.finetune_slots(model, background=OLD, top_t=2)
    block.__enter__()
    assert [n for n, p in model.named_parameters() if p.requires_grad or p.grad is not None] == ["memory_values"]
    with pytest.raises(KeyboardInterrupt):
        block.gen.throw(KeyboardInterrupt())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert [module.training for module in model.modules()] == modes
    assert pool_of(model).counts is None and pool_of(model).table.row_filter is None


def test_errors():
    model = model_of()

    def enter(model=model, **options):
        memcompile.finetune_slots(model, **options).__enter__()

    for wrong in (0, -1, 2.5, True):
        with pytest.raises(OptionError, match="top_t must be a positive number of slots"):
            enter(background=OLD, top_t=wrong)
    with pytest.raises(OptionError, match="background: 0 batches, none of which hit a slot"):
        enter(background=[], top_t=1)
    with pytest.raises(OptionError, match="this model has no counts of such batches yet"):
        enter(top_t=1)
    with pytest.raises(PlanError, match="has no memory"):
        enter(tiny_gpt(), top_t=1)
    block = memcompile.finetune_slots(model, background=OLD, top_t=1)
    block.__enter__()
    with pytest.raises(PlanError, match="open already: leave it first"):
        enter(top_t=1)
    block.__exit__(None, None, None)


def test_the_recipes_of_the_documentation_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "finetuning.md").read_text()
    model = model_of(values_optimizer="row_sgd")

    def step(part):
        names["optimizer"].zero_grad()
        model(*part).backward()
        names["optimizer"].step()

    names = {"torch": torch, "memcompile": memcompile, "model": model, "old_batches": OLD, "step": step}
    names |= {"batches": [batch(seed) for seed in range(3)], "optimizer": torch.optim.AdamW(model.parameters())}
    usage_recipe, finetuning_recipe = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(usage_recipe, names)
    assert names["usage"].hits == 3 * batch()[0].numel() * 2 * 2 * 2 and Path("usage.png").exists()
    before = snapshot(model)
    exec(finetuning_recipe, names)
    assert 0 < len(moved(model, before)) <= 3 * 100
