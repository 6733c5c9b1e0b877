"""Counts of hits: how often each slot, and each half-key of each head, is among the best of a token.

A forward that a backward runs, to recompute activations, is not counted a second time.
"""

import torch
from torch import Tensor

from memcompile.lowering._torch import runs_in_backward
from memcompile.lowering.register.operators import register_for_graphs


def _kernel(slots: Tensor, first_slot: int, slot_hits: Tensor, key_hits: Tensor, slot_offset: Tensor | None) -> None:
    """Adds the hits of slots int32 [tokens, heads, top_k] to slot_hits int64 [tables * n * n] and to key_hits int64
    [2, heads, n]. The slots are of the layer's own table, which begins at `first_slot`, or at slot_offset int32 [].
    """
    if runs_in_backward() or not slots.numel():
        return
    slots = slots.long()
    heads, n = key_hits.shape[1:]
    ones = slots.new_ones(1).expand(slots.numel())
    first = first_slot if slot_offset is None else slot_offset.to(slots.device)
    slot_hits.index_add_(0, (slots + first).flatten(), ones)
    head = torch.arange(heads, device=slots.device)[:, None] * n
    for side, keys in enumerate((slots // n, slots % n)):
        key_hits[side].view(-1).index_add_(0, (keys + head).flatten(), ones)


def _fake(slots: Tensor, first_slot: int, slot_hits: Tensor, key_hits: Tensor, slot_offset: Tensor | None) -> None:
    return None


def _vmap(*args: object) -> None:
    raise NotImplementedError("torch.func.vmap would count the hits of a batch in one place: stop counting first")


register_for_graphs("count_hits", _kernel, _fake, "CompositeExplicitAutograd", vmap=_vmap)
