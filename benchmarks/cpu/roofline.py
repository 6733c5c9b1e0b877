"""Draws how far under this machine's two roofs each contestant stays: bytes on the left, arithmetic on the right."""

import itertools
import math
from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox

from benchmarks.cpu.limits import Limits
from benchmarks.cpu.results import FORWARD, Median, Results

_OURS, _SAME_LAYER, _LIBRARY, _DENSE = "#c1272d", "#e68a2e", "#2a6fb0", "#4d4d4d"
_STYLES = {  # colour and marker
    "memcompile": (_OURS, "*"),
    "eager": (_SAME_LAYER, "o"),
    "Inductor": (_SAME_LAYER, "s"),
    "Inductor, naive gather": (_SAME_LAYER, "D"),
    "product-key-memory": (_LIBRARY, "o"),
    "PEER-pytorch": (_LIBRARY, "s"),
}


def _roofs(axes: Axes, limits: Limits, left: float, right: float) -> list[Bbox]:
    """Draws the slope of the bandwidth and the level of the GEMMs. Returns the pixels that they take."""
    bandwidth, rate = limits.gather_gb_s, limits.gemm_gflop_s
    corners = [(left, left * bandwidth), (rate / bandwidth, rate), (right, rate)]
    axes.plot(*zip(*corners, strict=True), color="black", linewidth=1.5, zorder=1)
    axes.fill_between(*zip(*corners, strict=True), 1e6, color="0.93", linewidth=0, zorder=0)
    pixels = axes.transData.transform(corners)
    slope = math.degrees(math.atan2(*(pixels[1] - pixels[0])[::-1]))
    above = {"textcoords": "offset points", "fontsize": 9, "rotation_mode": "anchor"}
    axes.annotate(f"random rows: {bandwidth:.0f} GB/s", corners[0], xytext=(4, 9), rotation=slope, **above)
    name = f"GEMM ({limits.gemm}): {rate:.0f} GFLOP/s"
    level = axes.annotate(name, corners[2], xytext=(-5, 4), ha="right", **above)
    steps = [i / 100 for i in range(101)]
    taken = [a + (b - a) * step for a, b in itertools.pairwise(pixels) for step in steps]
    return [level.get_window_extent(_renderer(axes)), *(Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in taken)]


def _renderer(axes: Axes) -> RendererAgg:
    canvas = axes.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    return canvas.get_renderer()


def _mark(axes: Axes, medians: Iterable[Median], taken: list[Bbox]) -> None:
    """A marker each, and its name at the nearest place that is not taken by a roof, a marker or another name."""
    renderer = _renderer(axes)
    points = []
    for median in medians:
        colour, marker = _STYLES.get(median.name, (_DENSE, "^"))
        x, y = median.flops / median.bytes, median.gflop_s
        size = 16 if marker == "*" else 8
        axes.plot(x, y, marker=marker, color=colour, markeredgecolor="white", markersize=size, zorder=3)
        points.append((median.name, colour, x, y))
    pixels = [axes.transData.transform((x, y)) for _, _, x, y in points]
    taken = taken + [Bbox.from_bounds(x - 10, y - 10, 20, 20) for x, y in pixels]
    shifts = sorted(itertools.product((1, -1), range(-90, 91, 6)), key=lambda shift: (abs(shift[1]), -shift[0]))
    for name, colour, x, y in sorted(points, key=lambda point: -point[3]):
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4}
        for side, shift in shifts:
            label = axes.annotate(
                name,
                (x, y),
                xytext=(side * (11 if abs(shift) < 12 else 18), shift),
                textcoords="offset points",
                ha="left" if side > 0 else "right",
                va="center",
                fontsize=9,
                color=colour,
                fontweight="bold" if name == "memcompile" else "normal",
                arrowprops={**line, "relpos": (side < 0, 0.5)} if shift else None,
                zorder=4,
            )
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # an annotation's has its line too
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


def draw_roofline(results: Results, path: Path) -> bool:
    """One panel a dtype, the forward of the main setting. Returns whether there was anything to draw."""
    tokens, main = results.main_tokens, results.main
    panels = {dtype: [*results.of_main(dtype, FORWARD, tokens).values()] for dtype in results.limits}
    panels = {dtype: medians for dtype, medians in panels.items() if medians}
    if not panels:
        return False
    drawn = list(itertools.chain(*panels.values()))
    intensities = [m.flops / m.bytes for m in drawn]
    left, right = min(intensities) / 3, max(intensities) * 8  # room for names
    lowest = min(m.gflop_s for m in drawn) / 2
    highest = max(results.limits[dtype].gemm_gflop_s for dtype in panels) * 2

    figure = Figure(figsize=(7 * len(panels), 6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"A layer's forward under the roofs of this machine: {tokens} tokens, d = {main.width}, "
        f"{main.num_slots:,} slots\n{results.machine['cpu']}, {results.machine['threads']} threads",
        fontsize=12,
    )
    axes: list[Axes] = [*figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]]
    for panel, dtype in zip(axes, panels, strict=True):
        panel.set(xscale="log", yscale="log", xlim=(left, right), ylim=(lowest, highest))
        panel.set_title(dtype)
        panel.set_xlabel("FLOPs a byte that the layer needs")
        panel.grid(which="major", color="0.88", linewidth=0.6)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes[0].set_ylabel("GFLOP/s")
    figure.canvas.draw()  # lays the panels out: from here on pixels hold
    for panel, (dtype, medians) in zip(axes, panels.items(), strict=True):
        _mark(panel, medians, _roofs(panel, results.limits[dtype], left, right))
    figure.savefig(path)
    return True
