"""Says what each group size costs, which is the best and what was assumed: as a table, or as JSON types."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from textwrap import fill
from typing import Any

from memcompile.cost.groups import Candidate, alternatives, best, remedies
from memcompile.cost.job import Job
from memcompile.cost.time import Exchange, Hardware

GIB, MIB = 2**30, 2**20
_STATES = {
    "adamw": "exp_avg and exp_avg_sq in {dtype}, and where the gradient is sparse last_step int32 [slots]",
    "lazy_adam": "exp_avg and exp_avg_sq in {dtype}",
    "row_wise_adagrad": "sum fp32 [slots]",
    "sgd": "none",
}
_HEADER = (
    "ranks replicas values gradient states buffers total layers step layers step search gather update total".split()
)
_SECTIONS = ((2, "group"), (5, "GiB a rank"), (2, "MiB received"), (6, "ms a step"))


def table(job: Job, hardware: Hardware, found: Sequence[Candidate]) -> str:
    """All candidates, the best one's collectives, and the assumptions; for people."""
    chosen = best(found)
    lines = [_title(job, hardware), "", *_candidates(found, chosen), ""]
    if chosen is None:
        lines += [misfit(job, hardware, found), ""]
    else:
        lines += [*_chosen(chosen, hardware), *_alternatives(job, hardware), ""]
    assumed = (fill(line, 118, initial_indent="- ", subsequent_indent="  ") for line in assumptions(job, hardware))
    return "\n".join([*lines, "assumed", *assumed])


def misfit(job: Job, hardware: Hardware, found: Sequence[Candidate]) -> str:
    """Why no group size fits, and what would help."""
    least = min(found, key=lambda c: c.memory.total)
    helping = remedies(job, hardware)
    return (
        f"does not fit: groups of {least.ranks} take the least, {_gib(least.memory.total)} GiB a rank, and "
        f"{_gib(hardware.free_memory)} of {_gib(hardware.gpu_memory)} GiB are free next to the rest of the model.\n"
        + ("It would fit with any one of: " + "; ".join(helping) if helping else "No option makes it fit.")
    )


def as_json(job: Job, hardware: Hardware, found: Sequence[Candidate]) -> dict[str, Any]:
    """The same in plain JSON types: bytes and seconds a rank and step. "best" is None where nothing fits."""
    chosen = best(found)
    return {
        "job": asdict(job),
        "hardware": asdict(hardware),
        "candidates": [_candidate_as_json(c) for c in found],
        "best": None if chosen is None else chosen.ranks,
        "remedies": remedies(job, hardware) if chosen is None else [],
        "assumptions": assumptions(job, hardware),
    }


def assumptions(job: Job, hardware: Hardware) -> list[str]:
    """What the numbers assume, a sentence each, with the options that change it."""
    states = _STATES[job.optimizer].format(dtype=job.state_dtype)
    masters = "with fp32 masters" if job.master_weights else "without masters"
    lines = [
        f"each rank brings {job.tokens:,} tokens a step to {job.layers} layer(s), {job.heads} heads x top {job.top_k} "
        f"= {job.hits} hits a token",
        f"values in {job.dtype} {masters}, a {job.values_grad} gradient, by {job.by}; "
        f"states of {job.optimizer}: {states}",
        f"a step touches {job.touched_rows(job.gpus):,} distinct rows on all GPUs: {job.unique:g} of what uniform hits "
        "would (--unique; real hits repeat some slots, and touch fewer)",
        f"bytes/s a GPU: NVLink {hardware.nvlink / 1e9:g} GB/s in nodes of {hardware.gpus_per_node}, network "
        f"{hardware.network / 1e9:g} GB/s, HBM {hardware.hbm / 1e9:g} GB/s; {hardware.nvlink_latency * 1e6:g} and "
        f"{hardware.network_latency * 1e6:g} us a collective; peak rates unless you gave measured ones",
        f"memory is read in pieces of {hardware.granule} bytes: shorter pieces of rows waste the rest; no caches",
        f"{_gib(hardware.model_memory)} GiB of {_gib(hardware.gpu_memory)} are the rest of the model (--model-memory)",
        "nothing overlaps; matrix products, launches and reads of moments for rows that are behind are not counted",
    ]
    if job.by == "rows":
        lines.append(f"the busiest rank has {job.skew:g} times the mean of the hits (--skew)")
    return lines


