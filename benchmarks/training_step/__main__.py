"""A whole training step: python -m benchmarks.training_step [--quick] [--output DIR] [--threads N]"""

import argparse
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from benchmarks.harness.machine import machine
from benchmarks.harness.package import load_kernels
from benchmarks.harness.processes import Local, Remote
from benchmarks.harness.results import Goal
from benchmarks.harness.session import Benchmark, Session
from benchmarks.harness.timing import Rounds
from benchmarks.training_step import cases
from benchmarks.training_step.cases import Case, Group
from benchmarks.training_step.measure import Run
from benchmarks.training_step.report import draw, judge, report
from benchmarks.training_step.worker import Worker

CURVE = (cases.OURS, cases.DENSE, cases.SPARSE_ADAM, cases.FBGEMM, cases.HARDWARE)
ALL = (
    *(cases.OURS, cases.LAZY_ADAM, cases.ROW_WISE_ADAGRAD, cases.ROW_SGD),
    *(cases.FBGEMM, cases.DENSE, cases.DENSE_LOOP, cases.SPARSE_ADAM),
)

ROUNDS = Rounds(seconds=1.5, fewest=3, most=15)
FEW_ROUNDS = Rounds(seconds=0, fewest=2, most=2)


def groups(quick: bool) -> tuple[Group, Group]:
    """The curve, of which each step touches about as many rows of every table, and what most goals are about."""
    if quick:
        small = {"heads": 2, "top_k": 4, "compiled": False}
        few = (cases.OURS, cases.FBGEMM, cases.HARDWARE)
        return Group(64, 4, (8, 16), few, **small), Group(128, 8, (16,), ALL, **small)
    return Group(256, 64, (128, 256, 512, 1024, 2048), CURVE), Group(1024, 512, (1024,), ALL)


def here(case: Case) -> Local:
    return Local(Worker, case)


def elsewhere(case: Case) -> Remote:
    # Inductor's own processes would share the processors with what is timed.
    return Remote(Worker, case, environment={"TORCHINDUCTOR_COMPILE_THREADS": "1"})


class TrainingStep(Benchmark):
    module, name, figure, threads = "benchmarks.training_step", "training-step", "training-step.png", 0
    about = "Measures a training step of a layer with a large table against its peers, and how it grows with the slots."
    quick = "tiny layers in one process, not compiled, in some seconds: whether all of it runs, nothing about the goals"

    def __init__(
        self, curve: Group, main: Group, threads: int, start: Callable[[Case], Local | Remote], rounds: Rounds = ROUNDS
    ) -> None:
        without = cases.FBGEMM in curve.names + main.names and find_spec("fbgemm_gpu") is None
        self.curve, self.main_group = (group.without(cases.FBGEMM) if without else group for group in (curve, main))
        self.worker_threads, self.start, self.rounds = threads, start, rounds
        super().__init__(machine(), sum(len(group.cases(threads)) for group in (self.main_group, self.curve)))
        if without:
            self.results.miss("all", cases.FBGEMM, "fbgemm-gpu-cpu is not installed")

    @classmethod
    def of(cls, args: argparse.Namespace) -> "TrainingStep":
        load_kernels()
        how = (here, FEW_ROUNDS) if args.quick else (elsewhere, ROUNDS)
        return cls(*groups(args.quick), args.threads, *how)

    def measure(self, session: Session) -> None:
        Run(self.start, self.worker_threads, self.rounds, session).measure((self.main_group, self.curve))

    def judge(self) -> list[Goal]:
        return judge(self.curve, self.main_group, self.results)

    def report(self) -> str:
        return report(self.results)

    def draw(self, path: Path) -> list[Path]:
        return [path] if draw(self.curve.width, self.results, path) else []


if __name__ == "__main__":
    sys.exit(TrainingStep.main())
