"""What the vmap rules share: fold a batch into tokens, offset slots into batched rows."""

import torch
from torch import Tensor


def batch_first(tensor: Tensor, dim: int | None, batch: int) -> Tensor:
    """`tensor` with the vmapped dimension in front; one that is not vmapped is repeated (a view)."""
    if dim is None:
        return tensor.expand(batch, *tensor.shape)
    return tensor.movedim(dim, 0)


def fold_into_tokens(tensor: Tensor, dim: int | None, batch: int) -> Tensor:
    """[tokens, ...], vmapped or not, to [batch * tokens, ...]."""
    return batch_first(tensor, dim, batch).flatten(0, 1)


def unfold_tokens(tensor: Tensor, batch: int) -> Tensor:
    """[batch * tokens, ...] to [batch, tokens, ...], also when there are no tokens."""
    return tensor.reshape(batch, tensor.shape[0] // batch if batch else 0, *tensor.shape[1:])


def offset_slots(slots: Tensor, dim: int | None, batch: int, num_slots: int) -> Tensor:
    """Slots of `batch` tables of `num_slots` rows each, as slots of the tables laid end to end.

    Returns [batch * tokens, hits], int64: the offset may pass 2**31.
    """
    batched = batch_first(slots, dim, batch).long()  # [batch, tokens, hits]
    offsets = torch.arange(batch, device=slots.device) * num_slots
    return (batched + offsets[:, None, None]).flatten(0, 1)
