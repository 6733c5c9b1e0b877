"""What the kernels are to reach on any GPU, as ratios of figures that are measured in the same turns."""

from typing import Any

from benchmarks.gpu.measure import LAYER
from benchmarks.gpu.parts import BAG, GATHER, SCORED_SEARCH, SEARCH, TOPK
from benchmarks.gpu.plan import Plan
from benchmarks.harness.layers import OURS, SWIGLU
from benchmarks.harness.results import (
    BACKWARD,
    FORWARD,
    FROZEN,
    Goal,
    Median,
    Results,
    Verdict,
    at_least,
    at_most,
    dtype_name,
    judged,
)


def judge(plan: Plan, results: Results) -> list[Goal]:
    """All goals that the plan asks for; one whose figures are missing is not met."""
    dtype = dtype_name(plan.dtype)
    sizes: dict[str, Any] = {"width": plan.main.width, "n_keys": plan.main.n_keys, "tokens": plan.main.tokens[0]}

    def goal(what: str, asked: str, kind: str, direction: str, names: tuple[str, ...], verdict: Verdict) -> Goal:
        case = results.by_name(kind=kind, direction=direction, **sizes)
        return judged(what, asked, dtype, [case.get(name) for name in names], verdict)

    def share_of_copy(ours: Median) -> tuple[str, bool]:
        copy = results.limits[dtype].gb_s
        return f"{ours.gb_s / copy:.0%} ({ours.gb_s:.0f} of {copy:.0f} GB/s)", ours.gb_s >= 0.9 * copy

    layer, topk, ffn = f"time as a multiple of {SWIGLU}", f"times as fast as {TOPK}", (OURS, SWIGLU)
    with_gradient = f"layer, {BACKWARD} with the values' dense gradient, {layer}"
    goals = [
        goal("gather of the measured copy bandwidth", ">= 90 %", GATHER, FORWARD, (OURS,), share_of_copy),
        goal(f"gather, times as fast as {BAG}", ">= 6 x", GATHER, FORWARD, (OURS, BAG), at_least(6)),
        goal(f"{SEARCH}, {topk}", ">= 3 x", SEARCH, FORWARD, (OURS, TOPK), at_least(3)),
        goal(f"{SCORED_SEARCH}, {topk}", ">= 3 x", SCORED_SEARCH, FORWARD, (OURS, TOPK), at_least(3)),
        goal(f"layer, {FORWARD}, {layer}", "<= 0.7 x", LAYER, FORWARD, ffn, at_most(0.7)),
        goal(with_gradient, "<= 1.0 x", LAYER, BACKWARD, ffn, at_most(1.0)),
    ]
    if plan.main.frozen:
        goals.append(goal(f"layer, {FROZEN}, {layer}", "<= 1.0 x", LAYER, FROZEN, ffn, at_most(1.0)))
    return goals
