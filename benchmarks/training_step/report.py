"""The results as tables, the goals last, where a terminal shows them."""

from benchmarks.common.tables import goal_table, milliseconds, table
from benchmarks.cpu.neighbours import QUIET
from benchmarks.training_step.cases import FFN
from benchmarks.training_step.goals import growth
from benchmarks.training_step.results import Median, Results
from benchmarks.training_step.worker import STEP, TABLE

TITLES = {STEP: "step: forward, backward and optimizer", TABLE: "table part: gather, its backward and the optimizer"}


def _times(results: Results, width: int, part: str) -> str:
    """A row a contestant, a column a number of slots."""
    curves = results.of(width, part)
    slots = sorted({number for name, curve in curves.items() for number in curve if name != FFN})
    rows = []
    for name, curve in curves.items():
        at = dict.fromkeys(slots, curve[0]) if name == FFN else curve
        cells = [f"{milliseconds(at[n].milliseconds)} ({at[n].ffns:.2f})" if n in at else "" for n in slots]
        grown = growth(curve)
        rows.append([name, *cells, "" if grown is None else f"{grown:+.0%}"])
    touched: dict[int, Median] = {n: m for curve in curves.values() for n, m in curve.items()}
    header = ["ms (multiple of the FFN's step)", *(f"{n:,} slots" for n in slots), "growth"]
    rows.append(["rows that a step touches", *(f"{touched[n].touched:,}" for n in slots), ""])
    tokens = next(iter(touched.values())).tokens
    return f"{TITLES[part]}, d = {width}, {tokens} tokens\n\n{table(header, rows)}"


def _peaks(results: Results, width: int) -> str:
    curves = {name: curve for name, curve in results.of(width, STEP).items() if name != FFN}
    slots = sorted({number for curve in curves.values() for number in curve})

    def cell(m: Median | None) -> str:
        return f"{m.peak_bytes / 2**30:.2f} / {m.needed_bytes / 2**30:.2f}" if m else ""

    rows = [[name, *(cell(curve.get(n)) for n in slots)] for name, curve in curves.items()]
    header = ["peak / values and states, GiB", *(f"{n:,} slots" for n in slots)]
    return f"memory, d = {width}\n\n{table(header, rows)}"


def render(results: Results) -> str:
    """Everything."""
    about = results.machine
    parts = [f"{about['cpu']}, {about['capability']}, {about['threads']} threads, torch {about['torch']}, float32"]
    for width in dict.fromkeys(m.width for m in results.medians):
        parts += [_times(results, width, part) for part in results.parts(width)]
        parts += [_peaks(results, width)] if STEP in results.parts(width) else []
    if results.missing:
        lines = [f"- d = {missing.width}, {missing.case}: {missing.reason}" for missing in results.missing]
        parts.append("\n".join(["Not measured:\n", *lines]))
    if results.goals:
        parts.append(f"goals: reached?\n\n{goal_table(results.goals)}")
    if results.neighbours.share > QUIET:
        parts.append(
            f"Other processes took {results.neighbours.share:.0%} of the processors meanwhile, and threads that wait "
            "for each other lose more than that: measure again on an idle machine."
        )
    return "\n\n".join(parts)
