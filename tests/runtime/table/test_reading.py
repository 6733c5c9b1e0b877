"""A table between steps: whoever reads or copies it sees its rows as they are after all steps."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

import memcompile
from memcompile.runtime.pool import pool_of
from tests.planned import assert_same, batch
from tests.runtime.table.stepping import adamw, assert_as_dense, evaluate, model_of, snapshot, stored_values, train

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
                stored = stored_values(model)
                model.eval()
                with mode():
                    seen.append(model(batch(99)[0]).detach().clone())
                model.train()
                assert torch.equal(stored, stored_values(model))
        results.append((seen, snapshot(model)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-10)
    assert_same(results[0][1], results[2][1])


def test_rows_are_behind_so_that_the_tests_above_are_of_something():
    model, dense = model_of("sparse"), model_of("dense")
    optimizer = adamw(model)
    train(model, optimizer, range(4))
    train(dense, adamw(dense), range(4))
    assert (stored_values(model) - dense.memory_values).abs().max() > 1e-4
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
        row_state = pool_of(alone).table.row_state(alone.memory_values)
        assert all(tensor.numel() == 0 for tensor in row_state[1:]), "its rows miss nothing"
        inside = copied(nn.Sequential(model))
        read = [evaluate(alone), evaluate(inside[0]), alone.memory_values.detach().clone()]
        train(alone, adamw(alone), range(4, 6))
        train(both, its_optimizer, range(4, 6))
        train(model, optimizer, range(4, 6))
        assert_same(snapshot(both), snapshot(model))
        return [*read, *snapshot(alone).values(), *snapshot(model).values()]

    assert_as_dense(training)
