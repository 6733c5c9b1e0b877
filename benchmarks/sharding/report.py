"""How the results read: tables of times, of bytes and of what the cost model predicts for GPUs, and a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from benchmarks.harness.plots import new_figure
from benchmarks.harness.results import Results
from benchmarks.harness.tables import milliseconds, remarks, table
from benchmarks.sharding.cases import STRONG, WEAK, Case, Sizes, rows_case, scaling
from benchmarks.sharding.measure import Line, Prediction
from benchmarks.sharding.traffic import Received
from benchmarks.sharding.trainee import COMMUNICATION, GATHER, OPTIMIZER, PARTS, REST, SEARCH
from benchmarks.sharding.worker import WHOLE_STEP

_KIB, _MIB, _GIB = 2**10, 2**20, 2**30
_TOLERANCE = 0.1  # of bytes that were measured, of the formula's
_OF_REPLICAS = "communication of replicas (modelled)"
_WORK = "processor time of a rank's own thread"
_COLOURS = {
    SEARCH: "#8c8c8c",
    GATHER: "#4c72b0",
    COMMUNICATION: "#c44e52",
    _OF_REPLICAS: "#dd8452",
    OPTIMIZER: "#55a868",
    REST: "#d4d4d4",
}
_TITLES = {WEAK: "weak: {:,} tokens a rank", STRONG: "strong: {:,} tokens in all"}


def of_processes(ranks: int) -> str:
    return f"{ranks} process{'es' * (ranks > 1)}"


def line_of(results: Results, case: Case) -> Line:
    (line,) = results.where(ranks=case.ranks, by=case.by, tokens=case.tokens)
    return line


def crowded(results: Results, sizes: Sizes) -> list[int]:
    """Numbers of processes of which not each had a core of its own."""
    return [ranks for ranks in sizes.ranks if ranks > results.machine["cores"]]


def _times(results: Results, sizes: Sizes) -> str:
    curves = scaling(sizes)
    listed = [
        (f"{curve}, {of_processes(case.ranks)}", case, cases[0]) for curve, cases in curves.items() for case in cases
    ]
    rows = rows_case(sizes)
    listed.append((f"by rows, {of_processes(rows.ranks)}", rows, curves[WEAK][0]))
    body = [[name, *_cells(results, case, first)] for name, case, first in listed]
    header = ["by columns", "tokens a rank", "step, ms", "of one", *PARTS, "work, ms", "of one", "MiB a rank"]
    return table(header, body)


def _cells(results: Results, case: Case, first: Case) -> list[str]:
    line, one = line_of(results, case), line_of(results, first)
    all_parts = sum(line.parts.values())
    return [
        f"{case.tokens:,}",
        milliseconds(line.milliseconds),
        f"{line.milliseconds / one.milliseconds:.2f}",
        *(f"{line.parts[part] / all_parts:.0%}" for part in PARTS),
        milliseconds(line.work),
        f"{line.work / one.work:.2f}",
        f"{sum(line.memory.values()) / _MIB:,.1f}",
    ]


def _traffic(results: Results) -> str:
    body = []
    for line in results.medians:
        name = f"{of_processes(line.ranks)} by {line.by}, {line.tokens:,} tokens each"
        for one in line.traffic:
            counts = [one.formula_bytes, one.measured_bytes]
            what = [one.name, one.operation, *(f"{count / _KIB:,.1f}" for count in counts)]
            body.append([name, *what, f"{one.of_formula:.3f}"])
    header = ["ranks", "received by a rank", "collective", "formula, KiB", "measured, KiB", "of the formula"]
    return table(header, body)


def _verdict(results: Results) -> str:
    """Which collectives bring what the formula says, and which do not."""
    found: dict[str, list[Received]] = {}
    for line in results.medians:
        for one in line.traffic:
            found.setdefault(one.operation or WHOLE_STEP, []).append(one)
    lines = []
    for operation, received in found.items():
        ratios = [one.of_formula for one in received]
        within = all(abs(ratio - 1) <= _TOLERANCE for ratio in ratios)
        kept = f"within {_TOLERANCE:.0%}" if within else f"NOT within {_TOLERANCE:.0%}"
        lines.append(f"- {operation}: {min(ratios):.3f} to {max(ratios):.3f} of the formula's bytes, {kept}")
    return "\n".join(lines)


def _predicted(prediction: Prediction) -> str:
    body = []
    for gpus, candidate in prediction.best.items():
        if candidate is None:
            body.append([f"{gpus:,}", "no fit", *[""] * 7])
            continue
        t = candidate.times
        seconds = (t.search, t.gather, t.layers_wire, t.step_wire, t.update, t.total)
        cells = [milliseconds(s * 1e3) for s in seconds]
        body.append([f"{gpus:,}", f"{candidate.ranks:,}", *cells, f"{candidate.memory.total / _GIB:.1f}"])
    header = ["GPUs", "ranks of the best group", "search, ms", "gather", "communication", "of replicas", "optimizer"]
    return table([*header, "step", "GiB a rank"], body)


def report(sizes: Sizes, rounds: int, prediction: Prediction, results: Results) -> str:
    about, job = results.machine, prediction.job
    parts = [
        f"{about['cpu']}, {about['capability']}, {about['cores']} cores, torch {about['torch']}, gloo on the loopback "
        f"interface, a thread a process\nd = {sizes.width}, {sizes.slots:,} slots, {sizes.heads} heads x top "
        f"{sizes.top_k}, float32, AdamW of rows; eager; medians of {rounds} rounds"
    ]
    if results.medians:
        parts += [
            _times(results, sizes),
            f"{WEAK}: tokens of a rank are fixed; {STRONG}: those of all ranks. Of one: of one process; by rows, of "
            "the\nweak one. Parts are shares of the step's time; communication lasts until all ranks have come. Work "
            "is the\nprocessor time of a rank's own thread, which waiting does not add to. MiB are values and states.",
        ]
        if many := crowded(results, sizes):
            parts.append(
                f"{' and '.join(map(str, many))} processes on {about['cores']} cores: their steps measure contention, "
                "not scaling. Work hardly depends on it; bytes and memory do not."
            )
        if any(line.traffic for line in results.medians):
            parts += [_traffic(results), _verdict(results)]
    parts.append(
        f"modelled, not measured: {job.slots:,} slots x {job.value_dim:,} in {job.dtype}, {job.layers} layers, "
        f"{job.tokens:,} tokens a rank, memcompile.cost's hardware\n\n{_predicted(prediction)}"
    )
    return "\n\n".join(parts + remarks(results))


def draw(sizes: Sizes, prediction: Prediction, results: Results, path: Path) -> bool:
    """Measured on the left, modelled for many GPUs on the right. Returns whether there was anything to draw."""
    if not results.medians:
        return False
    figure, (left, right) = new_figure(2, (13, 5.6), sharey=False)
    _measured(left, results, sizes)
    _modelled(right, prediction)
    named = {
        name: handle for axes in (left, right) for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    order = [*_COLOURS, _WORK]
    figure.legend([named[name] for name in order], order, fontsize=10, ncols=4, loc="outside lower center")
    figure.savefig(path)
    return True


def _measured(axes: Axes, results: Results, sizes: Sizes) -> None:
    curves, many = scaling(sizes), crowded(results, sizes)
    places: list[float] = []
    cases, labels = [], []
    for cases_of_curve in (curves[WEAK], curves[STRONG], [rows_case(sizes)]):
        start = places[-1] + 1.7 if places else 0.0
        places += [start + i for i in range(len(cases_of_curve))]
        cases += cases_of_curve
        labels += [f"{case.ranks}{'*' * (case.ranks in many)}" for case in cases_of_curve]
    measured = [line_of(results, case) for case in cases]
    top = _stack(axes, places, {part: [line.parts[part] for line in measured] for part in PARTS})
    work = [line.work for line in measured]
    axes.plot(places, work, "D", color="black", markeredgecolor="white", markersize=9, label=_WORK)
    axes.set_xticks(places, labels)
    axes.set_ylim(0, 1.12 * top)
    axes.set_ylabel("ms a step")
    starred = f" (* more than the {results.machine['cores']} cores: contention)" if many else ""
    axes.set_xlabel(f"processes{starred}")
    names = [_TITLES[WEAK].format(sizes.tokens), _TITLES[STRONG].format(sizes.all_tokens), "by rows"]
    ends = [0, len(curves[WEAK]), len(curves[WEAK]) + len(curves[STRONG]), len(cases)]
    for name, a, b in zip(names, ends, ends[1:], strict=False):
        axes.text((places[a] + places[b - 1]) / 2, 1.09 * top, name, ha="center", va="top", fontsize=10)
    axes.set_title(
        f"measured: gloo on one machine, {sizes.slots:,} slots x {sizes.width:,} in fp32,\n"
        "by columns where nothing is said",
        fontsize=11,
    )


def _modelled(axes: Axes, prediction: Prediction) -> None:
    job, best = prediction.job, prediction.best
    names = {SEARCH: "search", GATHER: "gather", COMMUNICATION: "layers_wire", _OF_REPLICAS: "step_wire"}
    names[OPTIMIZER] = "update"
    heights = {
        part: [getattr(candidate.times, name) * 1e3 if candidate else 0.0 for candidate in best.values()]
        for part, name in names.items()
    }
    top = _stack(axes, range(len(best)), heights)
    axes.set_xticks(range(len(best)), [f"{n:,}\n{c.ranks if c else 'no fit'}" for n, c in best.items()])
    axes.set_ylim(0, 1.12 * top)
    axes.set_ylabel("ms a step")
    axes.set_xlabel("GPUs; below, the ranks of the best group")
    axes.set_title(
        f"modelled, not measured: {job.slots:,} slots x {job.value_dim:,} in {job.dtype},\n{job.layers} layers, "
        f"{job.tokens:,} tokens a GPU, peak rates of H100 nodes",
        fontsize=11,
    )


def _stack(axes: Axes, places: Sequence[float], heights: Mapping[str, Sequence[float]]) -> float:
    """Bars of parts. Returns how high the highest is."""
    base = [0.0] * len(places)
    for part, height in heights.items():
        axes.bar(places, height, bottom=base, color=_COLOURS[part], label=part, width=0.8)
        base = [a + b for a, b in zip(base, height, strict=True)]
    axes.grid(axis="y", color="0.88", linewidth=0.6)
    axes.set_axisbelow(True)
    return max(base) or 1.0
