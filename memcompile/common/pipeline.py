"""A pipeline times its named steps, and writes their graphs on request.

`TORCH_LOGS="+memcompile"` prints a line a step: its time, and how many things it looked at or changed.
`MEMCOMPILE_DUMP=folder` writes the graphs that a step takes as text, before and after it:
`folder/pid7-000-plan/02-normalize.before.txt`, with `rank1-pid7` where the environment has a RANK.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import fx

from memcompile.errors import OptionError

log = logging.getLogger(__name__)

DUMP = "MEMCOMPILE_DUMP"
_runs = itertools.count()  # that this process has written


class Pipeline:
    """One run of a pipeline.

    Attributes:
        count: how many things the step that runs looked at or changed, which it sets.

    Raises:
        OptionError: MEMCOMPILE_DUMP is set, and files cannot be written there.
    """

    def __init__(self, name: str) -> None:
        self.count = 0
        self._name, self._folder, self._numbers = name, _new_folder(name), itertools.count(1)

    @contextlib.contextmanager
    def step(self, name: str, counts: str, graphs: Sequence[tuple[str, fx.Graph]] = ()) -> Iterator[None]:
        """Surrounds a step.

        Args:
            name: what the log and the files call it.
            counts: what is counted.
            graphs: those that the step takes, each with a name.
        """
        file = f"{next(self._numbers):02d}-{name}"
        self.count = 0
        self._write(f"{file}.before.txt", graphs)
        start = time.perf_counter()
        yield
        milliseconds = 1000 * (time.perf_counter() - start)
        log.debug("%s: %s took %.1f ms, %d %s", self._name, name, milliseconds, self.count, counts)
        self._write(f"{file}.after.txt", graphs)

    def _write(self, name: str, graphs: Sequence[tuple[str, fx.Graph]]) -> None:
        if self._folder is None or not graphs:
            return
        part = self._folder / f".{name}"
        with _writing():
            part.write_text("\n".join(f"# {of}\n{_text(graph)}" for of, graph in graphs))
            part.replace(self._folder / name)  # a reader never finds half a file


def is_dumping() -> bool:
    """Whether graphs are written to files."""
    return bool(os.environ.get(DUMP))


def _new_folder(pipeline: str) -> Path | None:
    """A folder for one run of a pipeline, which no other run of this or another process has."""
    if not is_dumping():
        return None
    process = f"rank{os.environ['RANK']}-" if "RANK" in os.environ else ""
    parent = Path(os.environ[DUMP])
    with _writing():
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            folder = parent / f"{process}pid{os.getpid()}-{next(_runs):03d}-{pipeline}"
            with contextlib.suppress(FileExistsError):  # of a process with the same number, earlier or elsewhere
                folder.mkdir()
                return folder


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OptionError(
            f"{DUMP}={os.environ[DUMP]!r} is where memcompile writes graphs, and it cannot ({error}): name a folder "
            f"that this process may write to, or unset {DUMP}"
        ) from error


def _text(graph: fx.Graph) -> str:
    """The graph as Python, with the shape, dtype and device of each value; with the graphs that it calls."""
    owner = graph.owning_module
    if isinstance(owner, fx.GraphModule) and owner.graph is graph:
        return owner.print_readable(print_output=False, include_device=True)
    return graph.python_code("self", verbose=True, include_device=True).src
