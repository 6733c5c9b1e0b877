"""Says what each group size costs, which is the best and what was assumed: as a table, or as JSON types."""

from collections.abc import Sequence
from dataclasses import asdict
from textwrap import fill
from typing import Any

from memcompile.cost.groups import Candidate, alternatives, best, remedies
from memcompile.cost.job import Job
from memcompile.cost.time import Hardware

GIB, MIB = 2**30, 2**20
_STATES = {
    "adamw": "exp_avg and exp_avg_sq in {dtype}, and where the gradient is sparse last_step int32 [slots]",
    "lazy_adam": "exp_avg and exp_avg_sq in {dtype}",
    "row_wise_adagrad": "sum fp32 [slots]",
    "sgd": "none",
}
_COLUMNS = {
    "group": "ranks replicas",
    "GiB a rank": "values gradient states buffers total",
    "MiB received": "layers step",
    "ms a step": "layers step search gather update total",
}


def table(job: Job, hardware: Hardware, found: Sequence[Candidate]) -> str:
    """All candidates, the best one's collectives, and the assumptions; for people."""
    chosen = best(found)
    about_best = [misfit(job, hardware, found)] if chosen is None else _chosen(job, hardware, chosen)
    assumed = (fill(line, 118, initial_indent="- ", subsequent_indent="  ") for line in assumptions(job, hardware))
    nodes = -(-job.gpus // hardware.gpus_per_node)
    size = _gib(job.rows * job.row_dim * job.element_bytes)
    title = (
        f"memcompile estimate: {job.rows:,} slots ({job.n_keys:,} half-keys a side) x {job.row_dim:,} in "
        f"{job.dtype}, {size} GiB, on {job.gpus:,} GPU(s) in {nodes} node(s)"
    )
    parts = [[title], _candidates(found, chosen), about_best, ["assumed", *assumed]]
    return "\n\n".join("\n".join(lines) for lines in parts)


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
        "candidates": [
            {
                "ranks": c.ranks,
                "replicas": c.replicas,
                "fits": c.fits,
                "memory": asdict(c.memory) | {"total": c.memory.total},
                "exchanges": [asdict(e) | {"total_bytes": e.total_bytes} for e in c.exchanges],
                "seconds": asdict(c.times) | {"total": c.times.total},
            }
            for c in found
        ],
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
    if job.has_pairs:
        lines.append(f"a row is u and v, each of {job.value_dim:,} elements (--variant peer)")
    if job.tables == "separate":
        lines.append(f"each layer has {job.slots:,} of the slots (--tables separate)")
    if job.by == "rows":
        lines.append(f"the busiest rank has {job.skew:g} times the mean of the hits (--skew)")
    return lines


def _candidates(found: Sequence[Candidate], chosen: Candidate | None) -> list[str]:
    sections = []
    for (title, names), rows in zip(_COLUMNS.items(), zip(*map(_cells, found), strict=True), strict=True):
        header, *body = _aligned([names.split(), *rows], " ")
        sections.append([title.center(len(header)), header, "-" * len(header), *body])
    titles, headers, rule, *lines = zip(*sections, strict=True)
    marks = ["*" if c is chosen else " " if c.fits else "!" for c in found]
    legend = ["* the best"] * (chosen is not None) + ["! does not fit"] * ("!" in marks)
    return [
        f"  {' | '.join(titles).rstrip()}",
        f"  {' | '.join(headers)}",
        f"  {'-+-'.join(rule)}",
        *(f"{mark} {' | '.join(row)}" for mark, row in zip(marks, lines, strict=True)),
        "; ".join(legend),
    ]


def _cells(c: Candidate) -> list[list[str]]:
    """Of each section of the table."""
    memory, times = c.memory, c.times
    sizes = (memory.values + memory.masters, memory.gradient, memory.states, memory.buffers, memory.total)
    received = [sum(e.total_bytes for e in part) for part in (c.layer_exchanges, c.step_exchanges)]
    return [
        [f"{c.ranks:,}", f"{c.replicas:,}"],
        [_short(n / GIB) for n in sizes],
        [f"{n / MIB:,.0f}" for n in received],
        [_short(s * 1e3) for s in (*vars(times).values(), times.total)],
    ]


def _aligned(rows: Sequence[Sequence[str]], gap: str, left: int = 0) -> list[str]:
    """Lines of cells, the first `left` of which start at the left of their columns and the others end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    return [gap.join(side(cell, w) for side, cell, w in zip(sides, row, widths, strict=True)) for row in rows]


def _chosen(job: Job, hardware: Hardware, chosen: Candidate) -> list[str]:
    """The best candidate, what it sends, and the best ones of other jobs."""
    groups = f"{chosen.replicas:,} group(s) of {chosen.ranks:,} rank(s)"
    best_line = (
        f"best: {groups}, {chosen.times.total * 1e3:,.1f} ms a step, {_gib(chosen.memory.total)} GiB a rank of "
        f"{_gib(hardware.free_memory)} free"
    )
    rows = [["sent a step", "by", "over", "times", "MiB received", "ms"]]
    for e in chosen.exchanges:
        numbers = [str(e.count), f"{e.total_bytes / MIB:,.1f}", f"{e.seconds * 1e3:,.2f}"]
        rows.append([e.name, e.operation, e.over, *numbers])
    others = (
        f"with {option} the best were groups of {c.ranks:,}: {c.times.total * 1e3:,.1f} ms, {_gib(c.memory.total)} GiB"
        for option, c in alternatives(job, hardware).items()
    )
    return [best_line, *(_aligned(rows, "  ", left=3) if chosen.exchanges else ["nothing is sent"]), *others]


def _short(number: float) -> str:
    return f"{number:,.1f}" if number < 1000 else f"{number:,.0f}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}"
