"""Which trainings there are: tuning, the comparison, sweeps. Short in minutes, full in hours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.knowledge.data import Sizes
from benchmarks.knowledge.systems import SIZES, SYSTEMS, Rates
from benchmarks.knowledge.training import Run

SWEPT = "memory+"  # the system of the sweeps
# Options of memcompile over those of the system, by the name of what is asked. A sweep is compared with itself alone:
# the options that stay the same in it may be others than those of the comparison.
SWEEPS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "slots": [{"n_keys": n, "top_k": 16} for n in (16, 32, 64, 128, 256, 512)],
    "layers": [{"memory_layers": number} for number in (1, 2, 3, 4)],
    "placement": [{"memory_layers": layers} for layers in ([0], [1], [2], [3], [0, 1], [1, 2], [2, 3])],
    "tables": [{"tables": "shared"}, {"tables": "separate"}, {"tables": "separate", "n_keys": 148}],
    "gate": [{"gate": gate} for gate in (True, False)],
    "weighting": [{"weighting": weighting} for weighting in ("softmax", "sigmoid")],
    "balance_loss": [{"balance_loss": factor} for factor in (0.0, 0.01, 0.1)],
    "query_norm": [{"query_norm": norm} for norm in ("none", "batch")],
    "qk_norm": [{"qk_norm": norm} for norm in (False, True)],
    "key_dim": [{"key_dim": dim} for dim in (8, 16, 32, 64)],
    "value_dim": [{"value_dim": dim} for dim in (12, 24, 48, 96)],
    "slots against value_dim": [
        {"n_keys": n, "value_dim": dim} for n, dim in ((128, 192), (181, 96), (256, 48), (362, 24))
    ],
    "heads against top_k": [{"heads": heads, "top_k": 64 // heads} for heads in (1, 2, 4, 8)],
    "values_lr": [{"values_lr": lr} for lr in (0.001, 0.003, 0.01, 0.03, 0.1)],
}


@dataclass(frozen=True)
class Plan:
    """Attributes:
    tuning_steps: of each training that chooses learning rates, with the seed TUNED_BY; 0: no choice, the first
        rates of each system are taken.
    sweeps: keys of SWEEPS, at the first of `sizes` and of `seeds`.
    """

    name: str
    data: Sizes
    systems: tuple[str, ...]
    sizes: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    tuning_steps: int = 0
    sweeps: tuple[str, ...] = ()


TUNED_BY = 100  # a seed of its own, so that no result has the luck of the choice
_DATA = Sizes(2000, vocabulary=512, rows=30, text_rows=2)
SHORT = Plan("short", _DATA, ("dense", "moe", "memory+"), ("small",), seeds=(0,), steps=700)
FULL = Plan(
    "full",
    replace(_DATA, facts=4000),
    systems=tuple(SYSTEMS),
    sizes=tuple(SIZES),
    seeds=(0, 1, 2),
    steps=1200,
    tuning_steps=1200,
    sweeps=tuple(SWEEPS),
)
Chosen = Mapping[tuple[str, str], Rates]  # by system and size


class Runs:
    """The trainings of a plan on data of this digest."""

    def __init__(self, plan: Plan, digest: str, compiled: bool = False) -> None:
        self._plan, self._digest, self._compiled = plan, digest, compiled

    def _run(self, system: str, size: str, seed: int, rates: Rates, steps: int, **options: Any) -> Run:
        return Run(system, size, seed, rates, steps, self._plan.data.facts, self._digest, options, self._compiled)

    def tuning(self) -> list[Run]:
        """Every system at each of its rates: the same number of trainings for each."""
        plan = self._plan
        if not plan.tuning_steps:
            return []
        return [
            self._run(system, size, TUNED_BY, rates, plan.tuning_steps)
            for size in plan.sizes
            for system in plan.systems
            for rates in SYSTEMS[system].rates
        ]

    def comparison(self, chosen: Chosen) -> list[Run]:
        plan = self._plan
        return [
            self._run(system, size, seed, self.rates(chosen, system, size), plan.steps)
            for size in plan.sizes
            for seed in plan.seeds
            for system in plan.systems
        ]

    def sweeps(self, chosen: Chosen) -> list[tuple[str, Run]]:
        """With the names of the sweeps. A training that two of them have in common stands in both."""
        plan = self._plan
        size = plan.sizes[0]
        rates = self.rates(chosen, SWEPT, size)
        return [
            (sweep, self._run(SWEPT, size, plan.seeds[0], rates, plan.steps, **options))
            for sweep in plan.sweeps
            for options in SWEEPS[sweep]
        ]

    def rates(self, chosen: Chosen, system: str, size: str) -> Rates:
        return chosen.get((system, size), SYSTEMS[system].rates[0])


def chosen_rates(results: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], Rates]:
    """The rates of the highest recall, by system and size; of equals the first."""
    best: dict[tuple[str, str], Mapping[str, Any]] = {}
    for result in results:
        key = result["system"], result["size"]
        if not result["diverged"] and (key not in best or result["recall"] > best[key]["recall"]):
            best[key] = result
    return {key: Rates(**result["rates"]) for key, result in best.items()}


def work(run: Run) -> int:
    """Of a training, in steps of the dense model of the first size: for the estimate of what remains."""
    size, first = SIZES[run.size], next(iter(SIZES.values()))
    share = size.width**2 * size.blocks / (first.width**2 * first.blocks)
    return max(1, round(SYSTEMS[run.system].flops * share)) * run.steps
