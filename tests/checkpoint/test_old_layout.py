"""Checkpoints and exports of an earlier version, which had the table on the module that was planned, still load."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

import memcompile
from memcompile import CheckpointError
from memcompile.checkpoint import config, import_safetensors, load, save, saving, steps
from memcompile.checkpoint.state.model_state import moved_tables
from tests.checkpoint import old_layout
from tests.checkpoint.old_layout import DATA, STEP, LanguageModel, expected, planned
from tests.checkpoint.trainings import everything
from tests.planned import assert_same, planned_gpt


def test_what_an_earlier_version_saved():
    model, optimizer = planned()
    loaded = load(DATA, model, optimizer)
    assert (loaded.step, loaded.extra, steps(DATA)) == (STEP, {"schedule": 3}, [STEP])
    assert_same(everything(model, optimizer), expected(model, optimizer))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.5]
    model(torch.arange(old_layout.WORDS)[None]).sum().backward()
    optimizer.step()


def test_what_an_earlier_version_exported():
    model, optimizer = planned()
    import_safetensors(DATA / "exported", model)
    assert_same(everything(model), {k: v for k, v in expected(model, optimizer).items() if k.startswith("model.")})


@pytest.mark.parametrize("path", [DATA, DATA / "exported"], ids=["checkpoint", "export"])
def test_a_model_planned_from_it(path):
    model = LanguageModel()
    memcompile.plan(model, memory=config(path))
    load(DATA, model)
    found = everything(model)
    assert_same(
        found, {name: old_layout.numbers(name.partition(".")[2], tensor.shape) for name, tensor in found.items()}
    )


# --- a table that lies further inside than where it was saved -----------------------------------------------------


def test_names_of_tables_that_moved():
    def moved(saved: str, own: str) -> dict[str, str]:
        return moved_tables(saved.split(), own.split())

    assert moved("memory_values head", "model.decoder.memory_values head") == {
        "memory_values": "model.decoder.memory_values"
    }
    assert moved("a.memory_values b.memory_values", "a.m.memory_values b.m.memory_values") == {
        "a.memory_values": "a.m.memory_values",
        "b.memory_values": "b.m.memory_values",
    }
    assert moved("memory_values a.memory_values", "a.b.memory_values") == {"a.memory_values": "a.b.memory_values"}
    assert moved("memory_values a.memory_values", "memory_values a.b.memory_values") == {
        "a.memory_values": "a.b.memory_values"
    }
    for own in ("memory_values", "other", "a.not_memory_values", "a.memory_values.weight"):
        assert moved("memory_values", own) == {}
    assert moved("a.memory_values", "memory_values") == {}
    assert moved("a.memory_values", "b.memory_values") == {}


class Whole(nn.Module):
    """A model whose decoder has the table."""

    def __init__(self, seed: int, **options: object) -> None:
        super().__init__()
        self.decoder = planned_gpt(seed=seed, **{"n_keys": 16, "values_grad": "sparse", **options})
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, *batch: Tensor) -> Tensor:
        return self.decoder(*batch) * self.scale


def training(seed: int, **options: object) -> tuple[Whole, AdamW]:
    model = Whole(seed, **options)
    values = model.decoder.memory_values
    rest = [parameter for parameter in model.parameters() if parameter is not values]
    return model, AdamW([{"params": rest}, {"params": [values], "weight_decay": 0.5}], lr=1e-2)


@pytest.fixture
def outside(monkeypatch):
    """Has `save` name the table as if it were a parameter of the whole model."""

    def outer(name: str) -> str:
        return name.replace("decoder.memory_values", "memory_values")

    collect, of = saving._collect, saving.OptimizerState.of

    def collected(state, *args):
        plans = collect(state, *args)
        renamed = {outer(name): value for name, value in state.items()}
        state.clear()
        state.update(renamed)
        return plans

    def of_optimizers(optimizers, root):
        state = of(optimizers, root)
        groups = [{**group, "params": [outer(name) for name in group["params"]]} for group in state.groups]
        entries, others = ({outer(name): v for name, v in part.items()} for part in (state.entries, state.others))
        return saving.OptimizerState(state.tensors, groups, entries, others)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "_collect", collected)
        patch.setattr(saving.OptimizerState, "of", of_optimizers)
        yield


@pytest.mark.parametrize("values_grad", ["sparse", "dense"])
def test_a_table_that_was_saved_outside(values_grad, outside, tmp_path):
    (model, optimizer), (other, new) = (training(seed, values_grad=values_grad) for seed in (0, 1))
    old_layout.train(model, optimizer, 3)
    save(tmp_path, model, optimizer, step=3)
    load(tmp_path, other, new)
    assert_same(everything(other, new), everything(model, optimizer))
    for each in ((model, optimizer), (other, new)):
        old_layout.train(*each, 2)
    assert_same(everything(other, new), everything(model, optimizer))


def test_it_is_not_taken_from_another_place(outside, tmp_path):
    model, optimizer = training(0)
    save(tmp_path, model, optimizer, step=1)
    other, new = training(1)
    other.memory_values = nn.Parameter(torch.zeros(256, 32))  # of the whole model, which has one too
    before = everything(other)
    with pytest.raises(CheckpointError, match=r"not in the checkpoint: decoder\.memory_values"):
        load(tmp_path, other, new)
    assert_same(everything(other), before)
