"""The benchmark of a training step: run whole with workers in this process, tiny sizes, and nothing compiled."""

import dataclasses
import json
import os
import signal
from functools import partial

import pytest
import torch

from benchmarks.harness.layers import OURS
from benchmarks.harness.machine import machine
from benchmarks.harness.processes import Local, WorkerError
from benchmarks.harness.results import Results
from benchmarks.training_step import __main__ as command
from benchmarks.training_step import cases, measure
from benchmarks.training_step.cases import DENSE, FBGEMM, FFN, HARDWARE, SPARSE_ADAM, Case, Group, lineups
from benchmarks.training_step.measure import Median
from benchmarks.training_step.report import judge
from benchmarks.training_step.trainees import LONG
from benchmarks.training_step.worker import STEP, TABLE, Worker

CURVE, MAIN = command.groups(quick=True)


@pytest.fixture(autouse=True)
def _without_fbgemm(monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda _: None)


@pytest.fixture
def not_drawn(monkeypatch):
    monkeypatch.setattr(command, "draw", lambda *_: False)  # half a second a figure


def run(tmp_path, curve=CURVE, main=MAIN, start=command.here):
    command.TrainingStep(curve, main, torch.get_num_threads(), start, command.FEW_ROUNDS).run(tmp_path)
    return json.loads((tmp_path / "training-step.json").read_text())


def of(content, **wanted):
    return [m for m in content["medians"] if all(m[key] == value for key, value in wanted.items())]


def test_a_whole_run(tmp_path, capsys):
    content, printed = run(tmp_path), capsys.readouterr().out
    assert content["complete"]
    assert [m["name"] for m in content["missing"]] == [FBGEMM]  # "not installed" is all that went wrong
    for group in (CURVE, MAIN):
        names = set(group.names) - {FBGEMM}
        assert {m["name"] for m in of(content, width=group.width, part=STEP)} == names - {HARDWARE} | {FFN}
        assert {m["name"] for m in of(content, width=group.width, part=TABLE)} >= names
    assert {m["slots"] for m in of(content, width=CURVE.width, name=OURS)} == {64, 256}
    assert all(m["milliseconds"] > 0 for m in content["medians"])
    assert all(m["touched"] == 32 for m in of(content, width=CURVE.width, part=TABLE))
    assert len(content["goals"]) == 4 and all(goal["reached"] != "not measured" for goal in content["goals"])
    for text in ("rows that a step touches", "fbgemm-gpu-cpu is not installed", "beyond the hardware's"):
        assert text in printed
    assert (tmp_path / "training-step.png").stat().st_size > 10_000


def test_who_dies_or_computes_something_else_is_left_out(tmp_path, not_drawn):
    class Odd(Worker):
        def facts(self):
            facts = super().facts()
            return dataclasses.replace(facts, loss=2 * facts.loss) if self.case.name == SPARSE_ADAM else facts

        def turn(self, what):
            if self.case.name == HARDWARE and self.case.n_keys == 8:
                raise WorkerError("killed: out of memory?")
            return super().turn(what)

    few = Group(64, 4, (8, 16), (DENSE, SPARSE_ADAM, HARDWARE), 2, 4, compiled=False)
    content = run(tmp_path, few, Group(128, 8, (16,), (DENSE,), 2, 4, compiled=False), partial(Local, Odd))
    reasons = {m["name"]: m["reason"] for m in content["missing"]}
    assert set(reasons) == {f"{SPARSE_ADAM}, 64 slots", f"{SPARSE_ADAM}, 256 slots", f"{HARDWARE}, 64 slots"}
    assert all(reasons[f"{SPARSE_ADAM}, {n} slots"].startswith("the first loss is") for n in (64, 256))
    assert content["complete"] and {m["name"] for m in content["medians"]} == {FFN, DENSE, HARDWARE}


