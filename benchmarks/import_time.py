"""What `import memcompile` costs over `import torch`.

python -m benchmarks.import_time [--quick] [--output DIR] [--repeats N]
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.harness.results import Results
from benchmarks.harness.session import Session, command_line, conduct, exit_code, positive
from benchmarks.harness.tables import table

PROGRAM = """
import json, sys, time
start, before = time.perf_counter(), len(sys.modules)
import torch
torch_at, torch_modules = time.perf_counter(), len(sys.modules)
import memcompile
end, modules = time.perf_counter(), len(sys.modules)
print(json.dumps([torch_at - start, end - torch_at, torch_modules - before, modules - torch_modules]))
"""


def measure(repeats: int, session: Session) -> None:
    """Medians over new processes; the first one fills the caches of the disk and of bytecode, and does not count."""
    runs = []
    for _ in range(repeats + 1):
        session.say("imports")
        runs.append(json.loads(subprocess.check_output([sys.executable, "-c", PROGRAM], text=True)))
        session.advance()
    ratio = statistics.median(ours / of_torch for of_torch, ours, *_ in runs[1:])
    names = "torch_seconds", "memcompile_seconds", "torch_modules", "memcompile_modules"
    figures = dict(zip(names, map(statistics.median, zip(*runs[1:], strict=True)), strict=True))
    session.results.medians.append(figures | {"memcompile_of_torch": ratio})


def report(repeats: int, results: Results) -> str:
    rows = [
        [name, f"{r[name + '_seconds']:.3f} s", f"{r[name + '_modules']:,.0f}", share]
        for r in results.medians
        for name, share in (("torch", ""), ("memcompile", f"{r['memcompile_of_torch']:.1%}"))
    ]
    about = f"torch {torch.__version__}, median of {repeats} processes"
    return f"{about}\n\n{table(['import', 'time', 'modules', 'of torch'], rows)}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line("benchmarks.import_time", __doc__, "one process after a first one")
    parser.add_argument("--repeats", type=positive, help="processes; the median is shown [9; 1 with --quick]")
    args = parser.parse_args(arguments)
    repeats = args.repeats or (1 if args.quick else 9)
    results = Results({"torch": torch.__version__})
    run = partial(measure, repeats)
    return exit_code(conduct("import-time", args.output, results, repeats + 1, run, partial(report, repeats)))


if __name__ == "__main__":
    sys.exit(main())
