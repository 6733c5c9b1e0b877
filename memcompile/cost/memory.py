"""Bytes of GPU memory that the table takes on a rank: values, gradient, optimizer states, and a step's buffers."""

from dataclasses import dataclass

from memcompile.cost.job import BYTES, Job
from memcompile.cost.wire import HIT

_FP32 = 4
_ROW_NUMBER = 8  # int64
_LAST_STEP = 4  # int32 [slots], of RowAdamW
_MOMENTS = {"adamw": 2, "lazy_adam": 2, "row_wise_adagrad": 0, "sgd": 0}  # tables of the values' size


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        values: the shard itself.
        masters: fp32 masters of bf16 values.
        gradient: of the shard, or of its rows that are hit.
        states: the optimizer's.
        buffers: the larger of what layers need (lists of hits until the backward; outputs of all tokens of the group)
            and of what replicas gather of each other.
    """

    values: int
    masters: int
    gradient: int
    states: int
    buffers: int

    @property
    def total(self) -> int:
        """The most that is alive at once."""
        return self.values + self.masters + self.gradient + self.states + self.buffers


def state_bytes(job: Job, columns: int) -> int:
    """Bytes of the optimizer's states of `columns` columns of one row.

    What is kept once a row is not sharded by columns: every rank of the group has it.
    """
    once = 0
    if job.optimizer == "row_wise_adagrad":
        once = _FP32
    elif job.optimizer == "adamw" and job.values_grad == "sparse":
        once = _LAST_STEP
    return _MOMENTS[job.optimizer] * columns * BYTES[job.state_dtype] + once


def master_bytes(job: Job) -> int:
    """Bytes of the master of an element; fp32 values are their own."""
    return _FP32 if job.master_weights and job.dtype != "fp32" else 0


def memory_of(job: Job, ranks: int, rank: int = 0) -> Memory:
    """What a rank of a memory group of `ranks` holds; rank 0 has the most."""
    slots, columns = job.shard(ranks, rank)
    return Memory(
        values=slots * columns * job.element_bytes,
        masters=slots * columns * master_bytes(job),
        gradient=_gradient(job, slots, columns, ranks),
        states=slots * state_bytes(job, columns),
        buffers=max(_during_layers(job, columns, ranks), _between_replicas(job, columns, ranks)),
    )


def own_rows(job: Job, rows: int, ranks: int) -> int:
    """How many of the rows that are touched lie on a rank: by columns a part of each, by rows their part."""
    return -(-rows // ranks) if job.by == "rows" else rows


def _gradient(job: Job, slots: int, columns: int, ranks: int) -> int:
    if job.values_grad == "dense":
        return slots * columns * job.element_bytes
    return own_rows(job, job.touched_rows(job.gpus), ranks) * (_ROW_NUMBER + columns * job.element_bytes)


def _during_layers(job: Job, columns: int, ranks: int) -> int:
    tokens = ranks * job.tokens
    return job.layers * tokens * job.hits * HIT + tokens * columns * job.element_bytes


def _between_replicas(job: Job, columns: int, ranks: int) -> int:
    replicas = job.gpus // ranks
    if replicas == 1 or job.values_grad == "dense":  # an all-reduce is in place
        return 0
    return replicas * own_rows(job, job.touched_rows(ranks), ranks) * (_ROW_NUMBER + columns * _FP32)
