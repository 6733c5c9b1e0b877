"""Measures a training step of a layer with a large table against its peers, and how it grows with the slots.

python -m benchmarks.training_step [--quick] [--output DIR] [--threads N]
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.common.session import Stop, interruptible
from benchmarks.common.timing import Rounds
from benchmarks.cpu.results import machine
from benchmarks.training_step import cases
from benchmarks.training_step.cases import Case, Group
from benchmarks.training_step.goals import judge
from benchmarks.training_step.measure import Contestant, Run
from benchmarks.training_step.plot import draw
from benchmarks.training_step.processes import Here, Process
from benchmarks.training_step.report import render
from benchmarks.training_step.results import Missing, Results
from memcompile.lowering import cpu

CURVE = (cases.OURS, cases.DENSE, cases.SPARSE_ADAM, cases.FBGEMM, cases.HARDWARE)
ALL = (
    *(cases.OURS, cases.FUSED, cases.LAZY_ADAM, cases.ROW_WISE_ADAGRAD, cases.ROW_SGD),
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


def benchmark(
    curve: Group, main: Group, threads: int, output: Path, start: Callable[[Case], Contestant], rounds: Rounds = ROUNDS
) -> Results:
    """Measures, prints the report and writes `training-step.json` and `training-step.png` to `output`."""
    begin, stop = time.perf_counter(), Stop()
    output.mkdir(parents=True, exist_ok=True)
    results = Results(machine())
    if cases.FBGEMM in curve.names + main.names and find_spec("fbgemm_gpu") is None:
        curve, main = (group.without(cases.FBGEMM) for group in (curve, main))
        results.missing.append(Missing(cases.FBGEMM, main.width, "fbgemm-gpu-cpu is not installed"))
    with interruptible(stop):
        Run(start, (main, curve), threads, rounds, results, stop).all()
    if stop.requested:
        print(f"\ninterrupted after {len(results.medians)} medians: what follows is a part")
    results.goals = judge(results, curve, main)
    print(f"\n{render(results)}\n")
    written = [output / "training-step.json"]
    results.write(written[0])
    if draw(results, curve.width, output / "training-step.png"):
        written.append(output / "training-step.png")
    print(f"{time.perf_counter() - begin:.0f} s; wrote {' and '.join(map(str, written))}")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny layers in one process, to try the benchmark")
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path("benchmark-results"), help="[%(default)s]")
    parser.add_argument("--threads", type=int, help=f"[{torch.get_num_threads()}; 1 with --quick]")
    args = parser.parse_args(arguments)
    if args.threads is None:  # on a busy machine tiny layers wait for their second thread, and not for their work
        args.threads = 1 if args.quick else torch.get_num_threads()
    if args.threads < 1:
        parser.error("--threads must be at least 1")
    torch.set_num_threads(args.threads)
    if not cpu.load():
        print(
            "memcompile's kernels could not be built (the log says why): its operators run as PyTorch's",
            file=sys.stderr,
        )
    if args.quick:
        print("tiny layers in one process, not compiled: whether all of it runs, and nothing about the goals")
    how = (Here, FEW_ROUNDS) if args.quick else (Process, ROUNDS)
    results = benchmark(*groups(args.quick), args.threads, args.output, *how)
    return 0 if results.complete else 130


if __name__ == "__main__":
    sys.exit(main())
