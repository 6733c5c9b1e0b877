"""Errors of collectives that say which one it was: a rank that hangs is seen at the timeout, in whatever waits then."""

import linecache
import re
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb
from types import TracebackType

from memcompile.errors import CollectiveError
from memcompile.lowering.distributed import collectives

_OPERATION = r"_c10d_functional\.(\w+)\.default"
_WAIT = re.compile(r"_c10d_functional\.wait_tensor\.default\((\w+)")
_FAILED = re.compile(r"timed? ?out|connection (closed|reset)|aborted|gloo|nccl", re.IGNORECASE)


@contextmanager
def named_collectives(where: str) -> Iterator[None]:
    """Turns the error of a collective of a sharded table, eager or in Inductor's code, into one that names it.

    Raises:
        CollectiveError: in the place of the RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        name = collective_in(error.__traceback__)
        if name is None or isinstance(error, CollectiveError) or not _FAILED.search(str(error)):
            raise
        raise CollectiveError(
            f"the collective {name} failed in the {where}: {error}. Another rank hangs, has died, or runs another "
            f"program; how long ranks wait is the timeout of init_process_group()"
        ) from error


def collective_in(traceback: TracebackType | None) -> str | None:
    """The collective in which an error was raised, by the names of its frames, or by the lines of generated code."""
    found = None
    for frame, line_number in walk_tb(traceback):
        code = frame.f_code
        if code.co_filename == collectives.__file__ and code.co_name in collectives.OPERATIONS:
            found = code.co_name
        else:
            found = _generated(code.co_filename, line_number) or found
    return found


def _generated(filename: str, line_number: int) -> str | None:
    line = linecache.getline(filename, line_number)
    wait = _WAIT.search(line)
    if wait is None:
        started = re.search(_OPERATION, line)
        return started[1] if started else None
    start = re.compile(rf"\b{wait[1]} = .*{_OPERATION}")
    before = map(start.search, reversed(linecache.getlines(filename)[: line_number - 1]))
    return next((started[1] for started in before if started), None)
