"""What a run has measured, what the cost model predicts beside it, and the JSON file that keeps both."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.results import write_json
from benchmarks.sharding.cases import Case, Sizes
from benchmarks.sharding.split import COMMUNICATION, PARTS
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
        work: of a processor, for the parts of a rank.
        memory: bytes of the rank that holds most.
        traffic: of each collective and of a whole step, at the rank that is farthest from the formula as gloo runs it.
    """

    milliseconds: float
    parts: dict[str, float]
    work: dict[str, float]
    memory: dict[str, int]
    traffic: list[Received]

    @property
    def own_work(self) -> float:
        """Milliseconds of a processor without communication, of which a rank's own thread does but the start."""
        return sum(ms for part, ms in self.work.items() if part != COMMUNICATION)


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
    return Line(
        milliseconds=statistics.median(_mean([sum(step.clock.values()) for step in steps]) for steps in rounds),
        parts=_medians([[step.clock for step in steps] for steps in rounds]),
        work=_medians([[step.processor for step in steps] for steps in rounds]),
        memory=max((of_rank.memory[case] for of_rank in told), key=lambda memory: sum(memory.values())),
        traffic=[max(same, key=lambda one: abs(one.of_gloo - 1)) for same in zip(*everyones, strict=True)],
    )


def _mean(seconds: Sequence[float]) -> float:
    return statistics.fmean(seconds) * 1e3


def _medians(rounds: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, float]:
    return {part: statistics.median(_mean([of[part] for of in ranks]) for ranks in rounds) for part in PARTS}


def _best(gpus: int, candidate: Candidate | None) -> dict[str, Any]:
    if candidate is None:
        return {"gpus": gpus, "ranks": None}
    seconds = asdict(candidate.times) | {"total": candidate.times.total}
    return {"gpus": gpus, "ranks": candidate.ranks, "seconds": seconds, "memory": candidate.memory.total}
