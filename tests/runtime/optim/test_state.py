"""State: saved and loaded in the middle bit for bit, copied, pickled; closures, schedulers, hooks, groups of memory."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, SparseAdam
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from memcompile.errors import OptionError
from memcompile.lowering.update.rate_history import RateHistory
from memcompile.runtime.optim import LazyAdam, RowAdamW, RowSGD, RowwiseAdagrad
from memcompile.runtime.pool import pool_of
from tests.planned import batch, planned_gpt
from tests.runtime.optim.sequences import Sequence, sequences
from tests.tolerance import largest_error

MAKERS = {
    "RowAdamW": RowAdamW,
    "LazyAdam": LazyAdam,
    "RowwiseAdagrad": RowwiseAdagrad,
    "RowSGD": RowSGD,
}
FORMS = {
    "fp32": (torch.float32, {}),
    "fp64": (torch.float64, {}),
    "bf16": (torch.bfloat16, {"seed": 5}),
    "bf16 with masters": (torch.bfloat16, {"master_weights": True}),
}


def steps(optimizer, parameter, run):
    for gradient, lr in run:
        optimizer.param_groups[0]["lr"] = lr
        parameter.grad = gradient
        optimizer.step()


def through_a_file(tree):
    file = io.BytesIO()
    torch.save(tree, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=5, deadline=None)
@given(sequence=sequences(steps=60), at=st.integers(0, 60), lower=st.booleans())
def test_save_and_load_in_the_middle(name, form, sequence, at, lower):
    dtype, options = FORMS[form]
    options = {**options, "weight_decay": sequence.weight_decay}
    if name in ("RowAdamW", "LazyAdam") and lower and form != "fp64":
        options["state_dtype"] = torch.bfloat16
    parameter = nn.Parameter(sequence.initial(dtype))
    optimizer = MAKERS[name]([parameter], **options)
    run = list(sequence.gradients(dtype))
    steps(optimizer, parameter, run[:at])
    values, saved = through_a_file([parameter.detach(), optimizer.state_dict()])
    again = nn.Parameter(values)
    restored = MAKERS[name]([again])
    restored.load_state_dict(saved)
    for one, its in ((optimizer, parameter), (restored, again)):
        steps(one, its, run[at:])
        if hasattr(one, "flush"):
            one.flush(its)
    assert torch.equal(parameter, again)
    first, second = optimizer.state_dict(), restored.state_dict()
    assert first["param_groups"] == second["param_groups"]
    for key, value in first["state"].get(0, {}).items():
        other = second["state"][0][key]
        assert torch.equal(value, other) and value.dtype == other.dtype if torch.is_tensor(value) else value == other


def test_saving_changes_nothing():
    sequence = Sequence(0, 40, 20, 3, "constant", 0.1)
    results = []
    for saves in (False, True):
        parameter = nn.Parameter(sequence.initial(torch.float32))
        optimizer = RowAdamW([parameter])
        for gradient, _ in sequence.gradients(torch.float32):
            parameter.grad = gradient
            optimizer.step()
            if saves:
                optimizer.state_dict()
        results.append(parameter)
    assert torch.equal(*results)


@pytest.mark.parametrize("name", MAKERS)
def test_copies_and_pickles(name):
    sequence = Sequence(2, 40, 20, 3, "warm-up and cosine", 0.1)
    run = list(sequence.gradients(torch.float32))
    parameter = nn.Parameter(sequence.initial(torch.float32))
    optimizer = MAKERS[name]([parameter], weight_decay=0.1)
    steps(optimizer, parameter, run[:20])
    parameter.grad = None
    others = copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))
    steps(optimizer, parameter, run[20:])
    for other in others:
        (same,) = other.param_groups[0]["params"]
        steps(other, same, run[20:])
        assert torch.equal(same, parameter)


def test_closures_hooks_and_schedulers():
    parameter = nn.Parameter(torch.ones(5, 2))
    other = nn.Parameter(torch.ones(4, 2))
    optimizer = RowAdamW([{"params": [parameter], "lr": 0.1}, {"params": [other], "weight_decay": 0.0}], lr=0.01)
    scheduler = LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append([group["lr"] for group in optimizer.param_groups]))

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.embedding(torch.tensor([1, 3]), parameter, sparse=True).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        assert optimizer.step(closure).requires_grad
        scheduler.step()
    assert seen == [[0.1, 0.01], [0.05, 0.005]]
    assert list(optimizer.state) == [parameter]
    assert len(RateHistory(optimizer.state[parameter]["history"])) == 2


def test_learning_rate_in_a_tensor():
    parameter = nn.Parameter(torch.ones(5, 2, dtype=torch.float64))
    same = nn.Parameter(torch.ones(5, 2, dtype=torch.float64))
    optimizers = [
        RowAdamW([parameter], lr=torch.tensor(0.1, dtype=torch.float64)),
        RowAdamW([same], lr=0.1),
    ]
    schedulers = [CosineAnnealingLR(optimizer, 20) for optimizer in optimizers]
    for step in range(20):
        for p, optimizer, scheduler in zip((parameter, same), optimizers, schedulers, strict=True):
            p.grad = torch.sparse_coo_tensor(torch.tensor([[step % 4]]), torch.ones(1, 2).double(), (5, 2))
            optimizer.step()
            scheduler.step()
    torch.testing.assert_close(parameter, same)


@pytest.mark.parametrize("name", MAKERS)
def test_goes_on_from_pytorch(name):
    """A run of PyTorch's own optimizer, saved and continued by rows."""
    pytorch = {"RowAdamW": AdamW, "LazyAdam": SparseAdam, "RowwiseAdagrad": Adagrad, "RowSGD": SGD}[name]
    sequence = Sequence(6, 80, 20, 1 if name == "RowwiseAdagrad" else 3, "constant", 0.1)
    run = list(sequence.gradients(torch.float64))
    dense = nn.Parameter(sequence.initial(torch.float64))
    options = {} if name == "LazyAdam" else {"eps": 1e-8} if name == "RowwiseAdagrad" else {"weight_decay": 0.1}
    reference = pytorch([dense], **options)

    def go_on(part):
        steps(reference, dense, [(g if name == "LazyAdam" else g.to_dense(), lr) for g, lr in part])

    go_on(run[:40])
    ours = nn.Parameter(dense.detach().clone())
    optimizer = MAKERS[name]([ours])
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    go_on(run[40:])
    steps(optimizer, ours, run[40:])
    if hasattr(optimizer, "flush"):
        optimizer.flush(ours)
    assert largest_error(ours, dense) <= 1e-12


