"""What the kernels are to reach on any machine, as ratios of figures that are measured in the same turns."""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor

from benchmarks.cpu.contestants import EAGER, OUR_GEMMS
from benchmarks.harness.layers import OURS, SWIGLU, Setting
from benchmarks.harness.machine import read_rows
from benchmarks.harness.results import BACKWARD, FORWARD, Goal, Results, Verdict, at_least, at_most, dtype_name, judged
from benchmarks.harness.timing import in_turns, wall_seconds

ROUNDS = 25


def gather_goal(setting: Setting, table: Tensor, tokens: int, prefetch: bool) -> Goal:
    """`weighted_gather` alone, against rows that are only read; the median of the rounds' ratios."""
    weights = torch.rand(tokens, setting.hits).softmax(dim=-1)

    def read() -> float:
        return read_rows(table, torch.randint(setting.num_slots, (tokens * setting.hits,)), prefetch)

    def gather() -> float:
        slots = torch.randint(setting.num_slots, (tokens, setting.hits), dtype=torch.int32)
        return wall_seconds(torch.ops.memcompile.weighted_gather, table, slots, weights)

    reads, gathers = in_turns(ROUNDS, read, gather)
    share = median(least / ours for least, ours in zip(reads, gathers, strict=True))
    gigabytes = tokens * setting.hits * setting.width * table.itemsize / 1e9
    reached = f"{share:.0%} ({gigabytes / median(gathers):.1f} of {gigabytes / median(reads):.1f} GB/s)"
    name = "weighted_gather of the measured random-row bandwidth"
    return Goal(name, ">= 90 %", dtype_name(table.dtype), reached, 0.9 <= share < 1.2)


def search_goal(setting: Setting, tokens: int) -> Goal:
    """`product_key_topk` against `torch.topk` of the same size, which only begins the search."""

    def sample(search: Callable[..., object]) -> float:
        return wall_seconds(search, torch.randn(2, tokens, setting.heads, setting.n_keys), setting.top_k)

    ours, topk = in_turns(ROUNDS, partial(sample, torch.ops.memcompile.product_key_topk), partial(sample, torch.topk))
    ratio = median(theirs / our for our, theirs in zip(ours, topk, strict=True))
    reached = f"{ratio:.1f} x ({median(ours) * 1e3:.2f} against {median(topk) * 1e3:.1f} ms)"
    return Goal("product_key_topk, times as fast as torch.topk", ">= 4 x", "float32", reached, ratio >= 4)


def layer_goals(results: Results, mains: Sequence[Setting], tokens: int) -> list[Goal]:
    """The whole layer's time in the main settings."""
    goals = []

    def add(main: Setting, name: str, asked: str, direction: str, count: int, other: str, verdict: Verdict) -> None:
        dtype = dtype_name(main.dtype)
        case = results.by_name(width=main.width, n_keys=main.n_keys, dtype=dtype, tokens=count, direction=direction)
        if other != OUR_GEMMS or other in case:  # which it is on AMD alone
            goals.append(judged(name, asked, dtype, (case.get(OURS), case.get(other)), verdict))

    for main in mains:
        add(main, "forward, times as fast as eager", ">= 1.8 x", FORWARD, tokens, EAGER, at_least(1.8))
        for ffn in (SWIGLU, OUR_GEMMS):
            multiple = f"time as a multiple of {ffn}"
            add(main, f"forward, {multiple}", "<= 1.0 x", FORWARD, tokens, ffn, at_most(1.0))
            add(main, f"forward of 1 token, {multiple}", "<= 1.0 x", FORWARD, 1, ffn, at_most(1.0))
            add(main, f"forward+backward, {multiple}", "<= 1.2 x", BACKWARD, tokens, ffn, at_most(1.2))
    return goals
