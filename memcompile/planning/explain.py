"""explain(): what was found in a model, what was chosen and why the rest was not, as a value that prints as a table."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from memcompile.common.sites import FfnSite
from memcompile.config import MemoryConfig
from memcompile.lowering import memory_lookup
from memcompile.passes.detect.detect import find_ffns
from memcompile.runtime.layer import MemoryLayer
from memcompile.runtime.pool import MemoryPool, pool_of
from memcompile.runtime.table.warnings.untrained import in_words, parameters_of_memory
from memcompile.runtime.which_group import groups_of
from memcompile.runtime.wrappers import live_optimizers, unwrap


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExplainedSite:
    """One FFN candidate.

    Attributes:
        index: its number among the blocks that can be replaced, as ``memory_layers=[...]`` takes it; None for a
            refused one.
        site: the block itself.
        chosen: whether it has a memory now, in its place or added to it.
        reason: why it is not, where it is not.
        flops_before: FLOPs a token of the dense block (matrix products, a multiply-add is two).
        flops_after: FLOPs a token of what stands there now.
    """

    index: int | None
    site: FfnSite
    chosen: bool
    reason: str
    flops_before: int
    flops_after: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExplainedGroup:
    """A group of a live optimizer that holds parameters of the memory.

    Attributes:
        optimizer: the optimizer's class.
        group: the index of the group.
        parameters: the names of the memory's parameters that are in it.
    """

    optimizer: str
    group: int
    parameters: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Explanation:
    """What memcompile sees in a model.

    Attributes:
        model: the model's class.
        planned: whether it has a memory.
        placement: whether the memory replaces blocks ("replace") or is added to them ("add").
        rows: every FFN candidate in execution order.
        parameters_before: the model's parameters without memory.
        parameters_after: the parameters it has now.
        memory: sizes of the memory in words; empty without one.
        optimizers: which groups of live optimizers hold the memory's parameters, as it is now.
        untrained: names of the memory's trainable parameters that no live optimizer holds. Empty while no live
            optimizer holds any parameter of the model.
    """

    model: str
    planned: bool
    placement: str
    rows: tuple[ExplainedSite, ...]
    parameters_before: int
    parameters_after: int
    memory: str
    optimizers: tuple[ExplainedGroup, ...] = ()
    untrained: tuple[str, ...] = ()

    @property
    def flops_before(self) -> int:
        """FLOPs a token in all feed-forward blocks, before."""
        return sum(row.flops_before * row.site.calls for row in self.rows)

    @property
    def flops_after(self) -> int:
        """FLOPs a token in feed-forward blocks and memory layers, now."""
        return sum(row.flops_after * row.site.calls for row in self.rows)

    def __repr__(self) -> str:
        header = ["#", "block", "pattern", "width", "hidden", "calls", "FLOPs/token", "memory"]
        table = [header, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]
        lines.insert(1, "  ".join("-" * w for w in widths))
        if not self.rows:
            lines = ["no linear > activation > linear block on a residual stream was seen"]
        found = f"memcompile: {self.model}, {len(self.rows)} feed-forward block(s) found"
        if not self.planned:
            return "\n".join([f"{found}, not planned yet", *lines, f"parameters {self.parameters_before:,}"])
        totals = [
            f"parameters {self.parameters_before:,} -> {self.parameters_after:,}",
            f"FLOPs a token in these blocks {self.flops_before:,} -> {self.flops_after:,}",
            self.memory,
            *(f"{held.optimizer}, group {held.group}, holds {in_words(held.parameters)}" for held in self.optimizers),
            *([f"no optimizer holds {in_words(self.untrained)}"] if self.untrained else []),
        ]
        chosen = sum(row.chosen for row in self.rows)
        done = f"memory added to {chosen}" if self.placement == "add" else f"{chosen} replaced by memory"
        return "\n".join([f"{found}, {done}", *lines, *totals])


def explain(model: nn.Module, example_inputs: Any = None) -> Explanation:
    """Every feed-forward candidate of ``model`` with its place, pattern and sizes, whether it is a memory, and if
    not why; parameters and FLOPs before and after. Changes nothing.

    Args:
        model: planned or not, wrapped or not.
        example_inputs: as for :func:`memcompile.plan`; read only where the model is not planned yet.
    """
    root, _ = unwrap(model)
    pool = pool_of(root)
    sites = pool.sites if pool is not None else find_ffns(root, example_inputs)
    owner = pool.owner if pool is not None and pool.owner not in root.modules() else root
    before = after = sum(p.numel() for p in owner.parameters())
    optimizers, untrained = ((), ()) if pool is None else _held(pool)
    if pool is not None:
        before += pool.removed_parameters - sum(p.numel() for _, p in pool.memory_parameters())
    return Explanation(
        model=type(owner).__name__,
        planned=pool is not None,
        placement=pool.config.placement if pool is not None else "replace",
        rows=tuple(_rows(sites, pool)),
        parameters_before=before,
        parameters_after=after,
        memory=_memory(pool) if pool is not None else "",
        optimizers=optimizers,
        untrained=untrained,
    )


def _held(pool: MemoryPool) -> tuple[tuple[ExplainedGroup, ...], tuple[str, ...]]:
    """Which live optimizers hold the memory's parameters, and which trainable ones none of them holds."""
    memory = {id(p): (name, p.requires_grad) for name, p in parameters_of_memory(pool.table).items()}
    model = {id(p) for p in (pool.table.model() or pool.owner).parameters()}
    groups = [group for group in groups_of(live_optimizers()) if any(id(p) in model for p in group.params)]
    found = []
    for group in groups:
        names = tuple(memory[id(p)][0] for p in group.params if id(p) in memory)
        if names:
            held = ExplainedGroup(optimizer=type(group.optimizer).__name__, group=group.number, parameters=names)
            found.append(held)
    order = {name: index for index, (name, _) in enumerate(memory.values())}
    found.sort(key=lambda held: min(order[name] for name in held.parameters))
    held_names = {name for held in found for name in held.parameters}
    untrained = [name for name, trainable in memory.values() if trainable and name not in held_names]
    return tuple(found), tuple(untrained) if groups else ()


