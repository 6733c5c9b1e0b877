"""The sizes that groups may have, what each costs, which is the best, and which options help where none fits."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from memcompile.config import MAX_KEYS
from memcompile.cost.job import Job
from memcompile.cost.memory import Memory, memory_of
from memcompile.cost.time import Exchange, Hardware, Times, exchanges_of, times_of
from memcompile.errors import OptionError

MOST_GPUS = 2**16  # of those that are suggested


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
    most = job.slots if job.by == "rows" else job.value_dim
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
        memory = memory_of(job, ranks)
        layers, step = exchanges_of(job, hardware, ranks)
        times, fits = times_of(job, hardware, ranks), memory.total <= hardware.free_memory
        found.append(Candidate(ranks, job.gpus // ranks, memory, layers, step, times, fits))
    return found


def best(found: Sequence[Candidate]) -> Candidate | None:
    """The one that fits and takes the least time, of equals the smaller memory; None where none fits."""
    fitting = [c for c in found if c.fits]
    return min(fitting, key=lambda c: (c.times.total, c.memory.total)) if fitting else None


def alternatives(job: Job, hardware: Hardware) -> dict[str, Candidate]:
    """The best candidate with the other gradient, and by the other way to shard, by the option; only where some fit."""
    others = {name: c for name, c in _changes(job).items() if name.startswith(("--values-grad", "--by"))}
    found = {name: best(candidates(other, hardware)) for name, other in others.items()}
    return {name: c for name, c in found.items() if c is not None}


def remedies(job: Job, hardware: Hardware) -> list[str]:
    """What makes a job fit: one option, or if none does, all that save memory together; more GPUs; fewer slots."""
    helping = [option for option, changed in _changes(job).items() if _fits(changed, hardware)]
    least = replace(job, dtype="bf16", optimizer="row_wise_adagrad", master_weights=False)
    if not helping and _fits(least, hardware):
        helping.append("--dtype bf16 --optimizer row_wise_adagrad without --master-weights")
    gpus = _gpus_that_fit(job, hardware)
    if gpus is not None:
        helping.append(f"--gpus {gpus}")
    slots = _slots_that_fit(job, hardware)
    if slots is not None:
        helping.append(f"--slots {slots} (at most, {math.isqrt(slots)}**2)")
    return helping


def _changes(job: Job) -> dict[str, Job]:
    """Jobs that take another option each, by that option."""
    changes: dict[str, Job] = {}
    if job.master_weights:
        changes["without --master-weights"] = replace(job, master_weights=False)
    for option, values in {
        "optimizer": ("row_wise_adagrad",),
        "state_dtype": ("bf16",),
        "dtype": ("bf16",),
        "values_grad": ("sparse", "dense"),
        "by": ("columns", "rows"),
    }.items():
        for value in values:
            if getattr(job, option) != value:
                changes[f"--{option.replace('_', '-')} {value}"] = replace(job, **{option: value})  # type: ignore[arg-type]
    return changes


def _fits(job: Job, hardware: Hardware) -> bool:
    return any(memory_of(job, ranks).total <= hardware.free_memory for ranks in group_sizes(job, hardware))


def _gpus_that_fit(job: Job, hardware: Hardware) -> int | None:
    """The first doubling that fits, in whole nodes. There may be none, as more ranks also have more tokens."""
    gpus = job.gpus
    while gpus < MOST_GPUS:
        gpus *= 2
        if gpus > hardware.gpus_per_node:
            gpus = -(-gpus // hardware.gpus_per_node) * hardware.gpus_per_node
        if _fits(replace(job, gpus=gpus), hardware):
            return gpus
    return None


def _slots_that_fit(job: Job, hardware: Hardware) -> int | None:
    """The most that fit these GPUs; None where not even top_k**2 do."""
    sizes = range(job.top_k, MAX_KEYS + 1)
    fitting = bisect_right(sizes, 0, key=lambda n: not _fits(replace(job, slots=n**2), hardware))
    return sizes[fitting - 1] ** 2 if fitting else None
