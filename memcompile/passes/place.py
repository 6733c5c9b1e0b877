"""Pass 4, place: which of the FFNs found become memory."""

from __future__ import annotations

from collections.abc import Sequence

from memcompile.config import LayerChoice
from memcompile.errors import PlanError
from memcompile.sites import FfnSite


def place(sites: Sequence[FfnSite], layers: LayerChoice) -> list[FfnSite]:
    """The chosen sites, in execution order.

    A number places that many centred and evenly strided, as "Memory Layers at Scale" does (section 3.1: layers
    4, 12, 20 of 24): the j-th of k among n goes to ``floor((j + 1/2) * n / k)``, so a tie between two blocks
    goes to the later one. Indices count the sites that can be replaced; negative ones count from the end.

    Raises:
        PlanError: fewer sites than asked, an index or a name that is not there, a filter that chose nothing.
    """
    usable = [site for site in sites if site.refusal is None]
    if not usable:
        raise PlanError(f"no feed-forward block to replace was found. {_refused(sites) or _NOTHING_SEEN}")
    if isinstance(layers, int):
        if layers > len(usable):
            raise PlanError(
                f"memory_layers={layers}, but only {len(usable)} feed-forward block(s) can be replaced: "
                f"{_names(usable)}. Ask for at most {len(usable)}. {_refused(sites)}".rstrip()
            )
        return [usable[(2 * j + 1) * len(usable) // (2 * layers)] for j in range(layers)]
    if callable(layers):
        chosen = [site for site in usable if layers(site)]
        if not chosen:
            raise PlanError(f"the memory_layers filter chose none of the feed-forward blocks: {_names(usable)}")
        return chosen
    wanted = {_resolve(item, usable, sites).down for item in layers}
    return [site for site in usable if site.down in wanted]


def _resolve(item: int | str, usable: list[FfnSite], sites: Sequence[FfnSite]) -> FfnSite:
    if isinstance(item, int):
        if not -len(usable) <= item < len(usable):
            raise PlanError(f"memory_layers names block {item}, but there are {len(usable)}: {_names(usable)}")
        return usable[item]
    named = [site for site in sites if item in (site.name, site.down)]
    if not named:
        raise PlanError(f"memory_layers names {item!r}, which is no feed-forward block: choose of {_names(usable)}")
    if len(named) > 1:
        raise PlanError(f"memory_layers names {item!r}, which owns several blocks: choose by {[s.down for s in named]}")
    if named[0].refusal:
        raise PlanError(f"{item!r} cannot become a memory: {named[0].refusal}")
    return named[0]


_NOTHING_SEEN = (
    "memcompile looks for linear > activation > linear (or gated) on a residual stream; "
    "if the model has such blocks, pass example_inputs to memcompile.plan() so that it can be traced"
)


def _names(sites: Sequence[FfnSite]) -> str:
    return ", ".join(repr(site.name or site.down) for site in sites)


def _refused(sites: Sequence[FfnSite]) -> str:
    reasons = [f"{site.name or site.down!r} was left alone: {site.refusal}" for site in sites if site.refusal]
    return "; ".join(reasons)
