"""How the results read: tables, goals, and a figure of time against slots."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from benchmarks.harness.layers import OURS
from benchmarks.harness.plots import DENSE as DENSE_COLOUR
from benchmarks.harness.plots import LIBRARY, MEMCOMPILE, SAME_LAYER, new_figure
from benchmarks.harness.results import Goal, Results, judged
from benchmarks.harness.tables import about_cpu, goal_tables, milliseconds, remarks, table
from benchmarks.training_step.cases import DENSE, FBGEMM, FFN, HARDWARE, SPARSE_ADAM, Group
from benchmarks.training_step.measure import Median
from benchmarks.training_step.worker import STEP, TABLE

TITLES = {STEP: "step: forward, backward and optimizer", TABLE: "table part: gather, its backward and the optimizer"}
_STYLES = {
    OURS: {"color": MEMCOMPILE, "marker": "*", "markersize": 12, "linewidth": 2, "zorder": 3},
    DENSE: {"color": SAME_LAYER, "marker": "o"},
    SPARSE_ADAM: {"color": LIBRARY, "marker": "s"},
    FBGEMM: {"color": LIBRARY, "marker": "D", "linestyle": "--"},
    HARDWARE: {"color": "black", "linestyle": ":", "marker": "."},
}
Curve = dict[int, Median]  # by slots


def curves_of(results: Results, width: int, part: str) -> dict[str, Curve]:
    """By name."""
    found: dict[str, Curve] = {}
    for m in results.where(width=width, part=part):
        found.setdefault(m.name, {})[m.slots] = m
    return found


def _parts(results: Results, width: int) -> list[str]:
    """Those of which something with a table was measured."""
    return list(dict.fromkeys(m.part for m in results.where(width=width) if m.slots))


def growth(curve: Curve) -> float | None:
    """How much longer it takes with the most slots than with the fewest: 0.1 is 10% longer. None where there is one."""
    few, many = min(curve, default=0), max(curve, default=0)
    return curve[many].ffns / curve[few].ffns - 1 if few < many else None


def judge(curve: Group, main: Group, results: Results) -> list[Goal]:
    """What a step is to cost on any machine, as ratios of figures that are measured in the same turns."""
    slots = main.n_keys[-1] ** 2
    steps = {name: curve.get(slots) for name, curve in curves_of(results, main.width, STEP).items()}

    def add(name: str, asked: str, others: tuple[str, ...], verdict: Callable[..., tuple[str, bool]]) -> Goal:
        return judged(f"{OURS}: {name}", asked, "float32", [steps.get(other) for other in others], verdict)

    def times_as_fast(ours: Median, dense: Median) -> tuple[str, bool]:
        ratio = dense.ffns / ours.ffns
        return f"{ratio:.1f} x ({ours.milliseconds:.0f} against {dense.milliseconds:.0f} ms)", ratio >= 20

    def multiple(ours: Median) -> tuple[str, bool]:
        return f"{ours.ffns:.2f} x ({ours.milliseconds:.0f} against {ours.ffn_milliseconds:.0f} ms)", ours.ffns <= 1.1

    def peak(ours: Median) -> tuple[str, bool]:
        over = ours.peak_bytes / ours.needed_bytes - 1
        return f"+ {over:.1%} ({ours.peak_bytes / 2**30:.2f} of {ours.needed_bytes / 2**30:.2f} GiB)", over < 0.1

    return [
        _growth_goal(results, curve),
        add(f"step, times as fast as {DENSE}", ">= 20 x", (OURS, DENSE), times_as_fast),
        add("step, time as a multiple of the FFN's", "<= 1.1 x", (OURS,), multiple),
        add("peak memory beyond values and states", "< 10 %", (OURS,), peak),
    ]


def _growth_goal(results: Results, curve: Group) -> Goal:
    """Of the table part: the search grows with the half-keys, and the rows that a step touches with the slots."""
    tables = curves_of(results, curve.width, TABLE)
    few, many = curve.n_keys[0] ** 2, curve.n_keys[-1] ** 2

    def verdict(ours: float, hardware: float) -> tuple[str, bool]:
        beyond = (1 + ours) / (1 + hardware) - 1
        return f"{beyond:+.0%} ({ours:+.0%}; the hardware's {hardware:+.0%})", beyond < 0.15

    name = f"{OURS}: table part, growth from {few:,} to {many:,} slots beyond the hardware's"
    found = [growth(tables.get(name, {})) for name in (OURS, HARDWARE)]
    return judged(name, "< 15 %", "float32", found, verdict)


def _times(results: Results, width: int, part: str) -> str:
    """A row for each contestant, a column for each number of slots."""
    curves = curves_of(results, width, part)
    slots = sorted({number for name, curve in curves.items() for number in curve if name != FFN})
    rows = []
    for name, curve in curves.items():
        at = dict.fromkeys(slots, curve[0]) if name == FFN else curve
        cells = [f"{milliseconds(at[n].milliseconds)} ({at[n].ffns:.2f})" if n in at else "" for n in slots]
        grown = growth(curve)
        rows.append([name, *cells, "" if grown is None else f"{grown:+.0%}"])
    touched: Curve = {n: m for curve in curves.values() for n, m in curve.items()}
    header = ["ms (multiple of the FFN's step)", *(f"{n:,} slots" for n in slots), "growth"]
    rows.append(["rows that a step touches", *(f"{touched[n].touched:,}" for n in slots), ""])
    tokens = next(iter(touched.values())).tokens
    return f"{TITLES[part]}, d = {width}, {tokens} tokens\n\n{table(header, rows)}"


def _peaks(results: Results, width: int) -> str:
    curves = {name: curve for name, curve in curves_of(results, width, STEP).items() if name != FFN}
    slots = sorted({number for curve in curves.values() for number in curve})

    def cell(m: Median | None) -> str:
        return f"{m.peak_bytes / 2**30:.2f} / {m.needed_bytes / 2**30:.2f}" if m else ""

    rows = [[name, *(cell(curve.get(n)) for n in slots)] for name, curve in curves.items()]
    header = ["peak / values and states, GiB", *(f"{n:,} slots" for n in slots)]
    return f"memory, d = {width}\n\n{table(header, rows)}"


def report(results: Results) -> str:
    parts = [f"{about_cpu(results)}, float32"]
    for width in dict.fromkeys(m.width for m in results.medians):
        parts += [_times(results, width, part) for part in _parts(results, width)]
        parts += [_peaks(results, width)] if STEP in _parts(results, width) else []
    return "\n\n".join(parts + goal_tables(results.goals, "goals: reached?") + remarks(results))


def _panel(axes: Axes, results: Results, width: int, part: str) -> None:
    for name, curve in curves_of(results, width, part).items():
        if name == FFN:
            axes.axhline(curve[0].milliseconds, color=DENSE_COLOUR, linestyle="--", label=name)
            continue
        slots = sorted(curve)
        axes.plot(slots, [curve[n].milliseconds for n in slots], label=name, **_STYLES.get(name, {}))
    axes.set(yscale="log", xlabel="slots", ylabel="ms")
    axes.set_xscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title(TITLES[part], fontsize=10)
    axes.grid(which="major", color="0.88", linewidth=0.6)


def draw(width: int, results: Results, path: Path) -> bool:
    """The curves of one width: the whole step on the left, the table alone and what the hardware takes on the right.
    Returns whether there was anything to draw.
    """
    parts = _parts(results, width)
    if not parts:
        return False
    title = (
        f"A training step against the slots of its table: d = {width}, {results.where(width=width)[0].tokens} tokens\n"
        f"{results.machine['cpu']}, {results.machine['threads']} threads"
    )
    figure, all_axes = new_figure(len(parts), (6 * len(parts), 5), title)
    for axes, part in zip(all_axes, parts, strict=True):
        _panel(axes, results, width, part)
    named = {label: line for axes in all_axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), fontsize=8, loc="outside lower center", ncols=len(named))
    figure.savefig(path)
    return True