def test_what_does_not_fit_says_so(tmp_path, monkeypatch, not_drawn):
    monkeypatch.setattr(measure, "free_bytes", lambda: 2e9)  # a process takes less, its three tables do not
    large = Group(64, 4, (8, 2**12), (HARDWARE,), 2, 4, compiled=False)
    content = run(tmp_path, large, Group(128, 8, (16,), (DENSE,), 2, 4, compiled=False))
    (missing,) = content["missing"]
    assert missing["name"] == f"{HARDWARE}, 16,777,216 slots" and "GiB of memory, 1.9 are free" in missing["reason"]
    assert len(of(content, name=HARDWARE)) == 1


def test_ctrl_c_keeps_what_was_measured(tmp_path, not_drawn):
    class Interrupted(Worker):
        def facts(self):
            if self.case.width == CURVE.width:
                os.kill(os.getpid(), signal.SIGINT)
            return super().facts()

    main = dataclasses.replace(MAIN, names=(DENSE,))
    content = run(tmp_path, main=main, start=partial(Local, Interrupted))
    assert not content["complete"] and {m["width"] for m in content["medians"]} == {main.width}


def test_lineups_fill_the_memory_and_keep_their_order():
    group = Group(256, 64, (128, 256, 512, 1024, 2048), (OURS, DENSE))
    todo, reference = group.cases(threads=2), group.reference(threads=2)
    found = lineups(todo, reference, 24e9)
    assert [case for lineup in found for case in lineup] == todo
    assert all(len(lineup) == 1 or cases.fit([reference, *lineup], 24e9) for lineup in found)
    assert [case.n_keys for case in found[0]] == [128, 256, 512, 1024]
    assert len(lineups(todo, reference, 1e9)) == len(todo)


def test_slots_of_the_table_part_are_different_and_spread():
    worker = Worker(Case(HARDWARE, 64, 32, 8, 1, heads=2, top_k=4))
    first, second = worker._distinct_slots(), worker._distinct_slots()
    assert len(first.unique()) == 64 and torch.equal((first // 16).sort().values, torch.arange(64))
    assert not torch.equal(first, second)


def test_rows_of_a_long_training_are_behind():
    worker = Worker(Case(OURS, 64, 32, 8, 1, heads=2, top_k=4, compiled=False))
    state = worker._trainee.table.state
    behind = LONG - state["last_step"].double()
    expected = 32 * 32 / worker.facts().touched
    assert 0.7 * expected < behind.mean() < 1.3 * expected and state["step"] > LONG


def median(name, part, slots, milliseconds, width, peak=1.0):
    return Median(
        name=name,
        part=part,
        width=width,
        slots=slots,
        tokens=1,
        touched=1,
        milliseconds=milliseconds,
        ffn_milliseconds=10.0,
        peak_bytes=peak,
        needed_bytes=1.0,
    )


@pytest.mark.parametrize(("over", "met"), [(0.99, True), (1.02, False)])
def test_goals_are_judged(over, met):
    curve, main = command.groups(quick=False)
    slots = main.n_keys[-1] ** 2
    results = Results(machine())
    for n, ours, hardware in ((2**14, 1.0, 1.0), (2**22, 1.15 * 2 * over, 2.0)):
        results.medians += [median(OURS, TABLE, n, ours, 256), median(HARDWARE, TABLE, n, hardware, 256)]
    results.medians.append(median(OURS, STEP, slots, 11.0 * over, 1024, 1.1 * over))
    results.medians.append(median(DENSE, STEP, slots, 220.0, 1024))
    assert [goal.met for goal in judge(curve, main, results)] == [met] * 4
    results.medians = results.medians[:1]
    assert {goal.reached for goal in judge(curve, main, results)} == {"not measured"}


def test_a_process_answers_and_its_failure_is_told():
    hardware = command.elsewhere(Case(HARDWARE, 64, 8, 4, 1, 2, 4))
    try:
        assert hardware.ask("facts").touched == 28 and hardware.ask("turn", TABLE) > 0 and hardware.ask("peak") > 0
        with pytest.raises(WorkerError, match=f"KeyError: '{STEP}'"):  # of which it has none
            hardware.ask("turn", STEP)
    finally:
        hardware.close()


def test_a_wrong_option_is_a_clear_error(capsys):
    with pytest.raises(SystemExit):
        command.TrainingStep.main(["--threads", "0"])
    assert "--threads: must be at least 1" in capsys.readouterr().err
