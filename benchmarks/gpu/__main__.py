"""A memory layer against its peers on a GPU: python -m benchmarks.gpu [--quick] [--output DIR]"""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as dynamo_config

from benchmarks.gpu import parts
from benchmarks.gpu.device import Cuda, Gpu
from benchmarks.gpu.parts import BAG, GATHER, SCORED_SEARCH, SEARCH, TOPK, UPDATE
from benchmarks.gpu.plan import SHARE_OF_MEMORY, Group, Plan, fitting_setting, full_plan, quick_plan
from benchmarks.harness import layers, tables
from benchmarks.harness.compare import Comparison, layer_case
from benchmarks.harness.layers import OURS, SWIGLU, Contestant, Setting, fill_table
from benchmarks.harness.plots import MEMCOMPILE, SAME_LAYER, Panel, Style, draw_roofline
from benchmarks.harness.results import (
    BACKWARD,
    FORWARD,
    FROZEN,
    Goal,
    Limits,
    Median,
    Verdict,
    at_least,
    at_most,
    dtype_name,
    judged,
)
from benchmarks.harness.session import Benchmark, Session
from benchmarks.harness.timing import Rounds, in_turns

LAYER = "layer"
EAGER, EAGER_BAG, INDUCTOR, INDUCTOR_BAG = "eager", "eager, F.embedding_bag", "Inductor", "Inductor, F.embedding_bag"
HIDDEN_MULTIPLE = 64
ROUNDS = Rounds(seconds=0.2, fewest=5, most=25)
WARM_UPS = 2
REPETITIONS = 21  # of what gives the limits
NOTES = (
    "Times are the device's, by CUDA events: the second-level cache holds other data before a call, and the host has "
    "launched the call when it begins, as under CUDA graphs. Medians of contestants that take turns. "
    "Scores of the peers are fp32 products by TF32, which is exact for half dtypes. The gradient of the values is "
    f"dense for every memory layer: '{BACKWARD}' has it, '{FROZEN}' does without."
)
STYLES: dict[str, Style] = {
    OURS: (MEMCOMPILE, "*"),
    EAGER: (SAME_LAYER, "o"),
    EAGER_BAG: (SAME_LAYER, "v"),
    INDUCTOR: (SAME_LAYER, "s"),
    INDUCTOR_BAG: (SAME_LAYER, "D"),
}
MOST_PANELS = 2


def layer_contestants(
    setting: Setting, table: nn.Parameter, all_peers: bool
) -> tuple[list[Contestant], frozenset[str]]:
    """All, and the names of those that compute the same."""
    under_inductor = {INDUCTOR: layers.naive, INDUCTOR_BAG: layers.bag} if all_peers else {}
    found = layers.memory_layers(setting, table, {EAGER: layers.naive, EAGER_BAG: layers.bag}, under_inductor)
    with table.device:
        ffns = [layers.swiglu_ffn(setting, HIDDEN_MULTIPLE)] + ([layers.gelu_ffn(setting)] if all_peers else [])
    return found + ffns, frozenset(c.name for c in found)


