"""LazyAdam is SparseAdam, RowwiseAdagrad is FBGEMM's formula and, of one column, Adagrad; RowSGD is SGD."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adagrad, Optimizer, SparseAdam

from memcompile.errors import OptionError
from memcompile.runtime.optim import LazyAdam, RowSGD, RowwiseAdagrad
from tests.runtime.optim.sequences import ExactSequence, Sequence, sequences, train
from tests.tolerance import assert_as_accurate, largest_error

FEW = settings(max_examples=20, deadline=None)


def assert_same(sequence, make, make_plain, dense=False):
    """fp64 to 1e-10, fp32 by the rule of `tests/tolerance.py`."""
    ours, _ = train(sequence, make, torch.float64)
    theirs, _ = train(sequence, make_plain, torch.float64, dense)
    assert largest_error(ours, theirs) <= 1e-10
    sequence = sequence.wide()
    ours, _ = train(sequence, make, torch.float32)
    plain, _ = train(sequence, make_plain, torch.float32, dense)
    exact, _ = train(ExactSequence(**vars(sequence)), make_plain, torch.float64, dense)
    assert_as_accurate(ours, plain, exact, "values")


@FEW
@given(sequences(), st.sampled_from([(0.9, 0.999), (0.0, 0.9)]), st.booleans())
def test_lazy_adam_is_sparse_adam(sequence, betas, maximize):
    options = {"betas": betas, "maximize": maximize}
    assert_same(sequence, lambda p: LazyAdam([p], **options), lambda p: SparseAdam([p], **options))


@FEW
@given(sequences(steps=60))
def test_lazy_adam_decays_touched_rows(sequence):
    class Decayed(SparseAdam):
        def step(self, closure=None):
            group = self.param_groups[0]
            (parameter,) = group["params"]
            rows = parameter.grad.coalesce().indices()[0]
            with torch.no_grad():
                parameter[rows] *= 1 - group["lr"] * sequence.weight_decay
            super().step(closure)

    assert_same(sequence, lambda p: LazyAdam([p], weight_decay=sequence.weight_decay), lambda p: Decayed([p]))


@FEW
@given(sequences(), st.booleans())
def test_row_sgd_is_sgd(sequence, maximize):
    options = {"weight_decay": sequence.weight_decay, "maximize": maximize}
    assert_same(sequence, lambda p: RowSGD([p], **options), lambda p: SGD([p], foreach=False, **options), dense=True)


@FEW
@given(sequences(), st.sampled_from([0.0, 0.1]))
def test_adagrad_of_one_column(sequence, first):
    sequence = Sequence(**{**vars(sequence), "dim": 1})
    options = {"eps": 1e-8, "initial_accumulator_value": first}
    make_plain = lambda p: Adagrad([p], foreach=False, **options)  # noqa: E731
    assert_same(sequence, lambda p: RowwiseAdagrad([p], **options), make_plain, dense=True)


class DenseRowwiseAdagrad(Optimizer):
    """The formula, row by row, in the plainest words; rows whose gradient is all zero were not touched."""

    def step(self, closure=None):
        (group,) = self.param_groups
        (parameter,) = group["params"]
        state = self.state[parameter]
        if not state:
            state["sum"] = torch.zeros(len(parameter), dtype=parameter.dtype)
        lr, decay = group["lr"], group["weight_decay"]
        with torch.no_grad():
            for row in parameter.grad.abs().sum(1).nonzero()[:, 0]:
                x, g = parameter[row], parameter.grad[row]
                if not group["decoupled"]:
                    g = g + decay * x
                state["sum"][row] += (g * g).mean()
                if group["decoupled"]:
                    x *= 1 - lr * decay
                x -= lr / (state["sum"][row].sqrt() + group["eps"]) * g


@FEW
@given(sequences(steps=80), st.booleans())
def test_row_wise_adagrad(sequence, decoupled):
    options = {"lr": 1e-2, "eps": 1e-8, "weight_decay": sequence.weight_decay, "decoupled": decoupled}
    assert_same(
        sequence,
        lambda p: RowwiseAdagrad([p], **options),
        lambda p: DenseRowwiseAdagrad([p], options),
        dense=True,
    )


def test_weight_decay_may_start_late():
    sequence = Sequence(5, 90, 12, 3, "warm-up and cosine", 0.0)

    def change(optimizer, parameter, step):
        optimizer.param_groups[0]["weight_decay"] = 0.3 * (step > 30)

    ours, optimizer = train(sequence, lambda p: RowSGD([p]), torch.float64, after_step=change)
    dense, _ = train(sequence, lambda p: SGD([p]), torch.float64, dense=True, after_step=change)
    assert largest_error(ours, dense) <= 1e-10 and "last_step" in optimizer.state[ours]


def test_without_weight_decay_sgd_has_no_state():
    parameter = nn.Parameter(torch.zeros(3, 2))
    optimizer = RowSGD([parameter])
    parameter.grad = torch.ones(3, 2).to_sparse(1)
    optimizer.step()
    optimizer.flush(parameter)
    assert optimizer.state[parameter] == {"step": 1}


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (RowSGD, {"momentum": 0.9}, "momentum: RowSGD has none"),
        (LazyAdam, {"eps": 0.0}, "eps"),
        (LazyAdam, {"betas": (1.0, 0.9)}, "betas"),
        (RowwiseAdagrad, {"eps": 0.0}, "eps"),
        (RowwiseAdagrad, {"initial_accumulator_value": -1.0}, "initial_accumulator_value"),
        (RowwiseAdagrad, {"lr": -1.0}, "lr: expected 0 or more"),
    ],
)
def test_refusals(make, options, message):
    with pytest.raises(OptionError, match=message):
        make([nn.Parameter(torch.zeros(3, 2))], **options)
