"""The operators that update rows in place: `opcheck`, what they refuse, rows that they must not touch."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memcompile.lowering import operator
from memcompile.lowering.register.kernels import IN_PYTORCH
from memcompile.lowering.update.missed_steps import factors_of_step, missed_steps
from memcompile.lowering.update.rate_history import RateHistory
from memcompile.lowering.update.row_adam import RowAdam
from memcompile.lowering.update.row_tables import RowAdagrad, RowSgd
from tests.tolerance import assert_as_accurate

FORMS = {  # param, whether it has a master, state
    "fp32": (torch.float32, False, torch.float32),
    "fp64": (torch.float64, False, torch.float64),
    "bf16": (torch.bfloat16, False, torch.float32),
    "masters": (torch.bfloat16, True, torch.float32),
    "bf16 state": (torch.float32, False, torch.bfloat16),
    "all bf16": (torch.bfloat16, False, torch.bfloat16),
}
UPDATES = {"row_adam": RowAdam, "row_adagrad": RowAdagrad, "row_sgd": RowSgd}
NAMES = sorted(UPDATES)
KERNELS = {name: IN_PYTORCH[name].kernel for name in NAMES}
STATE = {"row_adam": slice(5, 7), "row_adagrad": slice(5, 6), "row_sgd": slice(5, 5)}  # which arguments


def arguments(name, form="fp32", count=5, dim=21, slots=40, seed=0, grad=True, lags=True, decoupled=True):
    """Arguments of the operator, with rows of different lags."""
    dtype, has_master, state = FORMS[form]
    sums = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(seed)

    def table(kind, width=dim):
        return torch.randn(slots, width, generator=generator, dtype=torch.float64).to(kind)

    master = table(torch.float32) if has_master else None
    param = table(dtype) if master is None else master.bfloat16()
    rows = torch.randperm(slots, generator=generator)[:count]
    gradient = torch.randn(count, dim, generator=generator, dtype=torch.float64).to(sums) if grad else None
    first = [param, master, rows, gradient, 77]
    if name == "row_sgd":
        decays = torch.rand(count, generator=generator, dtype=torch.float64) if lags else None
        return [*first, decays, 0.1]
    if name == "row_adagrad":
        squares = table(sums, 1)[:, 0].square().contiguous()
        return [*first, squares, 0.1, 1e-8, 0.3, decoupled]
    history = RateHistory.new(0, 1e-8)
    for _ in range(300):
        history.record(1e-2, factors_of_step(1e-2, 0.1, (0.9, 0.999)))
    last = torch.randint(0, 301, (count,), generator=generator, dtype=torch.int32)
    missed = missed_steps(history, last, 300, sums) if lags else None
    parts = (missed.entries, missed.decays, missed.panels) if missed else (None, None, None)
    numbers = torch.tensor([0.999, 0.9, 0.999, 1e-2, 2.0, 1e-8], dtype=torch.float64)
    moments = table(state), table(state).square()
    return [*first, *moments, *parts, numbers]


def changed(name, run, args):
    """The tables after a run on copies."""
    args = [a.clone() if torch.is_tensor(a) else a for a in args]
    run(*args)
    return tables_of(name, args)


def tables_of(name, args):
    """The tables that the operator updates, in order: the parameter, its master, state."""
    return [table for table in (*args[:2], *args[STATE[name]]) if table is not None]


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_those_of_the_schema(name):
    schema = [argument.name for argument in operator(name)._schema.arguments]
    assert [field.name for field in dataclasses.fields(UPDATES[name])] == schema


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, form, trained):
    args = arguments(name, form)
    if trained:
        args = [a.requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    torch.library.opcheck(operator(name), args)


def assert_updates(name, run, args, nearest=True):
    """As accurate as the PyTorch operators in the same dtype; bf16 within one of its steps; other rows as they were.

    Args:
        run: the operator, or what stands for it, on the CPU's tensors.
        nearest: whether it rounds a master to the nearest bf16, as all devices do; Triton's interpreter cuts.
    """
    before = [a.clone() for a in args if torch.is_tensor(a)]
    actual = changed(name, run, args)
    plain = changed(name, KERNELS[name], args)
    exact = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in args]
    table = exact[0] if exact[1] is None else exact[1]
    exact = changed(name, KERNELS[name], [table, None, *exact[2:]])
    rows = args[2]
    others = torch.ones(len(args[0]), dtype=torch.bool)
    others[rows] = False
    if args[1] is not None:
        copy, master, *_ = actual
        if nearest:
            assert torch.equal(copy, master.bfloat16())
        assert torch.equal(copy[others], args[0][others])
        assert ((copy - master).abs() <= 2**-7 * master.abs()).all()
        actual, plain = actual[1:], plain[1:]
    tables = tables_of(name, args)[args[1] is not None :]
    for result, ours, true, old in zip(actual, plain, exact, tables, strict=True):
        assert torch.equal(result[others], old[others])
        if result.dtype is torch.bfloat16:
            # Rounded with the same bits; where a fp32 rounding differs, one step of bf16 may.
            assert (result != ours).sum() <= 1 + 0.001 * result.numel()
            lost = torch.finfo(torch.float32).eps * true.abs().max() if true.numel() else 0.0  # where terms cancel
            assert ((result.double() - true).abs() <= 2**-7 * true.abs() + lost).all()
        else:
            assert_as_accurate(result, ours, true)
    assert all(torch.equal(a, b) for a, b in zip(before, [a for a in args if torch.is_tensor(a)], strict=True))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    form=st.sampled_from(sorted(FORMS)),
    count=st.integers(0, 30),
    dim=st.sampled_from([0, 1, 7, 16, 33, 64, 100]),
    seed=st.integers(0, 2**32),
    grad=st.booleans(),
    lags=st.booleans(),
    decoupled=st.booleans(),
)
def test_against_fp64(name, form, count, dim, seed, grad, lags, decoupled):
    grad = grad or name == "row_adagrad"
    args = arguments(name, form, count, dim, seed=seed, grad=grad, lags=lags, decoupled=decoupled)
    assert_updates(name, operator(name), args)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_threads(name, form):
    args = arguments(name, form, count=700, dim=83, slots=1000)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(changed(name, operator(name), args))
    torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_adam_may_keep_moments(form):
    """Decays of 1 leave them bit for bit as they are; missed steps without panels multiply the row."""
    args = arguments("row_adam", form, count=20, grad=False)
    missed_steps, decays, panels = args[7:10]
    decays[:, 1:] = 1
    alone = missed_steps % 3 == 0
    panels[::3, :, 1:] = 0
    actual, plain = (changed("row_adam", run, args) for run in (operator("row_adam"), KERNELS["row_adam"]))
    assert all(map(torch.equal, actual[-2:], args[5:7])) and all(map(torch.equal, plain[-2:], args[5:7]))
    torch.testing.assert_close(actual[0], plain[0])
    if args[0].dtype is not torch.bfloat16:
        rows = args[2][alone]
        torch.testing.assert_close(actual[0][rows], args[0][rows] * decays[missed_steps[alone], :1].to(args[0].dtype))


@pytest.mark.parametrize("name", NAMES)
def test_refusals(name):
    args = arguments(name)

    def refuses(position, value, message, args=args):
        wrong = [*args]
        wrong[position] = value
        with pytest.raises((ValueError, RuntimeError), match=message):
            operator(name)(*wrong)

    refuses(0, args[0].half(), "param")
    refuses(0, args[0].t().contiguous().t(), "param")
    refuses(1, args[0], "master")
    refuses(1, args[0].bfloat16(), "master")
    refuses(1, args[0].t().contiguous().t(), "master", arguments(name, "bf16"))
    refuses(1, args[0].double(), "master", arguments(name, "bf16"))
    refuses(2, args[2].int(), "rows")
    refuses(3, args[3][:, 1:], "grad")
    refuses(3, args[3].bfloat16(), "grad")
    if name == "row_adam":
        refuses(5, args[5][:3], "exp_avg")
        refuses(6, args[6].bfloat16(), "exp_avg_sq")
        refuses(7, None, "missed_steps")
        refuses(8, args[8].float(), "decays")
        refuses(9, args[9][..., 1:], "panels")
        refuses(10, args[10][1:], "numbers")
    elif name == "row_adagrad":
        refuses(5, args[5][1:], "squares")
    else:
        refuses(5, args[5].float(), "decays")


@pytest.mark.parametrize("name", NAMES)
def test_rows_out_of_range(name):
    args = arguments(name)
    for wrong in (-1, 40):
        rows = args[2].clone()
        rows[2] = wrong
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            operator(name)(*args[:2], rows, *args[3:])
