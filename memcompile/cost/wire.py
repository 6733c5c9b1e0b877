"""Bytes that a rank receives in each collective of the sharded memory. Only counts: rates and topology are in time.py.

Letters in the formulas: P ranks share a table (the memory group), R groups like it (replicas) train on other tokens;
each rank has C tokens of K hits; rows are dv elements of b bytes; d is how many of their columns a rank holds.
"""

from dataclasses import dataclass

HIT = 8  # bytes of an int32 slot and an fp32 weight
_FP32 = 4
_ROW = 8  # bytes of a row's number in a sparse gradient, int64
MEMORY, REPLICAS = "memory", "replicas"  # the ranks that take part


@dataclass(frozen=True)
class Collective:
    """One collective as one rank sees it.

    Attributes:
        name: what is sent.
        operation: "all_gather", "all_to_all", "reduce_scatter" or "all_reduce".
        over: "memory", the group that shares the table, or "replicas", the ranks that hold the same part of it.
        received_bytes: what the rank gets from others; of sums on a ring, what passes through it.
    """

    name: str
    operation: str
    over: str
    received_bytes: int


def shard_size(size: int, ranks: int, rank: int) -> int:
    """How much of `size` a rank holds, as `torch.chunk` divides: the last ranks may have less, or nothing."""
    if not 0 <= rank < ranks:
        raise ValueError(f"rank: expected 0 to {ranks - 1}, got {rank}")
    chunk = -(-size // ranks)
    return min(chunk, max(0, size - rank * chunk))


def forward_collectives(
    tokens: int, hits: int, value_dim: int, ranks: int, rank: int, element_bytes: int, by: str = "columns"
) -> tuple[Collective, ...]:
    """The collectives of a layer's forward, in their order; none in a group of one rank.

    Every rank receives the list of hits of all others, (P - 1) C K 8 bytes. By columns it then receives the columns of
    its outputs that it lacks, C (dv - d) b; by rows the partial sums of all ranks, (P - 1) C dv b.

    Args:
        tokens: C, the same on every rank.
        hits: K = heads * top_k slots a token.
        value_dim: dv.
        ranks: P.
        rank: whose bytes are counted.
        element_bytes: b, of values and activations.
        by: "columns" or "rows", how the table is sharded.
    """
    own = _own_columns(value_dim, ranks, rank, by)
    if ranks == 1:
        return ()
    gathered = Collective("hits", "all_gather", MEMORY, (ranks - 1) * tokens * hits * HIT)
    if by == "rows":
        partial = (ranks - 1) * tokens * value_dim * element_bytes
        return gathered, Collective("partial outputs", "reduce_scatter", MEMORY, partial)
    return gathered, Collective("outputs", "all_to_all", MEMORY, tokens * (value_dim - own) * element_bytes)


def backward_collectives(
    tokens: int, hits: int, value_dim: int, ranks: int, rank: int, element_bytes: int, by: str = "columns"
) -> tuple[Collective, ...]:
    """The collectives of a layer's backward, in their order; none in a group of one rank. Arguments as in
    `forward_collectives`.

    A rank receives its columns of the outputs' gradients, (P - 1) C d b bytes, by rows all columns, (P - 1) C dv b;
    then the sums of the weights' gradients, in fp32: (P - 1) C K 4.
    """
    own = _own_columns(value_dim, ranks, rank, by)
    if ranks == 1:
        return ()
    operation = "all_gather" if by == "rows" else "all_to_all"
    return (
        Collective("output gradients", operation, MEMORY, (ranks - 1) * tokens * own * element_bytes),
        Collective("weight gradients", "reduce_scatter", MEMORY, (ranks - 1) * tokens * hits * _FP32),
    )


def step_collectives(
    rows: int,
    value_dim: int,
    ranks: int,
    rank: int,
    element_bytes: int,
    by: str = "columns",
    *,
    replicas: int,
    slots: int,
    values_grad: str = "sparse",
    optimizer: str = "adamw",
    updated_rows: int | None = None,
) -> tuple[Collective, ...]:
    """The collectives of a step, for all layers together.

    Between replicas, of a sparse gradient, the rows of all: (R - 1) rows (8 + 4 d) bytes, sums in fp32; by rows a rank
    has rows / P of them, whole. Of a dense one a ring's all-reduce, 2 (R - 1) / R of the shard's bytes. In the memory
    group, where `row_wise_adagrad` needs the squares of rows whose columns lie on P ranks: 2 (P - 1) / P rows 4.
    Fractions of bytes and rows are rounded up.

    Args:
        rows: distinct rows that a memory group touches in a step.
        value_dim, ranks, rank, element_bytes, by: as in `forward_collectives`.
        replicas: R, the number of memory groups.
        slots: rows of the whole table.
        values_grad: "sparse" or "dense".
        optimizer: "adamw", "lazy_adam", "row_wise_adagrad" or "sgd".
        updated_rows: distinct rows that any replica touches, which the optimizer then steps; None is `rows`.
    """
    own = _own_columns(value_dim, ranks, rank, by)
    found = []
    if replicas > 1 and values_grad == "sparse":
        own_rows = -(-rows // ranks) if by == "rows" else rows
        received = (replicas - 1) * own_rows * (_ROW + own * _FP32)
        found.append(Collective("gradient rows", "all_gather", REPLICAS, received))
    if replicas > 1 and values_grad == "dense":
        own_slots = shard_size(slots, ranks, rank) if by == "rows" else slots
        received = _on_a_ring(own_slots * own * element_bytes, replicas)
        found.append(Collective("gradient", "all_reduce", REPLICAS, received))
    if ranks > 1 and by == "columns" and optimizer == "row_wise_adagrad":
        stepped = slots if values_grad == "dense" else rows if updated_rows is None else updated_rows
        found.append(Collective("row squares", "all_reduce", MEMORY, _on_a_ring(stepped * _FP32, ranks)))
    return tuple(found)


def _on_a_ring(size: int, ranks: int) -> int:
    """Bytes that an all-reduce of `size` bytes brings to each rank: a reduce-scatter, then an all-gather."""
    return -(-2 * (ranks - 1) * size // ranks)


def _own_columns(value_dim: int, ranks: int, rank: int, by: str) -> int:
    if by not in ("columns", "rows"):
        raise ValueError(f"by: expected 'columns' or 'rows', got {by!r}")
    columns = shard_size(value_dim, ranks, rank)
    return value_dim if by == "rows" else columns
