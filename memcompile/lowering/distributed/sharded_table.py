"""A table that is sharded over a memory group: what each rank holds of it, and how sums are made of the parts.

The table lies by columns (dim 1) or by rows (dim 0), cut as `torch.chunk` and DTensor's `Shard` do: unevenly, some
parts empty. Each rank of the group has tokens of its own, at most C of them; what is short of C is padded, and hits
nothing. With P ranks:

    columns   all-gather of the packed slots and weights   [P * C, hits]
              the sums of all tokens, in the own columns   [P * C, value_dim / P]
              all-to-all: every token's columns            [C, value_dim]
    rows      all-gather of the packed slots and weights   [P * C, hits]
              partial sums of all tokens, over own rows    [P * C, value_dim]
              reduce-scatter                               [C, value_dim]

and backward the gradient of the sums takes the way back, and a reduce-scatter sums those of the weights. The values'
gradient is that of all tokens of the group over P: what DDP makes of the other parameters, the mean over ranks.

Where all ranks of the group have the same tokens (tensor parallelism) nothing of this is needed: the own columns of the
sums are what the own columns of the gate and of the output projection ask for.

The collectives are functional, so graphs hold them, and compute may stand between their start and their wait. Only
parts of the table are read: no rank ever holds more of it.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memcompile.lowering._torch import autograd_kernel, below_autograd, functorch_is_active, is_keyed, is_traced
from memcompile.lowering.distributed import collectives
from memcompile.lowering.gather.hits import sum_dtype
from memcompile.lowering.gather.table_gather import RowState, check_unchanged, gather
from memcompile.lowering.register.schema import operator

_WORDS = {torch.float32: torch.int32, torch.float64: torch.int64}  # slots as wide as weights travel with them


@dataclass(frozen=True)
class Shards:
    """How a table lies on the ranks of its memory group.

    Attributes:
        group: name of the process group, as functional collectives know it.
        sizes: the columns, or rows, of each rank.
        rank: of this process in the group.
        dim: 1 where the table lies by columns, 0 by rows.
        same_tokens: whether all ranks of the group have the same tokens (tensor parallelism), or each has its own.
    """

    group: str
    sizes: tuple[int, ...]
    rank: int
    dim: int
    same_tokens: bool = False

    @property
    def ranks(self) -> int:
        return len(self.sizes)

    @property
    def own(self) -> int:
        """The columns, or rows, of this rank."""
        return self.sizes[self.rank]

    @property
    def offset(self) -> int:
        """The first of them."""
        return sum(self.sizes[: self.rank])

    @property
    def even(self) -> bool:
        """Whether all ranks have equally many."""
        return len(set(self.sizes)) == 1

    @property
    def by_columns(self) -> bool:
        return self.dim == 1

    @property
    def own_tokens(self) -> bool:
        """Whether each of several ranks has tokens of its own."""
        return self.ranks > 1 and not self.same_tokens


def chunk_sizes(total: int, ranks: int) -> tuple[int, ...]:
    """What `torch.chunk`, and so DTensor's `Shard`, gives to each rank: the last ones get less, or nothing."""
    size = -(-total // ranks)
    return tuple(max(0, min(size, total - rank * size)) for rank in range(ranks))


def sharded_gather(
    table: Tensor,
    slots: Tensor,
    weights: Tensor,
    shards: Shards,
    capacity: int | None,
    gradient: str,
    row_state: RowState = (),
) -> Tensor:
    """`weighted_gather` of this rank's tokens over a whole table, or `table_gather` where the gradient is sparse.

    Args:
        table: the part that this rank holds, [slots, own columns] or [own rows, value_dim].
        slots: int32 or int64 [tokens, hits], and weights: float32 or float64 [tokens, hits], of this rank.
        capacity: the most tokens that a rank of the group has in this call. With None the ranks tell each other. Not
            read where all ranks have the same tokens.
        gradient: "dense" or "sparse".
        row_state: of the part, as `table_gather` takes it.

    Returns:
        [tokens, value_dim] in the values' dtype; the own columns of it where all ranks have the same tokens.

    Raises:
        NotImplementedError: under torch.func, or in a graph of another backend than memcompile's.
        RuntimeError: more tokens than the capacity.
    """
    capacity = agreed_capacity(slots, shards, capacity)
    return _sharded_gather(table, slots, weights, shards, capacity, gradient, row_state)  # type: ignore[no-any-return]


def agreed_capacity(slots: Tensor, shards: Shards, capacity: int | None) -> int | None:
    """The most tokens that a rank of the group has in this call; the ranks tell each other where it is not given.

    Raises:
        As `sharded_gather`.
    """
    if functorch_is_active():
        raise NotImplementedError("torch.func transforms do not work on sharded memory values: use an unsharded model")
    if capacity is None and not shards.same_tokens:
        if is_traced(slots):
            raise NotImplementedError(
                "sharded memory values are traced without a number of tokens that all ranks agree on: compile the "
                "model with backend='memcompile' (and export an unsharded model)"
            )
        capacity = most_tokens(slots.shape[0], shards.group, slots.device)
    if capacity is not None:
        torch._check(  # type: ignore[no-untyped-call]
            slots.shape[0] <= capacity,
            lambda: f"capacity: this rank has {slots.shape[0]} tokens, but the ranks agreed on at most {capacity}",
        )
    return capacity


def most_tokens(tokens: int, group: str, device: torch.device, too_few: bool = False) -> int:
    """The most tokens that a rank of the group has now. A collective, and it waits for the device.

    Args:
        too_few: whether a layer of this rank takes the statistics of one token, in training.

    Raises:
        ValueError: on every rank, where a rank has too few; else the others would wait for it in their lookups.
    """
    most, any_too_few = collectives.all_reduce(torch.tensor([tokens, too_few], device=device), group, "max").tolist()
    if any_too_few:
        raise ValueError(
            "x: BatchNorm of the query needs more than one token in training, as nn.BatchNorm1d does: a rank of the "
            "memory group has 1. Give each rank larger batches, or none, or put the layer in eval mode"
        )
    return int(most)


def _forward(
    ctx: Any,
    table: Tensor,
    slots: Tensor,
    weights: Tensor,
    shards: Shards,
    capacity: int,
    gradient: str,
    row_state: RowState,
) -> Tensor:
    tokens = slots.shape[0]
    with below_autograd():
        if shards.own_tokens:
            slots, weights = gather_hits(slots, weights, capacity, shards)
        hits, shares = own_hits(slots, weights, shards)
        if table.numel():
            sums = gather(table, hits, shares, row_state, gradient)
        else:
            sums = table.new_zeros(slots.shape[0], table.shape[1])
        if shards.own_tokens and shards.by_columns:
            sums = _columns_to_tokens(sums, capacity, shards)[:tokens]
        elif shards.own_tokens:
            sums = tokens_sum(sums, tokens, shards)
    ctx.save_for_backward(slots, weights)  # of all tokens
    keep_table(ctx, table, row_state, shards, capacity, gradient)
    return sums


def keep_table(ctx: Any, table: Tensor, row_state: RowState, shards: Shards, capacity: int, gradient: str) -> None:
    """Keeps for the backward what is no activation, as `table_gather` does."""
    ctx.table, ctx.row_state, ctx.version = table, row_state, table._version
    ctx.shards, ctx.capacity, ctx.gradient = shards, capacity, gradient


def gather_hits(slots: Tensor, weights: Tensor, capacity: int, shards: Shards) -> tuple[Tensor, Tensor]:
    """Slots and weights of all ranks, [P * C, hits] each; those of padding are -1 and 0. One all-gather."""
    word, hits = _WORDS[weights.dtype], slots.shape[1]
    packed = torch.cat([slots.to(word) + 1, weights.view(word)], 1)
    # A hit of padding is a slot of 0 - 1, so that zeros are enough for it.
    everyones = gather_tokens(packed, capacity, shards)  # [P * C, 2 * hits]
    return everyones[:, :hits] - 1, everyones[:, hits:].contiguous().view(weights.dtype)


def gather_tokens(own: Tensor, capacity: int, shards: Shards) -> Tensor:
    """[n, ...] of the own tokens -> [P * C, ...] of those of all ranks. One all-gather."""
    return collectives.all_gather(_padded(own, capacity), shards.ranks, shards.group)


def tokens_sum(of_all: Tensor, tokens: int, shards: Shards) -> Tensor:
    """[P * C, ...] of all ranks' tokens -> the sum over ranks for the own `tokens`. One reduce-scatter."""
    return collectives.reduce_scatter(of_all, shards.ranks, shards.group)[:tokens]


def _padded(tokens: Tensor, capacity: int) -> Tensor:
    """[n, ...] with zeros up to [C, ...]."""
    return F.pad(tokens, (0, 0, 0, capacity - tokens.shape[0]))


def own_hits(slots: Tensor, weights: Tensor, shards: Shards) -> tuple[Tensor, Tensor]:
    """Hits as the own part numbers its rows; of padding, and of rows elsewhere, any row by a weight of 0."""
    if shards.by_columns:
        return slots.clamp(min=0), weights
    own = is_own(slots, shards)
    return torch.where(own, slots - shards.offset, 0), torch.where(own, weights, 0)


def is_own(slots: Tensor, shards: Shards) -> Tensor:
    return (slots >= shards.offset) & (slots < shards.offset + shards.own)


def _columns_to_tokens(sums: Tensor, capacity: int, shards: Shards) -> Tensor:
    """[P * C, own columns] of all tokens -> [C, value_dim] of the own ones. One all-to-all."""
    sizes, own = shards.sizes, shards.own
    received = collectives.all_to_all(
        sums.reshape(-1), [capacity * size for size in sizes], [capacity * own] * shards.ranks, shards.group
    )
    if shards.even:
        return received.view(shards.ranks, capacity, own).transpose(0, 1).reshape(capacity, shards.ranks * own)
    blocks = torch.split(received, [capacity * size for size in sizes])
    return torch.cat([block.view(capacity, size) for block, size in zip(blocks, sizes, strict=True)], 1)


def check_backward(grad: Tensor) -> None:
    """Raises NotImplementedError for a backward that is not served."""
    if torch.is_grad_enabled():
        raise NotImplementedError("the gradient of sharded memory values has no derivative of its own (create_graph)")
    if is_traced(grad) and not is_keyed():
        raise NotImplementedError("sharded memory values are compiled by backend='memcompile' alone")


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None, None, None]:
    check_backward(grad)
    table, (slots, weights) = ctx.table, ctx.saved_tensors
    check_unchanged(table, ctx.version)
    shards = ctx.shards
    tokens, capacity = grad.shape[0], ctx.capacity
    if shards.own_tokens:
        if shards.by_columns:
            grad = _tokens_to_columns(_padded(grad, capacity), capacity, shards)
        else:
            grad = gather_tokens(grad, capacity, shards)  # [P * C, value_dim]
    grad_table = grad_weights = None
    if ctx.needs_input_grad[2]:
        grad_weights = _dots(table, slots, grad, ctx.row_state, shards)
        if shards.own_tokens:
            grad_weights = tokens_sum(grad_weights, tokens, shards)
        grad_weights = grad_weights.to(weights.dtype)
    if ctx.needs_input_grad[0]:
        mean = weights / shards.ranks if shards.own_tokens else weights
        grad_table = _scatter(table, slots, mean, grad, ctx.gradient, shards)
    return grad_table, None, grad_weights, None, None, None, None


