"""A memory layer against its peers on a GPU: python -m benchmarks.gpu [--quick] [--output DIR]"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch._dynamo import config as dynamo_config

from benchmarks.gpu.device import Cuda, Gpu
from benchmarks.gpu.goals import judge
from benchmarks.gpu.measure import EAGER, EAGER_BAG, INDUCTOR, INDUCTOR_BAG, LAYER, measure
from benchmarks.gpu.parts import GATHER, SCORED_SEARCH, SEARCH, UPDATE
from benchmarks.gpu.plan import Plan, full_plan, quick_plan
from benchmarks.harness import tables
from benchmarks.harness.layers import OURS, Setting
from benchmarks.harness.plots import MEMCOMPILE, SAME_LAYER, Panel, Style, draw_roofline
from benchmarks.harness.results import BACKWARD, FROZEN, Goal, dtype_name
from benchmarks.harness.session import Benchmark, Session

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
        measure(self.device, self.plan, session)

    def judge(self) -> list[Goal]:
        return judge(self.plan, self.results)

    def report(self) -> str:
        results, layer = self.results, self.main_layer
        about = [f"{k} {v:.0f}" if isinstance(v, float) else f"{k} {v}" for k, v in results.machine.items()]
        parts = [", ".join(about), NOTES, tables.limits_table(results)]
        parts += tables.part_tables(results, (GATHER, SEARCH, SCORED_SEARCH, UPDATE))
        parts += tables.layer_tables(results, LAYER)
        for tokens in sorted(self.plan.main.tokens):
            parts += tables.rates_table(results, LAYER, layer, tokens)
        goals = tables.goal_tables(results.goals, f"goals at d = {layer.width}, n = {layer.n_keys}: reached?")
        return "\n\n".join(parts + goals + tables.remarks(results))

    def draw(self, path: Path) -> bool:
        """The main layer's forward, one panel for each number of tokens."""
        results, layer, limits = self.results, self.main_layer, self.results.limits.get(dtype_name(self.plan.dtype))
        if limits is None:
            return False
        panels = [
            Panel(tables.of_tokens(n), limits, [*tables.forward_case(results, LAYER, layer, n).values()])
            for n in sorted(self.plan.main.tokens, reverse=True)[:MOST_PANELS]
        ]
        title = (
            f"A layer's forward under the roofs of this device: d = {layer.width}, {layer.num_slots:,} slots\n"
            f"{results.machine.get('device', '')}"
        )
        return draw_roofline(panels, title, STYLES, path)

    @classmethod
    def main(cls, arguments: Sequence[str] | None = None) -> int:
        if not torch.cuda.is_available():
            print("skipped: no CUDA device")
            return 0  # so that `make` goes on where a GPU is optional
        return super().main(arguments)


if __name__ == "__main__":
    sys.exit(GpuBenchmark.main())
