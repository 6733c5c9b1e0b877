"""Times in turns what is compared, so that the drift of clocks and machines hits all equally, and counts what other
processes took meanwhile.
"""

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.harness.processes import Remote

_STAT = Path("/proc/stat")
QUIET = 0.05  # share of the processors that other processes may take


@dataclass(frozen=True)
class Rounds:
    """How often a call is timed."""

    seconds: float  # for each contestant
    fewest: int
    most: int
    slow: float = math.inf  # seconds a call, of which one is enough

    def of(self, seconds: float) -> int:
        """For a call that takes so long."""
        return 1 if seconds > self.slow else min(self.most, max(self.fewest, math.ceil(self.seconds / seconds)))


def medians_in_turns(
    samples: Sequence[Callable[[], float]],
    first: Sequence[float],
    rounds: Rounds,
    say: Callable[[str], None],
    failed: Callable[[int, Exception], None] | None = None,
) -> list[float | None]:
    """The median seconds of each, None for one that failed.

    Args:
        samples: what is timed: each call returns its seconds.
        first: of each, the seconds of a call after it was warmed up, which decide how often it is timed.
        say: hears what goes on.
        failed: hears the index and the error of a sample that raises, which is then left out; None: the error is
            raised.
    """
    measured: list[list[float]] = []
    counts = []
    for seconds in first:
        kept = seconds > rounds.seconds  # where a call takes long, none is thrown away
        measured.append([seconds] if kept else [])
        counts.append(rounds.of(seconds) - kept)
    most = max(counts, default=0)
    shuffle = random.Random(0).shuffle
    order = [*range(len(samples))]
    out: set[int] = set()
    for turn in range(most):
        say(f"round {turn + 1} of {most}")
        shuffle(order)  # who comes after whom decides what is in the caches
        for i in order:
            # Fewer rounds than there are turns are spread over all of them.
            if i in out or turn * counts[i] // most == (turn + 1) * counts[i] // most:
                continue
            try:
                measured[i].append(samples[i]())
            except Exception as error:
                if failed is None:
                    raise
                failed(i, error)
                out.add(i)
    return [None if i in out else statistics.median(seconds) for i, seconds in enumerate(measured)]


def wake_threads() -> None:
    """Work for all threads: without any they fall asleep, and in a model the layer before has kept them awake."""
    torch.ones(2**18).add_(1)


def wall_seconds(call: Callable[..., object], *arguments: object) -> float:
    """Of one call, with threads that are awake."""
    wake_threads()
    start = time.perf_counter()
    output = call(*arguments)
    seconds = time.perf_counter() - start
    del output
    return seconds


def in_turns(rounds: int, *samples: Callable[[], float]) -> list[tuple[float, ...]]:
    """What each sample returned in each round."""
    return [*zip(*([sample() for sample in samples] for _ in range(rounds)), strict=True)]


def _busy_seconds() -> float | None:
    """Of all processors and processes since the machine started, None where Linux's /proc is not there."""
    if not _STAT.exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, _STAT.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class OtherProcesses:
    """Counts what processes other than the benchmark and its workers did, in the spans that are watched."""

    def __init__(self) -> None:
        self.available = 0.0  # seconds of all processors
        self.taken = 0.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        start, busy, own = time.perf_counter(), _busy_seconds(), time.process_time() + Remote.seconds
        yield
        after = _busy_seconds()
        if busy is not None and after is not None:
            self.taken += after - busy - (time.process_time() + Remote.seconds - own)
            self.available += (time.perf_counter() - start) * (os.cpu_count() or 1)

    @property
    def share(self) -> float:
        return max(0.0, self.taken / self.available) if self.available else 0.0