def test_what_was_saved_may_be_refused():
    parameter = nn.Parameter(torch.zeros(3, 2))
    for ours, theirs, message in (
        (RowAdamW([parameter]), AdamW([parameter], amsgrad=True), "amsgrad"),
        (LazyAdam([parameter]), AdamW([parameter], amsgrad=True), "amsgrad"),
        (RowSGD([parameter]), SGD([parameter], momentum=0.9), "momentum"),
    ):
        with pytest.raises(OptionError, match=message):
            ours.load_state_dict(theirs.state_dict())


def test_a_state_of_another_optimizer_is_refused():
    parameter = nn.Parameter(torch.zeros(3, 2))
    parameter.grad = torch.ones(3, 2)
    saved = {}
    for make in (SGD, RowSGD, Adagrad, RowwiseAdagrad, AdamW, RowAdamW):
        optimizer = make([parameter], eps=1e-8) if make is Adagrad else make([parameter])
        optimizer.step()
        saved[make] = {"state": optimizer.state_dict()["state"]}
    for ours, others, message in (
        (RowAdamW([parameter]), (SGD, RowSGD, Adagrad, RowwiseAdagrad), "row_adamw: it has no exp_avg, exp_avg_sq"),
        (LazyAdam([parameter]), (SGD, RowSGD, Adagrad, RowwiseAdagrad), "lazy_adam: it has no exp_avg, exp_avg_sq"),
        (RowwiseAdagrad([parameter]), (RowSGD, AdamW, RowAdamW), "row_wise_adagrad: it has no sum"),
    ):
        for other in others:
            state = saved[other] | {"param_groups": ours.state_dict()["param_groups"]}
            if state["state"]:  # SGD of PyTorch has none
                with pytest.raises(OptionError, match=f"the state is of another optimizer than {message}"):
                    ours.load_state_dict(state)
    wrong = copy.deepcopy(saved[RowwiseAdagrad]["state"])
    wrong[0]["sum"] = torch.zeros(2)
    ours = RowwiseAdagrad([parameter])
    with pytest.raises(OptionError, match=r"sum: expected one number a row, \[3\]; got \[2\]"):
        ours.load_state_dict({"state": wrong, "param_groups": ours.state_dict()["param_groups"]})


