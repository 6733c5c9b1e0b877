"""A save in a thread, during which the training continues: one at a time, and its error is always raised."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from memcompile.checkpoint.ranks import Ranks, all_ranks
from memcompile.common.progress import Progress

log = logging.getLogger(__name__)


class SaveHandle:
    """A save that was begun. One that is not asynchronous is done."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    @property
    def done(self) -> bool:
        """Whether it has ended on this rank, with an error or without."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> Path:
        """Waits until it has ended on every rank, and returns the folder of the step.

        Raises:
            CheckpointError: it failed; earlier checkpoints are as they were. It is raised once: here, or by the next
                `save` or `load`.
        """
        if self._thread is not None:
            self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._folder

    def start(self, write: Callable[[], object]) -> None:
        """Runs the rest of the save in a thread, which the process waits for when it ends."""

        def run() -> None:
            try:
                write()
            except Exception as error:
                log.error("the asynchronous save into %s failed: %s", self._folder, error)
                self._error = error

        global _last
        _last = self
        self._thread = threading.Thread(target=run, name="memcompile checkpoint")
        self._thread.start()


_last: SaveHandle | None = None


def wait() -> None:
    """Waits for the last asynchronous save. Call it before `os._exit`, which would end the save.

    Raises:
        CheckpointError: it failed, and its error was not raised yet.
    """
    global _last
    last, _last = _last, None
    if last is not None:
        last.wait()


def ready(progress: bool | None) -> tuple[Ranks, Progress]:
    """All ranks of the job, when the save before has ended on each, and a bar, which rank 0 alone shows."""
    ranks = all_ranks()
    ranks.each("finish the save before", wait)
    return ranks, Progress(progress if ranks.rank == 0 else False)
