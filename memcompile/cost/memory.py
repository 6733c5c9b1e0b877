"""Bytes of GPU memory that a rank needs for the table, and that it reads and writes in a step. Caches are left out."""

from dataclasses import dataclass

from memcompile.cost.job import BYTES, FP32, ROW_NUMBER, Job
from memcompile.cost.wire import HIT

_LAST_STEP = 4  # int32 [slots], of RowAdamW
_SCORE_PASSES = 3  # written by the GEMM, read twice by the selection
BACKWARD = 2  # of the gather's traffic: rows are read for the weights' gradients, and written for their own


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    values: int  # the shard itself
    masters: int  # fp32 masters of bf16 values
    gradient: int  # of the shard, or of its rows that are hit
    states: int  # the optimizer's
    # The larger of what layers need (what is saved for the backward; outputs of all tokens of the group) and of what
    # replicas gather of each other.
    buffers: int

    @property
    def total(self) -> int:
        """The most that is alive at once."""
        return sum(vars(self).values())


def memory_of(job: Job, ranks: int, rank: int = 0) -> Memory:
    """What a rank of a memory group of `ranks` holds; rank 0 has the most."""
    slots, columns = job.shard(ranks, rank)
    row, replicas, tokens = columns * job.element_bytes, job.gpus // ranks, ranks * job.tokens
    sums = tokens * job.output_columns(columns) * job.element_bytes
    tokens_sent = tokens * job.value_dim * job.element_bytes if job.has_pairs and ranks > 1 else 0
    saved = tokens * job.hits * (HIT + (FP32 if job.has_pairs else 0)) + tokens_sent  # with the dots u . x
    during_layers = job.layers * saved + sums + tokens_sent  # of which one layer's backward has the gradients
    if job.values_grad == "dense":
        gradient, between_replicas = slots * row, 0  # an all-reduce is in place
    else:
        gradient = job.own_rows(job.touched_rows(job.gpus), ranks) * (ROW_NUMBER + row)
        between_replicas = replicas * job.sent_rows_bytes(ranks, rank) if replicas > 1 else 0
    return Memory(
        values=slots * row,
        masters=slots * columns * _master_bytes(job),
        gradient=gradient,
        states=slots * state_bytes(job, columns),
        buffers=max(during_layers, between_replicas),
    )


def state_bytes(job: Job, columns: int) -> int:
    """Bytes of the optimizer's states of `columns` columns of one row.

    What is kept once a row is not sharded by columns: every rank of the group has it.
    """
    if job.optimizer in ("adamw", "lazy_adam"):
        has_last_step = job.optimizer == "adamw" and job.values_grad == "sparse"
        return 2 * columns * BYTES[job.state_dtype] + (_LAST_STEP if has_last_step else 0)
    return FP32 if job.optimizer == "row_wise_adagrad" else 0


def _master_bytes(job: Job) -> int:
    """Bytes of the master of an element; fp32 values are their own."""
    return FP32 if job.master_weights and job.dtype != "fp32" else 0


def moved(segment: int, granule: int) -> int:
    """Bytes that an access to a contiguous segment moves: whole granules, the segment starting at one."""
    return -(-segment // granule) * granule


def gather_bytes(job: Job, ranks: int, granule: int) -> int:
    """Of one layer's forward: the group's list of hits is read, then the part of each row that the busiest rank holds,
    and the outputs of all tokens of the group are written.
    """
    _, columns = job.shard(ranks)
    tokens, row = ranks * job.tokens, columns * job.element_bytes
    sums = tokens * job.output_columns(columns) * job.element_bytes
    read = tokens * job.value_dim * job.element_bytes if job.has_pairs else 0
    rows_read = tokens * job.hits
    if job.by == "rows":
        rows_read = min(rows_read, round(job.tokens * job.hits * job.skew))
    return tokens * job.hits * HIT + rows_read * moved(row, granule) + sums + read


def search_bytes(job: Job) -> int:
    """Of one layer's forward: queries and half-keys are read, fp32 scores written once and read twice."""
    scores = 2 * job.tokens * job.heads * job.n_keys
    operands = job.heads * job.query_width * job.element_bytes * (job.tokens + job.n_keys)
    return operands + _SCORE_PASSES * scores * FP32


def update_bytes(job: Job, ranks: int, granule: int) -> int:
    """Of one step: gathered rows of replicas are read and summed; the optimizer reads the gradient, and reads and
    writes values and states, of the rows that any replica touched or, with a dense gradient, of all.
    """
    slots, columns = job.shard(ranks)
    row, replicas = moved(columns * job.element_bytes, granule), job.gpus // ranks
    stepped = row + 2 * (row + columns * _master_bytes(job) + state_bytes(job, columns))
    if job.values_grad == "dense":
        return slots * stepped
    gathered = replicas * job.sent_rows_bytes(ranks) if replicas > 1 else 0
    return gathered + job.own_rows(job.touched_rows(job.gpus), ranks) * stepped
