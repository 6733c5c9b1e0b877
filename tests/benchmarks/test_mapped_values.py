"""The benchmark of rows in a file: a small table, all ways, and its JSON."""

import json

import pytest

from benchmarks import mapped_values


def test_it_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mapped_values, "TOKENS", (1, 3))
    folder = tmp_path / "folder"
    folder.mkdir()
    sizes = ["--gib", "0.001", "--directory", str(folder)]
    assert mapped_values.Mapped.main(["--quick", *sizes, "--output", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "mapped-values.json").read_text())
    assert (content["slots"], content["dim"]) == (22**2, 512)
    assert [m["tokens"] for m in content["medians"]] == [1, 3]
    for figures in (m["milliseconds"] for m in content["medians"]):
        assert set(figures) == {"default read-ahead", "MADV_RANDOM", "prefetch_rows", "in memory"}
        assert all(milliseconds > 0 for states in figures.values() for milliseconds in states.values())
    printed = capsys.readouterr().out
    assert "| 384 rows, ms" in printed and "1.00x" in printed
    assert not [*folder.iterdir()]  # the table is gone


@pytest.mark.parametrize(("option", "value"), [("--repeats", "0"), ("--gib", "-1")])
def test_options_that_make_no_sense(capsys, option, value):
    with pytest.raises(SystemExit):
        mapped_values.Mapped.main([option, value])
    assert f"{option}: must be" in capsys.readouterr().err
