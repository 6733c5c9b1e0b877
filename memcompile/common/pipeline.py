"""A pipeline is a list of named steps. `run` runs them in order, times each, and writes their graphs on request.

`TORCH_LOGS="+memcompile"` prints a line a step: its time, and how many things it looked at or changed.
`MEMCOMPILE_DUMP=folder` writes the graphs that a step takes as text, before and after it:
`folder/pid7-000-plan/02-normalize.before.txt`, with `rank1-pid7` where the environment has a RANK.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import fx

from memcompile.errors import OptionError

log = logging.getLogger(__name__)

DUMP = "MEMCOMPILE_DUMP"
_numbers = itertools.count()  # of the pipelines that this process has written


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a pipeline.

    Attributes:
        name: what the log and the files call it.
        run: does the step. It reads and writes the state that all steps share, and returns a number.
        counts: what that number counts.
        graphs: the graphs that the step takes, each with a name, read from the state; None for a step that takes none.
    """

    name: str
    run: Callable[[Any], int]
    counts: str
    graphs: Callable[[Any], Iterable[tuple[str, fx.Graph]]] | None = None


def run(pipeline: str, steps: Iterable[Step], state: Any) -> None:
    """Runs the steps on one state.

    Raises:
        OptionError: MEMCOMPILE_DUMP is set, and files cannot be written there.
    """
    folder = _new_folder(pipeline)
    total = 0.0
    for number, step in enumerate(steps, 1):
        _write(folder, f"{number:02d}-{step.name}.before.txt", step, state)
        start = time.perf_counter()
        count = step.run(state)
        seconds = time.perf_counter() - start
        total += seconds
        log.debug("%s: %s took %.1f ms, %d %s", pipeline, step.name, 1000 * seconds, count, step.counts)
        _write(folder, f"{number:02d}-{step.name}.after.txt", step, state)
    log.debug("%s: all steps took %.1f ms", pipeline, 1000 * total)


def is_dumping() -> bool:
    """Whether graphs are written to files."""
    return bool(os.environ.get(DUMP))


def _new_folder(pipeline: str) -> Path | None:
    """A folder for one run of a pipeline, which no other run of this or another process has."""
    if not is_dumping():
        return None
    process = f"rank{os.environ['RANK']}-" if "RANK" in os.environ else ""
    parent = Path(os.environ[DUMP])
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            folder = parent / f"{process}pid{os.getpid()}-{next(_numbers):03d}-{pipeline}"
            with contextlib.suppress(FileExistsError):  # of a process with the same number, earlier or elsewhere
                folder.mkdir()
                return folder
    except OSError as error:
        raise _unwritable(error) from error


def _write(folder: Path | None, name: str, step: Step, state: Any) -> None:
    if folder is None or step.graphs is None:
        return
    text = "\n".join(f"# {of}\n{_text(graph)}" for of, graph in step.graphs(state))
    part = folder / f".{name}"
    try:
        part.write_text(text)
        part.replace(folder / name)  # a reader never finds half a file
    except OSError as error:
        raise _unwritable(error) from error


def _unwritable(error: OSError) -> OptionError:
    return OptionError(
        f"{DUMP}={os.environ[DUMP]!r} is where memcompile writes graphs, and it cannot ({error}): name a folder that "
        f"this process may write to, or unset {DUMP}"
    )


def _text(graph: fx.Graph) -> str:
    """The graph as Python, with the shape, dtype and device of each value; with the graphs that it calls."""
    owner = graph.owning_module
    if isinstance(owner, fx.GraphModule) and owner.graph is graph:
        return owner.print_readable(print_output=False, include_device=True)
    return graph.python_code("self", verbose=True, include_device=True).src
