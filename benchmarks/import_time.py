"""What `import memcompile` costs over `import torch`.

python -m benchmarks.import_time [--quick] [--output DIR] [--repeats N]
"""

import argparse
import json
import statistics
import subprocess
import sys

import torch

from benchmarks.harness.session import Benchmark, Session
from benchmarks.harness.tables import table

PROGRAM = """
import json, sys, time
start, before = time.perf_counter(), len(sys.modules)
import torch
torch_at, torch_modules = time.perf_counter(), len(sys.modules)
import memcompile
end, modules = time.perf_counter(), len(sys.modules)
of_torch, ours = torch_at - start, end - torch_at
print(json.dumps([of_torch, ours, ours / of_torch, torch_modules - before, modules - torch_modules]))
"""
FIGURES = "torch_seconds", "memcompile_seconds", "ratio", "torch_modules", "memcompile_modules"


class ImportTime(Benchmark):
    module, name, repeats = "benchmarks.import_time", "import-time", (9, 1)
    about = "What `import memcompile` costs over `import torch`, in processes of their own."
    quick = "one process after a first one"

    def __init__(self, processes: int) -> None:
        super().__init__({"torch": torch.__version__, "processes": processes}, processes + 1)

    @classmethod
    def of(cls, args: argparse.Namespace) -> "ImportTime":
        return cls(args.repeats)

    def measure(self, session: Session) -> None:
        """The first process fills the caches of the disk and of bytecode, and does not count."""
        runs = []
        for _ in range(self.cases):
            session.check()
            runs.append(json.loads(subprocess.check_output([sys.executable, "-c", PROGRAM], text=True)))
            session.advance()
        figures = dict(zip(FIGURES, map(statistics.median, zip(*runs[1:], strict=True)), strict=True))
        self.results.medians.append(figures)

    def report(self) -> str:
        rows = [
            [name, f"{r[name + '_seconds']:.3f} s", f"{r[name + '_modules']:,.0f}", share]
            for r in self.results.medians
            for name, share in (("torch", ""), ("memcompile", f"{r['ratio']:.1%}"))
        ]
        about = f"torch {torch.__version__}, median of {self.results.machine['processes']} processes"
        return f"{about}\n\n{table(['import', 'time', 'modules', 'of torch'], rows)}"


if __name__ == "__main__":
    sys.exit(ImportTime.main())
