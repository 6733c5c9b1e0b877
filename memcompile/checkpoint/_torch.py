"""The private PyTorch API of checkpoints, imported here and nowhere else in the layer.

Tried with torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner_helpers import _create_read_items as create_read_items

# `save` itself warns in each process that is alone.
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict as save_state_dict
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import empty as distributed_empty

__all__ = ["create_read_items", "like", "local_part", "save_state_dict"]


def local_part(tensor: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """Where this rank's part of a tensor starts in it, and that part itself, detached; of a plain tensor it is all."""
    if isinstance(tensor, DTensor):
        (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
        return tuple(chunk.offsets), tensor.to_local().detach()
    return (0,) * tensor.dim(), tensor.detach()


def like(parameter: Tensor, saved: Tensor) -> Tensor:
    """A new tensor of the size and dtype of a saved one. Where it has the rows of a parameter it is on the same ranks
    and devices, and sharded in each dimension in which it is as large; others are on the CPU.
    """
    size, dtype = saved.shape, saved.dtype
    if not size or size[:1] != parameter.shape[:1]:
        return torch.empty(size, dtype=dtype, device="cpu")
    if not isinstance(parameter, DTensor):
        return torch.empty(size, dtype=dtype, device=parameter.device)
    placements = [
        p if isinstance(p, Shard) and p.dim < len(size) and size[p.dim] == parameter.shape[p.dim] else Replicate()
        for p in parameter.placements
    ]
    return distributed_empty(*size, dtype=dtype, device_mesh=parameter.device_mesh, placements=placements)
