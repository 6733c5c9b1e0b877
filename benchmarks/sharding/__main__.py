"""A sharded memory layer on 1, 2 and 4 processes, and by the cost model on 8 to 1,024 GPUs.

python -m benchmarks.sharding [--quick] [--output DIR] [--rounds N]
"""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.harness.machine import machine
from benchmarks.harness.package import Hardware, Job, load_kernels
from benchmarks.harness.session import Benchmark, Session, positive
from benchmarks.sharding.cases import Sizes, all_cases
from benchmarks.sharding.measure import measure, predict
from benchmarks.sharding.report import draw, report

QUICK = Sizes(width=64, n_keys=32, heads=2, top_k=8, tokens=32, ranks=(1, 2))
JOB = Job(slots=2**24, value_dim=2048, gpus=8)  # the largest power of two that eight GPUs hold
ROUNDS, FEW_ROUNDS = 15, 2


class Sharding(Benchmark):
    module, name, figure = "benchmarks.sharding", "sharding", "sharding.png"
    about = "Measures a sharded memory layer on 1, 2 and 4 processes, and models it on 8 to 1,024 GPUs."
    quick = "a tiny layer on two processes, in some seconds: to try the benchmark"

    def __init__(self, sizes: Sizes, rounds: int) -> None:
        super().__init__(
            machine() | {"cores": len(os.sched_getaffinity(0)), "threads": 1}, len(all_cases(sizes)) + rounds
        )
        self.sizes, self.rounds, self.prediction = sizes, rounds, predict(JOB, Hardware())
        self.results.more = {"sizes": asdict(sizes), "rounds": rounds, "predicted": self.prediction.content()}

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--rounds", type=positive, help=f"[{ROUNDS}; {FEW_ROUNDS} with --quick]")

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Sharding":
        if sys.platform != "linux":
            raise SystemExit("received bytes are counted by Linux: run it there")
        load_kernels()
        return cls(QUICK if args.quick else Sizes(), args.rounds or (FEW_ROUNDS if args.quick else ROUNDS))

    def measure(self, session: Session) -> None:
        measure(self.sizes, self.rounds, session)

    def report(self) -> str:
        return report(self.sizes, self.rounds, self.prediction, self.results)

    def draw(self, path: Path) -> list[Path]:
        return [path] if draw(self.sizes, self.prediction, self.results, path) else []


if __name__ == "__main__":
    sys.exit(Sharding.main())
