"""Draws the time of a step, in its parts, and the memory of a rank: over group sizes, and over numbers of GPUs."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from memcompile.cost.groups import Candidate, best, best_by_gpus
from memcompile.cost.job import Job
from memcompile.cost.report import GIB
from memcompile.cost.time import Hardware

_TIMES = {
    "layers_wire": "on the wire, layers",
    "step_wire": "on the wire, gradient",
    "search": "search",
    "gather": "gather and its backward",
    "update": "optimizer",
}
_MEMORY = {name: name for name in ("values", "masters", "gradient", "states", "buffers")}
_COLOURS = ["#c44e52", "#dd8452", "#8c8c8c", "#4c72b0", "#55a868"]


def draw(job: Job, hardware: Hardware, found: Sequence[Candidate], path: Path) -> None:
    """Writes the figure of a job and its candidates.

    Raises:
        ValueError: the file's ending is none that matplotlib writes.
    """
    figure = Figure(figsize=(12, 8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    chosen, by_gpus = best(found), best_by_gpus(job, hardware)
    figure.suptitle(
        f"{job.rows:,} slots x {job.row_dim:,} in {job.dtype}, {job.optimizer}, {job.values_grad} gradient, "
        f"{job.tokens:,} tokens a rank\nmodelled, nothing overlapped",
        fontsize=11,
    )
    upper, lower = figure.subplots(2, 2)
    sizes = [f"{c.ranks}*" if c is chosen else str(c.ranks) for c in found]
    _row(upper, sizes, found, hardware, f"ranks of a memory group, of {job.gpus:,} GPUs (* the best)")
    numbers = [f"{n}\n{c.ranks if c else 'no fit'}" for n, c in by_gpus.items()]
    _row(lower, numbers, [*by_gpus.values()], hardware, "GPUs, and the ranks of the best group")
    figure.legend(*upper[0].get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside lower left")
    figure.legend(*upper[1].get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside lower right")
    figure.savefig(path)


def _row(
    row: Sequence[Axes], labels: Sequence[str], found: Sequence[Candidate | None], hardware: Hardware, what: str
) -> None:
    """Times on the left, memory on the right; no bars where a number of GPUs has no candidate."""
    times, memory = row
    # those that do not fit may take hundreds of times as long, and the others would be too small to see
    fitting = [c.times.total * 1e3 for c in found if c and c.fits]
    heights = {name: [getattr(c.times, part) * 1e3 if c else 0.0 for c in found] for part, name in _TIMES.items()}
    _stack(times, labels, heights, 1.15 * max(fitting) if fitting else None)
    times.set_ylabel("ms a step")

    free = hardware.free_memory / GIB
    most = max([free, *(c.memory.total / GIB for c in found if c)])
    heights = {name: [getattr(c.memory, part) / GIB if c else 0.0 for c in found] for part, name in _MEMORY.items()}
    _stack(memory, labels, heights, min(2 * free, 1.15 * most))
    memory.axhline(free, color="black", linestyle="--", linewidth=1, label="free for the table")
    memory.set_ylabel("GiB a rank")
    for axes in row:
        axes.set_xlabel(what)


def _stack(axes: Axes, labels: Sequence[str], heights: dict[str, list[float]], limit: float | None) -> None:
    """Bars of parts. One beyond the limit is cut off there, with its height as a number."""
    base = [0.0] * len(labels)
    for colour, (name, height) in zip(_COLOURS, heights.items(), strict=True):
        axes.bar(range(len(labels)), height, bottom=base, color=colour, label=name)
        base = [a + b for a, b in zip(base, height, strict=True)]
    axes.set_xticks(range(len(labels)), labels)
    axes.grid(axis="y", color="0.88", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_ylim(0, limit)
    for place, total in enumerate(base):
        if limit is not None and total > limit:
            axes.text(place, 0.97 * limit, f"{total:,.0f}", ha="center", va="top", fontsize=8, color="white")
