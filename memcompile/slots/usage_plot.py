"""The figure of `usage(model).plot(path)`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from memcompile.slots.usage import Usage

_POINTS = 2000  # of the curve
_SIDES = ("#2a6fb0", "#e68a2e")


def draw(usage: Usage, path: Path) -> None:
    """Writes the figure, in the format of the path's ending."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    slots, heads = figure.subplots(1, 2)
    ordered = usage.counts.sort(descending=True).values.cpu()
    last = len(ordered) - 1
    at = sorted({i * last // (_POINTS - 1) for i in range(_POINTS)})
    slots.plot([i / len(ordered) for i in at], ordered[at].numpy(), color="#c1272d", linewidth=2)
    slots.axhline(usage.hits / usage.slots, color="0.6", linestyle=":", label="even use")
    slots.set(yscale="symlog", xlim=(0, 1), ylim=(0, None), xlabel="share of the slots, most hit first", ylabel="hits")
    slots.set_title(f"{usage.table.used:.0%} of {usage.slots:,} slots were hit")
    slots.legend(frameon=False)
    names = [f"{head.layer}, {head.head}" for head in usage.heads]
    for side, colour in enumerate(_SIDES):
        places = [i + 0.4 * side - 0.2 for i in range(len(names))]
        perplexities = [head.sides[side].perplexity for head in usage.heads]
        heads.barh(places, perplexities, 0.4, color=colour, label=f"half-keys of side {side + 1}")
    heads.axvline(usage.n_keys, color="0.6", linestyle=":")
    heads.set(yticks=range(len(names)), xlim=(0, usage.n_keys * 1.05), xlabel=f"perplexity, at most {usage.n_keys:,}")
    heads.set_yticklabels(names)
    heads.invert_yaxis()
    heads.set_title("How many half-keys each head reads")
    heads.legend(frameon=False, loc="lower right")
    for axes in (slots, heads):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
