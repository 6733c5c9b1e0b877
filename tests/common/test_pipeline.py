"""Steps of a pipeline: their order, what the log says of each, and the graphs that are written on request."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import memcompile
from memcompile.common.pipeline import DUMP, Pipeline
from memcompile.errors import OptionError
from memcompile.lowering.inductor.graph_pass import LoweringPass
from tests.models import tiny_gpt
from tests.planned import MEMORY, batch, stop_before_inductor

ROOT = Path(__file__).parents[2]
PLAN = ["trace", "normalize", "detect", "rehearse", "place", "size", "install", "adopt", "rebuild"]
COMPILE = ["verify", "dense_gradient", "capacity", "inductor"]


class Doubling(nn.Module):
    def forward(self, x):
        return x + x


def graphs(module: fx.GraphModule) -> list[tuple[str, fx.Graph]]:
    return [("a graph of ours", module.graph)]


def to_product(module: fx.GraphModule) -> int:
    adds = [node for node in module.graph.nodes if node.op == "call_function"]
    for node in adds:
        node.target = torch.mul
    return len(adds)


def look_and_multiply(module: fx.GraphModule) -> Pipeline:
    pipeline = Pipeline("test")
    with pipeline.step("look", "things", graphs(module)):
        pass
    with pipeline.step("multiply", "additions", graphs(module)):
        pipeline.count = to_product(module)
    return pipeline


def logged(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "memcompile.common.pipeline"]


def test_each_step_is_timed_and_counted(caplog):
    pipeline = Pipeline("test")
    with caplog.at_level(logging.DEBUG, logger="memcompile"):
        for name, count in {"a": 2, "b": None}.items():
            with pipeline.step(name, f"{name}s"):
                pipeline.count = pipeline.count if count is None else count
    expected = [r"test: a took [\d.]+ ms, 2 as", r"test: b took [\d.]+ ms, 0 bs"]
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(expected, logged(caplog), strict=True))


def test_nothing_is_logged_or_written_unasked(caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(DUMP, raising=False)
    with caplog.at_level(logging.INFO, logger="memcompile"):
        look_and_multiply(fx.symbolic_trace(Doubling()))
    assert not logged(caplog) and not list(tmp_path.iterdir())


def test_graphs_are_written_before_and_after_each_step(tmp_path, monkeypatch):
    monkeypatch.setenv(DUMP, str(tmp_path / "new" / "folder"))
    for _ in range(2):
        with look_and_multiply(fx.symbolic_trace(Doubling())).step("count", "things"):
            pass
    first, second = sorted((tmp_path / "new" / "folder").iterdir())
    assert re.fullmatch(rf"pid{os.getpid()}-\d\d\d-test", first.name) and first.name < second.name
    for folder in (first, second):
        text = {file.name: file.read_text() for file in folder.iterdir()}
        assert sorted(text) == [
            "01-look.after.txt",
            "01-look.before.txt",
            "02-multiply.after.txt",
            "02-multiply.before.txt",
        ]
        assert text["01-look.before.txt"] == text["01-look.after.txt"] == text["02-multiply.before.txt"]
        assert text["02-multiply.before.txt"].startswith("# a graph of ours\n") and "x + x" in text["01-look.after.txt"]
        assert "torch.mul(x, x)" in text["02-multiply.after.txt"]


def test_a_graph_without_a_module_and_the_bodies_that_a_module_calls_are_written(tmp_path, monkeypatch):
    class Checkpointed(nn.Module):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=False)

    captured = []
    torch.compile(Checkpointed(), backend=lambda module, _: captured.append(module) or module.forward)(torch.ones(3))
    bare = fx.Graph()
    bare.output(bare.call_function(torch.sigmoid, (bare.placeholder("x"),)))
    monkeypatch.setenv(DUMP, str(tmp_path))
    with Pipeline("test").step("look", "things", [("", captured[0].graph), ("", bare)]):
        pass
    text = next(tmp_path.glob("*/01-look.before.txt")).read_text()
    assert "tanh" in text and '"f32[3]cpu"' in text and "torch.sigmoid(x)" in text


def test_the_graph_that_a_step_refuses_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv(DUMP, str(tmp_path))
    pipeline = Pipeline("test")
    with pytest.raises(ZeroDivisionError), pipeline.step("refuse", "things", graphs(fx.symbolic_trace(Doubling()))):
        raise ZeroDivisionError
    (file,) = tmp_path.glob("*/*")
    assert file.name == "01-refuse.before.txt"


def test_a_folder_that_cannot_be_written_is_told_before_anything_changes(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(DUMP, str(tmp_path / "file"))
    model = tiny_gpt()
    keys = list(model.state_dict())
    with pytest.raises(OptionError, match=rf"{DUMP}='.*file' .*name a folder .* or unset {DUMP}"):
        memcompile.plan(model, memory_layers=1, **MEMORY)
    assert list(model.state_dict()) == keys


def test_a_folder_that_goes_away_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv(DUMP, str(tmp_path / "dump"))
    pipeline = Pipeline("test")
    shutil.rmtree(tmp_path / "dump")
    with (
        pytest.raises(OptionError, match=f"unset {DUMP}"),
        pipeline.step("look", "things", graphs(fx.symbolic_trace(Doubling()))),
    ):
        pass


WRITER = """
import torch
from torch import fx
from tests.common.test_pipeline import Doubling, look_and_multiply
for _ in range(20):
    look_and_multiply(fx.symbolic_trace(Doubling()))
