"""One run of a benchmark: its command line, Ctrl-C that ends it with what was measured so far, and what it writes."""

import argparse
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from benchmarks.harness.processes import environment_variables
from benchmarks.harness.results import Goal, Results


class Session:
    """What a measurement reports to while it runs."""

    def __init__(self, results: Results, cases: int) -> None:
        self.results = results
        self.interrupted = False  # what is being compiled may swallow the exception, or fail in another way
        self._progress = tqdm(total=cases, unit="case", dynamic_ncols=True, disable=None)

    def say(self, what: str) -> None:
        self.check()
        self._progress.set_description(what)

    def advance(self, cases: int = 1) -> None:
        self._progress.update(cases)

    def check(self) -> None:
        """Ends the run where Ctrl-C was pressed."""
        if self.interrupted:
            raise KeyboardInterrupt

    def __enter__(self) -> "Session":
        self._handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, frames: TracebackType | None) -> bool:
        signal.signal(signal.SIGINT, self._handler)
        self._progress.close()
        return self.interrupted

    def miss(self, case: str, name: str, error: BaseException | str) -> None:
        """Keeps why a contestant, or with no name a whole case, has no figures."""
        self.check()  # a compiler may have made another error of Ctrl-C
        self.results.miss(case, name, error)

    def _interrupt(self, *_: object) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # once more ends it immediately
        raise KeyboardInterrupt


def conduct(
    name: str,
    output: Path,
    results: Results,
    cases: int,
    measure: Callable[[Session], None],
    report: Callable[[Results], str],
    judge: Callable[[Results], list[Goal]] = lambda _: [],
    draw: Callable[[Results, Path], bool] | None = None,
    figure: str = "",
) -> Results:
    """Measures, prints the report, and writes `name.json` and, where there is something to draw, a figure.

    Inductor's cache is this run's own: Ctrl-C can leave an empty library there, on which every later run would fail.

    Args:
        cases: how many `measure` advances by.
        judge: gives the goals, of what was measured until the end or Ctrl-C.
        figure: the file's name; "" stands for `name.png`.
    """
    begin = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache,
        environment_variables({"TORCHINDUCTOR_CACHE_DIR": cache}),
        Session(results, cases) as session,
    ):
        measure(session)
        results.complete = True
    if not results.complete:
        print(f"\ninterrupted after {len(results.medians)} medians: what follows is a part")
    results.goals += judge(results)
    print(f"\n{report(results)}\n")
    written = [output / f"{name}.json", output / (figure or f"{name}.png")]
    results.write(written[0])
    if draw is None or not draw(results, written[1]):
        written.pop()
    print(f"{time.perf_counter() - begin:.0f} s; wrote {' and '.join(map(str, written))}")
    return results


def command_line(module: str, about: str | None, quick: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have.

    Args:
        module: after `python -m`.
        about: the docstring of the module, whose first line is told.
        quick: what the short form does.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=(about or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path("benchmark-results"), help="[%(default)s]")
    return parser


def positive(text: str) -> int:
    """For options that count something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def exit_code(results: Results) -> int:
    return 0 if results.complete else 130
