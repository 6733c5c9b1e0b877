"""How many batches of background data hit each slot, in the model and its state dict."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from memcompile.runtime.pool import MemoryPool
from memcompile.runtime.state_dicts import BACKGROUND


@dataclasses.dataclass(frozen=True)
class Background:
    """Attributes:
    hits: int32 [slots], in how many batches each slot was hit.
    batches: how many there were.
    """

    hits: Tensor
    batches: int


def put_background(pool: MemoryPool, background: Background) -> None:
    """Keeps it in buffers of the module that has the table."""
    batches = torch.tensor(background.batches, device=background.hits.device)
    for name, tensor in zip(BACKGROUND, (background.hits, batches), strict=True):
        pool.owner.register_buffer(name, tensor)


def background_of(pool: MemoryPool) -> Background | None:
    hits, batches = (pool.owner._buffers.get(name) for name in BACKGROUND)
    return None if hits is None or batches is None else Background(hits, int(batches))
