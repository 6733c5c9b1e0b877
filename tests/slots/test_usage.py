"""What counts say of a table: by hand, and of a model."""

from __future__ import annotations

import json
import math

import pytest
import torch

import memcompile
from memcompile.errors import PlanError
from memcompile.runtime.pool import pool_of
from memcompile.slots.usage import Evenness
from tests.planned import batch, planned_gpt


def test_evenness_by_hand():
    even = Evenness.of(torch.full((8,), 3))
    assert (even.used, even.gini) == (1, 0) and even.perplexity == pytest.approx(8) and abs(even.kl) < 1e-12
    one = Evenness.of(torch.tensor([0, 0, 5, 0]))
    assert (one.used, one.perplexity, one.gini) == (0.25, 1, 0.75) and one.kl == pytest.approx(math.log(4))
    mixed = Evenness.of(torch.tensor([1, 0, 3, 0]))
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert mixed.perplexity == pytest.approx(math.exp(entropy)) and mixed.kl == pytest.approx(math.log(4) - entropy)
    differences = [abs(a - b) for a in (1, 0, 3, 0) for b in (1, 0, 3, 0)]
    half_the_mean_difference, mean = sum(differences) / len(differences) / 2, 4 / 4
    assert mixed.gini == pytest.approx(half_the_mean_difference / mean)


def test_usage_of_a_model(tmp_path):
    model = planned_gpt(memory_layers=2)
    with pytest.raises(PlanError, match=r"not counted: call memcompile.count_usage\(model\) first"):
        memcompile.usage(model)
    memcompile.count_usage(model)
    with pytest.raises(PlanError, match="no hits of Transformer were counted: run it first"):
        memcompile.usage(model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    first = model.memory_values.detach().clone()
    model(*batch()).backward()
    optimizer.step()
    usage = memcompile.usage(model)
    tokens = batch()[0].numel()
    assert (usage.slots, usage.hits, len(usage.heads)) == (64, tokens * 2 * 2 * 4, 4)
    assert usage.counts.sum() == usage.hits and usage.table.used == (usage.counts > 0).double().mean()
    assert usage.trained == (model.memory_values != first).any(1).double().mean() == usage.table.used
    assert all(head.hits == tokens * 4 for head in usage.heads)
    told = json.loads(json.dumps(usage.to_dict()))
    assert told["table"]["used"] == usage.table.used and "counts" not in told
    shown = repr(usage)
    assert shown.startswith(f"64 slots, {usage.hits} hits: {usage.table.used:.1%} of the slots were hit, perplexity ")
    assert all(head.layer in shown for head in usage.heads)
    usage.plot(tmp_path / "usage.png")
    assert (tmp_path / "usage.png").stat().st_size > 10_000
    memcompile.usage(model, restart=True)
    assert not pool_of(model).counts.slot_hits.any()


def test_a_head_that_has_collapsed_and_a_table_of_which_few_slots_are_used():
    model = planned_gpt(n_keys=64, heads=2, top_k=1)
    (layer,) = pool_of(model).layers.values()
    with torch.no_grad():
        layer.query_weight[: layer.query_weight.shape[0] // 2] = 0  # head 0 asks the same for every token
        layer.query_bias[: layer.query_weight.shape[0] // 2] = 1
    memcompile.count_usage(model)
    model(batch()[0])
    (told,) = memcompile.usage(model).warnings
    assert told.startswith(f"head 0 of {layer.name} reads few half-keys: their perplexity is 1.0 of 64")
    for _ in range(10 * 64**2 // (batch()[0].numel() * 2) + 1):
        model(batch()[0])
    few, _ = memcompile.usage(model).warnings
    assert "of the slots were hit: plan with fewer slots (n_keys=" in few
    assert "warning: head 0" in repr(memcompile.usage(model))


def test_advice_names_what_is_not_in_use():
    model = planned_gpt(n_keys=64, heads=1, top_k=1, variant="pkm").eval()
    (layer,) = pool_of(model).layers.values()
    with torch.no_grad():
        layer.query_scale.zero_()  # the head asks the same for every token
    memcompile.count_usage(model)
    model(batch()[0])
    (told,) = memcompile.usage(model).warnings
    assert told.endswith("balance_loss=0.01 spreads them") and "query_norm" not in told
