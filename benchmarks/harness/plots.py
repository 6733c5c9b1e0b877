"""Figures: panels side by side, and the roofline, which shows how far each contestant is below the limits:
bytes on the left, arithmetic on the right.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox

from benchmarks.harness.layers import OURS
from benchmarks.harness.results import Limits, Median
from benchmarks.harness.tables import product_unit

MEMCOMPILE, SAME_LAYER, LIBRARY, DENSE = "#c1272d", "#e68a2e", "#2a6fb0", "#4d4d4d"
Style = tuple[str, str]  # colour and marker


def new_figure(
    columns: int, size: tuple[float, float], title: str = "", sharey: bool = True
) -> tuple[Figure, list[Axes]]:
    """An empty figure of panels side by side; `size` in inches."""
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    return figure, [*figure.subplots(1, columns, sharey=sharey, squeeze=False)[0]]


@dataclass(frozen=True)
class Panel:
    """One pair of limits, and who is drawn under them."""

    title: str
    limits: Limits
    medians: Sequence[Median]


def _roofs(axes: Axes, limits: Limits, unit: float, unit_name: str, left: float, right: float) -> list[Bbox]:
    """Draws the slope of the bandwidth and the level of the products. Returns the pixels that they take."""
    bandwidth, rate = limits.gb_s / unit, limits.gflop_s / unit
    corners = [(left, left * bandwidth), (rate / bandwidth, rate), (right, rate)]
    axes.plot(*zip(*corners, strict=True), color="black", linewidth=1.5, zorder=1)
    axes.fill_between(*zip(*corners, strict=True), 1e6, color="0.93", linewidth=0, zorder=0)
    pixels = axes.transData.transform(corners)
    slope = math.degrees(math.atan2(*(pixels[1] - pixels[0])[::-1]))
    above = {"textcoords": "offset points", "fontsize": 9, "rotation_mode": "anchor"}
    slope_name = f"{limits.bandwidth}: {limits.gb_s:.0f} GB/s"
    axes.annotate(slope_name, corners[0], xytext=(4, 9), rotation=slope, **above)
    level_name = f"{limits.product}: {rate:.0f} {unit_name}"
    level = axes.annotate(level_name, corners[2], xytext=(-5, 4), ha="right", **above)
    steps = [i / 100 for i in range(101)]
    taken = [a + (b - a) * step for a, b in itertools.pairwise(pixels) for step in steps]
    return [level.get_window_extent(_renderer(axes)), *(Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in taken)]


def _renderer(axes: Axes) -> RendererAgg:
    canvas = axes.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    return canvas.get_renderer()


def _mark(axes: Axes, medians: Iterable[Median], unit: float, styles: Mapping[str, Style], taken: list[Bbox]) -> None:
    """A marker each, and its name at the nearest place that is not taken by a roof, a marker or another name."""
    renderer = _renderer(axes)
    points = []
    for median in medians:
        colour, marker = styles.get(median.name, (DENSE, "^"))
        x, y = median.flops / median.bytes, median.gflop_s / unit
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
                fontweight="bold" if name == OURS else "normal",
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


def draw_roofline(panels: Sequence[Panel], title: str, styles: Mapping[str, Style], path: Path) -> bool:
    """Panels side by side, without those that are empty. Returns whether there was anything to draw.

    Args:
        styles: of contestants by name; the others are dense layers.
    """
    panels = [panel for panel in panels if panel.medians]
    drawn = [*itertools.chain(*(panel.medians for panel in panels))]
    if not drawn:
        return False
    unit, unit_name = product_unit(min((panel.limits for panel in panels), key=lambda limits: limits.gflop_s))
    intensities = [median.flops / median.bytes for median in drawn]
    corners = [panel.limits.gflop_s / panel.limits.gb_s for panel in panels]
    left, right = min(intensities + corners) / 3, max(intensities + corners) * 8  # room for names
    lowest = min(median.gflop_s for median in drawn) / unit / 2
    highest = max(panel.limits.gflop_s for panel in panels) / unit * 2

    figure, all_axes = new_figure(len(panels), (7 * len(panels), 6), title)
    for axes, panel in zip(all_axes, panels, strict=True):
        axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(lowest, highest))
        axes.set_title(panel.title)
        axes.set_xlabel("FLOPs a byte that the layer needs")
        axes.grid(which="major", color="0.88", linewidth=0.6)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    all_axes[0].set_ylabel(unit_name)
    figure.canvas.draw()  # lays the panels out: from here on pixels hold
    for axes, panel in zip(all_axes, panels, strict=True):
        _mark(axes, panel.medians, unit, styles, _roofs(axes, panel.limits, unit, unit_name, left, right))
    figure.savefig(path)
    return True
