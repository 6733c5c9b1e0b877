"""Rows of a table that lies in a file: cold and warm, with and without reading ahead, beside the same table in memory.

    python -m benchmarks.mapped_values [--gib 4] [--repeats 9] [--threads 1] [--directory DIR] [--json FILE]

A sample sums 128 random rows of 2 KiB for each token. It is cold when the system's page cache holds nothing of the
file, and warm when the same rows were read before. The directory must be on the disk that is meant; tmpfs is none.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import mmap
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common.results import write_json
from benchmarks.common.tables import milliseconds, table
from memcompile.lowering import operator
from memcompile.runtime.storage.mapped_values import MappedValues, open_values
from memcompile.runtime.storage.values_file import write

DIM, HITS, TOKENS = 512, 128, (1, 16, 512)
READAHEAD, RANDOM, PREFETCH, MEMORY = "default read-ahead", "MADV_RANDOM", "prefetch_rows", "in memory"


def read(values: Tensor, slots: Tensor, how: str) -> float:
    """Seconds of a gather."""
    weights = torch.full(slots.shape, 1 / HITS)
    start = time.perf_counter()
    if how == PREFETCH:
        slots = operator("prefetch_rows")(values, slots)
    operator("weighted_gather")(values, slots, weights)
    return time.perf_counter() - start


def mapped(path: str, how: str) -> MappedValues:
    """The table, mapped anew; nothing of it is in memory."""
    values = open_values(path)
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # of pages that nobody has read through a mapping
    os.close(descriptor)
    if how == READAHEAD:
        start = values.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(values.nbytes), mmap.MADV_NORMAL)
    return values


def measure(path: str, resident: Tensor, tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each way, "cold" and "warm"."""
    seconds: dict[str, dict[str, list[float]]] = {
        READAHEAD: {"cold": [], "warm": []},
        RANDOM: {"cold": [], "warm": []},
        PREFETCH: {"cold": [], "warm": []},
        MEMORY: {"warm": []},
    }
    for _ in range(repeats):
        slots = torch.randint(len(resident), (tokens, HITS), dtype=torch.int32)
        for how, times in seconds.items():
            values = resident if how == MEMORY else mapped(path, how)
            first = read(values, slots, how)
            if "cold" in times:
                times["cold"].append(first)
            read(values, slots, how)
            times["warm"].append(read(values, slots, how))
            del values
    return {how: {k: statistics.median(t) * 1e3 for k, t in times.items()} for how, times in seconds.items()}


def report(tokens: int, figures: dict[str, dict[str, float]]) -> str:
    def cells(how: str, state: str) -> list[str]:
        if state not in figures[how]:
            return ["-", "-"]
        taken = figures[how][state]
        return [milliseconds(taken), f"{taken / figures[PREFETCH][state]:.2f}x"]

    rows = [[how, *cells(how, "cold"), *cells(how, "warm")] for how in figures]
    return table([f"{tokens * HITS:,} rows, ms", "cold", f"of {PREFETCH}", "warm", f"of {PREFETCH}"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4, help="size of the table; it is in memory once, too")
    parser.add_argument("--repeats", type=int, default=9, help="samples; the median is shown")
    parser.add_argument("--threads", type=int, default=1, help="where others are busy, two wait for each other")
    parser.add_argument("--directory", help="where the file is made for the run; the system's temporary directory")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    if args.gib <= 0 or args.repeats < 1 or args.threads < 1:
        parser.error("--gib must be positive, --repeats and --threads at least 1")
    torch.set_num_threads(args.threads)
    slots = max(1, math.isqrt(int(args.gib * 2**30 / (4 * DIM)))) ** 2
    print(f"{slots:,} slots of {DIM} in float32, {args.threads} thread(s), median of {args.repeats}", flush=True)
    resident = torch.randn(slots, DIM)
    results = {}
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        path = os.path.join(directory, "values.safetensors")
        write(path, resident)
        measure(path, resident, 1, 1)  # kernels are built and loaded
        for tokens in TOKENS:
            results[tokens] = measure(path, resident, tokens, args.repeats)
            print(f"\n{report(tokens, results[tokens])}", flush=True)
    if args.json:
        write_json(args.json, {"slots": slots, "dim": DIM, "hits": HITS, "milliseconds": results})


if __name__ == "__main__":
    main()
