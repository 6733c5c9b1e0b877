"""Measures a memory layer against its peers on a GPU, and what both reach of its limits.

python -m benchmarks.gpu [--quick] [--output DIR]
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch._dynamo import config as dynamo_config

from benchmarks.gpu.device import Cuda, Gpu
from benchmarks.gpu.goals import judge
from benchmarks.gpu.measure import EAGER, EAGER_BAG, INDUCTOR, INDUCTOR_BAG, LAYER, measure
from benchmarks.gpu.parts import GATHER, SCORED_SEARCH, SEARCH, UPDATE
from benchmarks.gpu.plan import Plan, full_plan, quick_plan
from benchmarks.harness.layers import OURS, Setting
from benchmarks.harness.plots import MEMCOMPILE, SAME_LAYER, Panel, Style, draw_roofline
from benchmarks.harness.results import BACKWARD, FROZEN, Results, dtype_name
from benchmarks.harness.session import command_line, conduct, exit_code
from benchmarks.harness.tables import (
    forward_case,
    goal_tables,
    layer_tables,
    limits_table,
    of_tokens,
    part_tables,
    rates_table,
    remarks,
)

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


def report(plan: Plan, results: Results) -> str:
    main = Setting(plan.main.width, plan.main.n_keys, plan.dtype)
    about = ", ".join(f"{k} {v:.0f}" if isinstance(v, float) else f"{k} {v}" for k, v in results.machine.items())
    parts = [about, NOTES, limits_table(results), *part_tables(results, (GATHER, SEARCH, SCORED_SEARCH, UPDATE))]
    parts += layer_tables(results, LAYER)
    for tokens in sorted(plan.main.tokens):
        parts += rates_table(results, LAYER, main, tokens)
    title = f"goals at d = {main.width}, n = {main.n_keys}: reached?"
    return "\n\n".join(parts + goal_tables(results.goals, title) + remarks(results))


def draw(plan: Plan, results: Results, path: Path) -> bool:
    """The main layer's forward, one panel for each number of tokens."""
    main, limits = Setting(plan.main.width, plan.main.n_keys, plan.dtype), results.limits.get(dtype_name(plan.dtype))
    if limits is None:
        return False
    panels = [
        Panel(of_tokens(tokens), limits, [*forward_case(results, LAYER, main, tokens).values()])
        for tokens in sorted(plan.main.tokens, reverse=True)[:MOST_PANELS]
    ]
    title = (
        f"A layer's forward under the roofs of this device: d = {main.width}, {main.num_slots:,} slots\n"
        f"{results.machine.get('device', '')}"
    )
    return draw_roofline(panels, title, STYLES, path)


def benchmark(device: Gpu, plan: Plan, output: Path) -> Results:
    return conduct(
        "gpu",
        output,
        Results(device.about()),
        sum(group.cases for group in plan.groups),
        partial(measure, device, plan),
        partial(report, plan),
        partial(judge, plan),
        partial(draw, plan),
        "gpu-roofline.png",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line("benchmarks.gpu", __doc__, "only what the goals are about, in a minute")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return 0  # so that `make` goes on where a GPU is optional
    dynamo_config.recompile_limit = 64
    torch.set_float32_matmul_precision("high")  # the peers' scores: exact for half dtypes, and ten times as fast
    return exit_code(benchmark(Cuda(), quick_plan() if args.quick else full_plan(), args.output))


if __name__ == "__main__":
    sys.exit(main())
