"""The operators that update rows in place: `opcheck`, what they refuse, rows that they must not touch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memcompile.lowering import operator
from memcompile.lowering.gather import row_sums
from memcompile.lowering.update import row_adagrad, row_adam, row_sgd
from memcompile.lowering.update.missed_steps import factors_of_step, missed_steps
from memcompile.lowering.update.rate_history import RateHistory
from tests.tolerance import assert_as_accurate

FORMS = {  # values, rounded, state
    "fp32": (torch.float32, False, torch.float32),
    "fp64": (torch.float64, False, torch.float64),
    "bf16": (torch.bfloat16, False, torch.float32),
    "masters": (torch.float32, True, torch.float32),
    "bf16 state": (torch.float32, False, torch.bfloat16),
    "all bf16": (torch.bfloat16, False, torch.bfloat16),
}
KERNELS = {"row_adam": row_adam._kernel, "row_adagrad": row_adagrad._kernel, "row_sgd": row_sgd._kernel}
NAMES = sorted(KERNELS)
ROWS_AT = {"row_adam": 4, "row_adagrad": 3, "row_sgd": 2}  # which argument


def arguments(name, form="fp32", count=5, dim=21, slots=40, seed=0, grad=True, lags=True, decoupled=True):
    """Arguments of the operator, with rows of different lags."""
    dtype, copied, state = FORMS[form]
    sums = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(seed)

    def table(kind, width=dim):
        return torch.randn(slots, width, generator=generator, dtype=torch.float64).to(kind)

    values = table(dtype)
    rounded = values.bfloat16() if copied else None
    rows = torch.randperm(slots, generator=generator)[:count]
    gradient = torch.randn(count, dim, generator=generator, dtype=torch.float64).to(sums) if grad else None
    if name == "row_sgd":
        decays = torch.rand(count, generator=generator, dtype=torch.float64) if lags else None
        return [values, rounded, rows, gradient, decays, 0.1, 77]
    if name == "row_adagrad":
        squares = table(sums, 1)[:, 0].square().contiguous()
        return [values, rounded, squares, rows, gradient, 0.1, 1e-8, 0.3, decoupled, 77]
    history = RateHistory.new(0)
    for _ in range(300):
        history.record(1e-2, factors_of_step(1e-2, 0.1, (0.9, 0.999)))
    last = torch.randint(0, 301, (count,), generator=generator, dtype=torch.int32)
    missed = missed_steps(history, last, 300, sums) if lags else None
    parts = (missed.plan_of_row, missed.decays, missed.panels) if missed else (None, None, None)
    numbers = torch.tensor([0.999, 0.9, 0.999, 1e-2, 2.0, 1e-8], dtype=torch.float64)
    moments = table(state), table(state).square()
    return [values, rounded, *moments, rows, gradient, *parts, numbers, 77]


def changed(name, run, args):
    """The tables after a run on copies."""
    args = [a.clone() if torch.is_tensor(a) else a for a in args]
    run(*args)
    return tables_of(name, args)


def tables_of(name, args):
    """The tables that the operator updates, in order: values, their copy, state."""
    return [table for table in args[: ROWS_AT[name]] if table is not None]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, form):
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(operator(name), arguments(name, form), test_utils=tests)


def assert_updates(name, run, args, nearest=True):
    """As accurate as the PyTorch operators in the same dtype; bf16 within one of its steps; other rows as they were.

    Args:
        run: the operator, or what stands for it, on the CPU's tensors.
        nearest: whether it rounds the bf16 copy to nearest, as all devices do; Triton's interpreter cuts.
    """
    before = [a.clone() for a in args if torch.is_tensor(a)]
    actual = changed(name, run, args)
    plain = changed(name, KERNELS[name], args)
    exact = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in args]
    exact = changed(name, KERNELS[name], [exact[0], None, *exact[2:]])
    rows = args[ROWS_AT[name]]
    others = torch.ones(len(args[0]), dtype=torch.bool)
    others[rows] = False
    if args[1] is not None:
        values, copy = actual[:2]
        if nearest:
            assert torch.equal(copy, values.bfloat16())
        assert torch.equal(copy[others], args[1][others])
        assert ((copy - values).abs() <= 2**-7 * values.abs()).all()
        actual, plain = [values, *actual[2:]], [plain[0], *plain[2:]]
    tables = tables_of(name, [args[0], None, *args[2:]])
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
    """Decays of 1 leave them bit for bit as they are; a plan without panels multiplies the value."""
    args = arguments("row_adam", form, count=20, grad=False)
    args[7][:, 1:] = 1
    alone = args[6] % 3 == 0
    args[8][::3, :, 1:] = 0
    actual, plain = (changed("row_adam", run, args) for run in (operator("row_adam"), row_adam._kernel))
    assert all(map(torch.equal, actual[-2:], args[2:4])) and all(map(torch.equal, plain[-2:], args[2:4]))
    torch.testing.assert_close(actual[0], plain[0])
    if args[0].dtype is not torch.bfloat16:
        rows, decays = args[4][alone], args[7][args[6][alone], :1].to(args[0].dtype)
        torch.testing.assert_close(actual[0][rows], args[0][rows] * decays)


GRADIENTS = [(form, dtype) for form in FORMS if form != "fp64" for dtype in (torch.float32, torch.bfloat16)]
GRADIENTS += [("fp64", torch.float64), ("fp32", torch.float16)]


@pytest.mark.parametrize(("form", "dtype"), GRADIENTS)
@pytest.mark.parametrize("name", NAMES)
def test_gradient_in_factors(name, form, dtype):
    """Bit for bit what the sums give, in C++ and in PyTorch operators, however many rows are held at once."""
    generator = torch.Generator().manual_seed(1)
    slots = (torch.rand(23, 6, generator=generator) ** 2 * 40).int()
    weights, grad = torch.randn(23, 6, generator=generator), torch.randn(23, 37, generator=generator).to(dtype)
    rows, ends, hits = operator("hits_by_row")(slots, 40)
    args = arguments(name, form, count=len(rows), dim=37)
    at = {"row_adam": 4, "row_adagrad": 3, "row_sgd": 2}[name]
    before, after = [*args[:at], rows], args[at + 2 :]
    factors = [*before, grad, *after, ends, hits, weights]
    torch.library.opcheck(operator(name), factors, test_utils=("test_schema", "test_faketensor"))
    for run, sums in ((operator(name), operator("row_sums")), (KERNELS[name], row_sums._sums)):
        summed = sums(slots, weights, grad, 40)[1].to(torch.promote_types(args[0].dtype, torch.float32))
        expected = changed(name, run, [*before, summed, *after])
        assert all(map(torch.equal, changed(name, run, factors), expected))


def test_factors_in_chunks(monkeypatch):
    args = arguments("row_sgd", count=40)
    slots = torch.arange(40).repeat(3).view(12, 10)
    rows, ends, hits = operator("hits_by_row")(slots, 40)
    args = [*args[:2], rows, torch.randn(12, 21), *args[4:], ends, hits, torch.randn(12, 10)]
    expected = changed("row_sgd", row_sgd._kernel, args)
    monkeypatch.setattr("memcompile.lowering.update.row_tables._CHUNK_ELEMENTS", 7 * 21)
    assert all(map(torch.equal, changed("row_sgd", row_sgd._kernel, args), expected))


@pytest.mark.parametrize("name", NAMES)
def test_refusals(name):
    args = arguments(name)
    at = ROWS_AT[name]

    def refuses(position, value, message):
        wrong = [*args]
        wrong[position] = value
        with pytest.raises((ValueError, RuntimeError), match=message):
            operator(name)(*wrong)

    refuses(0, args[0].half(), "values")
    refuses(0, args[0].t().contiguous().t(), "values")
    refuses(1, args[0], "rounded")
    refuses(1, args[0].bfloat16().t().contiguous().t(), "rounded")
    refuses(at, args[at].int(), "rows")
    refuses(at + 1, args[at + 1][:, 1:], "grad")
    refuses(at + 1, args[at + 1].bfloat16(), "grad")
    rows, ends, hits = operator("hits_by_row")(args[at].view(-1, 1), 40)
    factors = [*args[:at], rows, *args[at + 1 :], ends, hits, torch.ones(5, 1)]
    first = len(args)
    for position, value, message in (
        (first, None, "ends, hits and weights"),
        (first, ends[1:], "ends"),
        (first + 1, hits.int(), "hits"),
        (first + 2, torch.ones(4, 1), "grad"),
        (at + 1, args[at + 1].double(), "grad"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            operator(name)(*factors[:position], value, *factors[position + 1 :])
    if name == "row_adam":
        refuses(2, args[2][:3], "exp_avg")
        refuses(3, args[3].bfloat16(), "exp_avg_sq")
        refuses(6, None, "plan_of_row")
        refuses(7, args[7].float(), "decays")
        refuses(8, args[8][..., 1:], "panels")
        refuses(9, args[9][1:], "numbers")
    elif name == "row_adagrad":
        refuses(2, args[2][1:], "squares")
    else:
        refuses(4, args[4].float(), "decays")


@pytest.mark.parametrize("name", NAMES)
def test_rows_out_of_range(name):
    args = arguments(name)
    at = ROWS_AT[name]
    for wrong in (-1, 40):
        rows = args[at].clone()
        rows[2] = wrong
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            operator(name)(*args[:at], rows, *args[at + 1 :])
