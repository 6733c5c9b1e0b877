"""Measures a memory layer against its peers on this machine's CPU, and what both reach of its limits.

python -m benchmarks.cpu [--quick] [--output DIR] [--threads N]
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch._dynamo import config as dynamo_config
from tqdm import tqdm

from benchmarks.common.results import BACKWARD, FORWARD, dtype_name
from benchmarks.common.session import Stop, interruptible
from benchmarks.common.setting import Contestant
from benchmarks.cpu.contestants import Group, contestants
from benchmarks.cpu.goals import gather_goal, layer_goals, search_goal
from benchmarks.cpu.limits import measure_limits
from benchmarks.cpu.memory import check_agreement
from benchmarks.cpu.report import render
from benchmarks.cpu.results import Median, Results, machine
from benchmarks.cpu.roofline import draw
from benchmarks.cpu.table import shared_table
from benchmarks.cpu.timing import medians
from memcompile.lowering import cpu

DTYPES = (torch.float32, torch.bfloat16)
MAIN_TOKENS = 512


stop = Stop()


def groups(quick: bool) -> list[Group]:
    """The main ones first."""
    if quick:
        return [Group(256, torch.float32, (64,), (64, 1)), Group(256, torch.bfloat16, (64,), (64,))]
    large = [Group(1024, dtype, (128, 512, 1024), (512, 1, 64, 2048)) for dtype in DTYPES]
    return large + [Group(256, dtype, (256,), (512,)) for dtype in DTYPES]


def measure_case(
    group: Group, tokens: int, direction: str, present: list[Contestant], results: Results, progress: tqdm
) -> None:
    dtype = dtype_name(group.dtype)
    present = [c for c in present if c.most_tokens is None or tokens <= c.most_tokens]

    def say(what: str) -> None:
        stop.check()
        progress.set_description(f"d={group.width} {dtype} {tokens} tokens {direction}: {what}")

    backward = direction == BACKWARD
    seconds = medians(present, tokens, group.width, group.dtype, backward, results.neighbours, say)
    for c, measured in zip(present, seconds, strict=True):
        needed = c.work.bytes(tokens, group.width, group.dtype.itemsize)
        flops = c.work.flops * tokens
        results.medians.append(
            Median(
                name=c.name,
                milliseconds=measured * 1e3,
                flops=flops,
                bytes=needed,
                width=group.width,
                n_keys=c.n_keys,
                dtype=dtype,
                direction=direction,
                tokens=tokens,
            )
        )
    progress.update()


def measure_group(group: Group, results: Results, progress: tqdm) -> None:
    progress.set_description(f"d={group.width} {dtype_name(group.dtype)}: filling the table")
    torch.manual_seed(0)
    is_main = group.width == results.main.width
    table = shared_table(group.largest.num_slots, group.width, group.dtype)
    if is_main:
        progress.set_description(f"{dtype_name(group.dtype)}: this machine's limits")
        limits = results.limits[dtype_name(group.dtype)] = measure_limits(table)
        results.goals.append(gather_goal(results.main, table, results.main_tokens, limits.gather_prefetched))
        if group.dtype == torch.float32:
            results.goals.append(search_goal(results.main, results.main_tokens))
    present = contestants(group, table)
    progress.set_description(f"d={group.width} {dtype_name(group.dtype)}: do all compute the same?")
    check_agreement(present, min(MAIN_TOKENS, max(group.tokens)), group.width, group.dtype)
    for tokens in group.tokens:
        for direction in (FORWARD, BACKWARD):
            measure_case(group, tokens, direction, present, results, progress)
    if is_main:
        results.goals += layer_goals(results, dtype_name(group.dtype))
    torch._dynamo.reset()  # what was compiled keeps the parameters of this group alive


def measure(todo: list[Group], results: Results) -> None:
    cases = sum(2 * len(group.tokens) for group in todo)
    with tqdm(total=cases, unit="case", dynamic_ncols=True, disable=None) as progress:
        for group in todo:
            measure_group(group, results, progress)
    results.complete = True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small layers, in a minute or two: to try the benchmark")
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path("benchmark-results"), help="[%(default)s]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="[%(default)s]")
    args = parser.parse_args()
    if args.threads < 1:
        parser.error("--threads must be at least 1")
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    dynamo_config.recompile_limit = 64
    if not cpu.load():
        print(
            "memcompile's kernels could not be built (the log says why): its operators run as PyTorch's",
            file=sys.stderr,
        )

    todo = groups(args.quick)
    tokens = MAIN_TOKENS if MAIN_TOKENS in todo[0].tokens else max(todo[0].tokens)
    results = Results(todo[0].largest, tokens, machine())
    start = time.perf_counter()
    with interruptible(stop):
        measure(todo, results)
    if stop.requested:
        print(f"\ninterrupted after {len(results.medians)} medians: what follows is a part")
    if args.quick:
        results.goals.clear()  # they are those of a large layer
    print(f"\n{render(results)}\n")
    results.write(args.output / "cpu.json")
    written = [args.output / "cpu.json"]
    if draw(results, args.output / "cpu-roofline.png"):
        written.append(args.output / "cpu-roofline.png")
    print(f"{time.perf_counter() - start:.0f} s; wrote {' and '.join(map(str, written))}")
    return 0 if results.complete else 130


if __name__ == "__main__":
    sys.exit(main())
