"""Four figures: recall against steps, slots and training FLOPs, and bits of knowledge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from benchmarks.harness.plots import new_figure
from benchmarks.knowledge.report import Result, Seeds, bits_per_byte, bits_per_parameter, mean, measured
from benchmarks.knowledge.training import ASKED

BACKWARD = 3  # a training step's FLOPs as a multiple of its forward's
# Systems with tables have warm colours, dense ones grey.
COLOURS = {
    "dense": "#9aa5b1",
    "dense2x": "#66727f",
    "dense4x": "#323f4b",
    "moe": "#2a6fb0",
    "ngram": "#2f9e7a",
    "pkm": "#b58a00",
    "peer": "#7b4fb5",
    "memory": "#e68a2e",
    "memory+": "#c1272d",
}


def draw(
    results: Sequence[Result], sweeps: Sequence[Result], sizes: Sequence[str], facts: int, stem: Path
) -> list[Path]:
    """Writes those figures that have something to show; returns their paths."""
    systems = {size: by_system for size in sizes if (by_system := measured(results, size))}
    subject = f"{facts:,} facts about airports, countries and cities"
    drawn = []

    def save(name: str, panels: Sequence[str], fill: Callable[[Axes, str], None], title: str, sharey: bool) -> None:
        figure, all_axes = new_figure(len(panels), (6.6 * len(panels), 4.6), f"{title} {subject}", sharey)
        for axes, panel in zip(all_axes, panels, strict=True):
            fill(axes, panel)
            axes.spines[["top", "right"]].set_visible(False)
        drawn.append(stem.with_name(f"{stem.name}-{name}.png"))
        figure.savefig(drawn[-1])

    if systems:
        both = [f"{size}, {per}" for size in systems for per in ("parameter", "active byte")]
        save("steps", [*systems], lambda axes, size: _step_curves(axes, systems[size], size), "Recall of", True)
        save("flops", [*systems], lambda axes, size: _flops_curves(axes, systems[size], size), "Recall of", True)
        save("bits", both, lambda axes, panel: _bits(axes, results, panel), "Bits of knowledge of", False)
    slots = [r for r in sweeps if r["sweep"] == "slots" and not r["diverged"]]
    if slots:
        size = slots[0]["size"]
        save("slots", [size], lambda axes, size: _slots(axes, slots, systems.get(size, {})), "Recall of", True)
    return drawn


def _steps(run: Result) -> list[float]:
    return [point["step"] for point in run["history"]]


def _training_flops(run: Result) -> list[float]:
    a_step = BACKWARD * run["flops"] * run["training_tokens"] / run["steps"]
    return [point["step"] * a_step for point in run["history"]]


def _curves(axes: Axes, systems: dict[str, Seeds], size: str, x: Callable[[Result], list[float]]) -> None:
    """The mean over the seeds, and a band from the lowest to the highest."""
    for name, runs in systems.items():
        colour = COLOURS[name]
        points = [*zip(*([point["recall"] for point in run["history"]] for run in runs), strict=True)]
        means = [sum(recalls) / len(recalls) for recalls in points]
        axes.plot(x(runs[0]), means, color=colour, linewidth=2, label=name)
        if len(runs) > 1:
            axes.fill_between(
                x(runs[0]), [*map(min, points)], [*map(max, points)], color=colour, alpha=0.2, linewidth=0
            )
    axes.set(title=size, ylabel=f"recalled exactly, of at most {ASKED:,} facts", ylim=(0, 1))
    _percent(axes)


def _step_curves(axes: Axes, systems: dict[str, Seeds], size: str) -> None:
    """With names at the curves' ends, moved upwards where they would lie on each other."""
    _curves(axes, systems, size, _steps)
    axes.set(xlabel="training steps")
    ends = [
        (mean(runs, lambda run: run["history"][-1]["recall"]), _steps(runs[0])[-1], n) for n, runs in systems.items()
    ]
    lowest = -1.0
    for recall, x, name in sorted(ends):
        lowest = max(recall, lowest + 0.055)
        text = f"{name} {recall:.0%}"
        style = {"color": COLOURS[name], "va": "center", "fontweight": "bold" if name == "memory+" else "normal"}
        axes.annotate(text, (x, lowest), (6, 0), textcoords="offset points", annotation_clip=False, **style)


def _flops_curves(axes: Axes, systems: dict[str, Seeds], size: str) -> None:
    _curves(axes, systems, size, _training_flops)
    axes.set(xscale="log", xlabel="training FLOPs (forward and backward, all tokens)")
    axes.legend(frameon=False)


def _percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)


def _bits(axes: Axes, results: Sequence[Result], what: str) -> None:
    size, per = what.split(", ")
    systems = measured(results, size)
    value = bits_per_parameter if per == "parameter" else bits_per_byte
    heights = [mean(runs, value) for runs in systems.values()]
    bars = axes.bar([*systems], heights, color=[COLOURS[name] for name in systems])
    axes.bar_label(bars, [f"{height:.2g}" for height in heights], padding=2)
    whole = "parameter" if per == "parameter" else "byte that a token reads"
    axes.set(title=f"{size}: bits a {whole}")
    axes.tick_params(axis="x", labelrotation=30)


def _slots(axes: Axes, runs: Sequence[Result], systems: dict[str, Seeds]) -> None:
    slots = [run["slots"] for run in runs]
    axes.set_xscale("log", base=2)
    for key, line, label in (("recall", "-", "trained templates"), ("held_out", "--", "held-out template")):
        axes.plot(
            slots, [run[key] for run in runs], line, marker="o", color=COLOURS["memory+"], label=f"memory+, {label}"
        )
    for name, line in (("dense", ":"), ("dense2x", ":"), ("dense4x", ":")):
        if name in systems:
            axes.axhline(mean(systems[name], "recall"), linestyle=line, color=COLOURS[name], label=name)
    axes.set(xlabel="slots", ylabel="facts recalled exactly", ylim=(0, 1))
    axes.legend(frameon=False)
    _percent(axes)
