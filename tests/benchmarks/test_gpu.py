"""The GPU benchmark as a whole, on the CPU: a device whose clock is the host's, tiny sizes, and nothing compiled."""

import json
import os
import signal
import time
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.__main__ import LAYER, GpuBenchmark
from benchmarks.gpu.parts import FUSED, GATHER, SCORED_SEARCH, SEARCH, SPARSE, STALE, UPDATE
from benchmarks.gpu.plan import Group, Plan, fitting_setting, full_plan, quick_plan
from benchmarks.harness import layers
from benchmarks.harness.layers import GELU, OURS, SWIGLU, Setting
from benchmarks.harness.results import BACKWARD, FORWARD, FROZEN, Limits, Median
from benchmarks.harness.timing import Rounds

PLAN = Plan(
    (Group(32, 8, (12, 1), (12,), parts=True, frozen=True), Group(64, 8, (12,), ())),
    all_peers=True,
    minutes=2,
    copy_bytes=2**12,
    gemm_size=16,
    top_k=4,
)
PEERS = {OURS, "eager", "eager, F.embedding_bag", "Inductor", "Inductor, F.embedding_bag", SWIGLU, GELU}


class Host:
    """The CPU in the place of a GPU."""

    torch_device = torch.device("cpu")
    memory = 2**30

    def seconds(self, call):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def free_bytes(self):
        return self.memory

    def tidy(self):
        pass

    def about(self):
        return {"device": "a host", "memory_gb": 1.0}


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(command, "ROUNDS", Rounds(seconds=1, fewest=2, most=2))


def written(path):
    return json.loads((path / "gpu.json").read_text())


def names(content, **wanted):
    found = [m for m in content["medians"] if all(m[key] == value for key, value in wanted.items())]
    return {m["name"] for m in found}


def test_a_whole_run(tmp_path, capsys):
    GpuBenchmark(Host(), PLAN).run(tmp_path)
    content, printed = written(tmp_path), capsys.readouterr().out
    assert content["complete"] and not content["missing"]
    assert content["limits"]["bfloat16"]["gb_s"] > 0 and content["limits"]["bfloat16"]["gflop_s"] > 0
    assert names(content, kind=GATHER) == {OURS, "memcompile, eager", "F.embedding_bag", "Inductor, naive gather"}
    for kind in (SEARCH, SCORED_SEARCH):
        expected = {OURS, "memcompile, eager", "torch.topk + merge", "torch.topk + merge, Inductor"}
        assert names(content, kind=kind) == expected
    assert names(content, kind=UPDATE) == {OURS, STALE, SPARSE, FUSED}
    cases = [(32, 12, FORWARD), (32, 1, FORWARD), (32, 12, BACKWARD), (32, 12, FROZEN), (64, 12, FORWARD)]
    for width, tokens, direction in cases:
        assert names(content, kind=LAYER, width=width, tokens=tokens, direction=direction) == PEERS
    assert all(m["milliseconds"] > 0 and m["bytes"] > 0 for m in content["medians"])
    assert len(content["goals"]) == 7 and all(g["reached"] != "not measured" for g in content["goals"])
    for goal in content["goals"]:
        assert goal["name"] in printed
    assert (tmp_path / "gpu-roofline.png").stat().st_size > 10_000


def test_a_contestant_that_fails_is_recorded_and_the_rest_is_measured(tmp_path, monkeypatch, capsys):
    def naive(values, slots, weights):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.")

    monkeypatch.setattr(layers, "naive", naive)
    GpuBenchmark(Host(), replace(PLAN, groups=PLAN.groups[:1])).run(tmp_path)
    content = written(tmp_path)
    assert {(m["name"], m["reason"]) for m in content["missing"]} == {
        ("eager", "out of memory"),
        ("Inductor", "out of memory"),
    }
    assert names(content, kind=LAYER) == PEERS - {"eager", "Inductor"}
    assert content["complete"] and "out of memory" in capsys.readouterr().out


def test_a_failure_between_two_rounds(tmp_path, monkeypatch):
    calls = []

    def bag(values, slots, weights):
        calls.append(1)
        if len(calls) > 7:  # two contestants are warm, with three calls each, and one was timed
            raise RuntimeError("CUDA error: an illegal memory access\nmore lines")
        return layers.naive(values, slots, weights)

    monkeypatch.setattr(layers, "bag", bag)
    GpuBenchmark(Host(), replace(PLAN, groups=(Group(32, 8, (12,), ()),))).run(tmp_path)
    content = written(tmp_path)
    failed = {(m["name"], m["reason"]) for m in content["missing"]}
    assert ("eager, F.embedding_bag", "RuntimeError: CUDA error: an illegal memory access") in failed
    assert names(content, kind=LAYER) == PEERS - {"eager, F.embedding_bag", "Inductor, F.embedding_bag"}


