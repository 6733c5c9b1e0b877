"""Measures a sharded memory layer on 1, 2 and 4 processes, and models it on 8 to 1,024 GPUs.

python -m benchmarks.sharding [--quick] [--output DIR] [--rounds N]
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from benchmarks.harness.machine import machine
from benchmarks.harness.package import Hardware, Job, load_kernels
from benchmarks.harness.results import Results
from benchmarks.harness.session import command_line, conduct, exit_code, positive
from benchmarks.sharding.cases import Sizes, all_cases
from benchmarks.sharding.measure import measure, predict
from benchmarks.sharding.plot import draw
from benchmarks.sharding.report import report

QUICK = Sizes(width=64, n_keys=32, heads=2, top_k=8, tokens=32, ranks=(1, 2))
JOB = Job(slots=2**24, value_dim=2048, gpus=8)  # the largest power of two that eight GPUs hold
ROUNDS, FEW_ROUNDS = 15, 2


def benchmark(sizes: Sizes, rounds: int, output: Path) -> Results:
    prediction = predict(JOB, Hardware())
    results = Results(machine() | {"cores": len(os.sched_getaffinity(0)), "threads": 1})
    results.more = {"sizes": asdict(sizes), "rounds": rounds, "predicted": prediction.content()}
    return conduct(
        "sharding",
        output,
        results,
        len(all_cases(sizes)) + rounds,
        partial(measure, sizes, rounds),
        partial(report, sizes, rounds, prediction),
        draw=partial(draw, sizes, prediction),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line("benchmarks.sharding", __doc__, "a tiny layer on two processes, to try the benchmark")
    parser.add_argument("--rounds", type=positive, help=f"[{ROUNDS}; {FEW_ROUNDS} with --quick]")
    args = parser.parse_args(arguments)
    if sys.platform != "linux":
        parser.error("received bytes are counted by Linux: run it there")
    load_kernels()
    rounds = args.rounds or (FEW_ROUNDS if args.quick else ROUNDS)
    return exit_code(benchmark(QUICK if args.quick else Sizes(), rounds, args.output))


if __name__ == "__main__":
    sys.exit(main())
