"""Saving and loading in one process: trainings that go on bit for bit, and what is refused before anything changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

import memcompile
from memcompile import CheckpointError, PlanError
from memcompile.checkpoint import config, load, save
from memcompile.runtime.optim import RowAdamW
from tests.checkpoint.trainings import everything, sharded_gpt, train, trained
from tests.models import tiny_gpt
from tests.planned import assert_same, planned_gpt

SPARSE: dict[str, Any] = {"n_keys": 16, "memory_layers": 2, "values_grad": "sparse"}  # rows are behind
OPTIMIZERS = {
    "AdamW": lambda model: AdamW(model.parameters(), lr=1e-2, weight_decay=0.1),
    "SGD": lambda model: SGD(model.parameters(), lr=1e-2),
    "RowAdamW": lambda model: RowAdamW(model.parameters(), lr=1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("values_grad", ["sparse", "dense"])
@pytest.mark.parametrize("before", ["new", "trained"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_goes_on_bit_for_bit(name, before, values_grad, tmp_path):
    options = SPARSE | {"values_grad": values_grad}
    model = planned_gpt(**options)
    optimizer = OPTIMIZERS[name](model)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(3):
        train(model, optimizer, [step])
        scheduler.step()
    save(tmp_path, model, optimizer, step=3, extra=scheduler.state_dict())

    other = planned_gpt(seed=1, **options)
    other_optimizer = OPTIMIZERS[name](other)
    other_scheduler = LambdaLR(other_optimizer, lambda step: 1 / (1 + step))
    if before == "trained":
        train(other, other_optimizer, range(5, 9))
    loaded = load(tmp_path, other, other_optimizer)
    other_scheduler.load_state_dict(loaded.extra)
    assert loaded.step == 3
    for m, o, s in ((model, optimizer, scheduler), (other, other_optimizer, other_scheduler)):
        for step in range(3, 6):
            train(m, o, [step])
            s.step()
    assert_same(everything(other, other_optimizer), everything(model, optimizer))


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("values_grad", ["sparse", "dense"])
def test_bf16_models_keep_the_dtypes_of_their_state(values_grad, state_dtype, tmp_path):
    options = SPARSE | {"values_grad": values_grad, "values_state_dtype": state_dtype}
    (model, optimizer), (other, new) = (
        (m, OPTIMIZERS["AdamW"](m))
        for m in (planned_gpt(**options).bfloat16(), planned_gpt(seed=1, **options).bfloat16())
    )
    train(model, optimizer, range(3))
    optimizer.state[model.head.weight]["exp_avg"] = optimizer.state[model.head.weight]["exp_avg"].float() / 3
    expected = everything(model, optimizer)
    assert values_grad == "dense" or expected["optimizer.memory_values.exp_avg"].dtype is getattr(torch, state_dtype)
    save(tmp_path, model, optimizer, step=1)
    load(tmp_path, other, new)
    found = everything(other, new)
    assert_same(found, expected)
    assert {name: value.dtype for name, value in found.items()} == {name: v.dtype for name, v in expected.items()}


def test_saving_before_the_first_step_changes_nothing(tmp_path):
    model, optimizer = trained(steps=0)
    optimizer.state.clear()
    before = everything(model, optimizer)
    save(tmp_path, model, optimizer, step=0)
    assert_same(everything(model, optimizer), before)
    other, other_optimizer = trained(seed=1)
    load(tmp_path, other, other_optimizer)
    assert_same(everything(other, other_optimizer), before)


def test_wrapped_models_and_groups_of_other_sizes(tmp_path):
    model, optimizer = trained()
    save(tmp_path, torch.compile(model, backend="eager"), optimizer, step=1)
    other = sharded_gpt(seed=1)
    other.blocks[0] = torch.compile(other.blocks[0], backend="eager")  # in its names is `_orig_mod`
    new = AdamW(other.parameters(), lr=1.0)  # in one group
    load(tmp_path, nn.DataParallel(other), new)
    assert len(new.param_groups) == 1
    assert new.param_groups[0]["lr"] == 1e-2
    found = {name.replace("_orig_mod.", ""): value for name, value in everything(other, new).items()}
    assert_same(found, everything(model, optimizer))


def test_groups_with_other_options_are_not_merged(tmp_path):
    model, optimizer = trained()
    optimizer.param_groups[1]["weight_decay"] = 0.5
    save(tmp_path, model, optimizer, step=1)
    other = sharded_gpt(seed=1)
    new = AdamW(other.parameters(), lr=1.0)
    before = everything(other, new)
    with pytest.raises(
        CheckpointError, match=r"parameters of group 0 in groups with other options \(weight_decay=0\.\d"
    ):
        load(tmp_path, other, new)
    assert_same(everything(other, new), before)


def test_two_optimizers(tmp_path):
    def training(seed: int) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        model = planned_gpt(seed=seed, **SPARSE)
        others = [p for p in model.parameters() if p is not model.memory_values]
        return model, [SGD(others, lr=1e-2, momentum=0.9), AdamW([model.memory_values], lr=1e-2)]

    model, optimizers = training(0)
    other, others = training(1)
    for step in range(3):
        for optimizer in optimizers:
            train(model, optimizer, [step])
    save(tmp_path, model, optimizers, step=3)
    load(tmp_path, other, others)
    for i in range(2):
        assert_same(everything(other, others[i]), everything(model, optimizers[i]))


class Noted(nn.Module):
    """Has extra state, as a tensor of any length or as an object."""

    def __init__(self, notes: Any) -> None:
        super().__init__()
        self.notes = notes

    def get_extra_state(self) -> Any:
        return self.notes

    def set_extra_state(self, state: Any) -> None:
        self.notes = state


@pytest.mark.parametrize("notes", [torch.arange(5), {"list": [1, 2], "tensor": torch.ones(2)}])
def test_extra_state_of_others(notes, tmp_path):
    model, other = planned_gpt(), planned_gpt(seed=1)
    model.noted, other.noted = Noted(notes), Noted(copy.deepcopy(notes) if isinstance(notes, dict) else torch.zeros(2))
    save(tmp_path, model, step=1)
    load(tmp_path, other)
    torch.testing.assert_close(other.noted.notes, notes)
    assert_same(everything(other), everything(model))


def test_a_dense_model_and_a_planned_part(tmp_path):
    dense, other = tiny_gpt(layers=2), tiny_gpt(layers=2)
    save(tmp_path / "dense", dense, step=1)
    load(tmp_path / "dense", other)
    assert_same(everything(other), everything(dense))
    with pytest.raises(PlanError, match="Transformer has a memory, but the checkpoint holds none: load it into the"):
        load(tmp_path / "dense", planned_gpt())

    whole, others = (nn.ModuleDict({"encoder": planned_gpt(seed=s)}) for s in (0, 1))
    save(tmp_path / "part", whole, step=1)
    load(tmp_path / "part", others)
    assert_same(everything(others), everything(whole))
    assert config(tmp_path / "part", part="encoder").n_keys == config(tmp_path / "part").n_keys == 8
    with pytest.raises(CheckpointError, match=r"no memory in 'decoder': it has one in each of 'encoder', give part="):
        config(tmp_path / "part", part="decoder")
    with pytest.raises(CheckpointError, match=r"dense has no memory$"):
        config(tmp_path / "dense")
    several = nn.ModuleDict({"encoder": planned_gpt(), "decoder": planned_gpt(n_keys=4)})
    save(tmp_path / "several", several, step=1)
    with pytest.raises(CheckpointError, match=r"several memories: it has one in each of 'encoder', 'decoder', give"):
        config(tmp_path / "several")
    assert config(tmp_path / "several", part="decoder").n_keys == 4


def test_a_model_that_is_planned_from_the_checkpoint(tmp_path):
    model, _ = trained(layers=4, memory_layers=(1, -1))
    save(tmp_path, model, step=1)
    other = tiny_gpt(layers=4)
    with pytest.raises(PlanError) as raised:
        load(tmp_path, other)
    fix = str(raised.value).partition("plan it first, ")[2]
    exec(fix, {"memcompile": memcompile, "model": other})
    load(tmp_path, other)
    assert_same(everything(other), everything(model))


def wider_head() -> nn.Module:
    model = sharded_gpt(seed=1)
    model.head = nn.Linear(32, 60, bias=False)
    return model


def more_slots() -> nn.Module:
    model = sharded_gpt(seed=1)
    model.memory_values = nn.Parameter(torch.zeros(16, 5))
    return model


def another_name() -> nn.Module:
    model = sharded_gpt(seed=1)
    model.out = model.head
    del model.head
    return model


OTHERS = {
    "n_keys": (lambda: sharded_gpt(n_keys=4), r"saved with another memory: n_keys=3 \(here 4\)"),
    "value_dim": (lambda: sharded_gpt(value_dim=6), r"another memory: value_dim=5 \(here 6\)"),
    "layers": (lambda: sharded_gpt(memory_layers=(0,)), r"layers \['blocks.1.ffn.2.weight'\] \(here \['blocks.0.ffn"),
    "slots": (more_slots, r"sizes differ: memory_values is \[9, 5\] \(here \[16, 5\]\): build the model as it was"),
    "sizes": (wider_head, r"sizes differ: head.weight is \[50, 32\] \(here \[60, 32\]\): build the model as it was"),
    "names": (another_name, r"not in the checkpoint: out.weight; not in the model: head.weight.*strict=False"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_refused_before_anything_changes(name, tmp_path):
    model, optimizer = trained()
    save(tmp_path, model, optimizer, step=1)
    make, message = OTHERS[name]
    other = make()
    before = everything(other)
    with pytest.raises((CheckpointError, PlanError), match=message):
        load(tmp_path, other)
    assert_same(everything(other), before)


def test_what_is_not_strict(tmp_path):
    model, optimizer = trained()
    save(tmp_path, model, optimizer, step=1)
    other = another_name()
    kept = other.out.weight.detach().clone()
    new = AdamW(other.parameters())
    with pytest.raises(CheckpointError, match=r"another|other parameters|not of this model"):
        load(tmp_path, other, new)
    load(tmp_path, other, new, strict=False)
    assert torch.equal(other.out.weight, kept)
    assert torch.equal(other.memory_values, model.memory_values)
    exp_avg = optimizer.state[model.memory_values]["exp_avg"]
    assert torch.equal(new.state[other.memory_values]["exp_avg"], exp_avg)


def test_what_the_optimizer_and_the_arguments_must_be(tmp_path):
    model, optimizer = trained()
    save(tmp_path, model, step=1)
    with pytest.raises(CheckpointError, match="was saved without an optimizer"):
        load(tmp_path, model, optimizer)
    with pytest.raises(CheckpointError, match=r"AdamW holds a parameter \[2\] that is not in the model"):
        save(tmp_path, model, AdamW([nn.Parameter(torch.ones(2))]), step=2)
    save(tmp_path, model, optimizer, step=2)
    with pytest.raises(CheckpointError, match=r"an optimizer of other parameters: it has \['blocks"):
        load(tmp_path, model, AdamW([model.memory_values]))
    with pytest.raises(CheckpointError, match=r"expected a torch\.optim\.Optimizer, got StepLR: .*extra="):
        save(tmp_path, model, torch.optim.lr_scheduler.StepLR(optimizer, 1), step=2)
    for arguments in ({"step": -1}, {"step": True}, {"step": 1, "keep": 0}):
        with pytest.raises(CheckpointError, match=r"must be an integer"):
            save(tmp_path, model, **arguments)
    with pytest.raises(CheckpointError, match=r"expected an nn\.Module"):
        save(tmp_path, {"model": 1}, step=1)


def in_two_groups(model: nn.Module, decay: float) -> AdamW:
    vectors = [p for p in model.parameters() if p.dim() < 2]
    rest = [p for p in model.parameters() if p.dim() >= 2]
    return AdamW([{"params": vectors, "weight_decay": 0.0}, {"params": rest, "weight_decay": decay}], lr=1e-2)


OTHER_OPTIMIZERS = {
    "class": (lambda model: SGD(model.parameters(), lr=0.1), "has the state of AdamW, and the optimizer is SGD"),
    "groups": (
        lambda model: in_two_groups(model, 0.3),
        r"groups 0 and 1 in one group, and both would get its options .weight_decay=0\.0 and 0\.3 now",
    ),
}


@pytest.mark.parametrize("name", OTHER_OPTIMIZERS)
def test_another_optimizer_is_refused_before_anything_changes(name, tmp_path):
    save(tmp_path, *trained(), step=1)
    model = sharded_gpt(seed=1)
    make, message = OTHER_OPTIMIZERS[name]
    optimizer = make(model)
    before = everything(model, optimizer)
    groups = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, model, optimizer)
    assert_same(everything(model, optimizer), before)
    assert groups == [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


class OwnAdamW(AdamW):
    """Another class, with the same options."""


def test_groups_alike_and_a_derived_class_are_no_other_optimizer(tmp_path):
    model, optimizer = trained()
    save(tmp_path, model, optimizer, step=1)
    decay = optimizer.param_groups[0]["weight_decay"]
    vectors, rest = in_two_groups(model, decay).param_groups
    own = OwnAdamW([{"params": vectors["params"]}, {"params": rest["params"]}], lr=1e-2)
    load(tmp_path, model, own)
    assert torch.equal(own.state[model.memory_values]["exp_avg"], optimizer.state[model.memory_values]["exp_avg"])


def test_processes_that_were_not_introduced_are_warned(tmp_path, monkeypatch, caplog):
    model, _ = trained()
    monkeypatch.setenv("WORLD_SIZE", "2")
    save(tmp_path, model, step=1)
    assert "WORLD_SIZE=2 processes, but torch.distributed is not initialised" in caplog.text
