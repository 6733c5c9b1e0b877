"""The benchmark of rows in a file: a small table, all ways, and its JSON."""

import json
import sys

import pytest

from benchmarks import mapped_values


def test_it_runs(tmp_path, monkeypatch, capsys):
    report = tmp_path / "figures.json"
    monkeypatch.setattr(mapped_values, "TOKENS", (1, 3))
    options = ["--gib", "0.001", "--repeats", "1", "--directory", str(tmp_path), "--json", str(report)]
    monkeypatch.setattr(sys, "argv", ["mapped_values", *options])
    mapped_values.main()
    content = json.loads(report.read_text())
    assert (content["slots"], content["dim"]) == (22**2, 512)
    for figures in content["milliseconds"].values():
        assert set(figures) == {"default read-ahead", "MADV_RANDOM", "prefetch_rows", "in memory"}
        assert all(milliseconds > 0 for states in figures.values() for milliseconds in states.values())
    printed = capsys.readouterr().out
    assert "| 384 rows, ms" in printed and "1.00x" in printed
    assert list(tmp_path.iterdir()) == [report]  # the table is gone


def test_options_that_make_no_sense(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mapped_values", "--repeats", "0"])
    with pytest.raises(SystemExit):
        mapped_values.main()
    assert "--repeats" in capsys.readouterr().err