def _tokens_to_columns(grad: Tensor, capacity: int, shards: Shards) -> Tensor:
    """[C, value_dim] of the own tokens -> [P * C, own columns] of all. One all-to-all."""
    sizes, own = shards.sizes, shards.own
    if shards.even:
        sent = grad.view(capacity, shards.ranks, own).transpose(0, 1).reshape(-1)
    else:
        sent = torch.cat([block.reshape(-1) for block in torch.split(grad, list(sizes), 1)])
    received = collectives.all_to_all(
        sent, [capacity * own] * shards.ranks, [capacity * size for size in sizes], shards.group
    )
    return received.view(shards.ranks * capacity, own)


def _dots(table: Tensor, slots: Tensor, grad: Tensor, row_state: RowState, shards: Shards) -> Tensor:
    """The gradient of all tokens' weights, as far as the own part makes it."""
    if not table.numel():
        return torch.zeros_like(slots, dtype=sum_dtype(table))
    hits, _ = own_hits(slots, slots, shards)
    if row_state:
        dots = operator("table_dot")(table, hits, grad, row_state)
    else:
        dots = operator("gather_dot")(table, hits, grad)
    return dots if shards.by_columns else torch.where(is_own(slots, shards), dots, 0)


def _scatter(table: Tensor, slots: Tensor, weights: Tensor, grad: Tensor, gradient: str, shards: Shards) -> Tensor:
    """The gradient of the own part. A sparse one has no row for hits of padding and of other ranks' rows."""
    if gradient == "dense":
        if not table.numel():
            return torch.zeros_like(table)
        hits, shares = own_hits(slots, weights, shards)
        return operator("weighted_scatter")(hits, shares, grad, table.shape[0])  # type: ignore[no-any-return]
    if not shards.by_columns:
        slots = own_slots(slots, shards)
    return operator("sparse_scatter")(table, [slots], [weights], [grad])  # type: ignore[no-any-return]


def own_slots(slots: Tensor, shards: Shards) -> Tensor:
    """Slots as the own rows are numbered; -1 for rows elsewhere and for padding."""
    return torch.where(is_own(slots, shards), slots - shards.offset, -1)


_sharded_gather = autograd_kernel("sharded_gather", forward=_forward, backward=_backward)
