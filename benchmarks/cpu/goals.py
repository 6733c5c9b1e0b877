"""What the kernels are to reach on any machine, as ratios of figures that are measured side by side."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common.dense import SWIGLU
from benchmarks.common.results import BACKWARD, FORWARD, Goal, dtype_name
from benchmarks.common.setting import Setting
from benchmarks.cpu.dense import OUR_GEMMS
from benchmarks.cpu.limits import read_rows
from benchmarks.cpu.results import Results
from benchmarks.cpu.timing import wake_threads

ROUNDS = 25
FFNS = (SWIGLU, OUR_GEMMS)


def _seconds(call: Callable[..., object], *arguments: object) -> float:
    wake_threads()
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def gather_goal(setting: Setting, table: Tensor, tokens: int, prefetch: bool) -> Goal:
    """`weighted_gather` alone, against rows that are only read; the median of the rounds' ratios."""
    hits = setting.heads * setting.top_k
    weights = torch.rand(tokens, hits).softmax(dim=-1)
    gather = torch.ops.memcompile.weighted_gather
    shares, gathers, limits = [], [], []
    for _ in range(ROUNDS):
        read = torch.randint(setting.num_slots, (tokens * hits,))
        slots = torch.randint(setting.num_slots, (tokens, hits), dtype=torch.int32)
        limits.append(read_rows(table, read, prefetch))
        gathers.append(_seconds(gather, table, slots, weights))
        shares.append(limits[-1] / gathers[-1])
    share = statistics.median(shares)
    gigabytes = tokens * hits * setting.width * table.itemsize / 1e9
    gb_s, most = gigabytes / statistics.median(gathers), gigabytes / statistics.median(limits)
    name = "weighted_gather of the measured random-row bandwidth"
    return Goal(
        name, ">= 90 %", dtype_name(table.dtype), f"{share:.0%} ({gb_s:.1f} of {most:.1f} GB/s)", 0.9 <= share < 1.2
    )


def search_goal(setting: Setting, tokens: int) -> Goal:
    """`product_key_topk` against `torch.topk` of the same scores, which only begins the search."""
    search = torch.ops.memcompile.product_key_topk
    ratios, searches, topks = [], [], []
    for _ in range(ROUNDS):
        scores = torch.randn(2, tokens, setting.heads, setting.n_keys)
        searches.append(_seconds(search, scores, setting.top_k))
        topks.append(_seconds(torch.topk, scores, setting.top_k))
        ratios.append(topks[-1] / searches[-1])
    ratio = statistics.median(ratios)
    ours, theirs = statistics.median(searches) * 1e3, statistics.median(topks) * 1e3
    reached = f"{ratio:.1f} x ({ours:.2f} against {theirs:.1f} ms)"
    return Goal("product_key_topk, times as fast as torch.topk", ">= 4 x", "float32", reached, ratio >= 4)


def layer_goals(results: Results, dtype: str) -> list[Goal]:
    """The whole layer's time, from the cases that have been measured; those that are missing are left out."""
    goals = []

    def add(what: str, direction: str, tokens: int, others: tuple[str, ...], most: float) -> None:
        case = results.of_main(dtype, direction, tokens)
        for other in others:
            if "memcompile" in case and other in case:
                ratio = case["memcompile"].milliseconds / case[other].milliseconds
                name = f"{what}, time as a multiple of {other}"
                goals.append(Goal(name, f"<= {most:.1f} x", dtype, f"{ratio:.2f} x", ratio <= most))

    tokens = results.main_tokens
    case = results.of_main(dtype, FORWARD, tokens)
    if "memcompile" in case and "eager" in case:
        ratio = case["eager"].milliseconds / case["memcompile"].milliseconds
        goals.append(Goal("forward, times as fast as eager", ">= 1.8 x", dtype, f"{ratio:.2f} x", ratio >= 1.8))
    add("forward", FORWARD, tokens, FFNS, 1.0)
    add("forward of 1 token", FORWARD, 1, FFNS, 1.0)
    add("forward+backward", BACKWARD, tokens, FFNS, 1.2)
    return goals
