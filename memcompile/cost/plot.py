"""Draws the time of a step, in its parts, and the memory of a rank: over group sizes, and over numbers of GPUs."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from memcompile.cost.groups import Candidate, best, candidates
from memcompile.cost.job import Job
from memcompile.cost.memory import Memory
from memcompile.cost.report import GIB
from memcompile.cost.time import Hardware, Times

NUMBERS_OF_GPUS = tuple(2**n for n in range(3, 11))  # 8 to 1,024
_NAMES = {
    "layers_wire": "on the wire, layers",
    "step_wire": "on the wire, gradient",
    "search": "search",
    "gather": "gather and its backward",
    "update": "optimizer",
}
_COLOURS = ["#c44e52", "#dd8452", "#8c8c8c", "#4c72b0", "#55a868"]


def draw(job: Job, hardware: Hardware, found: Sequence[Candidate], path: Path) -> None:
    """Writes the figure of a job and its candidates.

    Raises:
        ValueError: the file's ending is none that matplotlib writes.
    """
    figure = Figure(figsize=(12, 8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    chosen = best(found)
    figure.suptitle(
        f"{job.slots:,} slots x {job.value_dim:,} in {job.dtype}, {job.optimizer}, {job.values_grad} gradient, "
        f"{job.tokens:,} tokens a rank\nmodelled, nothing overlapped",
        fontsize=11,
    )
    (times, memory), (times_by_gpus, memory_by_gpus) = figure.subplots(2, 2)
    labels = [f"{c.ranks}*" if c is chosen else str(c.ranks) for c in found]
    _times(times, labels, found)
    _memory(memory, labels, found, hardware)
    for axes in (times, memory):
        axes.set_xlabel(f"ranks of a memory group, of {job.gpus:,} GPUs (* the best)")

    by_gpus = {f"{n}\n{c.ranks if c else 'no fit'}": c for n, c in best_by_gpus(job, hardware).items()}
    _times(times_by_gpus, list(by_gpus), list(by_gpus.values()))
    _memory(memory_by_gpus, list(by_gpus), list(by_gpus.values()), hardware)
    for axes in (times_by_gpus, memory_by_gpus):
        axes.set_xlabel("GPUs, and the ranks of the best group")
    figure.legend(*times.get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside lower left")
    figure.legend(*memory.get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside lower right")
    figure.savefig(path)


def best_by_gpus(job: Job, hardware: Hardware) -> dict[int, Candidate | None]:
    """The best candidate for each number of GPUs that fills its nodes; None where none fits."""
    node = hardware.gpus_per_node
    numbers = (n for n in NUMBERS_OF_GPUS if n <= node or n % node == 0)
    return {n: best(candidates(replace(job, gpus=n), hardware)) for n in numbers}


def _times(axes: Axes, labels: Sequence[str], found: Sequence[Candidate | None]) -> None:
    parts = [field.name for field in fields(Times)]
    heights = {_NAMES[p]: [getattr(c.times, p) * 1e3 if c else 0.0 for c in found] for p in parts}
    # those that do not fit may take hundreds of times as long, and the others would be too small to see
    fitting = [c.times.total * 1e3 for c in found if c and c.fits]
    _stack(axes, labels, heights, 1.15 * max(fitting) if fitting else None)
    axes.set_ylabel("ms a step")


def _memory(axes: Axes, labels: Sequence[str], found: Sequence[Candidate | None], hardware: Hardware) -> None:
    parts = [field.name for field in fields(Memory)]
    heights = {p: [getattr(c.memory, p) / GIB if c else 0.0 for c in found] for p in parts}
    free = hardware.free_memory / GIB
    most = max([free, *(c.memory.total / GIB for c in found if c)])
    _stack(axes, labels, heights, min(2 * free, 1.15 * most))
    axes.axhline(free, color="black", linestyle="--", linewidth=1, label="free for the table")
    axes.set_ylabel("GiB a rank")


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
