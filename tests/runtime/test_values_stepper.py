"""Values that are stepped by rows: the training is that of dense gradients, whatever happens around a step."""

from __future__ import annotations

import copy
import functools
import gc
import io
import logging
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer, SparseAdam
from torch.optim import lr_scheduler as schedulers

import memcompile
from memcompile.runtime import steps
from memcompile.runtime.optim import LazyAdam, RowAdamW, RowSGD, RowwiseAdagrad
from memcompile.runtime.pool import pool_of
from tests.planned import assert_same, batch, planned_gpt

SIZES: dict[str, Any] = {"n_keys": 16, "memory_layers": 2}
Training = Callable[[nn.Module], Any]


@functools.cache
def _planned(**options: Any) -> nn.Module:
    return planned_gpt(**options).double()


def model_of(values_grad: str, **options: Any) -> nn.Module:
    return copy.deepcopy(_planned(values_grad=values_grad, **SIZES | options))


def adamw(model: nn.Module, **options: Any) -> Optimizer:
    return AdamW(model.parameters(), **{"lr": 1e-2, "weight_decay": 0.1} | options)


def train(model: nn.Module, optimizer: Optimizer, steps: Iterable[int]) -> nn.Module:
    for step in steps:
        optimizer.zero_grad()
        model(*batch(step)).backward()
        optimizer.step()
    return model


def evaluate(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(batch(99)[0])


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}


def assert_as_dense(training: Training, tolerance: float = 1e-10, **options: Any) -> None:
    """The same training gives the same numbers (tensors, or models) as with values_grad="dense", but for rounding."""
    results = []
    for values_grad in ("sparse", "dense"):
        torch.manual_seed(0)
        result = training(model_of(values_grad, **options))
        results.append(snapshot(result) if isinstance(result, nn.Module) else result)
    torch.testing.assert_close(*results, rtol=0, atol=tolerance)


# --- who steps ----------------------------------------------------------------------------------------------------

ROW_OPTIMIZERS = {
    "AdamW": (AdamW, {}, RowAdamW),
    "fused AdamW": (AdamW, {"fused": True}, RowAdamW),
    "foreach AdamW": (AdamW, {"foreach": True, "maximize": True}, RowAdamW),
    "Adam": (Adam, {}, RowAdamW),
    "SGD": (SGD, {"weight_decay": 0.1}, RowSGD),
    "Adam with coupled weight decay": (Adam, {"weight_decay": 0.1}, None),
    "AMSGrad": (AdamW, {"amsgrad": True}, None),
    "betas whose momentum does not die out": (AdamW, {"betas": (0.95, 0.9)}, None),
    "SGD with momentum": (SGD, {"momentum": 0.9}, None),
    "RMSprop": (torch.optim.RMSprop, {}, None),
    "Adagrad": (Adagrad, {"eps": 1e-6}, None),
    "Adagrad with weight decay": (Adagrad, {"eps": 1e-6, "weight_decay": 0.1}, None),
}


@pytest.mark.parametrize("values_lr", [None, 2e-3])
@pytest.mark.parametrize("name", ROW_OPTIMIZERS)
def test_every_optimizer_trains_as_with_dense_gradients(name, values_lr):
    make, options, kind = ROW_OPTIMIZERS[name]

    def training(model: nn.Module) -> nn.Module:
        optimizer = make(model.parameters(), lr=1e-2, **options)
        scheduler = schedulers.LambdaLR(optimizer, lambda step: 0.8**step)
        for step in range(5):
            train(model, optimizer, [step])
            scheduler.step()
        stepper = pool_of(model).stepper
        if pool_of(model).values_grad == "sparse":
            assert (None if stepper is None else type(stepper.rows)) is kind
        return model

    # A gradient that is zero but for rounding, 1e-17, counts for 1e-17 / eps in Adam.
    assert_as_dense(training, values_lr=values_lr)


def test_sparse_adam_for_the_values_beside_another_optimizer():
    model = model_of("sparse")
    values = SparseAdam([model.memory_values], lr=1.0)
    rest = AdamW([p for name, p in model.named_parameters() if name != "memory_values"])
    model(*batch()).backward()
    before = model.memory_values.detach().clone()
    values.step()
    rest.step()
    assert pool_of(model).stepper is None
    touched = model.memory_values.grad.indices()[0]
    moved = (before - model.memory_values.detach()).abs().amax(1).nonzero()[:, 0]
    assert set(moved.tolist()) <= set(touched.tolist())
    assert 0 < (before - model.memory_values).abs().max() <= 1.01e-3  # values_lr


