"""The sizes that groups may have, what each costs, which is the best, and which options help where none fits."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

from memcompile.config import MAX_SLOTS
from memcompile.cost.job import Job
from memcompile.cost.memory import Memory, memory_of
from memcompile.cost.time import Exchange, Hardware, Times, exchanges_of, times_of
from memcompile.errors import OptionError

NUMBERS_OF_GPUS = tuple(2**n for n in range(3, 11))  # of `best_by_gpus`: 8 to 1,024
MOST_GPUS = 2**16  # of those that are suggested
_WAYS = [("values_grad", "sparse"), ("values_grad", "dense"), ("by", "columns"), ("by", "rows")]
_SAVINGS = [("optimizer", "row_wise_adagrad"), ("state_dtype", "bf16"), ("dtype", "bf16"), *_WAYS]


@dataclass(frozen=True)
class Candidate:
    """Memory groups of `ranks` ranks, `replicas` of them, and what a rank then holds, receives and takes in a step."""

    ranks: int
    replicas: int
    memory: Memory
    layer_exchanges: tuple[Exchange, ...]
    step_exchanges: tuple[Exchange, ...]
    times: Times
    fits: bool

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """All of a step."""
        return self.layer_exchanges + self.step_exchanges


def group_sizes(job: Job, hardware: Hardware) -> list[int]:
    """Divisors of the GPUs that fill nodes or divide them, up to one column (or row) a rank; ascending.

    Raises:
        OptionError: the GPUs do not fill their nodes.
    """
    node = hardware.gpus_per_node
    if job.gpus > node and job.gpus % node:
        raise OptionError(
            f"gpus={job.gpus} do not fill nodes of gpus_per_node={node}: "
            f"use {job.gpus // node * node} or {(job.gpus // node + 1) * node} GPUs, or another gpus_per_node"
        )
    most = job.rows if job.by == "rows" else job.row_dim
    node = min(node, job.gpus)
    divisors = (m for m in range(1, min(job.gpus, most) + 1) if job.gpus % m == 0)
    return [m for m in divisors if m % node == 0 or node % m == 0]


def candidates(job: Job, hardware: Hardware) -> list[Candidate]:
    """Every group size with its costs, ascending.

    Raises:
        OptionError: as `group_sizes`.
    """
    found = []
    for ranks in group_sizes(job, hardware):
        memory, times = memory_of(job, ranks), times_of(job, hardware, ranks)
        fits = memory.total <= hardware.free_memory
        found.append(Candidate(ranks, job.gpus // ranks, memory, *exchanges_of(job, hardware, ranks), times, fits))
    return found


def best(found: Sequence[Candidate]) -> Candidate | None:
    """The one that fits and takes the least time, of equals the smaller memory; None where none fits."""
    fitting = [c for c in found if c.fits]
    return min(fitting, key=lambda c: (c.times.total, c.memory.total)) if fitting else None


def best_by_gpus(job: Job, hardware: Hardware) -> dict[int, Candidate | None]:
    """The best candidate for each number of GPUs that fills its nodes; None where none fits."""
    node = hardware.gpus_per_node
    numbers = (n for n in NUMBERS_OF_GPUS if n <= node or n % node == 0)
    return {n: best(candidates(replace(job, gpus=n), hardware)) for n in numbers}


def alternatives(job: Job, hardware: Hardware) -> dict[str, Candidate]:
    """The best candidate with the other gradient, and by the other way to shard, by the option; only where some fit."""
    found = {words: best(candidates(replace(job, **change), hardware)) for words, change in _changes(job, _WAYS)}
    return {words: candidate for words, candidate in found.items() if candidate is not None}


def remedies(job: Job, hardware: Hardware) -> list[str]:
    """What makes a job fit: one option, or if none does, all that save memory together; more GPUs; fewer slots."""

    def fits(**changes: Any) -> bool:
        changed = replace(job, **changes)
        return any(memory_of(changed, ranks).total <= hardware.free_memory for ranks in group_sizes(changed, hardware))

    helping = ["without --master-weights"] if job.master_weights and fits(master_weights=False) else []
    helping += [words for words, change in _changes(job, _SAVINGS) if fits(**change)]
    if not helping and fits(dtype="bf16", optimizer="row_wise_adagrad", master_weights=False):
        helping.append("--dtype bf16 --optimizer row_wise_adagrad without --master-weights")
    gpus, node = job.gpus, hardware.gpus_per_node
    while gpus < MOST_GPUS:  # doublings, in whole nodes; there may be none that fits, as more ranks have more tokens
        gpus = 2 * gpus if 2 * gpus <= node else -(-2 * gpus // node) * node
        if fits(gpus=gpus):
            helping.append(f"--gpus {gpus}")
            break
    n_keys = range(job.top_k, isqrt(MAX_SLOTS * job.slots // job.rows) + 1)
    fitting = n_keys[: bisect_right(n_keys, False, key=lambda n: not fits(slots=n**2))]
    if fitting:
        helping.append(f"--slots {fitting[-1] ** 2} (at most, {fitting[-1]}**2)")
    return helping


def _changes(job: Job, choices: Sequence[tuple[str, str]]) -> list[tuple[str, dict[str, Any]]]:
    """Those of the choices that the job does not have, each as it is written and as the option of a `Job`."""
    others = [(name, value) for name, value in choices if getattr(job, name) != value]
    if job.has_pairs:
        others = [change for change in others if change != ("by", "columns")]
    return [(f"--{name.replace('_', '-')} {value}", {name: value}) for name, value in others]
