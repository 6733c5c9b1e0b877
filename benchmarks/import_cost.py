"""What `import memcompile` takes on top of `import torch`: the median over fresh processes.

    python -m benchmarks.import_cost [--processes 15]

A process is first started once for the system to have the files.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

PROGRAM = """
import sys, time
start = time.perf_counter()
import torch
between, modules = time.perf_counter(), len(sys.modules)
import memcompile
print(between - start, time.perf_counter() - between, len(sys.modules) - modules)
"""


def measure() -> tuple[float, float, int]:
    """Seconds of `import torch`, seconds of `import memcompile` after it, and how many modules that imported."""
    printed = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    torch_seconds, seconds, modules = printed.split()
    return float(torch_seconds), float(seconds), int(modules)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=15)
    processes = parser.parse_args().processes
    modules = measure()[2]
    runs = [measure() for _ in range(processes)]
    torch_seconds, seconds = (statistics.median(run[i] for run in runs) for i in (0, 1))
    ratio = statistics.median(own / of_torch for of_torch, own, _ in runs)
    print(f"import torch       {torch_seconds * 1e3:8.1f} ms")
    print(f"import memcompile  {seconds * 1e3:8.1f} ms more, {modules} modules")
    print(f"ratio              {ratio:8.1%} (median of {processes} processes)")


if __name__ == "__main__":
    main()