@pytest.mark.parametrize(
    ("name", "kind"),
    [("row_adamw", RowAdamW), ("lazy_adam", LazyAdam), ("row_wise_adagrad", RowwiseAdagrad), ("row_sgd", RowSGD)],
)
def test_a_chosen_optimizer_steps_as_it_does_alone_and_resumes_bit_for_bit(name, kind):
    model = model_of("sparse", values_optimizer=name, values_lr=None)
    twin = nn.Parameter(model.memory_values.detach().clone())
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    alone = kind([twin], lr=0.1, weight_decay=0.01)
    for step in range(3):
        train(model, optimizer, [step])
        twin.grad = model.memory_values.grad.clone()
        alone.step()
    alone.catch_up(twin)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert torch.equal(model.memory_values, twin)

    resumed = model_of("sparse", values_optimizer=name, values_lr=None, seed=1)
    other = SGD(resumed.parameters(), lr=0.1, weight_decay=0.01)
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert_same(snapshot(train(resumed, other, range(3, 6))), snapshot(train(model, optimizer, range(3, 6))))


def test_the_log_says_once_who_steps(caplog):
    steps._say_dense.cache_clear()
    with caplog.at_level(logging.INFO, "memcompile"):
        model = model_of("sparse")
        caplog.clear()
        train(model, adamw(model), range(3))
        other = torch.optim.RMSprop(model.parameters())
        train(model, other, range(2))
        train(model, other, range(2))
    said = [(r.levelname, r.getMessage()) for r in caplog.records]
    assert [level for level, _ in said] == ["INFO", "WARNING"]
    assert said[0][1] == "RowAdamW steps the memory's values by rows, in AdamW.step()"
    assert "RMSprop" in said[1][1] and "values_optimizer='row_adamw'" in said[1][1]


def test_options_that_change_in_mid_training():
    """Coupled weight decay has no counterpart by rows: rows are brought up to date before the dense step."""

    def training(model: nn.Module) -> nn.Module:
        optimizer = Adam(model.parameters(), lr=1e-2)
        for weight_decay in (0.0, 0.1, 0.0):
            optimizer.param_groups[0]["weight_decay"] = weight_decay
            train(model, optimizer, range(3))
        return model

    assert_as_dense(training)


def test_optimizers_that_take_turns():
    def training(model: nn.Module) -> nn.Module:
        parameters = list(model.parameters())
        turns = [adamw(model), SGD(parameters, lr=0.1, weight_decay=0.1), Adagrad(parameters, lr=1e-2, eps=1e-6)]
        turns.append(SGD(parameters, lr=0.1, momentum=0.9))
        for step in range(9):
            train(model, turns[step % 4], [step])
        return model

    assert_as_dense(training)


def test_lbfgs_goes_on_from_rows_that_are_up_to_date():
    def training(model: nn.Module) -> nn.Module:
        optimizer = adamw(model)
        train(model, optimizer, range(3))
        last = LBFGS(model.parameters(), lr=0.01, max_iter=2)

        def closure() -> Tensor:
            last.zero_grad()
            loss = model(*batch())
            loss.backward()
            return loss

        last.step(closure)
        return train(model, optimizer, range(3, 5))

    assert_as_dense(training)


def test_the_users_own_row_optimizer():
    def training(model: nn.Module) -> nn.Module:
        optimizer = adamw(model)
        if pool_of(model).values_grad == "sparse":
            optimizer = RowAdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        train(model, optimizer, range(3))
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        evaluate(model)
        return train(model, adamw(model), range(3, 5))

    assert_as_dense(training)


# --- groups, rates, closures --------------------------------------------------------------------------------------


