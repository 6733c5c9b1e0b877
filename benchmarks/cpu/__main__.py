"""Measures a memory layer against its peers on this machine's CPU, and what both reach of its limits.

python -m benchmarks.cpu [--quick] [--output DIR] [--threads N]
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config

from benchmarks.cpu.contestants import EAGER, INDUCTOR, NAIVE, SAME, contestants
from benchmarks.cpu.goals import gather_goal, layer_goals, search_goal
from benchmarks.harness.compare import Comparison, layer_case
from benchmarks.harness.layers import OURS, Setting, fill_table
from benchmarks.harness.machine import cpu_limits, machine
from benchmarks.harness.package import advise_huge_pages, load_kernels
from benchmarks.harness.plots import LIBRARY, MEMCOMPILE, SAME_LAYER, Panel, Style, draw_roofline
from benchmarks.harness.results import BACKWARD, FORWARD, Goal, Results, dtype_name
from benchmarks.harness.session import Session, command_line, conduct, exit_code, positive
from benchmarks.harness.tables import (
    about_cpu,
    forward_case,
    goal_tables,
    layer_tables,
    limits_table,
    rates_table,
    remarks,
)
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


@dataclass(frozen=True)
class Plan:
    groups: tuple[Group, ...]
    mains: tuple[Setting, ...]  # of which the goals, the rates and the roofline are told
    tokens: int  # there
    goals: bool = True


def plan(quick: bool) -> Plan:
    if quick:
        group = Group(256, torch.float32, (64,), (64,))
        return Plan((group,), (group.settings[-1],), 64, goals=False)  # which are those of a large layer
    dtypes = torch.float32, torch.bfloat16
    large = [Group(1024, dtype, (128, 512, 1024), (512, 1, 64, 2048)) for dtype in dtypes]
    small = [Group(256, dtype, (256,), (512,)) for dtype in dtypes]
    return Plan((*large, *small), tuple(group.settings[-1] for group in large), 512)


class Cpu:
    """Times a call by the clock, with threads that are awake."""

    def seconds(self, call: Callable[[], object]) -> float:
        return wall_seconds(call)

    def tidy(self) -> None:
        """Python gives the memory back by itself."""


def measure(todo: Plan, session: Session) -> None:
    for group in todo.groups:
        name = f"d = {group.width}, {dtype_name(group.dtype)}"
        session.say(f"{name}: filling the table")
        torch.manual_seed(0)
        largest = group.settings[-1]
        # One for all contestants, which read it and do not change it: the machine has no room for one each.
        table = torch.empty(largest.num_slots, group.width, dtype=group.dtype)
        advise_huge_pages(table)
        fill_table(table)
        if largest in todo.mains:
            session.say(f"{name}: this machine's limits")
            measure_limits(todo, largest, table, session.results)
        comparison = Comparison(Cpu(), session, ROUNDS, warm_ups=1)
        for setting, present in zip(group.settings, contestants(group.settings, table), strict=True):
            case = partial(layer_case, LAYER, setting, table.device, present, SAME, EAGER)
            comparison.measure([case(n, way) for n in group.tokens for way in (FORWARD, BACKWARD)])
        torch._dynamo.reset()  # what was compiled keeps the parameters of this group alive


def measure_limits(todo: Plan, main: Setting, table: Tensor, results: Results) -> None:
    limits, prefetch = cpu_limits(table)
    results.limits[dtype_name(main.dtype)] = limits
    if not todo.goals:
        return
    results.goals.append(gather_goal(main, table, todo.tokens, prefetch))
    if main.dtype == torch.float32:
        results.goals.append(search_goal(main, todo.tokens))


def report(todo: Plan, results: Results) -> str:
    main = todo.mains[0]
    goals = f"goals at d = {main.width}, n = {main.n_keys}, {todo.tokens} tokens: reached?"
    parts = [about_cpu(results), "Values' gradient excluded: no contestant computes that of its table."]
    parts += [limits_table(results), *layer_tables(results, LAYER)]
    for main in todo.mains:
        parts += rates_table(results, LAYER, main, todo.tokens)
    return "\n\n".join(parts + goal_tables(results.goals, goals) + remarks(results))


def draw(todo: Plan, results: Results, path: Path) -> bool:
    """The forward of the main settings, one panel for each dtype."""
    panels = [
        Panel(dtype, results.limits[dtype], [*forward_case(results, LAYER, main, todo.tokens).values()])
        for main in todo.mains
        if (dtype := dtype_name(main.dtype)) in results.limits
    ]
    main = todo.mains[0]
    title = (
        f"A layer's forward under the roofs of this machine: {todo.tokens} tokens, d = {main.width}, "
        f"{main.num_slots:,} slots\n{results.machine['cpu']}, {results.machine['threads']} threads"
    )
    return draw_roofline(panels, title, STYLES, path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line("benchmarks.cpu", __doc__, "one small layer, in a minute: to try the benchmark")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="[%(default)s]")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    dynamo_config.recompile_limit = 64
    load_kernels()
    todo = plan(args.quick)

    def judge(results: Results) -> list[Goal]:
        return layer_goals(results, todo.mains, todo.tokens) if todo.goals else []

    results = conduct(
        "cpu",
        args.output,
        Results(machine()),
        sum(2 * len(group.tokens) * len(group.n_keys) for group in todo.groups),
        partial(measure, todo),
        partial(report, todo),
        judge,
        partial(draw, todo),
        "cpu-roofline.png",
    )
    return exit_code(results)


if __name__ == "__main__":
    sys.exit(main())
