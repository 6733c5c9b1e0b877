"""What a run has measured, what the cost model predicts beside it, and the JSON file that keeps both."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.results import write_json
from benchmarks.sharding.cases import Case, Sizes
from benchmarks.sharding.split import PARTS, Step
from benchmarks.sharding.traffic import Received
from benchmarks.sharding.worker import Told
from memcompile.cost.groups import Candidate
from memcompile.cost.job import Job
from memcompile.cost.plot import best_by_gpus
from memcompile.cost.report import assumptions
from memcompile.cost.time import Hardware


@dataclass(frozen=True)
class Line:
    """Of one case: medians over the rounds, each the mean of its ranks.

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


@dataclass(frozen=True)
class Results:
    machine: dict[str, Any]
    sizes: Sizes
    rounds: int
    lines: dict[Case, Line]
    prediction: Prediction
    share_of_others: float  # of the processors, meanwhile

    @property
    def crowded(self) -> list[int]:
        """Numbers of processes of which not each had a core of its own."""
        return [ranks for ranks in self.sizes.ranks if ranks > self.machine["cores"]]

    def write(self, path: Path) -> None:
        prediction = self.prediction
        content = {
            "machine": self.machine | {"share_of_other_processes": self.share_of_others},
            "sizes": asdict(self.sizes),
            "rounds": self.rounds,
            "measured": [asdict(case) | asdict(line) for case, line in self.lines.items()],
            "predicted": {
                "job": asdict(prediction.job),
                "hardware": asdict(prediction.hardware),
                "assumptions": assumptions(prediction.job, prediction.hardware),
                "best": [_best(gpus, candidate) for gpus, candidate in prediction.best.items()],
            },
        }
        write_json(path, content)


def predict(job: Job, hardware: Hardware) -> Prediction:
    return Prediction(job, hardware, best_by_gpus(job, hardware))


def lines(told: Sequence[Told], cases: Sequence[Case]) -> dict[Case, Line]:
    """Of what all ranks tell."""
    return {case: _line([of_rank for of_rank in told if case in of_rank.steps], case) for case in cases}


def _line(told: Sequence[Told], case: Case) -> Line:
    rounds = [*zip(*(of_rank.steps[case] for of_rank in told), strict=True)]
    everyones = [of_rank.traffic.get(case, []) for of_rank in told]

    def median(seconds: Callable[[Step], float]) -> float:
        return statistics.median(1e3 * statistics.fmean(map(seconds, steps)) for steps in rounds)

    return Line(
        milliseconds=median(lambda step: sum(step.parts.values())),
        parts={part: median(lambda step, part=part: step.parts[part]) for part in PARTS},
        work=median(lambda step: step.processor),
        memory=max((of_rank.memory[case] for of_rank in told), key=lambda memory: sum(memory.values())),
        traffic=[max(same, key=lambda one: abs(one.of_formula - 1)) for same in zip(*everyones, strict=True)],
    )


def _best(gpus: int, candidate: Candidate | None) -> dict[str, Any]:
    if candidate is None:
        return {"gpus": gpus, "ranks": None}
    seconds = asdict(candidate.times) | {"total": candidate.times.total}
    return {"gpus": gpus, "ranks": candidate.ranks, "seconds": seconds, "memory": candidate.memory.total}
