"""Draws time against slots: the whole step on the left, the table alone and what the hardware takes on the right."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.common.roofline import DENSE as DENSE_COLOUR
from benchmarks.common.roofline import LIBRARY, SAME_LAYER
from benchmarks.common.roofline import OURS as OURS_COLOUR
from benchmarks.training_step.cases import DENSE, FBGEMM, FFN, HARDWARE, OURS, SPARSE_ADAM
from benchmarks.training_step.report import TITLES
from benchmarks.training_step.results import Results

_STYLES = {
    OURS: {"color": OURS_COLOUR, "marker": "*", "markersize": 12, "linewidth": 2, "zorder": 3},
    DENSE: {"color": SAME_LAYER, "marker": "o"},
    SPARSE_ADAM: {"color": LIBRARY, "marker": "s"},
    FBGEMM: {"color": LIBRARY, "marker": "D", "linestyle": "--"},
    HARDWARE: {"color": "black", "linestyle": ":", "marker": "."},
}


def _panel(axes: Axes, results: Results, width: int, part: str) -> None:
    curves = results.of(width, part)
    for name, curve in curves.items():
        if name == FFN:
            axes.axhline(curve[0].milliseconds, color=DENSE_COLOUR, linestyle="--", label=name)
            continue
        slots = sorted(curve)
        axes.plot(slots, [curve[n].milliseconds for n in slots], label=name, **_STYLES.get(name, {}))
    axes.set(xscale="log", yscale="log", xlabel="slots", ylabel="ms")
    axes.set_xscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title(TITLES[part], fontsize=10)
    axes.grid(which="major", color="0.88", linewidth=0.6)


def draw(results: Results, width: int, path: Path) -> bool:
    """The curves of one width. Returns whether there was anything to draw."""
    parts = results.parts(width)
    if not parts:
        return False
    figure = Figure(figsize=(6 * len(parts), 5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    tokens = next(m.tokens for m in results.medians if m.width == width)
    figure.suptitle(
        f"A training step against the slots of its table: d = {width}, {tokens} tokens\n"
        f"{results.machine['cpu']}, {results.machine['threads']} threads",
        fontsize=11,
    )
    for axes, part in zip(figure.subplots(1, len(parts), sharey=True, squeeze=False)[0], parts, strict=True):
        _panel(axes, results, width, part)
    named = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), fontsize=8, loc="outside lower center", ncols=len(named))
    figure.savefig(path)
    return True
