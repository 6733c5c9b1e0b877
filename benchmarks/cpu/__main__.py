"""A memory layer against its peers on a CPU: python -m benchmarks.cpu [--quick] [--output DIR] [--threads N]"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config

from benchmarks.cpu.contestants import EAGER, INDUCTOR, NAIVE, OUR_GEMMS, SAME, contestants
from benchmarks.harness import tables
from benchmarks.harness.compare import Comparison, layer_case
from benchmarks.harness.layers import OURS, SWIGLU, Setting, fill_table
from benchmarks.harness.machine import cpu_limits, machine, read_rows
from benchmarks.harness.package import advise_huge_pages, load_kernels
from benchmarks.harness.plots import LIBRARY, MEMCOMPILE, SAME_LAYER, Panel, Style, draw_roofline
from benchmarks.harness.results import BACKWARD, FORWARD, Goal, Verdict, at_least, at_most, dtype_name, judged
from benchmarks.harness.session import Benchmark, Session
from benchmarks.harness.timing import Rounds, in_turns, wall_seconds

ROUNDS = Rounds(seconds=0.3, fewest=3, most=30, slow=1.5)
REPETITIONS = 25  # of an operator alone
LAYER = "layer"
STYLES: dict[str, Style] = {
    OURS: (MEMCOMPILE, "*"),
    EAGER: (SAME_LAYER, "o"),
    INDUCTOR: (SAME_LAYER, "s"),
    NAIVE: (SAME_LAYER, "D"),
    "product-key-memory": (LIBRARY, "o"),
    "PEER-pytorch": (LIBRARY, "s"),
}


@dataclass(frozen=True)
class Group:
    """Memory layers of several sizes, each in the first rows of one table."""

    width: int
    dtype: torch.dtype
    n_keys: tuple[int, ...]  # ascending
    tokens: tuple[int, ...]

    @property
    def settings(self) -> list[Setting]:
        return [Setting(self.width, n_keys, self.dtype) for n_keys in self.n_keys]


def full() -> list[Group]:
    dtypes = torch.float32, torch.bfloat16
    large = [Group(1024, dtype, (128, 512, 1024), (512, 1, 64, 2048)) for dtype in dtypes]
    return large + [Group(256, dtype, (256,), (512,)) for dtype in dtypes]


def gather_goal(setting: Setting, table: Tensor, tokens: int, prefetch: bool) -> Goal:
    """`weighted_gather` alone, against rows that are only read; the median of the rounds' ratios."""
    weights = torch.rand(tokens, setting.hits).softmax(dim=-1)

    def read() -> float:
        return read_rows(table, torch.randint(setting.num_slots, (tokens * setting.hits,)), prefetch)

    def gather() -> float:
        slots = torch.randint(setting.num_slots, (tokens, setting.hits), dtype=torch.int32)
        return wall_seconds(torch.ops.memcompile.weighted_gather, table, slots, weights)

    reads, gathers = in_turns(REPETITIONS, read, gather)
    share = median(least / ours for least, ours in zip(reads, gathers, strict=True))
    gigabytes = tokens * setting.hits * setting.width * table.itemsize / 1e9
    reached = f"{share:.0%} ({gigabytes / median(gathers):.1f} of {gigabytes / median(reads):.1f} GB/s)"
    name = "weighted_gather of the measured random-row bandwidth"
    return Goal(name, ">= 90 %", dtype_name(table.dtype), reached, 0.9 <= share < 1.2)


def search_goal(setting: Setting, tokens: int) -> Goal:
    """`product_key_topk` against `torch.topk` of the same size, which only begins the search."""

    def sample(search: Callable[..., object]) -> float:
        return wall_seconds(search, torch.randn(2, tokens, setting.heads, setting.n_keys), setting.top_k)

    ours, topk = in_turns(
        REPETITIONS, partial(sample, torch.ops.memcompile.product_key_topk), partial(sample, torch.topk)
    )
    ratio = median(theirs / our for our, theirs in zip(ours, topk, strict=True))
    reached = f"{ratio:.1f} x ({median(ours) * 1e3:.2f} against {median(topk) * 1e3:.1f} ms)"
    return Goal("product_key_topk, times as fast as torch.topk", ">= 4 x", "float32", reached, ratio >= 4)


class Cpu:
    """Times a call by the clock, with threads that are awake."""

    def seconds(self, call: Callable[[], object]) -> float:
        return wall_seconds(call)

    def tidy(self) -> None:
        """Python gives the memory back by itself."""


