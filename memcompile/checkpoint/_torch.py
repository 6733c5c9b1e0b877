"""The private PyTorch API of checkpoints, imported here and nowhere else in the layer.

Tried with torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# `save` itself warns in each process that is alone.
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict as save_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import empty as distributed_empty

__all__ = ["is_first_copy", "is_fsdp1", "like", "local_part", "save_state_dict"]


def local_part(tensor: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """Where this rank's part of a tensor starts in it, and that part itself, detached; of a plain tensor it is all."""
    if isinstance(tensor, DTensor):
        (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
        return tuple(chunk.offsets), tensor.to_local().detach()
    return (0,) * tensor.dim(), tensor.detach()


def is_fsdp1(model: nn.Module) -> bool:
    """Whether the first FSDP wraps the model or a part of it."""
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def like(tensor: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A new tensor of that size, where and as another is: on the same ranks, and sharded in each dimension in which it
    is as large.
    """
    if not isinstance(tensor, DTensor):
        return torch.empty(size, dtype=dtype, device=tensor.device)
    placements = [
        p if isinstance(p, Shard) and p.dim < len(size) and size[p.dim] == tensor.shape[p.dim] else Replicate()
        for p in tensor.placements
    ]
    return distributed_empty(*size, dtype=dtype, device_mesh=tensor.device_mesh, placements=placements)


def is_first_copy(tensor: DTensor) -> bool:
    """Whether this rank's part of a tensor is the first of its copies, where ranks have the same part."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    return all(at == 0 or not isinstance(p, Replicate) for at, p in zip(coordinate, tensor.placements, strict=True))
