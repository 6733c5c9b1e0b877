"""Draws where a step's time goes: measured with a few processes on the left, modelled for many GPUs on the right."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from benchmarks.harness.plots import new_figure
from benchmarks.harness.results import Results
from benchmarks.sharding.cases import STRONG, WEAK, Sizes, rows_case, scaling
from benchmarks.sharding.measure import Prediction
from benchmarks.sharding.report import crowded, line_of
from benchmarks.sharding.trainee import COMMUNICATION, GATHER, OPTIMIZER, PARTS, REST, SEARCH

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


def draw(sizes: Sizes, prediction: Prediction, results: Results, path: Path) -> bool:
    """Returns whether there was anything to draw."""
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
