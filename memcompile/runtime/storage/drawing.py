"""Draws the memory of a planned model: after `to_empty()`, which leaves tensors without numbers, or to start over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from memcompile.lowering.parameters import draw_buffers, draw_layer, draw_seed, draw_values, new_layer
from memcompile.runtime._torch import local_offset, local_part
from memcompile.runtime.distributed.sharding import draw_part, redraw_layer
from memcompile.runtime.pool import MemoryPool, live_pools

if TYPE_CHECKING:
    from memcompile.runtime.layer import MemoryLayer


def draw_table(pool: MemoryPool) -> None:
    """Draws the values anew, in place. A collective where they are a DTensor: it is the same table however it lies."""
    pool.table.flush()  # what rows have missed is of the values as they are now
    values, sharded, start_of_v = pool.values, pool.table.sharded, pool.config.pair_at(pool.width)
    if sharded is not None:
        draw_part(pool.table.part, sharded, pool)
    elif isinstance(values, DTensor):  # by fully_shard
        rows, columns = local_offset(values)
        draw_values(local_part(values), _common_seed(values), pool.values_shape, (rows, columns), start_of_v)
    else:
        draw_values(values, pair_at=start_of_v)


def draw_parameters(layer: MemoryLayer) -> None:
    """Draws a layer's own parameters anew, in place, and resets its buffers. A collective where they are DTensors."""
    pool, sharded = layer.pool, layer.pool.table.sharded
    draw_buffers(layer._buffers)
    if sharded is not None and sharded.tokens == "shared":
        redraw_layer(layer, pool)
        return
    if not any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
        draw_layer(layer._parameters, pool.config)
        return
    weight = layer.query_weight
    for name, drawn in new_layer(pool.config, layer.width, weight.dtype, weight.device).items():
        parameter = layer._parameters[name]
        if isinstance(parameter, DTensor) and isinstance(drawn, Tensor) and not drawn.is_meta:
            part = distribute_tensor(drawn.detach(), parameter.device_mesh, parameter.placements)
            local_part(parameter).detach().copy_(local_part(part))


def draw_emptied(modules: Iterable[nn.Module]) -> None:
    """Draws what these modules themselves hold of a memory, but for values that no `to_empty()` reaches."""
    modules = list(modules)
    pools = {pool.owner: pool for pool in live_pools()}
    for pool in [pools[module] for module in modules if module in pools]:
        if not pool.config.frozen:
            draw_table(pool)
    layers = {layer for pool in pools.values() for layer in pool.layers.values()}
    for module in modules:
        if module in layers:
            draw_parameters(module)  # type: ignore[arg-type]


@torch.no_grad()
def _common_seed(values: DTensor) -> int:
    """A seed of `draw_values`, that of the mesh's first rank."""
    seed, mesh = torch.tensor([draw_seed()], device=values.device), values.device_mesh
    if not seed.is_meta:
        for dim in range(mesh.ndim):
            dist.broadcast(seed, group=mesh.get_group(dim), group_src=0)
        return int(seed)
    return 0
