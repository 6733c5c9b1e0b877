"""Bytes that a GPU reads from and writes to its own memory for the table. Only counts; caches are left out."""

from memcompile.cost.job import Job
from memcompile.cost.memory import master_bytes, own_rows, state_bytes
from memcompile.cost.wire import HIT

_FP32 = 4
_ROW_NUMBER = 8
_SCORE_PASSES = 3  # written by the GEMM, read twice by the selection
BACKWARD = 2  # of the forward's traffic: rows are read for the weights' gradients, and written for their own


def moved(segment: int, granule: int) -> int:
    """Bytes that an access to a contiguous segment moves: whole granules, the segment starting at one."""
    return -(-segment // granule) * granule


def gather_bytes(job: Job, ranks: int, granule: int) -> int:
    """Of one layer's forward: the group's list of hits is read, then the part of each row that the busiest rank holds,
    and the outputs of all tokens of the group are written.
    """
    _, columns = job.shard(ranks)
    tokens = ranks * job.tokens
    row = columns * job.element_bytes
    rows_read = tokens * job.hits
    if job.by == "rows":
        rows_read = min(rows_read, round(job.tokens * job.hits * job.skew))
    return tokens * job.hits * HIT + rows_read * moved(row, granule) + tokens * row


def search_bytes(job: Job) -> int:
    """Of one layer's forward: queries and half-keys are read, fp32 scores written once and read twice."""
    scores = 2 * job.tokens * job.heads * job.n_keys
    operands = job.heads * job.query_width * job.element_bytes * (job.tokens + job.n_keys)
    return operands + _SCORE_PASSES * scores * _FP32


def update_bytes(job: Job, ranks: int, granule: int) -> int:
    """Of one step: gathered rows of replicas are read and summed; the optimizer reads the gradient, and reads and
    writes values and states, of the rows that any replica touched or, with a dense gradient, of all.
    """
    slots, columns = job.shard(ranks)
    kept = moved(columns * job.element_bytes, granule) + columns * master_bytes(job) + state_bytes(job, columns)
    stepped = moved(columns * job.element_bytes, granule) + 2 * kept
    if job.values_grad == "dense":
        return slots * stepped
    replicas = job.gpus // ranks
    gathered = replicas * own_rows(job, job.touched_rows(ranks), ranks) if replicas > 1 else 0
    updated = own_rows(job, job.touched_rows(job.gpus), ranks)
    return gathered * (_ROW_NUMBER + columns * _FP32) + updated * stepped
