"""A bar of the bytes that were written or read; lines in the log where a bar cannot be drawn."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from contextlib import closing
from typing import Any

log = logging.getLogger(__name__)

LONG = 2**30  # bytes from which a stage is shown unless told otherwise


class Progress:
    """Counts the bytes of one stage after another; any thread may count.

    Args:
        shown: True shows a bar where tqdm is installed, else a line in the log for each tenth. None does so for stages
            of a GiB and more, with lines unless stderr is a terminal. False shows nothing.
    """

    def __init__(self, shown: bool | None) -> None:
        self._wanted = shown
        self._lock = threading.Lock()
        self._bar: Any = None
        self._lines = False
        self._doing, self._total, self._done = "", 0, 0

    def start(self, doing: str, total: int) -> closing[Progress]:
        """Begins a stage, of so many bytes, which ends with the block after `with`; one that was begun is over."""
        self.close()
        self._doing, self._total, self._done = doing, total, 0
        if self._wanted or (self._wanted is None and total >= LONG):
            if self._wanted or sys.stderr.isatty():
                with contextlib.suppress(ImportError):
                    from tqdm.auto import tqdm

                    self._bar = tqdm(total=total, desc=doing, unit="B", unit_scale=True, unit_divisor=1024)
            self._lines = self._bar is None
        return closing(self)

    def add(self, count: int) -> None:
        """Counts so many bytes more."""
        with self._lock:
            before = self._done
            self._done = min(before + count, self._total)  # files have some bytes around their tensors
            if self._bar is not None:
                self._bar.update(self._done - before)
            tenths = 10 * self._done // max(1, self._total)
            if self._lines and tenths > 10 * before // max(1, self._total):
                log.info("%s: %d%% of %.1f GiB", self._doing, 10 * tenths, self._total / 2**30)

    def close(self) -> None:
        """Ends the stage."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._lines = None, False