def _rows(sites: Sequence[FfnSite], pool: MemoryPool | None) -> list[ExplainedSite]:
    rows, indices = [], itertools.count()
    for site in sites:
        layer = pool.layers.get(site.down.removeprefix(pool.prefix)) if pool is not None else None
        flops_after = site.flops if layer is None or pool is None or pool.adds else 0
        rows.append(
            ExplainedSite(
                index=None if site.refusal else next(indices),
                site=site,
                chosen=layer is not None,
                reason=site.refusal or ("not chosen by memory_layers" if pool is not None and layer is None else ""),
                flops_before=site.flops,
                flops_after=flops_after + (_layer_flops(layer) if layer is not None else 0),
            )
        )
    return rows


def _layer_flops(layer: MemoryLayer) -> int:
    """Counted, not derived: one token through the layer on the meta device."""

    def meta(tensor: torch.Tensor | None) -> torch.Tensor | None:
        # by its shape: a DTensor's is that of the whole tensor
        return None if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    tensors: dict[str, Any] = {name: meta(tensor) for name, tensor in layer.tensors(layer.pool.values).items()}
    token = torch.empty(1, layer.width, dtype=layer.query_weight.dtype, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        memory_lookup(token, **tensors, **layer.options)
    return counter.get_total_flops()


def _memory(pool: MemoryPool) -> str:
    c = pool.config
    assert c.n_keys is not None
    if c.frozen:
        where = f"the file {c.values_path}" if c.values_path is not None else "the CPU's memory"
        learning = f" for inference, in {where}"
    else:
        rule = c.values_optimizer or "the optimizer's rule where there is one by rows, otherwise row_adamw"
        rate = "its learning rate" if c.values_lr is None else f"the constant learning rate {c.values_lr:g}"
        learning = f"\nvalues: stepped when the optimizer that holds them steps, by {rule}, at {rate}"
    return (
        f"memory: {c.slots:,} slots ({c.n_keys} half-keys a side) x {pool.values_shape[1]} in {len(pool.layers)} "
        f"layer(s), {c.heads} heads x top {c.top_k}, key_dim {c.key_dim}; values "
        f"{str(pool.values.dtype).removeprefix('torch.')}{_form(c)}{learning}"
    )


def _form(config: MemoryConfig) -> str:
    """What a layer computes, where an option of that has not its default; of resolved options."""
    parts = {
        "BatchNorm of the query": config.has_batch_norm,
        "pairs [u | v]": config.has_pairs,
        f"{'a' if config.gate else 'no'} gate": True,
        "unit norm of query and keys": config.qk_norm,
        "sigmoid weights": config.weighting == "sigmoid",
        "a table for each layer": config.tables == "separate",
        f"balance loss {config.balance_loss:g}": config.balance_loss > 0,
    }
    plain = {name: getattr(MemoryConfig(), name) for name in ("weighting", "tables", "qk_norm", "balance_loss")}
    if config == dataclasses.replace(config, **plain, **MemoryConfig().form):
        return ""
    return f"\nvariant {config.variant}: {', '.join(part for part, has in parts.items() if has)}"


def _cells(row: ExplainedSite) -> list[str]:
    site = row.site
    flops = f"{row.flops_before:,}" + (f" -> {row.flops_after:,}" if row.chosen else "")
    state = "yes" if row.chosen else f"no: {row.reason}" if row.reason else "can be"
    index = "-" if row.index is None else str(row.index)
    pattern = site.pattern if len(site.pattern) <= 44 else f"{site.pattern[:34]} ... {site.pattern[-5:]}"
    sizes = [f"{site.width:,}", f"{site.hidden:,}", str(site.calls)]
    return [index, site.name or site.down, pattern, *sizes, flops, state]