def test_who_computes_something_else_has_no_times(tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "naive", lambda values, slots, weights: values[slots].sum(dim=1))
    GpuBenchmark(Host(), replace(PLAN, groups=(Group(32, 8, (12,), ()),))).run(tmp_path)
    content = written(tmp_path)
    assert names(content, kind=LAYER) == PEERS - {"eager", "Inductor"}
    assert all(m["reason"].startswith("differs from eager, F.embedding_bag by") for m in content["missing"])


def test_what_does_not_fit_or_comes_too_late_is_skipped(tmp_path):
    device = Host()
    device.memory = 2**10
    GpuBenchmark(device, PLAN).run(tmp_path)
    assert {m["case"] for m in written(tmp_path)["missing"]} == {"d = 32, n = 8", "d = 64, n = 8"}
    assert not written(tmp_path)["medians"]
    GpuBenchmark(Host(), replace(PLAN, minutes=0)).run(tmp_path)
    content = written(tmp_path)
    assert not content["medians"] and len(content["missing"]) == 4 + 4 + 1
    assert {g["reached"] for g in content["goals"]} == {"not measured"} and not any(g["met"] for g in content["goals"])


def test_ctrl_c_writes_what_was_measured(tmp_path, monkeypatch):
    device, calls = Host(), []

    def seconds(call):
        calls.append(1)
        if len(calls) == 100:
            os.kill(os.getpid(), signal.SIGINT)
        return Host().seconds(call)

    monkeypatch.setattr(device, "seconds", seconds)
    GpuBenchmark(device, PLAN).run(tmp_path)
    content = written(tmp_path)
    assert not content["complete"] and content["medians"] and not content["missing"]


def test_the_table_is_narrowed_until_it_fits_with_its_gradient():
    group, free = Group(4096, 4096, (1,), ()), 78 * 10**9
    setting = fitting_setting(group, full_plan(), free)
    assert setting.value_dim == 512 and setting.width == 4096
    assert 2 * 4096**2 * 512 * 2 <= 0.6 * free < 2 * 4096**2 * 1024 * 2
    assert fitting_setting(group, full_plan(), 10**9) is None


def median(kind, setting, name, milliseconds, direction=FORWARD, moved=0.0):
    return Median(
        name=name,
        milliseconds=milliseconds,
        flops=1.0,
        bytes=moved,
        kind=kind,
        width=setting.width,
        n_keys=setting.n_keys,
        value_dim=setting.value_dim,
        dtype="bfloat16",
        tokens=8192,
        direction=direction,
    )


@pytest.mark.parametrize(("ours", "met"), [(0.69, True), (0.71, False)])
def test_goals_are_judged(ours, met):
    plan = quick_plan()
    main_setting = Setting(plan.main.width, plan.main.n_keys, plan.dtype)
    benchmark = GpuBenchmark(Host(), plan)
    benchmark.results.limits = {"bfloat16": Limits(100.0, "large copy", 1000.0, "GEMM")}
    benchmark.results.medians = [
        median(LAYER, main_setting, OURS, ours),
        median(LAYER, main_setting, SWIGLU, 1.0),
        median(LAYER, main_setting, OURS, ours + 0.3, BACKWARD),
        median(LAYER, main_setting, SWIGLU, 1.0, BACKWARD),
        median(GATHER, main_setting, OURS, 1000 * ours, moved=0.7 * 90e9),
        median(GATHER, main_setting, "F.embedding_bag", 1000 * 0.7 * 6),
        median(SEARCH, main_setting, OURS, ours),
        median(SEARCH, main_setting, "torch.topk + merge", 0.7 * 3),
    ]
    goals = benchmark.judge()
    assert [g.reached == "not measured" for g in goals] == [False, False, False, True, False, False]
    assert [g.met for g in goals if g.reached != "not measured"] == [met] * 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the benchmark")
def test_without_a_gpu_one_line_says_so(capsys):
    assert GpuBenchmark.main(["--quick"]) == 0
    assert capsys.readouterr().out == "skipped: no CUDA device\n"
