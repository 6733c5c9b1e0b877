"""Hits are counted as a search of the same queries finds them: eager, compiled, recomputed, of every variant."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import memcompile
from memcompile.errors import PlanError
from memcompile.runtime.pool import pool_of
from tests.lowering.reference import product_key_topk_reference, scores_reference
from tests.models import tiny_gpt
from tests.planned import batch, planned_gpt


def found_by_hand(model: nn.Module, *inputs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Counts of the hits of all layers, from the scores of all slots of each token's queries."""
    pool = pool_of(model)
    config = pool.config
    slot_hits = torch.zeros(config.slots, dtype=torch.int64)
    key_hits = {}
    inputs_of = {}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: inputs_of.update({layer.name: args[0]}))
        for layer in pool.layers.values()
    ]
    was_training = model.training
    with torch.no_grad():
        model(*inputs)
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    for layer in pool.layers.values():
        batch_norm = layer.query_scale, layer.query_shift, layer.query_mean, layer.query_var
        projected = layer.query_weight, layer.query_bias, layer.half_keys, layer.temperature
        scores = scores_reference(inputs_of[layer.name], *projected, config.heads, batch_norm, model.training)
        best, n = product_key_topk_reference(scores, config.top_k)[1], config.n_keys
        slot_hits += torch.bincount((best + layer.first_slot).flatten(), minlength=config.slots)
        counts = torch.zeros(2, config.heads, n, dtype=torch.int64)
        for head in range(config.heads):
            for side, keys in enumerate((best[:, head] // n, best[:, head] % n)):
                counts[side, head] = torch.bincount(keys.flatten(), minlength=n)
        key_hits[layer.name] = counts
    return slot_hits, key_hits


def assert_counts(model: nn.Module, slot_hits: torch.Tensor, key_hits: dict[str, torch.Tensor], times: int = 1) -> None:
    counts = pool_of(model).counts
    assert torch.equal(counts.slot_hits, times * slot_hits)
    assert counts.key_hits.keys() == key_hits.keys()
    assert all(torch.equal(counts.key_hits[name], times * hits) for name, hits in key_hits.items())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"variant": "pkm"}, {"variant": "peer"}, {"tables": "separate", "memory_layers": 2}, {"weighting": "sigmoid"}],
    ids=str,
)
def test_counts_of_variants(options, training):
    model = planned_gpt(**options).double().train(training)
    tokens, _ = batch()
    expected = found_by_hand(model, tokens)
    memcompile.count_usage(model)
    output = model(tokens)
    assert_counts(model, *expected)
    memcompile.count_usage(model, False)
    assert torch.equal(model(tokens), output)


@pytest.mark.parametrize("values_grad", ["dense", "sparse"])
def test_a_compiled_training_counts_and_learns_as_an_eager_one(values_grad):
    model = planned_gpt(memory_layers=2, values_grad=values_grad)
    twin = copy.deepcopy(model)
    memcompile.count_usage(model)
    memcompile.count_usage(twin)
    compiled = torch.compile(model, backend="memcompile", fullgraph=True)
    for m in (compiled, twin):
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3)
        for step in range(3):
            optimizer.zero_grad()
            m(*batch(step)).backward()
            optimizer.step()
    ours, theirs = pool_of(model).counts, pool_of(twin).counts
    total = 3 * batch()[0].numel() * 2 * 4 * 2  # heads, top_k, layers
    assert ours.slot_hits.sum() == theirs.slot_hits.sum() == total
    assert (ours.slot_hits - theirs.slot_hits).abs().sum() <= 0.01 * total  # ties of rounding
    for name, hits in ours.key_hits.items():
        assert hits.sum() == theirs.key_hits[name].sum() == total


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        leaf = torch.zeros(1, requires_grad=True)  # the reentrant kind needs one
        return checkpoint(lambda leaf, *inputs: self.model(*inputs), leaf, *inputs, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_forward_counts_once(reentrant):
    model = planned_gpt()
    expected = found_by_hand(model, batch()[0])
    memcompile.count_usage(model)
    Checkpointed(model, reentrant)(*batch()).sum().backward()
    assert_counts(model, *expected)


def test_counts_follow_a_model_and_its_copies():
    model = planned_gpt()
    tokens, _ = batch()
    expected = found_by_hand(model, tokens)
    memcompile.count_usage(model)
    model(tokens)
    other = copy.deepcopy(model)
    model.to(torch.float32)
    model(tokens)
    memcompile.count_usage(model)  # goes on
    assert_counts(model, *expected, times=2)
    assert_counts(other, *expected)
    assert not any("hits" in name for name in model.state_dict())


def test_an_exported_program_counts_nothing():
    model = planned_gpt().eval()
    memcompile.count_usage(model)
    tokens, _ = batch()
    program = torch.export.export(model, (tokens,), strict=False)
    assert "counting" not in str(program.graph)
    assert torch.equal(program.module()(tokens), model(tokens))
    assert pool_of(model).counts.slot_hits.sum() == tokens.numel() * 2 * 4  # of the eager forward alone


def test_a_model_without_memory():
    with pytest.raises(PlanError, match="has no memory: plan it first"):
        memcompile.count_usage(tiny_gpt())