def test_values_in_a_group_of_their_own_and_named_parameters():
    def training(model: nn.Module) -> nn.Module:
        rest = [(name, p) for name, p in model.named_parameters() if name != "memory_values"]
        own = [("memory_values", model.memory_values)]
        optimizer = AdamW([{"params": own, "weight_decay": 0.3}, {"params": rest}], lr=1e-2, fused=True)
        train(model, optimizer, range(3))
        assert optimizer.param_groups[0]["param_names"] == ["memory_values"]
        optimizer.param_groups[0].update(lr=1e-3, weight_decay=0.0)
        train(model, optimizer, range(3, 5))
        optimizer.param_groups[0].update(params=[], param_names=[])
        optimizer.add_param_group({"params": own, "betas": (0.5, 0.9)})
        return train(model, optimizer, range(5, 7))

    assert_as_dense(training, values_lr=None)


@pytest.mark.parametrize("values_lr", [None, 2e-3])
def test_a_rate_in_a_tensor(values_lr):
    assert_as_dense(
        lambda model: train(model, adamw(model, lr=torch.tensor(0.01, dtype=torch.float64)), range(4)),
        values_lr=values_lr,
    )


def test_closures_and_steps_that_raise():
    def training(model: nn.Module) -> nn.Module:
        optimizer = adamw(model)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(*batch(seen.append(0) or len(seen)))
            loss.backward()
            if len(seen) == 3:
                raise ValueError
            return loss

        seen: list[int] = []
        for _ in range(5):
            try:
                assert optimizer.step(closure) is not None
            except ValueError:
                assert len(seen) == 3
        return model

    assert_as_dense(training)


def test_an_optimizer_for_each_parameter_that_steps_in_the_backward():
    def training(model: nn.Module) -> nn.Module:
        optimizers = {p: AdamW([p], lr=1e-2) for p in model.parameters()}

        def step(parameter: Tensor) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        for seed in range(4):
            model(*batch(seed)).backward()
        return model

    assert_as_dense(training)


def test_values_that_are_frozen_and_thawed():
    def training(model: nn.Module) -> nn.Module:
        optimizer = adamw(model)
        for frozen in (False, True, False):
            model.memory_values.requires_grad_(not frozen)
            train(model, optimizer, range(3))
        return model

    assert_as_dense(training)


def test_steps_without_a_backward_and_both_ways_to_zero():
    """A gradient of zeros is a step of momentum, one of None is none."""

    def training(model: nn.Module) -> nn.Module:
        optimizer = adamw(model)
        for step in range(8):
            optimizer.zero_grad(set_to_none=step in (4, 5))
            if step not in (2, 5):
                model(*batch(step)).backward()
            optimizer.step()
        return model

    assert_as_dense(training)


def test_an_optimizer_step_inside_torch_compile():
    model, twin = (model_of("sparse") for _ in range(2))
    optimizer, other = (SGD([m.memory_values, m.head.weight], lr=0.1) for m in (model, twin))
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for each, call in ((model, step), (twin, other.step)):
        each(*batch()).backward()
        call()
    torch.testing.assert_close(snapshot(model), snapshot(twin))
    assert type(pool_of(model).stepper.rows) is RowSGD


# --- scaling and clipping -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [None, "norm", "value"])
def test_grad_scaler_and_clipping(fused, clip):
    def training(model: nn.Module) -> nn.Module:
        optimizer, scaler = adamw(model, fused=fused), torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(5):
            optimizer.zero_grad()
            overflow = float("inf") if step == 2 else 1.0
            scaler.scale(overflow * model(*batch(step))).backward()
            if clip is not None:
                scaler.unscale_(optimizer)
            if clip == "norm":
                nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
            if clip == "value":
                nn.utils.clip_grad_value_(model.parameters(), 1e-3)
            before = model.memory_values.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, model.memory_values) == (step == 2)
        assert scaler.get_scale() == 4.0
        return model

    assert_as_dense(training)


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_evaluation_is_dense_trainings_and_changes_no_bit(mode):
    results = []
    for values_grad, evaluates in (("sparse", True), ("dense", True), ("sparse", False)):
        model = model_of(values_grad)
        optimizer, seen = adamw(model), []
        for step in range(5):
            train(model, optimizer, [step])
            if evaluates:
                stored = model.memory_values.detach().clone()
                model.eval()
                with mode():
                    seen.append(model(batch(99)[0]).detach().clone())
                model.train()
                assert torch.equal(stored, model.memory_values)
        results.append((seen, snapshot(model)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-10)
    assert_same(results[0][1], results[2][1])


def test_rows_are_behind_so_that_the_tests_above_are_of_something():
    model, dense = model_of("sparse"), model_of("dense")
    optimizer = adamw(model)
    train(model, optimizer, range(4))
    train(dense, adamw(dense), range(4))
    assert (model.memory_values - dense.memory_values).abs().max() > 1e-4
    model.state_dict()
    torch.testing.assert_close(model.memory_values, dense.memory_values, rtol=0, atol=1e-10)


def test_torch_func_reads_rows_that_are_up_to_date():
    def training(model: nn.Module) -> list[Tensor]:
        optimizer = adamw(model)
        train(model, optimizer, range(3))
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, parameters, batch(9))

        first = torch.func.grad(loss)(parameters)
        train(model, optimizer, range(3, 5))
        return [*first.values(), loss(parameters), *snapshot(train(model, optimizer, range(5, 7))).values()]

    assert_as_dense(training)