def _title(job: Job, hardware: Hardware) -> str:
    nodes = -(-job.gpus // hardware.gpus_per_node)
    size = _gib(job.slots * job.value_dim * job.element_bytes)
    return (
        f"memcompile estimate: {job.slots:,} slots ({job.n_keys:,} half-keys a side) x {job.value_dim:,} in "
        f"{job.dtype}, {size} GiB, on {job.gpus:,} GPU(s) in {nodes} node(s)"
    )


def _candidates(found: Sequence[Candidate], chosen: Candidate | None) -> list[str]:
    rows = [_HEADER, *(_cells(c) for c in found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    starts = [sum(count for count, _ in _SECTIONS[:i]) for i in range(len(_SECTIONS) + 1)]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(w) for cell, w in zip(cells, widths, strict=True)]
        return " | ".join(" ".join(padded[a:b]) for a, b in pairwise(starts))

    sections = [
        name.center(sum(widths[a:b]) + b - a - 1) for (_, name), (a, b) in zip(_SECTIONS, pairwise(starts), strict=True)
    ]
    rule = "-+-".join("-" * (sum(widths[a:b]) + b - a - 1) for a, b in pairwise(starts))
    marks = ["*" if c is chosen else " " if c.fits else "!" for c in found]
    body = [f"{mark} {line(row)}" for mark, row in zip(marks, rows[1:], strict=True)]
    legend = ["* the best", *(["! does not fit"] if "!" in marks else [])]
    return [
        f"  {' | '.join(sections).rstrip()}",
        f"  {line(_HEADER)}",
        f"  {rule}",
        *body,
        "; ".join(legend if chosen else legend[1:]),
    ]


def _cells(c: Candidate) -> list[str]:
    memory, times = c.memory, c.times
    sizes = (memory.values + memory.masters, memory.gradient, memory.states, memory.buffers, memory.total)
    received = [sum(e.received_bytes for e in part) for part in (c.layer_exchanges, c.step_exchanges)]
    seconds = (times.layers_wire, times.step_wire, times.search, times.gather, times.update, times.total)
    return [
        f"{c.ranks:,}",
        f"{c.replicas:,}",
        *(_short(n / GIB) for n in sizes),
        *(f"{n / MIB:,.0f}" for n in received),
        *(_short(s * 1e3) for s in seconds),
    ]


def _chosen(chosen: Candidate, hardware: Hardware) -> list[str]:
    exchanges = [*chosen.layer_exchanges, *chosen.step_exchanges]
    groups = f"{chosen.replicas:,} group(s) of {chosen.ranks:,} rank(s)"
    lines = [
        f"best: {groups}, {chosen.times.total * 1e3:,.1f} ms a step, {_gib(chosen.memory.total)} GiB a rank of "
        f"{_gib(hardware.free_memory)} free"
    ]
    if not exchanges:
        return [*lines, "nothing is sent"]
    header = ["sent a step", "by", "over", "times", "MiB received", "ms"]
    rows = [header, *(_exchange_cells(e) for e in exchanges)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        texts = [cell.ljust(w) for cell, w in zip(row[:3], widths[:3], strict=True)]
        numbers = [cell.rjust(w) for cell, w in zip(row[3:], widths[3:], strict=True)]
        lines.append("  ".join(texts + numbers))
    return lines


def _alternatives(job: Job, hardware: Hardware) -> list[str]:
    return [
        f"with {option} the best were groups of {c.ranks:,}: {c.times.total * 1e3:,.1f} ms, {_gib(c.memory.total)} GiB"
        for option, c in alternatives(job, hardware).items()
    ]


def _exchange_cells(e: Exchange) -> list[str]:
    c = e.collective
    return [c.name, c.operation, c.over, str(e.count), f"{e.received_bytes / MIB:,.1f}", f"{e.seconds * 1e3:,.2f}"]


def _candidate_as_json(c: Candidate) -> dict[str, Any]:
    exchanges = [*c.layer_exchanges, *c.step_exchanges]
    return {
        "ranks": c.ranks,
        "replicas": c.replicas,
        "fits": c.fits,
        "memory": asdict(c.memory) | {"total": c.memory.total},
        "exchanges": [
            asdict(e.collective) | {"count": e.count, "total_bytes": e.received_bytes, "seconds": e.seconds}
            for e in exchanges
        ],
        "seconds": asdict(c.times) | {"total": c.times.total},
    }


def _short(number: float) -> str:
    return f"{number:,.1f}" if number < 1000 else f"{number:,.0f}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}"
