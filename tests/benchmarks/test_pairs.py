"""The benchmark of pairs as a whole: a tiny table, and what it prints."""

import re
import sys

import pytest

from benchmarks.cpu import pairs


def test_a_whole_run(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pairs", "--rounds", "1", "--tokens", "2", "--log-slots", "5"])
    pairs.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\| (256|1024) ", line)]
    assert len(rows) == 2 * 2 * 3
    assert all(len(re.findall(r"\d \(\d+\.\d\d x\)", row)) == len(pairs.CONTESTANTS) for row in rows)


def test_who_computes_something_else_is_not_measured(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pairs", "--rounds", "1", "--tokens", "2", "--log-slots", "5"])
    monkeypatch.setitem(pairs.CONTESTANTS, "two gathers", lambda values, slots, weights, x: 2 * x)
    with pytest.raises(AssertionError, match="not close"):
        pairs.main()
