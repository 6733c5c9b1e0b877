"""Runs many generated models, and tells each cause of a deviation once, on the smallest model that shows it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import logging
from collections.abc import Callable, Iterator, Sequence

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.check import DoesNotRun, Finding, alike, check, reduced
from tests.fuzz.grammar import models
from tests.fuzz.spec import Model, features

_PLAIN = frozenset(features(Model()))
_RENEWED = 50  # models after which what Hypothesis keeps of them is hidden: it is 5 times as slow at the 2,000th else


@dataclasses.dataclass
class Group:
    """Findings of one cause: what they say, and the choices without which it does not happen."""

    finding: Finding
    choices: frozenset[str]
    count: int = 1

    def explains(self, finding: Finding, model: Model) -> bool:
        return alike(self.finding, finding) and self.choices <= set(features(model))


@dataclasses.dataclass
class Survey:
    """What a run generated and found; ``broken`` are models that do not run, which are none of the examples."""

    generated: collections.Counter[str]
    groups: list[Group]
    examples: int = 0
    broken: list[str] = dataclasses.field(default_factory=list)


def survey(examples: int, random_seed: int, progress: Callable[[], None] = lambda: None) -> Survey:
    """Checks ``examples`` models."""
    result = Survey(collections.Counter(), [])

    @seed(random_seed)
    @settings(
        max_examples=examples,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(models())
    def run(model: Model) -> None:
        try:
            findings = check(model)
        except DoesNotRun as error:
            result.broken.append(str(error))
            return
        result.examples += 1
        result.generated.update(set(features(model)))
        for finding in findings:
            known = next((group for group in result.groups if group.explains(finding, model)), None)
            if known is not None:
                known.count += 1
            else:
                simple, small = reduced(model, finding)
                result.groups.append(Group(small, frozenset(features(simple)) - _PLAIN))
        if result.examples % _RENEWED == 0:
            _hide_live_objects()
        progress()

    with quick_detector():
        run()
    return result


def merged(surveys: Sequence[Survey]) -> Survey:
    """What several runs together generated and found."""
    result = Survey(collections.Counter(), [])
    for part in surveys:
        result.examples += part.examples
        result.generated += part.generated
        result.broken += part.broken
        for group in part.groups:
            same = [g for g in result.groups if g.choices == group.choices and alike(g.finding, group.finding)]
            if same:
                same[0].count += group.count
            else:
                result.groups.append(group)
    return result


@contextlib.contextmanager
def quick_detector() -> Iterator[None]:
    """Hides every live object from the detector, and mutes its warnings about inputs that do not run."""
    logger = logging.getLogger("memcompile")
    level = logger.level
    logger.setLevel(logging.ERROR)
    check(Model())  # what is loaded at first use is there
    _hide_live_objects()
    try:
        yield
    finally:
        gc.unfreeze()
        logger.setLevel(level)


def _hide_live_objects() -> None:
    """The detector looks at every live object, to forget fake tensors in caches: at those made from now on."""
    gc.collect()
    gc.freeze()
