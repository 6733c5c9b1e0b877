"""A block with a memory layer whose table a group of ranks shares, trained as a user would."""

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import AdamW

import memcompile
from benchmarks.sharding.cases import Sizes
from benchmarks.training_step.contestants import Block
from memcompile.runtime._torch import local_part
from memcompile.runtime.pool import pool_of

TABLE, STATES = "values", "states"


class Trainee:
    """Plans, shards, and steps. Built on all ranks of the mesh at once.

    The ranks promise equally many tokens: without, each forward has one more all-gather, of 8 bytes a rank. What DDP
    would do for the other parameters is as for any model, and left out.
    """

    def __init__(self, sizes: Sizes, mesh: DeviceMesh, by: str, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.width = sizes.width
        self.model = Block(sizes.width).to(dtype)
        memcompile.plan(
            self.model,
            memory_layers=1,
            n_keys=sizes.n_keys,
            heads=sizes.heads,
            top_k=sizes.top_k,
            values_grad="sparse",
        )
        memcompile.shard(self.model, mesh, by=by, tokens="even")
        self.optimizer = AdamW(self.model.parameters())
        self.dtype = dtype
        self._tokens = torch.Generator().manual_seed(mesh.get_local_rank())

    def forward_backward(self, tokens: int) -> None:
        """Of new tokens: the same again would hit the same rows."""
        x, target = torch.randn(2, tokens, self.width, generator=self._tokens).to(self.dtype)
        F.mse_loss(self.model(x.requires_grad_()), target).backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def memory(self) -> dict[str, int]:
        """Bytes of the table that this rank holds, and of its states. It has stepped before."""
        pool = pool_of(self.model)
        assert pool is not None and pool.stepper is not None
        (state,) = pool.stepper.rows.state.values()
        states = [entry for entry in state.values() if isinstance(entry, torch.Tensor)]
        return {TABLE: local_part(pool.values).nbytes, STATES: sum(entry.nbytes for entry in states)}