def test_a_program_that_is_exported_in_mid_training():
    def training(model: nn.Module) -> list[Tensor]:
        optimizer = adamw(model)
        train(model, optimizer, range(4))
        program = torch.export.export(model, (batch(99)[0],))
        read = [program.state_dict["memory_values"].detach().clone(), program.module()(batch(99)[0]).detach()]
        return [*read, *snapshot(train(model, optimizer, range(4, 6))).values()]

    assert_as_dense(training)


def test_a_memory_that_is_drawn_anew_in_mid_training():
    def training(model: nn.Module) -> nn.Module:
        optimizer = adamw(model)
        train(model, optimizer, range(4))
        memcompile.reset_parameters(model)
        return train(model, optimizer, range(4, 6))

    assert_as_dense(training)


def test_a_penalty_on_the_values():
    """Read whole in each step, the rows are never behind."""

    def training(model: nn.Module) -> nn.Module:
        optimizer = adamw(model)
        for step in range(4):
            optimizer.zero_grad()
            (model(*batch(step)) + 0.1 * model.memory_values.square().sum()).backward()
            assert not model.memory_values.grad.is_sparse
            optimizer.step()
        return model

    assert_as_dense(training)


def test_saving_between_forward_and_backward():
    def training(model: nn.Module) -> nn.Module:
        optimizer = adamw(model)
        train(model, optimizer, range(3))
        optimizer.zero_grad()
        loss = model(*batch(9))
        model.state_dict()
        optimizer.state_dict()
        loss.backward()
        optimizer.step()
        return model

    assert_as_dense(training)


def test_a_backward_after_a_step_that_changed_what_its_forward_read():
    model = model_of("sparse")
    optimizer, loss = adamw(model), model(*batch())
    train(model, optimizer, [1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("what", ["saves", "reads after loading"])
def test_inference_mode_leaves_nothing_that_training_cannot_use(what):
    def training(model: nn.Module) -> nn.Module:
        optimizer = adamw(model)
        scheduler = schedulers.LambdaLR(optimizer, lambda step: 0.9**step)
        for step in range(6):
            train(model, optimizer, [step])
            scheduler.step()
            if step == 2:
                if what != "saves":
                    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                with torch.inference_mode():
                    model(batch(99)[0])
                    model.state_dict()
        return model

    assert_as_dense(training, values_lr=None)


# --- copies -------------------------------------------------------------------------------------------------------


def through_pickle(what: Any) -> Any:
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, lambda what: pickle.loads(pickle.dumps(what))])
def test_a_copy_of_a_model_in_mid_training(copied):
    def training(model: nn.Module) -> list[Tensor]:
        optimizer = adamw(model)
        train(model, optimizer, range(4))
        alone = copied(model)
        both, its_optimizer = copied((model, optimizer))
        assert type(pool_of(alone).stepper) is type(None)
        inside = copied(nn.Sequential(model))
        read = [evaluate(alone), evaluate(inside[0]), alone.memory_values.detach().clone()]
        train(alone, adamw(alone), range(4, 6))
        train(both, its_optimizer, range(4, 6))
        train(model, optimizer, range(4, 6))
        assert_same(snapshot(both), snapshot(model))
        return [*read, *snapshot(alone).values(), *snapshot(model).values()]

    assert_as_dense(training)


