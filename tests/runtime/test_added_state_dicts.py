"""Checkpoints of models to which memory was added."""

from __future__ import annotations

import io
import logging

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel

import memcompile
from memcompile import PlanError
from tests.models import tiny_gpt
from tests.planned import assert_same, batch, planned_gpt
from tests.runtime.saved import LAYER, by_torch_save, snapshot


def added_gpt(seed: int = 0) -> nn.Module:
    model = planned_gpt(seed=seed, placement="add")
    nn.init.normal_(model.blocks[1].ffn[2].memory.out_weight)
    return model


@pytest.mark.parametrize("assign", [False, True])
def test_an_added_memory_and_its_ffn_round_trip(assign):
    source, (tokens, _) = added_gpt(), batch()
    assert set(source.state_dict()) == set(tiny_gpt(layers=2).state_dict()) | {"memory_values", *LAYER}
    state = by_torch_save(source.state_dict())
    model = tiny_gpt(layers=2)
    memcompile.plan(model, memory=memcompile.config_from(state))
    model.load_state_dict(state, assign=assign)
    assert_same(snapshot(model), snapshot(source))
    assert torch.equal(model(tokens), source(tokens))
    nn.init.zeros_(model.blocks[1].ffn[2].memory.out_weight)
    assert not torch.equal(model(tokens), source(tokens)), "assigning the weights took the memory away"


@pytest.mark.parametrize("assign", [False, True])
def test_a_dense_checkpoint_loads_into_the_ffns_that_stay(assign, caplog):
    torch.manual_seed(1)
    dense, model = tiny_gpt(layers=2), added_gpt()
    before = snapshot(model)
    with caplog.at_level(logging.WARNING, "memcompile"):
        model.load_state_dict(dense.state_dict(), assign=assign)
    (record,) = [r for r in caplog.records if r.name.startswith("memcompile")]
    assert "4 weights of memory-augmented FFNs (blocks.1.ffn) are loaded" in record.getMessage()
    after, memory = snapshot(model), {"memory_values", *LAYER}
    assert_same({n: after[n] for n in memory}, {n: before[n] for n in memory})
    assert_same({n: after[n] for n in set(after) - memory}, snapshot(dense))
    nn.init.zeros_(model.blocks[1].ffn[2].memory.out_weight)
    assert torch.equal(model(batch()[0]), dense(batch()[0]))


def test_the_other_placement_is_refused():
    with pytest.raises(PlanError, match=r"placement='replace' \(here 'add'\)"):
        added_gpt().load_state_dict(planned_gpt().state_dict())


def test_an_added_model_through_torch_save_and_distributed_state_dicts():
    model, (tokens, _) = added_gpt(), batch()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(tokens), model(tokens))
    other = added_gpt(seed=1)
    set_model_state_dict(other, get_model_state_dict(model))
    assert torch.equal(other(tokens), model(tokens))
    average = AveragedModel(model)
    average.update_parameters(model)
    assert torch.equal(average(tokens), model(tokens))
