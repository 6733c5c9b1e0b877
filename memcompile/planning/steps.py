"""The steps of plan(), in order.

trace        passes/capture/    the model on fake tensors -> graphs of ATen operators
normalize    passes/capture/    one form for in-place operators and for operands of which only the shape is read
detect       passes/detect/     every FFN, proved or refused with its reason
place        passes/detect/     which of them `memory_layers` chooses
rehearse     planning/          does the model's own code run with stand-ins there? Others are placed where not
size         planning/          the sizes that were not given; how the values lie on a mesh
install      runtime/           from here on the model changes: values, layers and stand-ins
adopt        runtime/           optimizers of the replaced parameters get those of the memory
rebuild      runtime/           DDPs around the model take its new parameters
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from memcompile.common.pipeline import Step
from memcompile.common.sites import FfnSite
from memcompile.common.sizes import resolve
from memcompile.config import MemoryConfig
from memcompile.lowering.parameters import values_shape
from memcompile.passes.detect.detect import IN_A_MODEL, Detection
from memcompile.passes.detect.place import place
from memcompile.planning.rehearsal import rehearse
from memcompile.runtime import patches
from memcompile.runtime.adoption import adopt_optimizers
from memcompile.runtime.distributed.ddp import rebuild
from memcompile.runtime.distributed.sharding import check_plans_agree, cut
from memcompile.runtime.install import install, owner_of
from memcompile.runtime.interrupts import uninterrupted
from memcompile.runtime.pool import MemoryPool

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.nn.parallel import DistributedDataParallel


@dataclasses.dataclass(kw_only=True)
class Planning(Detection):
    """What the steps of one plan read, and what each leaves for the next.

    Attributes:
        model: the root, without its wrappers.
        requested: the options as the user gave them.
        mesh: what the values are sharded over, by what, and how tokens are shared; None where they are whole.
        wrappers: the DDPs around the root.
        until_planned: closed at the end of the last step.
        sites: every FFN.
        chosen: those that get a memory.
        pool: the memory.
        parameters: of the chosen FFNs.
    """

    model: nn.Module
    requested: MemoryConfig
    mesh: tuple[DeviceMesh, str, str] | None
    wrappers: Sequence[DistributedDataParallel]
    until_planned: contextlib.ExitStack
    sites: list[FfnSite] = dataclasses.field(default_factory=list)
    chosen: list[FfnSite] = dataclasses.field(default_factory=list)
    pool: MemoryPool = dataclasses.field(init=False)
    parameters: list[nn.Parameter] = dataclasses.field(default_factory=list)


def _place(planning: Planning) -> int:
    planning.sites = [block.site for block in planning.blocks]
    planning.chosen = place(planning.sites, planning.requested.memory_layers)
    return len(planning.chosen)


def _rehearse(planning: Planning) -> int:
    """Refuses a chosen site that fails, and chooses another where ``memory_layers`` leaves a choice."""
    requested, rehearsed = planning.requested, len(planning.chosen)
    while failures := rehearse(planning.model, planning.captures, planning.chosen, requested.placement == "add"):
        planning.sites = [dataclasses.replace(s, refusal=failures.get(s.down, s.refusal)) for s in planning.sites]
        planning.chosen = place(planning.sites, requested.memory_layers)
        rehearsed += len(planning.chosen)
    return rehearsed


def _size(planning: Planning) -> int:
    root, requested = planning.model, planning.requested
    config = resolve(requested, planning.chosen, sum(p.numel() for p in root.parameters()))
    owner, prefix = owner_of(root, planning.chosen)
    config = dataclasses.replace(config, memory_layers=[site.down.removeprefix(prefix) for site in planning.chosen])
    planning.pool = pool = MemoryPool(
        owner=owner, prefix=prefix, config=config, requested=requested, sites=tuple(planning.sites)
    )
    pool.table.model = weakref.ref(root)
    if planning.mesh is not None:
        pool.table.sharded = cut(config, *planning.mesh)
        check_plans_agree(pool, pool.table.sharded)
    return values_shape(config)[0]


def _install(planning: Planning) -> int:
    patches.hold(planning.pool)
    planning.until_planned.enter_context(uninterrupted())  # half a change could not be mended by a second call
    planning.parameters = install(planning.pool, planning.model, planning.chosen)
    return len(planning.pool.layers)


def _adopt(planning: Planning) -> int:
    return adopt_optimizers(planning.parameters, planning.pool, planning.model)


def _rebuild(planning: Planning) -> int:
    for wrapper in planning.wrappers:
        rebuild(wrapper)
    return len(planning.wrappers)


STEPS = (
    *IN_A_MODEL,
    Step("place", _place, "blocks chosen"),
    Step("rehearse", _rehearse, "blocks rehearsed"),
    Step("size", _size, "slots"),
    Step("install", _install, "layers installed"),
    Step("adopt", _adopt, "optimizers adopted"),
    Step("rebuild", _rebuild, "wrappers rebuilt"),
)
