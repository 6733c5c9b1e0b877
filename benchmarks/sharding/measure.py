"""Runs the cases on processes, and joins what their ranks tell."""

import os
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.harness.package import Candidate, Hardware, Job, assumptions, best_by_gpus
from benchmarks.harness.processes import Remote, ask_all
from benchmarks.harness.session import Session
from benchmarks.sharding.cases import Case, Sizes, all_cases
from benchmarks.sharding.traffic import Received
from benchmarks.sharding.trainee import PARTS, Step
from benchmarks.sharding.worker import Rank

_QUIET_PROFILER = {"KINETO_LOG_LEVEL": "99"}  # each step starts and stops it


@dataclass(frozen=True)
class Line(Case):
    """A case, with medians over the rounds, each the mean of its ranks.

    Attributes:
        milliseconds: of a step.
        parts: of its parts; medians, which add up to about a step.
        work: of a processor, by a rank's own thread.
        memory: bytes of the rank that holds most.
        traffic: of each collective and of a whole step, at the rank that is farthest from the formula.
    """

    milliseconds: float
    parts: dict[str, float]
    work: float
    memory: dict[str, int]
    traffic: list[Received]


@dataclass(frozen=True)
class Prediction:
    job: Job
    hardware: Hardware
    best: dict[int, Candidate | None]  # by GPUs; None where no group size fits

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "job": asdict(self.job),
            "hardware": asdict(self.hardware),
            "assumptions": assumptions(self.job, self.hardware),
            "best": [_best(gpus, candidate) for gpus, candidate in self.best.items()],
        }


def predict(job: Job, hardware: Hardware) -> Prediction:
    return Prediction(job, hardware, best_by_gpus(job, hardware))


def measure(sizes: Sizes, rounds: int, session: Session) -> None:
    """All cases, in turns. What every rank says of its steps is kept in the results as lines.

    Raises:
        WorkerError: a rank failed.
    """
    cases, results = all_cases(sizes), session.results
    steps: dict[Case, list[list[Step]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        ranks = [Remote(Rank, rank, sizes, store, environment=_QUIET_PROFILER) for rank in range(sizes.ranks[-1])]
        try:
            prepared = {}
            for case in cases:
                session.say(f"{case.ranks} by {case.by}: gets ready")
                prepared[case] = [told for told in ask_all(ranks, "prepare", case) if told is not None]
                session.advance()
            shuffle = random.Random(0).shuffle
            order = [*cases]
            with results.others.watched():
                for turn in range(rounds):
                    session.say(f"round {turn + 1} of {rounds}")
                    shuffle(order)
                    for case in order:
                        steps[case].append([step for step in ask_all(ranks, "step", case) if step is not None])
                    session.advance()
        finally:
            for rank in ranks:
                rank.close()
    results.medians += [line(case, steps[case], *zip(*prepared[case], strict=True)) for case in cases]


def line(
    case: Case, rounds: Sequence[Sequence[Step]], memory: Sequence[dict[str, int]], traffic: Sequence[list[Received]]
) -> Line:
    """Of the steps of all ranks in each round, and of the memory and traffic of each rank."""

    def median(seconds: Callable[[Step], float]) -> float:
        return statistics.median(1e3 * statistics.fmean(map(seconds, steps)) for steps in rounds)

    return Line(
        **asdict(case),
        milliseconds=median(lambda step: sum(step.parts.values())),
        parts={part: median(lambda step, part=part: step.parts[part]) for part in PARTS},
        work=median(lambda step: step.processor),
        memory=max(memory, key=lambda memory: sum(memory.values())),
        traffic=[max(same, key=lambda one: abs(one.of_formula - 1)) for same in zip(*traffic, strict=True)],
    )


def _best(gpus: int, candidate: Candidate | None) -> dict[str, Any]:
    if candidate is None:
        return {"gpus": gpus, "ranks": None}
    seconds = asdict(candidate.times) | {"total": candidate.times.total}
    return {"gpus": gpus, "ranks": candidate.ranks, "seconds": seconds, "memory": candidate.memory.total}
