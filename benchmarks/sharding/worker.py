"""What every process does: it builds the layers of all groups that it is in, and runs them in turns with the others."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.cpu.neighbours import Neighbours
from benchmarks.sharding.cases import Case, Sizes, all_cases
from benchmarks.sharding.split import Step, timed
from benchmarks.sharding.traffic import Alone, Received, beside, formulas, received_between
from benchmarks.sharding.trainee import Trainee

_WARM_UPS = 2
_STEPS = 3  # whose bytes are counted together
WHOLE_STEP = "whole step"


@dataclass
class Told:
    """By one rank, of the cases that it is in."""

    steps: dict[Case, list[Step]] = field(default_factory=dict)  # by round
    traffic: dict[Case, list[Received]] = field(default_factory=dict)  # of each collective, and of all of a step
    memory: dict[Case, dict[str, int]] = field(default_factory=dict)  # bytes
    others: float = 0.0  # share of the processors that other processes took while steps were timed


def work(rank: int, sizes: Sizes, rounds: int, say: Callable[[str], None]) -> Told:
    """Measures all cases. Called on all ranks at once, of which there are as many as the largest case has."""
    meshes = {ranks: DeviceMesh("cpu", torch.arange(ranks), mesh_dim_names=("memory",)) for ranks in sizes.ranks}
    cases, told = all_cases(sizes), Told()
    trainees: dict[tuple[int, str], Trainee] = {}
    for case in cases:
        key = case.ranks, case.by
        say(f"{case.ranks} by {case.by}: gets ready")
        if rank < case.ranks:
            if key not in trainees:
                trainees[key] = Trainee(sizes, meshes[case.ranks], case.by)
            _train(trainees[key], case, _WARM_UPS)
            told.memory[case] = trainees[key].memory()
            if case.ranks > 1:
                told.traffic[case] = _traffic(trainees[key], case, sizes, rank, meshes[case.ranks])
        dist.barrier()
    neighbours, shuffle = Neighbours(_everyones_seconds), random.Random(0).shuffle
    with neighbours.watched():
        for turn in range(rounds):
            say(f"round {turn + 1} of {rounds}")
            shuffle(cases)  # the same order on all ranks
            for case in cases:
                dist.barrier()
                if rank < case.ranks:
                    step = _time(trainees[case.ranks, case.by], case, meshes[case.ranks])
                    told.steps.setdefault(case, []).append(step)
    told.others = neighbours.share
    return told


def _train(trainee: Trainee, case: Case, steps: int) -> None:
    for _ in range(steps):
        trainee.forward_backward(case.tokens)
        trainee.step()


def _time(trainee: Trainee, case: Case, mesh: DeviceMesh) -> Step:
    """Of the second of two steps: other cases had the caches before."""
    _train(trainee, case, 1)
    dist.barrier(mesh.get_group())
    return timed(lambda: trainee.forward_backward(case.tokens), trainee.step)


def _traffic(trainee: Trainee, case: Case, sizes: Sizes, rank: int, mesh: DeviceMesh) -> list[Received]:
    """Of each collective alone, and of whole steps as they are in training."""

    def meet() -> None:
        dist.barrier(mesh.get_group())

    with Alone(meet) as alone:
        trainee.forward_backward(case.tokens)
    trainee.step()
    expected = formulas(case, sizes, rank)
    before = received_between(meet)
    _train(trainee, case, _STEPS)
    measured = (received_between(meet) - before) / _STEPS
    whole = Received(WHOLE_STEP, "", sum(c.received_bytes for c in expected), measured)
    return [*beside(expected, alone.found), whole]


def _everyones_seconds() -> float:
    """Of processors that all ranks have taken. A collective."""
    seconds = torch.tensor(time.process_time(), dtype=torch.float64)
    dist.all_reduce(seconds)
    return seconds.item()