def limits(device: Gpu, plan: Plan) -> Limits:
    """In turns, so that the clocks are those of a device at work."""
    copy_bytes, size, where = min(plan.copy_bytes, device.free_bytes() // 4), plan.gemm_size, device.torch_device
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=where).random_()
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=where).to(plan.dtype) for _ in range(2))
    seconds = in_turns(
        REPETITIONS,
        partial(device.seconds, lambda: target.copy_(source)),
        partial(device.seconds, lambda: left @ right),
    )
    copy, product = (median(one[REPETITIONS // 4 :]) for one in seconds)  # without those that warm it up
    # A copy reads and writes its bytes.
    return Limits(2 * copy_bytes / copy / 1e9, "large copy", 2 * size**3 / product / 1e9, "GEMM")


class GpuBenchmark(Benchmark):
    module, name, figure = "benchmarks.gpu", "gpu", "gpu-roofline.png"
    about = "Measures a memory layer against its peers on a GPU, and what both reach of its limits."
    quick = "only what the goals are about, in a minute"

    def __init__(self, device: Gpu, plan: Plan) -> None:
        super().__init__(device.about(), sum(group.cases for group in plan.groups))
        self.device, self.plan = device, plan
        self.main_layer = Setting(plan.main.width, plan.main.n_keys, plan.dtype)

    @classmethod
    def of(cls, args: argparse.Namespace) -> "GpuBenchmark":
        dynamo_config.recompile_limit = 64
        torch.set_float32_matmul_precision("high")  # the peers' scores: exact for half dtypes, and ten times as fast
        return cls(Cuda(), quick_plan() if args.quick else full_plan())

    def measure(self, session: Session) -> None:
        """What fails is recorded, and the run goes on."""
        device, plan = self.device, self.plan
        session.say("this device's limits")
        comparison = Comparison(device, session, ROUNDS, WARM_UPS, time.perf_counter() + 60 * plan.minutes)
        self.results.limits[dtype_name(plan.dtype)] = limits(device, plan)
        for group in plan.groups:
            setting = fitting_setting(group, plan, device.free_bytes())
            if setting is None:
                reason = f"its table and the table's gradient exceed {SHARE_OF_MEMORY:.0%} of the free memory"
                session.miss(str(group), "", reason)
                session.advance(group.cases)
                continue
            session.say(f"{group}: filling the table")
            try:
                self.measure_group(group, setting, comparison)
            except Exception as error:
                session.miss(str(group), "", error)
            torch._dynamo.reset()  # what was compiled keeps the parameters of this group alive
            device.tidy()

    def measure_group(self, group: Group, setting: Setting, comparison: Comparison) -> None:
        torch.manual_seed(0)
        shape, where, peers = (setting.num_slots, setting.value_dim), self.device.torch_device, self.plan.all_peers
        table = nn.Parameter(torch.empty(shape, dtype=setting.dtype, device=where))
        with torch.no_grad():
            fill_table(table)
        if group.parts:
            tokens = group.tokens[0]
            comparison.measure([parts.gather_case(setting, table, tokens, peers)])
            for make in (parts.search_case, parts.scored_search_case, parts.update_case):
                comparison.measure([make(setting, where, tokens, peers)])
        contestants, same = layer_contestants(setting, table, peers)
        case = partial(layer_case, LAYER, setting, where, contestants, same, EAGER_BAG, table=table)
        cases = [case(tokens, FORWARD) for tokens in group.tokens]
        cases += [case(tokens, BACKWARD) for tokens in group.backward_tokens]
        if group.frozen:
            cases.append(case(group.backward_tokens[0], FROZEN))
        comparison.measure(cases)

    def judge(self) -> list[Goal]:
        """All goals that the plan asks for; one whose figures are missing is not met."""
        main, dtype = self.plan.main, dtype_name(self.plan.dtype)
        sizes: dict[str, Any] = {"width": main.width, "n_keys": main.n_keys, "tokens": main.tokens[0]}

        def goal(what: str, asked: str, kind: str, direction: str, names: tuple[str, ...], verdict: Verdict) -> Goal:
            case = self.results.by_name(kind=kind, direction=direction, **sizes)
            return judged(what, asked, dtype, [case.get(name) for name in names], verdict)

        def share_of_copy(ours: Median) -> tuple[str, bool]:
            copy = self.results.limits[dtype].gb_s
            return f"{ours.gb_s / copy:.0%} ({ours.gb_s:.0f} of {copy:.0f} GB/s)", ours.gb_s >= 0.9 * copy

        layer, topk, ffn = f"time as a multiple of {SWIGLU}", f"times as fast as {TOPK}", (OURS, SWIGLU)
        with_gradient = f"layer, {BACKWARD} with the values' dense gradient, {layer}"
        goals = [
            goal("gather of the measured copy bandwidth", ">= 90 %", GATHER, FORWARD, (OURS,), share_of_copy),
            goal(f"gather, times as fast as {BAG}", ">= 6 x", GATHER, FORWARD, (OURS, BAG), at_least(6)),
            goal(f"{SEARCH}, {topk}", ">= 3 x", SEARCH, FORWARD, (OURS, TOPK), at_least(3)),
            goal(
                f"{SCORED_SEARCH}, {topk}",
                ">= 3 x",
                SCORED_SEARCH,
                FORWARD,
                (OURS, TOPK),
                at_least(3),
            ),
            goal(f"layer, {FORWARD}, {layer}", "<= 0.7 x", LAYER, FORWARD, ffn, at_most(0.7)),
            goal(with_gradient, "<= 1.0 x", LAYER, BACKWARD, ffn, at_most(1.0)),
        ]
        if main.frozen:
            goals.append(goal(f"layer, {FROZEN}, {layer}", "<= 1.0 x", LAYER, FROZEN, ffn, at_most(1.0)))
        return goals

    def report(self) -> str:
        results, layer = self.results, self.main_layer
        about = [f"{k} {v:.0f}" if isinstance(v, float) else f"{k} {v}" for k, v in results.machine.items()]
        shown = [", ".join(about), NOTES, tables.limits_table(results)]
        shown += tables.part_tables(results, (GATHER, SEARCH, SCORED_SEARCH, UPDATE))
        shown += tables.layer_tables(results, LAYER)
        for tokens in sorted(self.plan.main.tokens):
            shown += tables.rates_table(results, LAYER, layer, tokens)
        goals = tables.goal_tables(results.goals, f"goals at d = {layer.width}, n = {layer.n_keys}: reached?")
        return "\n\n".join(shown + goals + tables.remarks(results))

    def draw(self, path: Path) -> list[Path]:
        """The main layer's forward, one panel for each number of tokens."""
        results, layer, limits = self.results, self.main_layer, self.results.limits.get(dtype_name(self.plan.dtype))
        if limits is None:
            return []
        panels = [
            Panel(tables.of_tokens(n), limits, [*tables.forward_case(results, LAYER, layer, n).values()])
            for n in sorted(self.plan.main.tokens, reverse=True)[:MOST_PANELS]
        ]
        title = (
            f"A layer's forward under the roofs of this device: d = {layer.width}, {layer.num_slots:,} slots\n"
            f"{results.machine.get('device', '')}"
        )
        return [path] if draw_roofline(panels, title, STYLES, path) else []

    @classmethod
    def main(cls, arguments: Sequence[str] | None = None) -> int:
        if not torch.cuda.is_available():
            print("skipped: no CUDA device")
            return 0  # so that `make` goes on where a GPU is optional
        return super().main(arguments)


if __name__ == "__main__":
    sys.exit(GpuBenchmark.main())
