"""Measures a training step of a layer with a large table against its peers, and how it grows with the slots.

python -m benchmarks.training_step [--quick] [--output DIR] [--threads N]
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.harness.machine import machine
from benchmarks.harness.package import load_kernels
from benchmarks.harness.processes import Local, Remote, Worker
from benchmarks.harness.results import Results
from benchmarks.harness.session import Session, command_line, conduct, exit_code, positive
from benchmarks.harness.timing import Rounds
from benchmarks.training_step import cases, worker
from benchmarks.training_step.cases import Case, Group
from benchmarks.training_step.measure import Run
from benchmarks.training_step.report import draw, judge, report

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


def here(case: Case) -> Worker:
    return Local(worker.Worker, case)


def elsewhere(case: Case) -> Worker:
    # Inductor's own processes would share the processors with what is timed.
    return Remote(worker.Worker, case, environment={"TORCHINDUCTOR_COMPILE_THREADS": "1"})


def benchmark(
    curve: Group, main: Group, threads: int, output: Path, start: Callable[[Case], Worker], rounds: Rounds = ROUNDS
) -> Results:
    results = Results(machine())
    if cases.FBGEMM in curve.names + main.names and find_spec("fbgemm_gpu") is None:
        curve, main = (group.without(cases.FBGEMM) for group in (curve, main))
        results.miss("all", cases.FBGEMM, "fbgemm-gpu-cpu is not installed")

    def measure(session: Session) -> None:
        Run(start, threads, rounds, session).measure((main, curve))

    total = sum(len(group.cases(threads)) for group in (main, curve))
    drawing = partial(draw, curve.width)
    return conduct("training-step", output, results, total, measure, report, partial(judge, curve, main), drawing)


def main(arguments: Sequence[str] | None = None) -> int:
    short = "tiny layers in one process, not compiled, in some seconds: whether all of it runs"
    parser = command_line("benchmarks.training_step", __doc__, short)
    parser.add_argument("--threads", type=positive, help=f"[{torch.get_num_threads()}; 1 with --quick]")
    args = parser.parse_args(arguments)
    # On a busy machine tiny layers wait for their second thread, and not for their work.
    threads = args.threads or (1 if args.quick else torch.get_num_threads())
    torch.set_num_threads(threads)
    load_kernels()
    if args.quick:
        print("tiny layers in one process, not compiled: whether all of it runs, and nothing about the goals")
    how = (here, FEW_ROUNDS) if args.quick else (elsewhere, ROUNDS)
    return exit_code(benchmark(*groups(args.quick), threads, args.output, *how))


if __name__ == "__main__":
    sys.exit(main())
