"""How much of the processor others took while the layers were timed: with it, a median means little."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_STAT = Path("/proc/stat")
QUIET = 0.05  # share of the processor that others may take


def _busy_seconds() -> float | None:
    """Of all processors and processes since the machine started, None where Linux's /proc is not there."""
    if not _STAT.exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, _STAT.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Neighbours:
    """Counts what processes other than this one did, in the spans that are watched.

    `own` gives the seconds of processors that are not theirs: where a benchmark has workers, their seconds too.
    """

    def __init__(self, own: Callable[[], float] = time.process_time) -> None:
        self.own = own
        self.seconds = 0.0  # of all processors
        self.others = 0.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        start, busy, own = time.perf_counter(), _busy_seconds(), self.own()
        yield
        after = _busy_seconds()
        if busy is not None and after is not None:
            self.others += after - busy - (self.own() - own)
            self.seconds += (time.perf_counter() - start) * (os.cpu_count() or 1)

    @property
    def share(self) -> float:
        return max(0.0, self.others / self.seconds) if self.seconds else 0.0
