"""The detector finds exactly the FFNs of every model of the zoo, and says why it leaves the traps alone."""

from __future__ import annotations

import pytest

import memcompile
from tests.zoo import MODELS, TRAPS, table


def test_counts():
    assert (len(MODELS), len(TRAPS)) == (40, 30)
    assert len({entry.name for entry in MODELS + TRAPS}) == 70


@pytest.mark.parametrize("entry", [*MODELS, *TRAPS], ids=str)
def test_finds_exactly_the_ffns(entry):
    model, inputs = entry.new()
    expected = entry.expected(model)
    assert bool(expected) == bool(entry.down), "the pattern of the down-projections matches nothing"
    in_train = memcompile.find_ffns(model, inputs)
    in_eval = memcompile.find_ffns(model.eval(), inputs)
    assert table.accepted(in_train) == expected
    assert table.accepted(in_eval) == expected
    if entry in TRAPS:
        sentences = table.refusals(in_train)
        assert bool(sentences) == bool(entry.refused)
        assert entry.refused in "; ".join(sentences)
    assert table.row(entry, in_train) == table.committed_rows()[entry.name], "run `make docs`"


@pytest.mark.parametrize("entry", [entry for entry in [*MODELS, *TRAPS] if entry.guessed], ids=str)
def test_finds_the_same_without_example_inputs(entry):
    model, _ = entry.new()
    assert table.accepted(memcompile.find_ffns(model)) == entry.expected(model)


def test_table_has_one_line_for_each():
    assert table.document(table.committed_rows()) == table.COMMITTED.read_text()
