"""Rows of a table that lies in a file: cold and warm, with and without reading ahead, and the same table in memory.

python -m benchmarks.mapped_values [--quick] [--output DIR] [--gib 4] [--repeats 9] [--threads 1] [--directory DIR]

A sample sums 128 random rows of 2 KiB for each token. It is cold when the system's page cache holds nothing of the
file, and warm when the same rows were read before. The directory must be on the disk that is meant; tmpfs is none.
"""

import argparse
import ctypes
import math
import mmap
import os
import statistics
import sys
import tempfile

import torch
from torch import Tensor

from benchmarks.harness.machine import machine
from benchmarks.harness.package import open_values, operator, write_values
from benchmarks.harness.session import Benchmark, Session
from benchmarks.harness.tables import milliseconds, table
from benchmarks.harness.timing import wall_seconds

DIM, HITS, TOKENS = 512, 128, (1, 16, 512)
READAHEAD, RANDOM, PREFETCH, MEMORY = "default read-ahead", "MADV_RANDOM", "prefetch_rows", "in memory"


def read(values: Tensor, slots: Tensor, weights: Tensor, how: str) -> Tensor:
    if how == PREFETCH:
        slots = operator("prefetch_rows")(values, slots)
    return operator("weighted_gather")(values, slots, weights)


def mapped(path: str, how: str) -> Tensor:
    """The table, mapped anew; nothing of it is in memory."""
    values: Tensor = open_values(path)
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # of pages that were not read through a mapping
    os.close(descriptor)
    if how == READAHEAD:
        start = values.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(values.nbytes), mmap.MADV_NORMAL)
    return values


def medians(path: str, resident: Tensor, tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each way, "cold" and "warm"."""
    seconds: dict[str, dict[str, list[float]]] = {
        how: {"cold": [], "warm": []} for how in (READAHEAD, RANDOM, PREFETCH)
    }
    seconds[MEMORY] = {"warm": []}
    weights = torch.full((tokens, HITS), 1 / HITS)
    for _ in range(repeats):
        slots = torch.randint(len(resident), (tokens, HITS), dtype=torch.int32)
        for how, times in seconds.items():
            values = resident if how == MEMORY else mapped(path, how)
            first = wall_seconds(read, values, slots, weights, how)
            if "cold" in times:
                times["cold"].append(first)
            read(values, slots, weights, how)
            times["warm"].append(wall_seconds(read, values, slots, weights, how))
            del values
    return {how: {k: statistics.median(t) * 1e3 for k, t in times.items()} for how, times in seconds.items()}


def tokens_table(tokens: int, figures: dict[str, dict[str, float]]) -> str:
    def cells(how: str, state: str) -> list[str]:
        if state not in figures[how]:
            return ["-", "-"]
        taken = figures[how][state]
        return [milliseconds(taken), f"{taken / figures[PREFETCH][state]:.2f}x"]

    rows = [[how, *cells(how, "cold"), *cells(how, "warm")] for how in figures]
    return table([f"{tokens * HITS:,} rows, ms", "cold", f"of {PREFETCH}", "warm", f"of {PREFETCH}"], rows)


def size(text: str) -> float:
    """GiB, of one row at least."""
    gib = float(text)
    if not gib > 0:
        raise argparse.ArgumentTypeError("must be positive")
    return gib


class Mapped(Benchmark):
    module, name, threads, repeats = "benchmarks.mapped_values", "mapped-values", 1, (9, 1)
    about = "Rows of a table that lies in a file: cold and warm, read ahead or not, and the same table in memory."
    quick = "a table of 16 MiB, each sample once"

    def __init__(self, slots: int, samples: int, directory: str | None) -> None:
        super().__init__(machine(), len(TOKENS))
        self.results.more = {"slots": slots, "dim": DIM, "hits": HITS}
        self.slots, self.samples, self.directory = slots, samples, directory

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--gib", type=size, help="size of the table, which is in memory once, too [4]")
        parser.add_argument("--directory", help="where the file is made [the system's temporary directory]")

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Mapped":
        gib = args.gib or (2**-6 if args.quick else 4)
        return cls(max(1, math.isqrt(int(gib * 2**30 / (4 * DIM)))) ** 2, args.repeats, args.directory)

    def measure(self, session: Session) -> None:
        session.say("the table")
        resident = torch.randn(self.slots, DIM)
        with tempfile.TemporaryDirectory(dir=self.directory) as folder:
            path = os.path.join(folder, "values.safetensors")
            write_values(path, resident)
            medians(path, resident, 1, 1)  # kernels are built and loaded
            for tokens in TOKENS:
                session.say(f"{tokens} tokens")
                figures = medians(path, resident, tokens, self.samples)
                self.results.medians.append({"tokens": tokens, "milliseconds": figures})
                session.advance()

    def report(self) -> str:
        threads = self.results.machine["threads"]
        about = f"{self.slots:,} slots of {DIM} in float32, {threads} thread(s), median of {self.samples}"
        return "\n\n".join([about, *(tokens_table(m["tokens"], m["milliseconds"]) for m in self.results.medians)])


if __name__ == "__main__":
    sys.exit(Mapped.main())
