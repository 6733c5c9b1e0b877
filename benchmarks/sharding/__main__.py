"""Measures a sharded memory layer on 1, 2 and 4 processes, and models it on 8 to 1,024 GPUs.

python -m benchmarks.sharding [--quick] [--output DIR] [--rounds N]
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks.cpu.results import machine
from benchmarks.sharding.cases import Sizes, all_cases
from benchmarks.sharding.plot import draw
from benchmarks.sharding.processes import run
from benchmarks.sharding.report import render
from benchmarks.sharding.results import Results, lines, predict
from memcompile.cost.job import Job
from memcompile.cost.time import Hardware
from memcompile.lowering import cpu

QUICK = Sizes(width=64, n_keys=32, heads=2, top_k=8, tokens=32, ranks=(1, 2))
JOB = Job(slots=2**24, value_dim=2048, gpus=8)  # the largest power of two that eight GPUs hold
ROUNDS, FEW_ROUNDS = 15, 2


def benchmark(sizes: Sizes, rounds: int, output: Path) -> Results:
    """Measures, prints the report and writes `sharding.json` and `sharding.png` to `output`."""
    begin = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    cases = all_cases(sizes)
    with tqdm(total=len(cases) + rounds, unit="", dynamic_ncols=True, disable=None) as progress:

        def say(what: str) -> None:
            progress.set_description(what)
            progress.update()

        told = run(sizes, rounds, say)
    results = Results(
        machine=machine() | {"cores": len(os.sched_getaffinity(0)), "threads": 1},
        sizes=sizes,
        rounds=rounds,
        lines=lines(told, cases),
        prediction=predict(JOB, Hardware()),
        share_of_others=told[0].others,
    )
    print(f"\n{render(results)}\n")
    written = output / "sharding.json", output / "sharding.png"
    results.write(written[0])
    draw(results, written[1])
    print(f"{time.perf_counter() - begin:.0f} s; wrote {' and '.join(map(str, written))}")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharding", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny layer on two processes, to try the benchmark")
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path("benchmark-results"), help="[%(default)s]")
    parser.add_argument("--rounds", type=int, help=f"[{ROUNDS}; {FEW_ROUNDS} with --quick]")
    args = parser.parse_args(arguments)
    rounds = args.rounds or (FEW_ROUNDS if args.quick else ROUNDS)
    if rounds < 1:
        parser.error("--rounds must be at least 1")
    if sys.platform != "linux":
        parser.error("received bytes are counted by Linux: run it there")
    if not cpu.load():
        print(
            "memcompile's kernels could not be built (the log says why): its operators run as PyTorch's",
            file=sys.stderr,
        )
    benchmark(QUICK if args.quick else Sizes(), rounds, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
