"""The values as a DTensor, and the part of them that this rank holds: what layers read and optimizers step."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard

from memcompile.lowering.distributed.sharded_table import Shards, chunk_sizes
from memcompile.runtime._torch import local_part, sized_at_run_time

# Its size is what graphs have for the most tokens of a rank, until that is agreed upon. Not an attribute of what a
# module holds: Dynamo takes the sizes of those for constants.
_NO_SIZE = 1_000_003  # what it looks like until then
_ROOM = sized_at_run_time(torch.empty(1).expand(_NO_SIZE))


@dataclasses.dataclass(eq=False)
class ShardedValues:
    """How the values of a pool lie on a mesh.

    Attributes:
        mesh: of one dimension, the memory group, or of two, replicas before it.
        shards: the cut over the memory group.
        tokens: "uneven", "even" or "shared": see `memcompile.shard`.
        own: the part as a leaf of autograd; `part` keeps it up to date.
    """

    mesh: DeviceMesh
    shards: Shards
    tokens: str
    own: nn.Parameter | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedValues:
        """Of a copied model, whose values have a storage of their own."""
        return ShardedValues(self.mesh, self.shards, self.tokens)

    @classmethod
    def over(cls, mesh: DeviceMesh, shape: tuple[int, int], dim: int, tokens: str) -> ShardedValues:
        """Of a table [slots, value_dim] that is cut along `dim`."""
        memory = mesh.ndim - 1
        sizes = chunk_sizes(shape[dim], mesh.size(memory))
        group, rank = mesh.get_group(memory).group_name, mesh.get_local_rank(memory)
        return cls(mesh, Shards(group, sizes, rank, dim, same_tokens=tokens == "shared"), tokens)

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Of the values on the mesh."""
        return (*([Replicate()] * (self.mesh.ndim - 1)), Shard(self.shards.dim))

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same part; None where no others do."""
        return self.mesh.get_group(0) if self.mesh.ndim == 2 and self.mesh.size(0) > 1 else None

    @property
    def memory_mesh(self) -> DeviceMesh:
        """The memory group alone."""
        return self.mesh if self.mesh.ndim == 1 else self.mesh[self.mesh.mesh_dim_names[-1]]  # type: ignore[index]

    def part(self, values: nn.Parameter) -> nn.Parameter:
        """This rank's part of the values, on their storage: one leaf, whatever is loaded or cast. Its gradient is made
        theirs: `values_gradient`.
        """
        local = local_part(values)
        if self.own is None or self.own.is_meta != local.is_meta:  # which share no leaf
            self.own = nn.Parameter(local.detach(), requires_grad=values.requires_grad)
        elif (self.own.data_ptr(), self.own.dtype, self.own.shape) != (local.data_ptr(), local.dtype, local.shape):
            self.own.data = local.detach()
        return self.own.requires_grad_(values.requires_grad)  # type: ignore[return-value]

    def capacity(self, x: Tensor) -> int | None:
        """The `capacity` of a lookup of the tokens x [..., width]."""
        if self.tokens == "even":
            return x.shape[:-1].numel()
        is_agreed = self.tokens == "uneven" and torch.compiler.is_compiling()  # before the graph runs
        return _ROOM.shape[0] if is_agreed else None