"""


def test_processes_write_to_one_folder(tmp_path):
    environment = os.environ | {DUMP: str(tmp_path), "PYTHONPATH": str(ROOT)}
    ranks = [subprocess.Popen([sys.executable, "-c", WRITER], env=environment | {"RANK": rank}) for rank in "01"]
    assert [process.wait() for process in ranks] == [0, 0]
    folders = sorted(folder.name for folder in tmp_path.iterdir())
    numbers = [f"{number:03d}" for number in range(20)]
    expected = [f"rank{rank}-pid{p.pid}-{n}-test" for rank, p in zip("01", ranks, strict=True) for n in numbers]
    assert folders == expected and {len(list(folder.iterdir())) for folder in tmp_path.iterdir()} == {4}


def test_the_steps_of_a_plan_and_of_a_compilation(caplog, tmp_path, monkeypatch):
    monkeypatch.setenv(DUMP, str(tmp_path))
    stop_before_inductor(monkeypatch, lambda graph_module, inputs: graph_module.forward)
    with caplog.at_level(logging.DEBUG, logger="memcompile"):
        model = torch.compile(tiny_gpt(), backend="memcompile", memory_layers=2, **MEMORY)
        model(batch()[0])
    lines = [re.fullmatch(r"(\w+): (\w+) took [\d.]+ ms, (\d+) (.+)", line) for line in logged(caplog)]
    steps = [match.groups() for match in lines if match]
    assert [name for pipeline, name, *_ in steps if pipeline == "plan"] == PLAN
    assert [name for pipeline, name, *_ in steps if pipeline == "compile"] == COMPILE
    counted = {name: f"{number} {what}" for _, name, number, what in steps}
    assert counted["trace"] == "1 graphs" and counted["detect"] == "4 blocks found"
    assert counted["place"] == "2 blocks chosen" and counted["rehearse"] == "4 blocks rehearsed"
    assert counted["install"] == "2 layers installed" and counted["verify"] == "2 lookups"
    written = [path.relative_to(tmp_path).as_posix().partition("-")[2] for path in sorted(tmp_path.rglob("*.txt"))]
    taking = [f"plan/0{n}-{PLAN[n - 1]}" for n in (2, 3)] + [f"compile/0{n}-{COMPILE[n - 1]}" for n in (1, 2, 3)]
    assert [name.partition("-")[2] for name in written] == [
        f"{step}.{when}.txt" for step in taking for when in ("after", "before")
    ]


def test_inductors_caches_are_left_out_while_graphs_are_written(monkeypatch):
    assert LoweringPass("").uuid() is not None
    monkeypatch.setenv(DUMP, "anywhere")
    assert LoweringPass("").uuid() is None