# --- checkpoints --------------------------------------------------------------------------------------------------


def states(model: nn.Module, optimizer: Optimizer) -> tuple[dict, dict]:
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


@pytest.mark.parametrize("order", ["model", "optimizer", "model, optimizer", "optimizer, model", "distributed", "none"])
def test_loading_in_mid_training(order):
    def training(model: nn.Module) -> nn.Module:
        optimizer = adamw(model)
        train(model, optimizer, range(3))
        saved = copy.deepcopy(get_state_dict(model, optimizer)) if order == "distributed" else states(model, optimizer)
        train(model, optimizer, range(3, 6))
        if order == "distributed":
            set_state_dict(model, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1])
        for part in order.split(", "):
            if part == "model":
                model.load_state_dict(saved[0])
            if part == "optimizer":
                optimizer.load_state_dict(saved[1])
        if order == "none":
            optimizer.state.clear()
        return train(model, optimizer, range(6, 8))

    assert_as_dense(training)


@pytest.mark.parametrize("make", [adamw, lambda model: SGD(model.parameters(), lr=0.1, weight_decay=0.1)])
def test_dense_and_sparse_training_read_each_others_checkpoints(make):
    trained, results = [], []
    for values_grad in ("sparse", "dense"):
        model = model_of(values_grad)
        optimizer = make(model)
        train(model, optimizer, range(3))
        trained.append(states(model, optimizer))
    for values_grad, (weights, state) in zip(("dense", "sparse"), trained, strict=True):
        model = model_of(values_grad, seed=1)
        optimizer = make(model)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        results.append(snapshot(train(model, optimizer, range(3, 6))))
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)
    layouts = [{name: value.shape for name, value in state["state"].get(0, {}).items()} for _, state in trained]
    assert layouts[0] == layouts[1] | {"step": torch.Size([])}, "memory_values are the first parameter"


