"""Measures a memory layer against its peers on a GPU, and what both reach of its limits.

python -m benchmarks.gpu [--quick] [--output DIR]
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch._dynamo import config as dynamo_config

from benchmarks.common.session import Stop, interruptible
from benchmarks.gpu.device import Cuda, Device
from benchmarks.gpu.goals import judge
from benchmarks.gpu.measure import Run
from benchmarks.gpu.plan import Plan, full_plan, quick_plan
from benchmarks.gpu.report import render
from benchmarks.gpu.results import Results
from benchmarks.gpu.roofline import draw


def benchmark(device: Device, plan: Plan, output: Path) -> Results:
    """Measures, prints the report and writes `gpu.json` and `gpu-roofline.png` to `output`."""
    start, stop = time.perf_counter(), Stop()
    output.mkdir(parents=True, exist_ok=True)
    results = Results(device.about())
    with interruptible(stop):
        Run(device, plan, results, stop).all()
    if stop.requested:
        print(f"\ninterrupted after {len(results.medians)} medians: what follows is a part")
    results.goals = judge(results, plan)
    print(f"\n{render(results)}\n")
    written = [output / "gpu.json"]
    results.write(written[0])
    if draw(results, output / "gpu-roofline.png"):
        written.append(output / "gpu-roofline.png")
    print(f"{time.perf_counter() - start:.0f} s; wrote {' and '.join(map(str, written))}")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only what the goals are about, in a minute")
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path("benchmark-results"), help="[%(default)s]")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return 0  # so that `make` goes on where a GPU is optional
    dynamo_config.recompile_limit = 64
    torch.set_float32_matmul_precision("high")  # the peers' scores: exact for half dtypes, and ten times as fast
    results = benchmark(Cuda(), quick_plan() if args.quick else full_plan(), args.output)
    return 0 if results.complete else 130


if __name__ == "__main__":
    sys.exit(main())
