"""What counts of hits say: how many slots are used, how evenly, and which heads read few half-keys."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from memcompile.config import MemoryConfig
from memcompile.errors import OptionError, PlanError
from memcompile.runtime.pool import memory_of
from memcompile.runtime.table.warnings.unread import LEAST, n_keys_of_share, share_read, what_spreads

COLLAPSED = 0.05  # of the half-keys: a head whose perplexity is below reads few
ENOUGH = 10  # hits a slot, on average, after which few used slots are told


@dataclasses.dataclass(frozen=True)
class Evenness:
    """How hits are spread over n slots or half-keys; p_i is the share of hits that i has.

    Attributes:
        used: the share of the n that was hit.
        perplexity: exp of the entropy, of 1 to n: over how many the hits are spread.
        kl: Kullback-Leibler divergence of p from the uniform distribution, in nats: log(n) - entropy.
        gini: 0 where all have as many hits, towards 1 where one has all.
    """

    used: float
    perplexity: float
    kl: float
    gini: float

    @classmethod
    def of(cls, hits: Tensor) -> Evenness:
        """Of counts [n] of which one at least is positive."""
        counts = hits.double()
        shares = counts[counts > 0] / counts.sum()
        entropy = -(shares * shares.log()).sum().item()
        ordered, n = counts.sort().values, len(counts)
        ranks = torch.arange(1, n + 1, dtype=torch.float64, device=counts.device)
        gini = ((2 * ranks - n - 1) * ordered).sum().item() / (n * counts.sum().item())
        return cls(len(shares) / n, math.exp(entropy), math.log(n) - entropy, gini)


@dataclasses.dataclass(frozen=True)
class HeadUsage:
    """Of one head of a layer.

    Attributes:
        hits: of its slots.
        sides: how evenly they are spread over the half-keys of each side.
    """

    layer: str
    head: int
    hits: int
    sides: tuple[Evenness, Evenness]


@dataclasses.dataclass(frozen=True)
class Usage:
    """How a table is used. `print` shows a table; see `to_dict` and `plot`.

    Attributes:
        slots: how many there are.
        hits: how many were counted, of all layers.
        table: how evenly they are spread over the slots.
        heads: of each layer that was hit.
        trained: the share of the slots that steps of an optimizer have touched since its state began; None where the
            rule of the table has no moments, or there was no step.
        counts: int64 [slots], hits of each slot.
        n_keys: half-keys a side.
        warnings: what is wrong, and what to do about it.
    """

    slots: int
    hits: int
    table: Evenness
    heads: tuple[HeadUsage, ...]
    trained: float | None
    counts: Tensor
    n_keys: int
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without the counts."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "counts"}
        heads = [dataclasses.asdict(head) for head in self.heads]
        return fields | {"table": dataclasses.asdict(self.table), "heads": heads, "warnings": list(self.warnings)}

    def plot(self, path: str | Path) -> None:
        """Writes a figure: the hits of the slots, sorted, and the perplexity of each head's half-keys.

        Raises:
            OptionError: matplotlib is not installed.
        """
        try:
            from memcompile.slots.usage_plot import draw
        except ImportError as error:
            raise OptionError(f"usage(model).plot() needs matplotlib: pip install matplotlib ({error})") from error
        draw(self, Path(path))

    def __repr__(self) -> str:
        table = self.table
        lines = [
            f"{self.slots:,} slots, {self.hits:,} hits: {table.used:.1%} of the slots were hit, perplexity "
            f"{table.perplexity:,.0f}, KL to uniform {table.kl:.2f}, Gini {table.gini:.2f}",
        ]
        if self.trained is not None:
            lines.append(f"{self.trained:.1%} of the rows have been trained; the others are as they were drawn")
        width = max([len("layer"), *(len(head.layer) for head in self.heads)])
        lines.append(f"{'layer':{width}}  head  {'hits':>13}  half-keys used   perplexity of {self.n_keys:,}")
        for head in self.heads:
            used, perplexity = (
                " / ".join(format(getattr(side, name), form) for side in head.sides)
                for name, form in (("used", ".0%"), ("perplexity", ",.0f"))
            )
            lines.append(f"{head.layer:{width}}  {head.head:4}  {head.hits:13,}  {used:>14}   {perplexity}")
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def _warnings(config: MemoryConfig, hits: int, table: Evenness, heads: Sequence[HeadUsage]) -> Iterator[str]:
    assert config.n_keys is not None, "sizes of a plan are resolved"
    if table.used < LEAST and hits >= ENOUGH * config.slots:
        fewer = n_keys_of_share(config, table.used)
        yield (
            f"{table.used:.1%} of the slots were hit: plan with fewer slots (n_keys={fewer} has as many as were hit), "
            f"or spread the hits: {what_spreads(config)}"
        )
    for head in heads:
        perplexity = min(side.perplexity for side in head.sides)
        if perplexity < COLLAPSED * config.n_keys:
            yield (
                f"head {head.head} of {head.layer} reads few half-keys: their perplexity is {perplexity:.1f} of "
                f"{config.n_keys:,}. {what_spreads(config)} spreads them"
            )


def usage(model: nn.Module, *, all_ranks: bool = False, restart: bool = False) -> Usage:
    """How a memory is used, by the hits since :func:`memcompile.count_usage`.

    Args:
        model: a planned model, a part of one, or what wraps one.
        all_ranks: sums the counts of all ranks of the default process group: a collective, which every rank calls.
            Without it they are of this rank's tokens.
        restart: counts from zero afterwards.

    Raises:
        PlanError: the model has no memory, its hits are not counted, or there were none.
    """
    pool = memory_of(model)
    counts = pool.counts
    if counts is None:
        raise PlanError(f"hits of {type(model).__name__} are not counted: call memcompile.count_usage(model) first")
    tensors = [tensor.clone() for tensor in counts.tensors()]
    if all_ranks and dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)
    slot_hits, *key_hits = tensors
    if not slot_hits.any():
        raise PlanError(f"no hits of {type(model).__name__} were counted: run it first")
    config: Any = pool.config
    heads = tuple(
        HeadUsage(name, head, int(hits[0, head].sum()), (Evenness.of(hits[0, head]), Evenness.of(hits[1, head])))
        for name, hits in zip(counts.key_hits, key_hits, strict=True)
        if hits.any()
        for head in range(config.heads)
    )
    total, table = int(slot_hits.sum()), Evenness.of(slot_hits)
    result = Usage(
        slots=len(slot_hits),
        hits=total,
        table=table,
        heads=heads,
        trained=share_read(pool.table.state or {}),
        counts=slot_hits,
        n_keys=config.n_keys,
        warnings=tuple(_warnings(config, total, table, heads)),
    )
    if restart:
        counts.zero()
    return result
