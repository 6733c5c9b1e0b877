"""The kernels that update rows in place against the PyTorch operators and fp64: the tests of the CPU's once more."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memcompile.lowering import operator
from memcompile.lowering.triton import launch
from memcompile.lowering.update.stochastic_rounding import round_rows
from tests.lowering.update.test_row_updates import FORMS, NAMES, arguments, assert_updates, changed, tables_of

KERNEL_OF = {"row_adam": "update_adam", "row_adagrad": "update_adagrad", "row_sgd": "update_sgd"}


@given(
    name=st.sampled_from(NAMES),
    form=st.sampled_from(sorted(FORMS)),
    count=st.integers(0, 9),
    dim=st.sampled_from([0, 1, 7, 33, 64, 100]),
    seed=st.integers(0, 2**32),
    grad=st.booleans(),
    lags=st.booleans(),
    decoupled=st.booleans(),
)
def test_against_fp64(name, form, count, dim, seed, grad, lags, decoupled):
    grad = grad or name == "row_adagrad"
    args = arguments(name, form, count, dim, seed=seed, grad=grad, lags=lags, decoupled=decoupled)
    assert_updates(name, operator(name), args, nearest=False)


@pytest.mark.parametrize("form", ["fp32", "fp64", "all bf16"])
@pytest.mark.parametrize(("name", "dim"), [("row_adam", 1100), ("row_adagrad", 1100), ("row_adagrad", 5000)])
def test_rows_of_several_blocks(name, dim, form):
    assert_updates(name, operator(name), arguments(name, form, 3, dim, slots=9), nearest=False)


def test_it_was_triton(launched):
    for name in NAMES:
        changed(name, operator(name), arguments(name))
        changed(name, operator(name), arguments(name, count=0))
    assert launched == [KERNEL_OF[name] for name in NAMES]


@pytest.mark.parametrize("seed", [0, 1, 77, 2**31, 2**32 - 1, 2**40 + 5])
def test_the_bits_of_stochastic_rounding(seed):
    """A step of nothing: what the fp32 values are rounded to is a matter of the hash alone."""
    rows = torch.tensor([5, 0, 2**16 + 3])
    values = torch.zeros(2**16 + 9, 70, dtype=torch.bfloat16)
    grad = -torch.randn(3, 70, generator=torch.Generator().manual_seed(1))
    grad[0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    operator("row_sgd")(values, None, rows, grad, seed, None, 1.0)
    torch.testing.assert_close(values[rows], round_rows(-grad, rows, seed, 0), rtol=0, atol=0, equal_nan=True)


def test_how_many_panels_an_entry_has():
    """Up to the last that has a moment, whichever."""
    panels = torch.zeros(4, 3, 8, dtype=torch.float64)
    panels[:, :, 0] = 1.0  # centres
    panels[1, 0, 1] = panels[2, 1, 7] = panels[3, 0, 1] = panels[3, 2, 4] = 1e-300
    assert launch._panel_counts(panels).tolist() == [0, 1, 2, 3]
    assert launch._panel_counts(panels[:, :0]).tolist() == [0, 0, 0, 0]
    assert launch._panel_counts(panels[:, :1]) is None and launch._panel_counts(None) is None


@pytest.mark.parametrize("panels", [0, 1, 2, 5])
def test_any_number_of_panels(panels):
    """Those at the end without moments add nothing; one without them between others has its place."""
    args = arguments("row_adam", count=9)
    args[9] = args[9][:, :panels].clone()  # [entries, panels, 8]
    args[9][::2, panels // 2 :] = 0
    args[9][1::2, :1, 1:] = 0
    assert_updates("row_adam", operator("row_adam"), args)


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_the_table_does_not_have_are_left_out(name):
    args = arguments(name)
    rows = args[2]
    expected = changed(name, operator(name), args)
    there, absent = rows[[0, 2, 4]], rows[[1, 3]]
    rows[1], rows[3] = -1, len(args[0])
    actual = changed(name, operator(name), args)
    for found, whole, old in zip(actual, expected, tables_of(name, args), strict=True):
        assert torch.equal(found[there], whole[there])
        assert torch.equal(found[absent], old[absent])
