"""``make fuzz``: many generated models in several processes; tells what deviated and how often each form was made."""

from __future__ import annotations

import argparse
import itertools
import random
import sys

from tests.fuzz import spec
from tests.fuzz.misses import MISSES
from tests.fuzz.processes import run
from tests.fuzz.survey import Survey, merged

_CHOICES = {
    "ffn.home": spec.HOMES,
    "ffn.projection": spec.PROJECTIONS,
    "ffn.gating": spec.GATINGS,
    "ffn.activation": spec.ACTIVATIONS,
    "ffn.cast": spec.CASTS,
    "ffn.inner_norm": spec.INNER_NORMS,
    "ffn.dropout": spec.DROPOUTS,
    "block.layout": spec.LAYOUTS,
    "block.norm": spec.NORMS,
    "block.mixer": spec.MIXERS,
    "block.residual": spec.RESIDUALS,
    "block.scale": spec.SCALES,
    "model.stem": spec.STEMS,
    "model.head": spec.HEADS,
    "model.output": spec.OUTPUTS,
    "model.dtype": spec.DTYPES,
    "model.cache": spec.CACHES,
    "miss": tuple(MISSES),
}
_SWITCHES = """ffn.bias ffn.gate_last ffn.flat block.late block.drop_path block.checkpoint block.shared
    model.training model.guess""".split()
_RARE = 500  # a choice that is made less than once in so many models is one that the strategy hardly ever makes


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--examples", type=int, default=5000)
    arguments.add_argument("--processes", type=int, default=2)
    arguments.add_argument("--seed", type=int, default=random.randrange(2**32))
    options = arguments.parse_args()
    print(f"seed {options.seed}")
    result = merged(run(options.examples, options.processes, options.seed))
    rare = _print_table(result)
    for group in sorted(result.groups, key=lambda group: group.finding.kind):
        choices = ", ".join(sorted(group.choices)) or "the simplest model"
        print(f"\n{'=' * 100}\n{group.count} times, needs {choices}\n{group.finding}")
    causes, broken = len(result.groups), len(result.broken)
    for text in result.broken[:1]:
        print(f"\n{'=' * 100}\na generated model that does not run by itself: {text}")
    print(f"\n{result.examples} models, {causes} causes of deviations, {len(rare)} choices hardly ever made: {rare}")
    print(f"{broken} more did not run by themselves")
    return 1 if causes or rare or broken > result.examples // _RARE else 0


def _print_table(result: Survey) -> list[str]:
    """How many models had each choice; returns those that hardly any had."""
    choices = _CHOICES | dict.fromkeys(_SWITCHES, (False, True))
    names = [f"{field}: {choice}" for field in choices for choice in choices[field]]
    for field, lines in itertools.groupby(names, key=lambda name: name.partition(":")[0]):
        print(f"\n{field}")
        for name in lines:
            print(f"{result.generated[name]:8}  {name.partition(': ')[2]}")
    return [name for name in names if result.generated[name] < result.examples // _RARE]


if __name__ == "__main__":
    sys.exit(main())
