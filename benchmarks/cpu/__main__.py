"""A memory layer against its peers on a CPU: python -m benchmarks.cpu [--quick] [--output DIR] [--threads N]"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config

from benchmarks.cpu.contestants import EAGER, INDUCTOR, NAIVE, SAME, contestants
from benchmarks.cpu.goals import gather_goal, layer_goals, search_goal
from benchmarks.harness import tables
from benchmarks.harness.compare import Comparison, layer_case
from benchmarks.harness.layers import OURS, Setting, fill_table
from benchmarks.harness.machine import cpu_limits, machine
from benchmarks.harness.package import advise_huge_pages, load_kernels
from benchmarks.harness.plots import LIBRARY, MEMCOMPILE, SAME_LAYER, Panel, Style, draw_roofline
from benchmarks.harness.results import BACKWARD, FORWARD, Goal, dtype_name
from benchmarks.harness.session import Benchmark, Session
from benchmarks.harness.timing import Rounds, wall_seconds

ROUNDS = Rounds(seconds=0.3, fewest=3, most=30, slow=1.5)
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
        return layer_goals(self.results, self.mains, self.tokens) if self.judged else []

    def report(self) -> str:
        results, main = self.results, self.mains[0]
        parts = [tables.about_cpu(results), "Values' gradient excluded: no contestant computes that of its table."]
        parts += [tables.limits_table(results), *tables.layer_tables(results, LAYER)]
        for setting in self.mains:
            parts += tables.rates_table(results, LAYER, setting, self.tokens)
        goals = f"goals at d = {main.width}, n = {main.n_keys}, {self.tokens} tokens: reached?"
        return "\n\n".join(parts + tables.goal_tables(results.goals, goals) + tables.remarks(results))

    def draw(self, path: Path) -> bool:
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
        return draw_roofline(panels, title, STYLES, path)


if __name__ == "__main__":
    sys.exit(CpuBenchmark.main())
