"""A bar of the bytes that rank 0 has written or read, or log lines where tqdm is not installed."""

from __future__ import annotations

import logging
import threading
from typing import Any

log = logging.getLogger("memcompile.checkpoint")

LONG = 2**30  # bytes from which it is shown unless told otherwise


class Progress:
    """Counts bytes of one stage after another; any thread may count.

    Args:
        shown: whether it is shown; None shows stages of a GiB and more.
    """

    def __init__(self, shown: bool | None) -> None:
        self._wanted = shown
        self._lock = threading.Lock()
        self._bar: Any = None
        self._doing, self._total, self._done, self._said = "", 0, 0, 0

    def start(self, doing: str, total: int) -> None:
        """A new stage, of so many bytes."""
        self.close()
        self._doing, self._total, self._done, self._said = doing, total, 0, 0
        shown = total >= LONG if self._wanted is None else self._wanted
        self._bar = _new_bar(doing, total) if shown else None

    def add(self, count: int) -> None:
        """So many bytes more are done."""
        with self._lock:
            count = min(count, self._total - self._done)  # files have some bytes around their tensors
            self._done += count
            if self._bar is _LINES:
                tenths = 10 * self._done // max(1, self._total)
                if tenths > self._said:
                    self._said = tenths
                    log.info("%s: %d%% of %.1f GiB", self._doing, 10 * tenths, self._total / 2**30)
            elif self._bar is not None:
                self._bar.update(count)

    def close(self) -> None:
        """The stage is over."""
        if self._bar is not None and self._bar is not _LINES:
            self._bar.close()
        self._bar = None


_LINES = object()  # in the place of a bar: lines in the log


def _new_bar(doing: str, total: int) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return _LINES
    return tqdm(total=total, desc=doing, unit="B", unit_scale=True, unit_divisor=1024)