def test_a_state_that_is_refused_changes_nothing():
    """Also of another number of rows, and of an optimizer that has no state of its parameters."""
    small, large = (nn.Parameter(torch.zeros(rows, 2)) for rows in (3, 4))
    small.grad, large.grad = torch.ones(3, 2), torch.ones(4, 2)
    for make in (RowAdamW, LazyAdam, RowwiseAdagrad, lambda p: RowSGD(p, weight_decay=0.1)):
        ours, theirs = make([small]), make([large])
        ours.step()
        theirs.step()
        before = copy.deepcopy(ours.state_dict())
        for state, message in (
            (theirs.state_dict(), r"of another parameter: \w+: expected .*3.*; got \[4"),
            ({**theirs.state_dict(), "param_groups": [{"params": [0], "lr": -1.0}]}, "lr|betas|eps"),
        ):
            with pytest.raises(OptionError, match=message):
                ours.load_state_dict(state)
            assert ours.state_dict()["param_groups"] == before["param_groups"]
            torch.testing.assert_close(ours.state_dict()["state"], before["state"], rtol=0, atol=0)
    for ours in (RowAdamW([small]), LazyAdam([small])):
        with pytest.raises(OptionError, match=r"of another optimizer than .*: it has no betas"):
            ours.load_state_dict(SGD([small]).state_dict())
    adamw = AdamW([small])
    adamw.step()
    with pytest.raises(OptionError, match="of another optimizer than row_sgd: it has exp_avg"):
        RowSGD([small]).load_state_dict(adamw.state_dict())


def test_a_step_and_a_flush_of_wrong_tensors_change_nothing():
    first, second = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    optimizer = RowAdamW([first, second])
    first.grad, second.grad = torch.ones(3, 2), torch.ones(3, 2).to_sparse(2)
    with pytest.raises(ValueError, match="2 sparse dimensions"):
        optimizer.step()
    assert torch.equal(first, torch.ones(3, 2)) and not optimizer.state
    for rows in (torch.tensor([0.5]), torch.tensor([True])):
        with pytest.raises(OptionError, match="rows: expected int32 or int64"):
            optimizer.flush(first, rows)
    with pytest.raises(OptionError, match="not in this optimizer"):
        optimizer.flush(torch.ones(3, 2))


def test_sums_of_elements_become_their_mean_over_a_row():
    """The sum of a row's mean squares is the mean of its elements' sums: PyTorch's Adagrad goes on as FBGEMM's."""
    sequence = Sequence(7, 60, 20, 5, "constant", 0.0)
    run = list(sequence.gradients(torch.float64))
    dense, ours = (nn.Parameter(sequence.initial(torch.float64)) for _ in range(2))
    elementwise, by_row = Adagrad([dense], eps=1e-8, initial_accumulator_value=0.1), RowwiseAdagrad([ours])
    by_row.param_groups[0]["initial_accumulator_value"] = 0.1
    steps(elementwise, dense, [(gradient.to_dense(), lr) for gradient, lr in run])
    steps(by_row, ours, run)
    restored = RowwiseAdagrad([dense])
    restored.load_state_dict(copy.deepcopy(elementwise.state_dict()))
    found, expected = restored.state[dense], by_row.state[ours]
    assert found["sum"].shape == (20,) and found["step"] == expected["step"] == 60
    torch.testing.assert_close(found["sum"], expected["sum"], rtol=1e-12, atol=0)


def test_scaled_gradients():
    """GradScaler divides sparse gradients, and skips a step whose gradients overflow."""
    parameter = nn.Parameter(torch.ones(5, 2))
    optimizer = RowAdamW([parameter], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        loss = nn.functional.embedding(torch.tensor([1, 1]), parameter, sparse=True).sum() * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.state[parameter]["step"] == 2 and parameter.isfinite().all()
    assert optimizer.state[parameter]["exp_avg"][1].tolist() == pytest.approx([0.38, 0.38])


def test_memory_values_step_by_their_own_rate():
    """The values of a planned model learn at `values_lr`, whatever the rate of the group that holds them."""
    moved = []
    for lr, options in ((0.5, {"values_lr": 1e-3}), (1e-3, {"values_lr": None})):
        model = planned_gpt(**options)
        values = pool_of(model).values
        before = values.detach().clone()
        optimizer = RowAdamW([values], lr=lr)
        model(*batch()).backward()
        optimizer.step()
        moved.append(values.detach() - before)
        assert [group["lr"] for group in optimizer.param_groups] == [lr]
    assert moved[0].any() and torch.equal(*moved)


def test_in_place_changes_are_seen_by_autograd():
    parameter = nn.Parameter(torch.ones(5, 2))
    optimizer = RowSGD([parameter])
    loss = parameter.square().sum()
    parameter.grad = torch.ones(5, 2).to_sparse(1)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
