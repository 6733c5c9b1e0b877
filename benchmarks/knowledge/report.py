"""Tables of what was measured, and the goals."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.harness.results import Goal
from benchmarks.harness.tables import goal_tables, table
from benchmarks.knowledge.systems import SYSTEMS

Result = Mapping[str, Any]  # of one training, as in its file
Seeds = Sequence[Result]  # trainings that differ in the seed alone
EQUAL = 0.15  # two sizes are about equal where they differ by less


def measured(results: Iterable[Result], size: str) -> dict[str, Seeds]:
    """By system, in the order of SYSTEMS: the trainings that did not diverge."""
    kept = [r for r in results if r["size"] == size and not r["diverged"]]
    by_system = {system: [r for r in kept if r["system"] == system] for system in SYSTEMS}
    return {system: runs for system, runs in by_system.items() if runs}


def mean(runs: Seeds, measure: str | Callable[[Result], float]) -> float:
    return statistics.fmean(map(_getter(measure), runs))


def bits_per_parameter(run: Result) -> float:
    return run["known_bits"] / run["parameters"]


def bits_per_byte(run: Result) -> float:
    """Of the bytes that a token reads."""
    return run["known_bits"] / run["bytes"]


def _getter(measure: str | Callable[[Result], float]) -> Callable[[Result], float]:
    return measure if callable(measure) else lambda run: run[measure]


def _spread(runs: Seeds, measure: str | Callable[[Result], float], form: str) -> str:
    """The mean, and with several seeds the standard deviation; empty for what a system does not have."""
    values = [*map(_getter(measure), runs)]
    if None in values:
        return ""
    shown = format(statistics.fmean(values), form)
    return f"{shown} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else shown


COLUMNS: dict[str, tuple[str | Callable[[Result], float], str]] = {
    "parameters": ("parameters", ",.0f"),
    "active": ("active", ",.0f"),
    "FLOPs/token": ("flops", ",.0f"),
    "bytes/token": ("bytes", ",.0f"),
    "recall": ("recall", ".1%"),
    "held-out template": ("held_out", ".1%"),
    "answer bits": ("answer_bits", ".2f"),
    "bits/parameter": (bits_per_parameter, ".4f"),
    "bits/active byte": (bits_per_byte, ".4f"),
    "training s": ("train_seconds", ".0f"),
    "slots used": ("slots_used", ".0%"),  # the share of them whose row training changed
}


def _row(name: str, runs: Seeds) -> list[str]:
    constant = {"parameters", "active", "FLOPs/token", "bytes/token"}
    return [
        name,
        *(format(mean(runs, m), f) if c in constant else _spread(runs, m, f) for c, (m, f) in COLUMNS.items()),
    ]


def comparison_tables(results: Sequence[Result], size: str) -> list[str]:
    """Equal FLOPs, equal parameters, and text that is no facts."""
    systems = measured(results, size)
    shown = []
    for title, cost, of in (("FLOPs a token", "flops", "dense"), ("parameters", "parameters", "memory+")):
        if of not in systems:
            continue
        asked = mean(systems[of], cost)
        equal = {name: runs for name, runs in systems.items() if abs(mean(runs, cost) / asked - 1) < EQUAL}
        rows = [_row(name, runs) for name, runs in equal.items()]
        shown.append(f"{size}: about the {title} of {of}\n\n{table(['', *COLUMNS], rows)}")
    others = [
        _row(name, runs) for name, runs in systems.items() if mean(runs, "flops") >= (1 + EQUAL) * _flops(systems)
    ]
    if others:
        shown.append(f"{size}: more FLOPs a token\n\n{table(['', *COLUMNS], others)}")
    dense = mean(systems["dense"], "text_bits_per_byte") if "dense" in systems else None
    rows = [
        [
            name,
            _spread(runs, "text_bits_per_byte", ".4f"),
            f"{mean(runs, 'text_bits_per_byte') / dense - 1:+.2%}" if dense else "",
        ]
        for name, runs in systems.items()
    ]
    if rows:
        heads = ["", "bits a byte", "against dense"]
        shown.append(f"{size}: source code that was not trained\n\n{table(heads, rows)}")
    return shown


def _flops(systems: Mapping[str, Seeds]) -> float:
    """Of dense; without it, of the smallest."""
    return mean(systems["dense"], "flops") if "dense" in systems else min(mean(r, "flops") for r in systems.values())


def relation_table(results: Sequence[Result], size: str) -> list[str]:
    systems = measured(results, size)
    if not systems:
        return []
    relations = next(iter(systems.values()))[0]["recall_by_relation"]

    def recall_of(relation: str) -> list[str]:
        return [f"{mean(runs, lambda run: run['recall_by_relation'][relation]):.1%}" for runs in systems.values()]

    rows = [[relation, *recall_of(relation)] for relation in relations]
    return [f"{size}: recall by relation\n\n{table(['', *systems], rows)}"]


def tuning_table(results: Sequence[Result]) -> list[str]:
    """Every learning rate that was tried."""
    rows = [
        [
            f"{r['system']}, {r['size']}",
            f"{r['rates']['lr']:g}",
            "" if r["rates"]["values_lr"] is None else f"{r['rates']['values_lr']:g}",
            "diverged" if r["diverged"] else f"{r['recall']:.1%}",
            "" if r["diverged"] else f"{r['text_bits_per_byte']:.4f}",
        ]
        for r in results
    ]
    heads = ["learning rates that were tried", "lr", "of values", "recall", "text, bits a byte"]
    return [table(heads, rows)] if rows else []


def sweep_table(results: Sequence[Result]) -> list[str]:
    rows = []
    for r in results:
        options = ", ".join(f"{name} {value}" for name, value in r["options"].items())
        figures = [f"{r['parameters']:,}", f"{r['flops']:,.0f}"]
        if r["diverged"]:
            rows.append([r["sweep"], options, *figures, "diverged", "", "", "", "", ""])
            continue
        reached = [f"{r['recall']:.1%}", f"{r['held_out']:.1%}", f"{r['answer_bits']:.2f}"]
        rows.append(
            [
                *(r["sweep"], options, *figures, *reached, f"{bits_per_parameter(r):.4f}"),
                *(f"{r['text_bits_per_byte']:.4f}", _spread([r], "slots_used", ".0%")),
            ]
        )
    names = ("options", "parameters", "FLOPs/token", "recall", "held-out template", "answer bits", "bits/parameter")
    return [table(["sweep", *names, "text, bits a byte", "slots used"], rows)] if rows else []


def judge(results: Sequence[Result], size: str) -> list[Goal]:
    """The goals of this comparison that can be judged: both systems have been trained."""
    systems = measured(results, size)

    def goal(name: str, asked: str, other: str, met: Callable[[Seeds, Seeds], tuple[str, bool]]) -> list[Goal]:
        if "memory+" not in systems or other not in systems:
            return []
        reached, is_met = met(systems["memory+"], systems[other])
        return [Goal(name, asked, size, reached, is_met)]

    def recall_ratio(measure: str, least: float, most_flops: float) -> Callable[[Seeds, Seeds], tuple[str, bool]]:
        def met(ours: Seeds, other: Seeds) -> tuple[str, bool]:
            recalls, flops = (mean(ours, m) / max(mean(other, m), 1e-9) for m in (measure, "flops"))
            return f"{recalls:.2f} x at {flops:.2f} x FLOPs", recalls >= least and flops <= most_flops

        return met

    def text(ours: Seeds, other: Seeds) -> tuple[str, bool]:
        ratio = mean(ours, "text_bits_per_byte") / mean(other, "text_bits_per_byte")
        return f"{ratio - 1:+.2%}", ratio <= 1.01

    against = {
        "dense": ("at least 2 x the recall, at no more FLOPs", 2, 1),
        "dense2x": ("more recall", 1, 1),
        "moe": ("more recall", 1, 1.05),
        "peer": ("no less recall", 1, 1.05),
    }
    goals = [
        goal(f"memory+ against {other}{where}", asked, other, recall_ratio(measure, least, most_flops))
        for measure, where in (("recall", ""), ("held_out", ", held-out template"))
        for other, (asked, least, most_flops) in against.items()
    ]
    goals.append(goal("memory+'s loss on source code", "at most 1% above dense", "dense", text))
    return [judged for of_one in goals for judged in of_one]


def report(results: Sequence[Result], tuning: Sequence[Result], sweeps: Sequence[Result], goals: Sequence[Goal]) -> str:
    sizes = dict.fromkeys(r["size"] for r in results)
    parts = [part for size in sizes for part in (*comparison_tables(results, size), *relation_table(results, size))]
    parts += [*tuning_table(tuning), *sweep_table(sweeps), *goal_tables(goals, "goals")]
    diverged = [r for r in results if r["diverged"]]
    parts += [f"{len(diverged)} training(s) diverged and are in no mean: see the results"] if diverged else []
    return "\n\n".join(parts)