@pytest.mark.parametrize("old", ["alive", "deleted"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_new_optimizer_in_mid_training(old, assign):
    """Values that are assigned are other parameters, which a new optimizer must be given."""

    def training(model: nn.Module) -> list[Tensor]:
        optimizer = adamw(model)
        train(model, optimizer, range(4))
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
        kept = [optimizer] if old == "alive" else []
        del optimizer
        gc.collect()
        read, new = evaluate(model), adamw(model)
        train(model, new, range(4, 7))
        for optimizer in kept:
            train(model, optimizer, [7])
        return [read, *snapshot(train(model, new, [8])).values()]

    assert_as_dense(training)


def test_an_optimizer_that_is_collected_while_something_is_traced():
    def training(model: nn.Module) -> nn.Module:
        optimizer = adamw(model)
        train(model, optimizer, range(3))
        with FakeTensorMode():
            del optimizer
            gc.collect()
        assert pool_of(model).stepper is None
        return model

    assert_as_dense(training)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_bf16_models(state_dtype):
    model = planned_gpt(values_grad="sparse", values_state_dtype=state_dtype, values_lr=None, **SIZES).bfloat16()
    optimizer = adamw(model)
    first = model(*batch()).item()
    train(model, optimizer, [0] * 12)
    assert model(*batch()).item() < first - 1
    assert optimizer.state[model.memory_values]["exp_avg"].dtype is getattr(torch, state_dtype)
    assert model.memory_values.dtype is model.memory_values.grad.dtype is torch.bfloat16


def test_a_cast_in_mid_training():
    def training(model: nn.Module) -> list[Tensor]:
        optimizer = adamw(model)
        train(model, optimizer, range(3))
        read = evaluate(model.float())
        state = copy.deepcopy(optimizer.state_dict())
        values = model.memory_values.detach().clone()
        optimizer = adamw(model)
        optimizer.load_state_dict(copy.deepcopy(state))
        train(model, optimizer, range(3, 5))
        assert optimizer.state[model.memory_values]["exp_avg"].dtype is torch.float32
        return [read, values, state["state"][0]["exp_avg"].float()]

    assert_as_dense(training, tolerance=1e-5)


def test_two_models_in_one_optimizer():
    results = []
    for values_grad in ("sparse", "dense"):
        models = [model_of(values_grad), model_of(values_grad, seed=1, values_lr=1e-2)]
        optimizer = AdamW([p for model in models for p in model.parameters()], lr=1e-2)
        for step in range(4):
            optimizer.zero_grad()
            sum(model(*batch(step + i)) for i, model in enumerate(models) if step != i).backward()
            optimizer.step()
        results.append([snapshot(model) for model in models])
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)


# --- random training ----------------------------------------------------------------------------------------------

ACTIONS = ("step", "step", "step", "accumulate", "skip", "clip", "zero", "schedule", "evaluate", "save", "load", "new")


class Loop:
    """A training of one model that can do all ACTIONS."""

    def __init__(self, values_grad: str, values_lr: float | None, sgd: bool) -> None:
        self.model, self.sgd, self.batch = model_of(values_grad, values_lr=values_lr, memory_layers=1), sgd, 0
        self.seen: list[Tensor] = []
        self.new()
        self.save()

    def new(self) -> None:
        make = SGD if self.sgd else AdamW
        self.optimizer = make(self.model.parameters(), lr=1e-2, weight_decay=0.1)
        self.scheduler = schedulers.LambdaLR(self.optimizer, lambda step: 0.7**step)

    def backward(self) -> None:
        self.batch += 1
        self.model(*batch(self.batch, size=1)).backward()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.backward()
        self.optimizer.step()

    def accumulate(self) -> None:
        self.backward()
        self.optimizer.step()

    def skip(self) -> None:
        self.optimizer.zero_grad()
        self.backward()

    def clip(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()

    def zero(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)

    def schedule(self) -> None:
        self.scheduler.step()

    def evaluate(self) -> None:
        self.seen.append(evaluate(self.model))

    def save(self) -> None:
        parts = (self.model, self.optimizer, self.scheduler)
        self.saved = copy.deepcopy([part.state_dict() for part in parts])

    def load(self) -> None:
        for part, state in zip((self.model, self.optimizer, self.scheduler), copy.deepcopy(self.saved), strict=True):
            part.load_state_dict(state)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@settings(deadline=None, max_examples=15, derandomize=True, database=None)
@given(
    actions=st.lists(st.sampled_from(ACTIONS), min_size=4, max_size=16),
    values_lr=st.sampled_from([None, 2e-3]),
    sgd=st.booleans(),
)
def test_random_training_is_that_of_dense_gradients(actions, values_lr, sgd):
    loops = [Loop(values_grad, values_lr, sgd) for values_grad in ("sparse", "dense")]
    for loop in loops:
        for action in [*actions, "evaluate"]:
            getattr(loop, action)()
    sparse, dense = ((loop.seen, snapshot(loop.model)) for loop in loops)
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-10)


# --- optimizers and dtypes without a counterpart ----------------------------------------------------------------------


@pytest.mark.parametrize("build", [torch.optim.Adafactor, torch.optim.Adagrad, torch.optim.RMSprop])
@pytest.mark.parametrize("name", ["row_adamw", "row_wise_adagrad"])
def test_any_optimizer_may_have_its_values_stepped_by_rows(build, name):
    """Options of the same name that mean something else, and state that it began with, are not taken over."""
    model = planned_gpt(values_grad="sparse", values_optimizer=name, n_keys=16)
    optimizer = build(model.parameters(), lr=1e-3)
    before = model.state_dict()["memory_values"].clone()
    for step in range(3):
        optimizer.zero_grad()
        model(*batch(step)).backward()
        optimizer.step()
    moved = (model.state_dict()["memory_values"] - before).abs()
    assert 0 < moved.max() < 0.1
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    model(*batch(3)).backward()
    optimizer.step()


def test_halved_after_training():
    """fp16 is not stepped by rows: what they missed is made up for in fp32, and the gradient is dense from then on."""
    model, twin = (planned_gpt(values_grad=gradient, n_keys=16) for gradient in ("sparse", "dense"))
    for each in (model, twin):
        optimizer = AdamW(each.parameters(), lr=1e-2, weight_decay=0.1)
        for step in range(4):
            optimizer.zero_grad()
            each(*batch(step)).backward()
            optimizer.step()
        each.half()
    torch.testing.assert_close(model.state_dict()["memory_values"], twin.memory_values.detach(), rtol=2**-9, atol=1e-6)
    assert model.half()(*batch(9)).isfinite()
