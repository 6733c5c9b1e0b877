"""A benchmark as a command: its options, Ctrl-C that ends it with what was measured so far, and what it writes."""

import argparse
import platform
import signal
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from benchmarks.harness.processes import environment_variables, fresh_medians
from benchmarks.harness.results import Goal, Results
from benchmarks.harness.tables import table


class Session:
    """What a measurement reports to while it runs."""

    def __init__(self, results: Results, cases: int, unit: str = "case") -> None:
        self.results = results
        self.interrupted = False  # what is being compiled may swallow the exception, or fail in another way
        self._progress = tqdm(total=cases, unit=unit, dynamic_ncols=True, disable=None)

    def say(self, what: str) -> None:
        self.check()
        self._progress.set_description(what)

    def advance(self, cases: int = 1) -> None:
        self._progress.update(cases)

    def check(self) -> None:
        """Ends the run where Ctrl-C was pressed."""
        if self.interrupted:
            raise KeyboardInterrupt

    def miss(self, case: str, name: str, error: BaseException | str) -> None:
        """Keeps why a contestant, or with no name a whole case, has no figures."""
        self.check()  # a compiler may have made another error of Ctrl-C
        self.results.miss(case, name, error)

    def _interrupt(self, *_: object) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # once more ends it immediately
        raise KeyboardInterrupt

    def __enter__(self) -> "Session":
        self._handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, frames: TracebackType | None) -> bool:
        signal.signal(signal.SIGINT, self._handler)
        self._progress.close()
        return self.interrupted


class Benchmark(ABC):
    """What is measured, and how it reads.

    Attributes:
        module: after `python -m`.
        about, more: what the command does; what its help says below the options.
        quick: what `--quick` does; "": there is no such option.
        name: of the JSON file, and of figures without a name of their own.
        figure: its file, where the benchmark draws one.
        unit: what the measurement advances by.
        threads: the default of --threads, 0 for as many as PyTorch has; None: there is no such option.
        repeats: the defaults of --repeats, in full and in short; None: there is no such option.
        cases: how many units there are.
    """

    module: ClassVar[str]
    about: ClassVar[str]
    more: ClassVar[str] = ""
    quick: ClassVar[str] = ""
    name: str
    figure: ClassVar[str] = ""
    unit: ClassVar[str] = "case"
    threads: ClassVar[int | None] = None
    repeats: ClassVar[tuple[int, int] | None] = None

    def __init__(self, machine: dict[str, Any], cases: int) -> None:
        self.results = Results(machine)
        self.cases = cases

    @classmethod
    @abstractmethod
    def of(cls, args: argparse.Namespace) -> "Benchmark":
        """As the command line asks for it."""

    @classmethod  # noqa: B027 (most have none)
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Those that no other benchmark has."""

    @abstractmethod
    def measure(self, session: Session) -> None: ...

    @abstractmethod
    def report(self) -> str: ...

    def judge(self) -> list[Goal]:
        """By what was measured until the end or Ctrl-C."""
        return []

    def done(self) -> str:
        """What was measured until Ctrl-C."""
        return f"{len(self.results.medians)} medians"

    def draw(self, path: Path) -> list[Path]:
        """Returns the figures that were written: `path`, or several whose names begin as it does; none where there is
        nothing to draw.
        """
        return []

    def run(self, output: Path) -> Results:
        """Measures, prints the report and writes the files.

        Inductor's cache is this run's own: Ctrl-C can leave an empty library there, on which every later run would
        fail.
        """
        begin, results = time.perf_counter(), self.results
        output.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache,
            environment_variables({"TORCHINDUCTOR_CACHE_DIR": cache}),
            Session(results, self.cases, self.unit) as session,
        ):
            self.measure(session)
            results.complete = True
        if not results.complete:
            print(f"\ninterrupted after {self.done()}: what follows is a part")
        results.goals += self.judge()
        print(f"\n{self.report()}\n")
        written = [output / f"{self.name}.json"]
        results.write(written[0])
        written += self.draw(output / (self.figure or f"{self.name}.png"))
        print(f"{time.perf_counter() - begin:.0f} s; wrote {', '.join(map(str, written))}")
        return results

    @classmethod
    def parse(cls, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """A bad option is named, with exit code 2."""
        parser = argparse.ArgumentParser(prog=f"python -m {cls.module}", description=cls.about, epilog=cls.more)
        if cls.quick:
            parser.add_argument("--quick", action="store_true", help=cls.quick)
        else:
            parser.set_defaults(quick=False)
        output = Path("benchmark-results")
        parser.add_argument("--output", metavar="DIR", type=Path, default=output, help="[%(default)s]")
        if cls.threads is not None:
            threads = cls.threads or torch.get_num_threads()
            shown = f"[{threads}; 1 with --quick]" if cls.quick else f"[{threads}]"
            parser.add_argument("--threads", type=positive, help=shown)
        if cls.repeats is not None:
            shown = f"samples, of which the median is shown [{cls.repeats[0]}; {cls.repeats[1]} with --quick]"
            parser.add_argument("--repeats", type=positive, help=shown)
        cls.add_options(parser)
        args = parser.parse_args(arguments)
        if cls.threads is not None:
            # On a busy machine small layers wait for their second thread, and not for their work.
            args.threads = args.threads or (1 if args.quick else threads)
        if cls.repeats is not None:
            args.repeats = args.repeats or cls.repeats[args.quick]
        args.command = " ".join(["python -m", cls.module, *(sys.argv[1:] if arguments is None else arguments)])
        return args

    @classmethod
    def main(cls, arguments: Sequence[str] | None = None) -> int:
        """Returns the exit code: 130 where Ctrl-C ended it."""
        args = cls.parse(arguments)
        if cls.threads is not None:
            torch.set_num_threads(args.threads)
        return 0 if cls.of(args).run(args.output).complete else 130


class FreshProcesses(Benchmark):
    """Medians over processes that start with empty caches, one row of a table for each case."""

    repeats = (3, 1)
    header: ClassVar[tuple[str, ...]]

    def __init__(self, cases: Mapping[str, Sequence[Callable[[], dict[str, float]]]], processes: int) -> None:
        super().__init__({"torch": torch.__version__, "processes": processes}, len(cases))
        self._calls, self._processes = cases, processes

    @abstractmethod
    def row(self, *figures: dict[str, float]) -> list[str]:
        """Of what each call of a case returned."""

    def measure(self, session: Session) -> None:
        for case, calls in self._calls.items():
            session.say(case)
            self.results.medians.append({"case": case, "figures": fresh_medians(self._processes, *calls)})
            session.advance()

    def report(self) -> str:
        rows = [[m["case"], *self.row(*m["figures"])] for m in self.results.medians]
        about = f"torch {torch.__version__}, {platform.machine()}, median of {self._processes} processes"
        return f"{about}\n\n{table(self.header, rows)}"


def positive(text: str) -> int:
    """For options that count something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
