"""Bytes that a rank receives in each collective of the sharded memory, by the formulas of docs/cost-model.md. Only
counts: rates and topology are in time.py.
"""

from dataclasses import dataclass

from memcompile.cost.job import FP32, Job

HIT = 8  # bytes of an int32 slot and an fp32 weight
MEMORY, REPLICAS = "memory", "replicas"  # who takes part: who shares a table, or who holds the same part of it


@dataclass(frozen=True)
class Collective:
    """One collective as one rank sees it."""

    name: str  # what is sent
    operation: str  # "all_gather", "all_to_all", "reduce_scatter" or "all_reduce"
    over: str  # MEMORY or REPLICAS
    received_bytes: int  # what the rank gets from others; of sums on a ring, what passes through it


def layer_collectives(job: Job, ranks: int, rank: int = 0) -> tuple[Collective, ...]:
    """Those of a layer's forward, then those of its backward, in their order; none in a group of one rank.

    By columns a rank receives the columns of its outputs that it lacks, by rows the partial sums of all ranks. Of pairs
    the tokens travel too, and their gradients.
    """
    if ranks == 1:
        return ()
    _, own = job.shard(ranks, rank)
    own = job.output_columns(own)
    hits, column = (ranks - 1) * job.tokens * job.hits, job.tokens * job.element_bytes
    if job.by == "rows":
        outputs, forward, backward, lacking = "partial outputs", "reduce_scatter", "all_gather", (ranks - 1) * own
    else:
        outputs, forward, backward, lacking = "outputs", "all_to_all", "all_to_all", job.value_dim - own
    width = (ranks - 1) * job.value_dim * column
    return (
        Collective("hits", "all_gather", MEMORY, hits * HIT),
        *([Collective("tokens", "all_gather", MEMORY, width)] if job.has_pairs else []),
        Collective(outputs, forward, MEMORY, lacking * column),
        Collective("output gradients", backward, MEMORY, (ranks - 1) * own * column),
        Collective("weight gradients", "reduce_scatter", MEMORY, hits * FP32),
        *([Collective("token gradients", "reduce_scatter", MEMORY, width)] if job.has_pairs else []),
    )


def step_collectives(job: Job, ranks: int, rank: int = 0) -> tuple[Collective, ...]:
    """The collectives of a step, for all layers together: a gradient between replicas, and in the memory group the
    squares that `row_wise_adagrad` needs of rows whose columns lie on all ranks. Fractions of bytes are rounded up.
    """
    slots, columns = job.shard(ranks, rank)
    replicas, is_dense = job.gpus // ranks, job.values_grad == "dense"
    found = []
    if replicas > 1 and is_dense:
        received = _on_a_ring(slots * columns * job.element_bytes, replicas)
        found.append(Collective("gradient", "all_reduce", REPLICAS, received))
    elif replicas > 1:
        received = (replicas - 1) * job.sent_rows_bytes(ranks, rank)
        found.append(Collective("gradient rows", "all_gather", REPLICAS, received))
    if ranks > 1 and job.by == "columns" and job.optimizer == "row_wise_adagrad":
        stepped = job.rows if is_dense else job.touched_rows(job.gpus)
        found.append(Collective("row squares", "all_reduce", MEMORY, _on_a_ring(stepped * FP32, ranks)))
    return tuple(found)


def _on_a_ring(size: int, ranks: int) -> int:
    """Bytes that an all-reduce of `size` bytes brings to each rank: a reduce-scatter, then an all-gather."""
    return -(-2 * (ranks - 1) * size // ranks)
