"""Checkpoints and exports of an earlier version, which had the table on the module that was planned, still load."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import AdamW

import memcompile
from memcompile import PlanError
from memcompile.checkpoint import config, export_safetensors, import_safetensors, load, save, saving, steps
from memcompile.checkpoint.formats import safetensors as safetensors_files
from memcompile.checkpoint.state import model_state
from memcompile.checkpoint.state.model_state import moved_tables
from tests.checkpoint import old_layout
from tests.checkpoint.old_layout import DATA, STEP, LanguageModel, expected, planned
from tests.checkpoint.trainings import everything, train
from tests.models import tiny_gpt
from tests.planned import MEMORY, assert_same


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


def test_modules_of_tables_that_moved():
    def moved(saved: list[str], own: list[str]) -> dict[str, str]:
        return moved_tables(saved, own)

    assert moved([""], ["model.decoder"]) == {"": "model.decoder"}
    assert moved(["a", "b"], ["a.m", "b.m"]) == {"a": "a.m", "b": "b.m"}
    assert moved(["", "a"], ["a.b"]) == {"a": "a.b"}
    assert moved(["", "a"], ["", "a.b"]) == {"a": "a.b"}
    for own in ("", "ab", "b"):
        assert moved(["", "a"][bool(own) :], [own]) == {}
    assert moved(["a"], [""]) == {}


class Wrapped(nn.Module):
    """What earlier versions saved is of the wrapper, and none of it tells which part runs the layers."""

    def __init__(self, seed: int, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.scale = tiny_gpt(layers=2), nn.Parameter(torch.ones(1))
        memcompile.plan(self, memory_layers=1, **MEMORY | {"n_keys": 16} | options)

    def forward(self, *tokens: Tensor) -> Tensor:
        return self.inner(*tokens) * self.scale


def training(seed: int, **options: Any) -> tuple[Wrapped, AdamW]:
    model = Wrapped(seed, **options)
    values = model.inner.memory_values
    rest = [parameter for parameter in model.parameters() if parameter is not values]
    return model, AdamW([{"params": rest}, {"params": [values], "weight_decay": 0.5}], lr=1e-2)


def outer(name: str) -> str:
    """A name of the table, or of an entry of its state, where earlier versions had it."""
    return name.replace("inner.memory_values", "memory_values")


@pytest.fixture
def as_before(monkeypatch) -> Iterator[None]:
    """Has `save` and `export_safetensors` write names and plans as earlier versions did."""
    of, state_of, plans_of = saving.OptimizerState.of, model_state.model_state, model_state.plans_of

    def of_optimizers(optimizers: Any, root: nn.Module) -> Any:
        state = of(optimizers, root)
        groups = [{**group, "params": [outer(name) for name in group["params"]]} for group in state.groups]
        tensors, entries, others = (
            {outer(name): value for name, value in part.items()}
            for part in (state.tensors, state.entries, state.others)
        )
        return saving.OptimizerState(tensors, groups, entries, others)

    def plans(root: nn.Module) -> model_state.Plans:
        (plan,) = plans_of(root).values()
        layers = [f"inner.{name}" for name in plan["layers"]]
        return {"": {**plan, "layers": layers, "config": {**plan["config"], "memory_layers": layers}}}

    with monkeypatch.context() as patch:
        patch.setattr(saving.OptimizerState, "of", of_optimizers)
        for module in (saving, safetensors_files):
            patch.setattr(module, "plans_of", plans)
            patch.setattr(module, "model_state", lambda root: {outer(k): v for k, v in state_of(root).items()})
        yield


@pytest.mark.parametrize("values_grad", ["sparse", "dense"])
def test_a_training_goes_on(values_grad, as_before, tmp_path):
    (model, optimizer), (other, new) = (training(seed, values_grad=values_grad) for seed in (0, 1))
    train(model, optimizer, range(3))
    save(tmp_path, model, optimizer, step=3)
    load(tmp_path, other, new)
    assert_same(everything(other, new), everything(model, optimizer))
    for each in ((model, optimizer), (other, new)):
        train(*each, range(3, 5))
    assert_same(everything(other, new), everything(model, optimizer))


def test_an_export(as_before, tmp_path):
    (model, _), (other, _) = (training(seed) for seed in (0, 1))
    export_safetensors(model, tmp_path, max_shard_size=10_000)
    assert "memory_values[0:78]" in (tmp_path / safetensors_files.INDEX).read_text()
    import_safetensors(tmp_path, other)
    assert_same(everything(other), everything(model))


def test_a_file_of_a_state_dict(tmp_path):
    """As others write it, without our metadata: the table's name tells where it lies, now and before."""
    (model, _), (other, _), (third, _) = (training(seed) for seed in range(3))
    state = dict(model.state_dict())
    for number, (into, rename) in enumerate(((other, str), (third, outer))):
        path = tmp_path / f"{number}.safetensors"
        safetensors.torch.save_file({rename(name): tensor for name, tensor in state.items()}, path)
        assert config(path).n_keys == 16
        import_safetensors(path, into)
        assert_same(everything(into), everything(model))


def test_another_memory_is_still_refused(as_before, tmp_path):
    save(tmp_path, *training(0), step=1)
    other, new = training(1, n_keys=8)
    before = everything(other)
    with pytest.raises(PlanError, match=r"saved with another memory: n_keys=16 \(here 8\)"):
        load(tmp_path, other, new)
    assert_same(everything(other), before)
