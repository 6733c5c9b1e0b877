"""Which of the FFNs found get a memory."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
from collections.abc import Sequence

from memcompile.common.sites import FfnSite
from memcompile.config import LayerChoice
from memcompile.errors import PlanError


def place(sites: Sequence[FfnSite], layers: LayerChoice) -> list[FfnSite]:
    """The chosen sites, in execution order, for the ``memory_layers`` of a :class:`memcompile.MemoryConfig`.

    The j-th of k layers among n blocks of a stack goes to ``floor((j + 1/2) * n / k)``, as in "Memory Layers at Scale"
    (section 3.1). Indices count the sites that can be replaced; negative ones count from the end. Names are exact, of a
    block or of its down-projection's weight; a name with ``*``, ``?`` or ``[`` is a glob on both, which passes over
    blocks that cannot be replaced.

    Raises:
        PlanError: fewer sites than asked, an index, a name or a glob that finds none, a filter that chose nothing.
    """
    usable = [site for site in sites if site.refusal is None]
    if not usable:
        raise PlanError(f"no feed-forward block to replace was found. {_refused(sites) or _NOTHING_SEEN}")
    if isinstance(layers, int):
        return _spread(usable, layers, sites)
    if callable(layers):
        chosen = [site for site in usable if layers(site)]
        if not chosen:
            raise PlanError(f"the memory_layers filter chose none of the feed-forward blocks: {_names(usable)}")
        return chosen
    if layers == "all":
        return usable
    items = _named_here([layers] if isinstance(layers, str) else list(layers), sites)
    wanted = {site.down for item in items for site in _resolve(item, usable, sites)}
    return [site for site in usable if site.down in wanted]


def with_named(sites: Sequence[FfnSite], layers: LayerChoice) -> list[FfnSite]:
    """The sites, with those usable that are refused only where nobody names them, and that ``layers`` names."""
    if callable(layers) or isinstance(layers, int):
        return list(sites)
    items = set(_named_here([layers] if isinstance(layers, str) else list(layers), sites))
    return [
        dataclasses.replace(site, refusal=None)
        if site.by_name and not items.isdisjoint((site.name, site.down))
        else site
        for site in sites
    ]


def _named_here(items: list[int | str], sites: Sequence[FfnSite]) -> list[int | str]:
    """Names of weights that were given from another module, as the model has them: a plan names its layers from the
    module that holds the table, and earlier versions named them from the model that was planned.
    """
    downs = {site.down for site in sites}
    names = [item for item in items if isinstance(item, str)]
    if len(names) < len(items) or not names or any(name in downs for name in names):
        return items
    longer = {down.removesuffix(names[0]) for down in downs if down.endswith(f".{names[0]}")}
    shorter = {names[0].removesuffix(down) for down in downs if names[0].endswith(f".{down}")}
    found = [[prefix + name for name in names] for prefix in longer]
    found += [[name.removeprefix(prefix) for name in names] for prefix in shorter]
    here = [given for given in found if downs.issuperset(given)]
    return [*here[0]] if len(here) == 1 else items


def _spread(usable: list[FfnSite], count: int, sites: Sequence[FfnSite]) -> list[FfnSite]:
    if count > len(usable):
        one_block = "" if len(usable) > 1 else f" {_ONE_BLOCK.format(count)}"
        raise PlanError(
            f"memory_layers={count}, but only {len(usable)} feed-forward block(s) can be replaced: "
            f"{_names(usable)}. Ask for at most {len(usable)}.{one_block} {_refused(sites)}".rstrip()
        )
    stacks: dict[str, list[FfnSite]] = {}
    for site in usable:
        stacks.setdefault(site.stack, []).append(site)
    shares = _divide(count, [len(stack) for stack in stacks.values()])
    wanted = {
        stack[(2 * j + 1) * len(stack) // (2 * share)].down
        for stack, share in zip(stacks.values(), shares, strict=True)
        for j in range(share)
    }
    return [site for site in usable if site.down in wanted]


def _divide(count: int, sizes: Sequence[int]) -> list[int]:
    """``count`` in proportion to ``sizes``, whole numbers by largest remainder; of equals the later gets one more."""
    total = sum(sizes)
    shares = [count * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (count * sizes[i] % total, i), reverse=True)
    for i in itertools.islice(by_remainder, count - sum(shares)):
        shares[i] += 1
    return shares


def _resolve(item: int | str, usable: list[FfnSite], sites: Sequence[FfnSite]) -> list[FfnSite]:
    if isinstance(item, int):
        if not -len(usable) <= item < len(usable):
            raise PlanError(f"memory_layers names block {item}, but there are {len(usable)}: {_names(usable)}")
        return [usable[item]]
    named = [site for site in sites if item in (site.name, site.down)]
    if not named and any(character in item for character in "*?["):
        named = [site for site in sites if any(fnmatch.fnmatchcase(name, item) for name in (site.name, site.down))]
        chosen = [site for site in named if site.refusal is None]
        if not named:
            raise PlanError(f"memory_layers={item!r} matches no feed-forward block: choose from {_names(usable)}")
        if not chosen:
            raise PlanError(f"memory_layers={item!r} matches no block that can become a memory. {_refused(named)}")
        return chosen
    if not named:
        raise PlanError(f"memory_layers names {item!r}, which is no feed-forward block: choose from {_names(usable)}")
    if len(named) > 1:
        raise PlanError(f"memory_layers names {item!r}, which owns several blocks: choose by {[s.down for s in named]}")
    if named[0].refusal:
        raise PlanError(f"{item!r} cannot become a memory: {named[0].refusal}")
    return named


_ONE_BLOCK = (
    "Where each block of a larger model is compiled by itself, plan the whole model first, "
    "memcompile.plan(model, memory_layers={}), and compile its blocks without memory options"
)
_NOTHING_SEEN = (
    "memcompile looks for linear > activation > linear (or gated) on a residual stream; "
    "if the model has such blocks, pass example_inputs to memcompile.plan() so that it can be traced"
)


def _names(sites: Sequence[FfnSite]) -> str:
    return ", ".join(repr(site.name or site.down) for site in sites)


def _refused(sites: Sequence[FfnSite]) -> str:
    reasons = [f"{site.name or site.down!r} was left alone: {site.refusal}" for site in sites if site.refusal]
    return "; ".join(reasons)
