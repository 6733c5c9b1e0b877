"""What the kernels are to reach on any machine, as ratios of figures that are measured in the same turns."""

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.cpu.contestants import EAGER, OUR_GEMMS
from benchmarks.harness.layers import OURS, SWIGLU, Setting
from benchmarks.harness.machine import read_rows
from benchmarks.harness.results import BACKWARD, FORWARD, Goal, Results, Verdict, at_least, at_most, dtype_name, judged
from benchmarks.harness.timing import wall_seconds

ROUNDS = 25


def gather_goal(setting: Setting, table: Tensor, tokens: int, prefetch: bool) -> Goal:
    """`weighted_gather` alone, against rows that are only read; the median of the rounds' ratios."""
    weights = torch.rand(tokens, setting.hits).softmax(dim=-1)
    gather = torch.ops.memcompile.weighted_gather
    shares, gathers, limits = [], [], []
    for _ in range(ROUNDS):
        read = torch.randint(setting.num_slots, (tokens * setting.hits,))
        slots = torch.randint(setting.num_slots, (tokens, setting.hits), dtype=torch.int32)
        limits.append(read_rows(table, read, prefetch))
        gathers.append(wall_seconds(gather, table, slots, weights))
        shares.append(limits[-1] / gathers[-1])
    share = statistics.median(shares)
    gigabytes = tokens * setting.hits * setting.width * table.itemsize / 1e9
    gb_s, most = gigabytes / statistics.median(gathers), gigabytes / statistics.median(limits)
    name = "weighted_gather of the measured random-row bandwidth"
    reached = f"{share:.0%} ({gb_s:.1f} of {most:.1f} GB/s)"
    return Goal(name, ">= 90 %", dtype_name(table.dtype), reached, 0.9 <= share < 1.2)


def search_goal(setting: Setting, tokens: int) -> Goal:
    """`product_key_topk` against `torch.topk` of the same scores, which only begins the search."""
    search = torch.ops.memcompile.product_key_topk
    ratios, searches, topks = [], [], []
    for _ in range(ROUNDS):
        scores = torch.randn(2, tokens, setting.heads, setting.n_keys)
        searches.append(wall_seconds(search, scores, setting.top_k))
        topks.append(wall_seconds(torch.topk, scores, setting.top_k))
        ratios.append(topks[-1] / searches[-1])
    ratio = statistics.median(ratios)
    ours, theirs = statistics.median(searches) * 1e3, statistics.median(topks) * 1e3
    reached = f"{ratio:.1f} x ({ours:.2f} against {theirs:.1f} ms)"
    return Goal("product_key_topk, times as fast as torch.topk", ">= 4 x", "float32", reached, ratio >= 4)


def layer_goals(results: Results, mains: Sequence[Setting], tokens: int) -> list[Goal]:
    """The whole layer's time in the main settings."""
    goals = []

    def add(main: Setting, name: str, asked: str, direction: str, count: int, other: str, verdict: Verdict) -> None:
        dtype = dtype_name(main.dtype)
        case = results.by_name(width=main.width, n_keys=main.n_keys, dtype=dtype, tokens=count, direction=direction)
        if other != OUR_GEMMS or other in case:  # which are the same as everybody's on other processors
            goals.append(judged(name, asked, dtype, (case.get(OURS), case.get(other)), verdict))

    for main in mains:
        add(main, "forward, times as fast as eager", ">= 1.8 x", FORWARD, tokens, EAGER, at_least(1.8))
        for ffn in (SWIGLU, OUR_GEMMS):
            multiple = f"time as a multiple of {ffn}"
            add(main, f"forward, {multiple}", "<= 1.0 x", FORWARD, tokens, ffn, at_most(1.0))
            add(main, f"forward of 1 token, {multiple}", "<= 1.0 x", FORWARD, 1, ffn, at_most(1.0))
            add(main, f"forward+backward, {multiple}", "<= 1.2 x", BACKWARD, tokens, ffn, at_most(1.2))
    return goals
