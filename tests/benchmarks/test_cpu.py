"""The CPU benchmark as a whole: tiny layers, nothing compiled."""

import json

import pytest
import torch

from benchmarks.cpu import __main__ as command
from benchmarks.cpu import contestants
from benchmarks.cpu.__main__ import CpuBenchmark, Group
from benchmarks.cpu.contestants import EAGER, INDUCTOR, NAIVE, OUR_GEMMS
from benchmarks.harness.layers import GELU, OURS, SWIGLU
from benchmarks.harness.results import BACKWARD, FORWARD
from benchmarks.harness.timing import Rounds

GROUPS = [Group(64, torch.float32, (32, 64), (8, 1)), Group(64, torch.bfloat16, (64,), (8,))]
MEMORY = {OURS, EAGER, INDUCTOR}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(command, "ROUNDS", Rounds(seconds=0, fewest=2, most=2))
    monkeypatch.setattr(contestants, "library_contestants", lambda *_: [])
    monkeypatch.setattr(contestants, "mkl_is_held_back", lambda: True)


def names(content, **wanted):
    return {m["name"] for m in content["medians"] if all(m[key] == value for key, value in wanted.items())}


def test_a_whole_run(tmp_path, capsys):
    CpuBenchmark(GROUPS, judged=True).run(tmp_path)
    content, printed = json.loads((tmp_path / "cpu.json").read_text()), capsys.readouterr().out
    assert content["complete"] and not content["missing"]
    ffns = {GELU, SWIGLU, OUR_GEMMS}
    for tokens in (8, 1):
        for direction in (FORWARD, BACKWARD):
            wanted = {"dtype": "float32", "tokens": tokens, "direction": direction}
            assert names(content, **wanted, n_keys=32) == MEMORY | ffns
            assert names(content, **wanted, n_keys=64) == MEMORY | ffns | {NAIVE, "MoE"}
    assert names(content, dtype="bfloat16", n_keys=64) == MEMORY | {GELU, SWIGLU, NAIVE, "MoE"}
    assert all(m["milliseconds"] > 0 and m["bytes"] > 0 for m in content["medians"])
    assert {dtype for dtype, limits in content["limits"].items() if limits["gb_s"] > 0} == {"float32", "bfloat16"}
    by_dtype = {d: [g for g in content["goals"] if g["dtype"] == d] for d in content["limits"]}
    assert len(by_dtype["float32"]) == 2 + 7 and len(by_dtype["bfloat16"]) == 1 + 4
    of_one_token = "forward of 1 token, time as a multiple of FFN, SwiGLU 8/3 d"
    assert [g["name"] for g in content["goals"] if g["reached"] == "not measured"] == [of_one_token]  # in bfloat16
    assert all(goal["name"] in printed for goal in content["goals"])
    assert "forward, bfloat16, d = 64, n = 64, 8 tokens" in printed
    assert (tmp_path / "cpu-roofline.png").stat().st_size > 10_000


def test_who_computes_something_else_has_no_times(tmp_path, monkeypatch):
    monkeypatch.setattr(contestants, "naive", lambda values, slots, weights: values[slots].sum(dim=1))
    CpuBenchmark(GROUPS[1:], judged=False).run(tmp_path)
    content = json.loads((tmp_path / "cpu.json").read_text())
    assert names(content) == MEMORY | {GELU, SWIGLU, "MoE"} and not content["goals"]
    ((name, reason),) = {(m["name"], m["reason"]) for m in content["missing"]}
    assert name == NAIVE and reason.startswith("differs from eager by")
