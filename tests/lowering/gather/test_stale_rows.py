"""Rows read as they are after the steps that they missed: against fp64, against `row_adam`, `opcheck`, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memcompile.lowering import operator
from memcompile.lowering.register.kernels import IN_PYTORCH
from tests.lowering.update.test_row_updates import FORMS, arguments
from tests.tolerance import assert_as_accurate

NAMES = ["stale_dot", "stale_gather"]
KERNELS = {name: IN_PYTORCH[name].kernel for name in NAMES}
UNROUNDED = sorted(form for form in FORMS if form != "masters")


def reads(name, form="fp32", tokens=5, hits=9, dim=21, slots=40, seed=0, dtype=torch.int32):
    """Arguments of the operator: rows of all lags, some up to date, some whose moments were never touched."""
    values, _, rows, _, _, *moments, missed_steps, decays, panels, _ = arguments(
        "row_adam", form, slots, dim, slots, seed=seed, grad=False
    )
    first, second = (moment.double() for moment in moments)
    moments[0].copy_(first.clamp(-1, 1) * second.sqrt())  # as in training, so that no single term decides the error
    missed_steps = missed_steps[rows.argsort()]
    panels = torch.where((torch.arange(len(panels)) % 3 == 0).view(-1, 1, 1), 0.0, panels)
    generator = torch.Generator().manual_seed(seed)
    hit = torch.randint(0, slots, (tokens, hits), generator=generator)
    shape = (tokens, hits if name == "stale_gather" else dim)
    other = torch.randn(shape, generator=generator, dtype=torch.float64).to(values.dtype)
    return [values, *moments, hit.to(dtype), other, missed_steps[hit], decays, panels, 1e-8]


@settings(max_examples=50, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    form=st.sampled_from(UNROUNDED),
    tokens=st.sampled_from([0, 20]),
    hits=st.sampled_from([0, 3, 9, 70, 130]),
    dim=st.sampled_from([0, 7, 33, 64, 300]),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_against_fp64(name, form, tokens, hits, dim, seed, dtype):
    args = reads(name, form, tokens, hits, dim, seed=seed, dtype=dtype)
    before = [a.clone() for a in args if torch.is_tensor(a)]
    exact = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    actual = operator(name)(*args)
    expected = KERNELS[name](*exact)
    if form == "fp64":  # the plain mathematics is what is exact here
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
    else:
        assert_as_accurate(actual, KERNELS[name](*args), expected)
    assert all(map(torch.equal, before, [a for a in args if torch.is_tensor(a)]))


@pytest.mark.parametrize("form", ["fp32", "fp64", "bf16 state"])
def test_is_what_catching_up_makes_of_rows(form):
    args = reads("stale_gather", form, tokens=40, hits=1)
    values, exp_avg, exp_avg_sq, slots, weights, missed, decays, panels, eps = args
    read = operator("stale_gather")(*args[:4], torch.ones_like(weights), *args[5:])
    rows, numbers = slots[:, 0].long(), torch.tensor([1, 0, 0, 0, 0, eps], dtype=torch.float64)
    for i, row in enumerate(rows):
        tables = [table.clone() for table in (values, exp_avg, exp_avg_sq)]
        operator("row_adam")(tables[0], None, row[None], None, 0, *tables[1:], missed[i], decays, panels, numbers)
        torch.testing.assert_close(read[i], tables[0][row])


@pytest.mark.parametrize("form", UNROUNDED)
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_threads(name, form):
    args = reads(name, form, tokens=101, hits=13, dim=83)
    before, results = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(operator(name)(*args))
    torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("form", UNROUNDED)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, form):
    args = tuple(reads(name, form))
    torch.library.opcheck(operator(name), args)
    for tensor in args[:3]:
        tensor.requires_grad_()
    torch.library.opcheck(operator(name), args)


@pytest.mark.parametrize("name", NAMES)
def test_refusals(name):
    args = reads(name)
    for position, value, message in (
        (0, args[0].half(), "values"),
        (0, args[0].t().contiguous().t(), "values"),
        (1, args[1][1:], "exp_avg"),
        (2, args[2].bfloat16(), "exp_avg_sq"),
        (3, args[3].short(), "slots"),
        (3, args[3] + 40, "out of range|index"),
        (4, args[4][:, 1:], "weights|grad"),
        (5, args[5].int(), "missed_steps"),
        (5, args[5][:, 1:], "missed_steps"),
        (6, args[6].float(), "decays"),
        (7, args[7][..., 1:], "panels"),
    ):
        with pytest.raises((ValueError, RuntimeError, IndexError), match=message):
            operator(name)(*args[:position], value, *args[position + 1 :])
