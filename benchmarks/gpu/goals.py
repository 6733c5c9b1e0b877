"""What the kernels are to reach on any GPU, as ratios of figures that are measured side by side."""

from collections.abc import Callable

from benchmarks.common.dense import SWIGLU
from benchmarks.common.results import BACKWARD, FORWARD, Goal, dtype_name
from benchmarks.gpu.case import FROZEN, GATHER, LAYER, OURS, SCORED_SEARCH, SEARCH
from benchmarks.gpu.gather import BAG
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.results import Median, Results
from benchmarks.gpu.search import TOPK


def judge(results: Results, plan: Plan) -> list[Goal]:
    """All goals that the plan asks for; one whose figures are missing is not met."""
    tokens, dtype = plan.main.tokens[0], dtype_name(plan.dtype)
    goals: list[Goal] = []

    def add(what: str, asked: str, kind: str, direction: str, names: tuple[str, ...], verdict: _Verdict) -> None:
        case = results.of(kind, results.main, tokens, direction) if results.main else {}
        missing = [name for name in names if name not in case]
        reached, met = verdict(*(case[name] for name in names)) if not missing else ("not measured", False)
        goals.append(Goal(what, asked, dtype, reached, met))

    def share_of_copy(ours: Median) -> tuple[str, bool]:
        copy = results.limits.copy_gb_s if results.limits else float("inf")
        return f"{ours.gb_s / copy:.0%} ({ours.gb_s:.0f} of {copy:.0f} GB/s)", ours.gb_s >= 0.9 * copy

    def times_as_fast(least: float) -> _Verdict:
        def verdict(ours: Median, other: Median) -> tuple[str, bool]:
            ratio = other.milliseconds / ours.milliseconds
            return f"{ratio:.2f} x ({ours.milliseconds:.3f} against {other.milliseconds:.3f} ms)", ratio >= least

        return verdict

    def multiple(most: float) -> _Verdict:
        def verdict(ours: Median, other: Median) -> tuple[str, bool]:
            ratio = ours.milliseconds / other.milliseconds
            return f"{ratio:.2f} x ({ours.milliseconds:.3f} against {other.milliseconds:.3f} ms)", ratio <= most

        return verdict

    add("gather of the measured copy bandwidth", ">= 90 %", GATHER, FORWARD, (OURS,), share_of_copy)
    add(f"gather, times as fast as {BAG}", ">= 6 x", GATHER, FORWARD, (OURS, BAG), times_as_fast(6))
    add(f"{SEARCH}, times as fast as {TOPK}", ">= 3 x", SEARCH, FORWARD, (OURS, TOPK), times_as_fast(3))
    add(f"{SCORED_SEARCH}, times as fast as {TOPK}", ">= 3 x", SCORED_SEARCH, FORWARD, (OURS, TOPK), times_as_fast(3))
    layer = f"time as a multiple of {SWIGLU}"
    add(f"layer, {FORWARD}, {layer}", "<= 0.7 x", LAYER, FORWARD, (OURS, SWIGLU), multiple(0.7))
    with_gradient = f"layer, {BACKWARD} with the values' dense gradient, {layer}"
    add(with_gradient, "<= 1.0 x", LAYER, BACKWARD, (OURS, SWIGLU), multiple(1.0))
    if plan.main.frozen:
        add(f"layer, {FROZEN}, {layer}", "<= 1.0 x", LAYER, FROZEN, (OURS, SWIGLU), multiple(1.0))
    return goals


_Verdict = Callable[..., tuple[str, bool]]  # medians -> what was reached, and whether that is enough
