"""What all benchmarks share: turns, workers, and a run's files."""

import json
import os
import signal
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import compile_time, planning
from benchmarks.harness import session
from benchmarks.harness.processes import Remote, WorkerError, ask_all, fresh_medians
from benchmarks.harness.results import at_least, at_most, judged, short
from benchmarks.harness.session import Benchmark
from benchmarks.harness.timing import Rounds, medians_in_turns
from tests.benchmarks.asked import Asked, figures


def test_turns_are_shared_out_by_the_length_of_a_call():
    calls = []

    def timed(name, seconds):
        return lambda: calls.append(name) or seconds

    rounds = Rounds(seconds=1.0, fewest=2, most=4, slow=100.0)
    found = medians_in_turns(
        [timed("fast", 0.1), timed("long", 3.0), timed("slow", 200.0)], [0.1, 3.0, 200.0], rounds, str
    )
    assert found == [0.1, 3.0, 200.0]
    assert [calls.count(name) for name in ("fast", "long", "slow")] == [4, 1, 0]  # long ones count from the first call


def test_a_sample_that_fails_is_left_out():
    calls, heard = [], []

    def failing():
        calls.append(1)
        raise ValueError("no more")

    rounds = Rounds(seconds=1.0, fewest=3, most=3)
    found = medians_in_turns([lambda: 0.5, failing], [0.5, 0.5], rounds, str, lambda i, error: heard.append((i, error)))
    assert found == [0.5, None] and len(calls) == 1
    assert [(i, str(error)) for i, error in heard] == [(1, "no more")]
    with pytest.raises(ValueError, match="no more"):
        medians_in_turns([failing], [0.5], rounds, str)


def test_workers_answer_in_order_and_have_their_environment():
    workers = [Remote(Asked, n, environment={"BENCHMARK": str(n)}) for n in (1, 2)]
    before = Remote.seconds
    try:
        assert ask_all(workers, "plus", 10) == [11, 12]
        assert ask_all(workers, "variable", "BENCHMARK") == ["1", "2"] and "BENCHMARK" not in os.environ
        assert Remote.seconds > before
        with pytest.raises(WorkerError, match=r"(?s)rank \d: Traceback.*TypeError"):
            ask_all(workers, "plus", "ten")
    finally:
        for worker in workers:
            worker.close()


@pytest.mark.parametrize(
    ("sign", "reason"), [(signal.SIGKILL, "killed: out of memory?"), (signal.SIGTERM, "what it says last")]
)
def test_a_worker_that_dies_says_why(sign, reason):
    worker = Remote(Asked, 1)
    try:
        with pytest.raises(WorkerError) as error:
            worker.ask("die", sign)
        assert short(error.value) == reason
    finally:
        worker.close()


def test_medians_of_new_processes_with_empty_caches():
    found = fresh_medians(1, partial(figures, 1.0), partial(figures, 2.0))
    assert found == [{"x": 1.0, "caches": 0}, {"x": 2.0, "caches": 0}]


class Some(Benchmark):
    name = "some"

    def __init__(self, measure):
        super().__init__({}, cases=1)
        self.measure = measure

    def report(self):
        return str(self.results.medians)

    of = measure = None


def test_ctrl_c_ends_a_run_with_what_was_measured(tmp_path, capsys):
    def measure(run):
        run.results.medians.append({"x": 1})
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:  # as a compiler may
            run.say("what follows")
        run.results.medians.append({"x": 2})

    handler, cache = signal.getsignal(signal.SIGINT), os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    results = Some(measure).run(tmp_path / "new")
    content = json.loads((tmp_path / "new" / "some.json").read_text())
    assert content["medians"] == [{"x": 1}] and not content["complete"] and not results.complete
    assert "interrupted after 1 medians" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is handler and os.environ.get("TORCHINDUCTOR_CACHE_DIR") == cache


def test_an_error_is_raised_and_nothing_is_written(tmp_path):
    def measure(run):
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        Some(measure).run(tmp_path)
    assert not [*tmp_path.iterdir()]


class Figure:
    def __init__(self, milliseconds):
        self.milliseconds = milliseconds


@pytest.mark.parametrize(("ours", "met"), [(0.9, True), (1.1, False)])
def test_verdicts(ours, met):
    for verdict in (at_most(1.0), at_least(1.0)):
        goal = judged("time", "1 x", "float32", (Figure(ours), Figure(1.0)), verdict)
        assert goal.met == met and f"({ours:.3f} against 1.000 ms)" in goal.reached
    missing = judged("time", "1 x", "float32", (Figure(ours), None), at_most(1.0))
    assert (missing.reached, missing.met) == ("not measured", False)


def in_this_process(repeats, *calls):
    return [call() for call in calls]


def test_planning_and_compile_time_print_their_tables(tmp_path, monkeypatch, capsys):
    def layers():
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 1, 32), 3)

    monkeypatch.setattr(planning, "MODELS", {"three layers": layers})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(session, "fresh_medians", in_this_process)
    for benchmark in (planning.Planning, compile_time.CompileTime):
        assert benchmark.main(["--quick", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| three layers |" in printed and "| Llama, 1 layer of 256 |" in printed
    (plan,) = json.loads((tmp_path / "planning.json").read_text())["medians"]
    assert plan["figures"][0]["ffns"] == 3 and plan["figures"][0]["seconds"] > 0
    (compiled,) = json.loads((tmp_path / "compile-time.json").read_text())["medians"]
    inductor, ours = compiled["figures"]
    assert inductor["plan"] < ours["plan"] < ours["total"] and inductor["total"] > 0
