"""The benchmark of a sharded layer: run whole on two processes at tiny sizes, and its own logic without any."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness.processes import WorkerError
from benchmarks.harness.results import Results
from benchmarks.sharding import __main__ as command
from benchmarks.sharding.cases import STRONG, WEAK, Case, Sizes, all_cases, rows_case, scaling
from benchmarks.sharding.measure import line, predict
from benchmarks.sharding.report import report
from benchmarks.sharding.traffic import formulas, received_bytes, with_formulas
from benchmarks.sharding.trainee import COMMUNICATION, GATHER, OPTIMIZER, PARTS, REST, SEARCH, Step, split, timed
from benchmarks.sharding.worker import WHOLE_STEP
from memcompile.cost.groups import NUMBERS_OF_GPUS
from memcompile.cost.job import Job
from memcompile.cost.memory import memory_of
from memcompile.cost.time import Hardware
from memcompile.lowering.register.schema import operator

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux counts what a socket receives")
SIZES = command.QUICK


@linux
def test_a_whole_run(tmp_path, capsys):
    assert command.Sharding.main(["--quick", "--output", str(tmp_path)]) == 0
    content, printed = json.loads((tmp_path / "sharding.json").read_text()), capsys.readouterr().out
    assert {(m["ranks"], m["by"], m["tokens"]) for m in content["medians"]} == {
        (1, "columns", 32),
        (2, "columns", 32),
        (1, "columns", 64),
        (2, "rows", 32),
    }
    for one_case in content["medians"]:
        parts = {part for part, ms in one_case["parts"].items() if ms > 0}
        assert parts == set(PARTS) - ({COMMUNICATION} if one_case["ranks"] == 1 else set())
        assert bool(one_case["traffic"]) == (one_case["ranks"] > 1)
        for one in one_case["traffic"]:
            assert one["formula_bytes"] <= one["measured_bytes"] <= one["formula_bytes"] + 2**12  # headers and barriers
        job = Job(
            slots=SIZES.slots,
            value_dim=SIZES.width,
            gpus=one_case["ranks"],
            dtype="fp32",
            top_k=8,
            layers=1,
            by=one_case["by"],
        )
        modelled = memory_of(job, one_case["ranks"])
        assert one_case["memory"]["values"] == modelled.values
        assert 0 <= one_case["memory"]["states"] - modelled.states <= 1024  # the history of learning rates
    assert [best["gpus"] for best in content["predicted"]["best"]] == list(NUMBERS_OF_GPUS)
    assert all(text in printed for text in (WEAK, STRONG, WHOLE_STEP, "modelled, not measured"))
    assert (tmp_path / "sharding.png").stat().st_size > 10_000


def test_a_rank_that_fails_is_told(tmp_path):
    with pytest.raises(WorkerError, match=r"(?s)rank \d.*top_k"):
        command.Sharding(Sizes(width=32, n_keys=4, heads=1, top_k=8, tokens=4, ranks=(1,)), 1).run(tmp_path)


def test_cases_of_both_curves():
    sizes = Sizes()
    curves = scaling(sizes)
    assert [case.tokens for case in curves[WEAK]] == [sizes.tokens] * 3
    assert {case.ranks * case.tokens for case in curves[STRONG]} == {sizes.all_tokens}
    cases = all_cases(sizes)
    assert len(cases) == len(set(cases)) == 6 and curves[WEAK][1] == curves[STRONG][1]


def test_time_is_split_by_operator():
    query, half_keys = torch.randn(8, 1, 4), torch.randn(2, 1, 4, 2)
    table = torch.randn(16, 4)
    optimized = []

    def forward_backward():
        weights, slots = operator("product_key_search")(query, half_keys, 2)
        operator("table_gather")(table, slots.flatten(1), weights.flatten(1), (), "sparse").relu()

    step = timed(forward_backward, lambda: optimized.append(1))
    assert optimized == [1] and set(step.parts) == set(PARTS) and step.processor > 0
    assert all(step.parts[part] > 0 for part in (SEARCH, GATHER, OPTIMIZER, REST)) and step.parts[COMMUNICATION] == 0


def test_an_operator_within_another_counts_once():
    def event(name, microseconds, caller=None):
        elapsed = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, time_range=elapsed, cpu_parent=caller)

    lookup = event("memcompile::memory_lookup", 90)
    search = event("memcompile::product_key_search", 30, lookup)
    gather = event("memcompile::table_gather", 20, lookup)
    inside = [event("memcompile::product_key_search", 29, search), event("memcompile::weighted_gather", 18, gather)]
    started, waited = event("_c10d_functional::all_reduce", 1), event("_c10d_functional::wait_tensor", 4)
    found = split([lookup, search, gather, *inside, started, waited, event("aten::mm", 50)])
    assert found == pytest.approx({SEARCH: 30e-6, GATHER: 20e-6, COMMUNICATION: 5e-6})


def test_other_collectives_than_the_formulas_know_are_an_error():
    case = Case(2, "columns", 8)
    expected = formulas(case, SIZES, 0)
    operations = ["all_gather", "all_to_all", "all_to_all", "all_to_all"]  # a reduce-scatter on a CPU is one
    found = [(name, c.received_bytes) for name, c in zip(operations, expected, strict=True)]
    received = with_formulas(expected, found)
    assert [one.of_formula for one in received] == [1] * 4
    with pytest.raises(ValueError, match=r"the step has the collectives \['all_to_all'"):
        with_formulas(expected, found[1:])


@linux
def test_a_process_without_connections_receives_nothing():
    before = received_bytes()
    assert received_bytes() == before >= 0


def steps(clocks: list[float]) -> list[Step]:
    return [Step(dict.fromkeys(PARTS, clock), clock / 2) for clock in clocks]


def test_medians_of_rounds_are_of_the_mean_of_ranks():
    rounds = [*zip(steps([1e-3, 5e-3, 3e-3]), steps([3e-3, 1e-3, 7e-3]), strict=True)]
    found = line(Case(2, "columns", 8), rounds, [{"values": 1, "states": 1}, {"values": 1, "states": 3}], [[], []])
    assert found.parts == pytest.approx(dict.fromkeys(PARTS, 3.0)) and found.milliseconds == pytest.approx(15.0)
    assert found.work == pytest.approx(1.5) and found.memory["states"] == 3 and found.tokens == 8


@pytest.mark.parametrize(("cores", "crowded"), [(4, False), (2, True)])
def test_more_processes_than_cores_are_told(cores, crowded):
    sizes = Sizes()
    results = Results({"cpu": "a processor", "capability": "none", "cores": cores, "torch": torch.__version__})
    results.medians = [line(case, [steps([1e-3])], [{"values": 1}], [[]]) for case in all_cases(sizes)]
    results.others.available, results.others.taken = 2.0, 1.0
    printed = report(sizes, 1, predict(command.JOB, Hardware()), results)
    assert ("their steps measure contention, not scaling" in printed) == crowded
    assert "Other processes took 50%" in printed and f"by rows, {rows_case(sizes).ranks} processes" in printed