class CpuBenchmark(Benchmark):
    """Of the groups that are as wide as the first, the largest layer is what the goals and the roofline are about."""

    module, name, figure, threads = "benchmarks.cpu", "cpu", "cpu-roofline.png", 0
    about = "Measures a memory layer against its peers on this machine's CPU, and what both reach of its limits."
    quick = "one small layer, in a minute: to try the benchmark"

    def __init__(self, groups: list[Group], judged: bool) -> None:
        super().__init__(machine(), sum(2 * len(group.tokens) * len(group.n_keys) for group in groups))
        self.groups, self.judged, self.tokens = groups, judged, groups[0].tokens[0]
        self.mains = [group.settings[-1] for group in groups if group.width == groups[0].width]

    @classmethod
    def of(cls, args: argparse.Namespace) -> "CpuBenchmark":
        dynamo_config.recompile_limit = 64
        load_kernels()
        # The goals are those of a large layer.
        return cls([Group(256, torch.float32, (64,), (64,))] if args.quick else full(), judged=not args.quick)

    def measure(self, session: Session) -> None:
        for group in self.groups:
            session.say(f"d = {group.width}, {dtype_name(group.dtype)}: the table, and this machine's limits")
            torch.manual_seed(0)
            largest = group.settings[-1]
            # One for all contestants, which read it and do not change it: the machine has no room for one each.
            table = torch.empty(largest.num_slots, group.width, dtype=group.dtype)
            advise_huge_pages(table)
            fill_table(table)
            if largest in self.mains:
                self.measure_limits(largest, table)
            comparison = Comparison(Cpu(), session, ROUNDS, warm_ups=1)
            for setting, present in zip(group.settings, contestants(group.settings, table), strict=True):
                case = partial(layer_case, LAYER, setting, table.device, present, SAME, EAGER)
                comparison.measure([case(n, way) for n in group.tokens for way in (FORWARD, BACKWARD)])
            torch._dynamo.reset()  # what was compiled keeps the parameters of this group alive

    def measure_limits(self, main: Setting, table: Tensor) -> None:
        limits, prefetch = cpu_limits(table)
        self.results.limits[dtype_name(main.dtype)] = limits
        if self.judged:
            self.results.goals.append(gather_goal(main, table, self.tokens, prefetch))
            if main.dtype == torch.float32:
                self.results.goals.append(search_goal(main, self.tokens))

    def judge(self) -> list[Goal]:
        """The whole layer's time in the main settings."""
        goals: list[Goal] = []

        def add(main: Setting, name: str, asked: str, direction: str, count: int, other: str, verdict: Verdict) -> None:
            dtype = dtype_name(main.dtype)
            case = self.results.by_name(
                width=main.width, n_keys=main.n_keys, dtype=dtype, tokens=count, direction=direction
            )
            if other != OUR_GEMMS or other in case:  # which it is on AMD alone
                goals.append(judged(name, asked, dtype, (case.get(OURS), case.get(other)), verdict))

        for main in self.mains if self.judged else []:
            add(main, "forward, times as fast as eager", ">= 1.8 x", FORWARD, self.tokens, EAGER, at_least(1.8))
            for ffn in (SWIGLU, OUR_GEMMS):
                multiple = f"time as a multiple of {ffn}"
                add(main, f"forward, {multiple}", "<= 1.0 x", FORWARD, self.tokens, ffn, at_most(1.0))
                add(main, f"forward of 1 token, {multiple}", "<= 1.0 x", FORWARD, 1, ffn, at_most(1.0))
                add(main, f"forward+backward, {multiple}", "<= 1.2 x", BACKWARD, self.tokens, ffn, at_most(1.2))
        return goals

    def report(self) -> str:
        results, main = self.results, self.mains[0]
        parts = [tables.about_cpu(results), "Values' gradient excluded: no contestant computes that of its table."]
        parts += [tables.limits_table(results), *tables.layer_tables(results, LAYER)]
        for setting in self.mains:
            parts += tables.rates_table(results, LAYER, setting, self.tokens)
        goals = f"goals at d = {main.width}, n = {main.n_keys}, {self.tokens} tokens: reached?"
        return "\n\n".join(parts + tables.goal_tables(results.goals, goals) + tables.remarks(results))

    def draw(self, path: Path) -> list[Path]:
        """The forward of the main layers, one panel for each dtype."""
        results, main = self.results, self.mains[0]
        panels = [
            Panel(dtype, results.limits[dtype], [*tables.forward_case(results, LAYER, setting, self.tokens).values()])
            for setting in self.mains
            if (dtype := dtype_name(setting.dtype)) in results.limits
        ]
        title = (
            f"A layer's forward under the roofs of this machine: {self.tokens} tokens, d = {main.width}, "
            f"{main.num_slots:,} slots\n{results.machine['cpu']}, {results.machine['threads']} threads"
        )
        return [path] if draw_roofline(panels, title, STYLES, path) else []


if __name__ == "__main__":
    sys.exit(CpuBenchmark.main())
