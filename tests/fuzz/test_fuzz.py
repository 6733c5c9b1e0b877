"""The detector and the stand-ins on generated models, whose truth is known. ``make fuzz`` runs many more."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, note, reject, settings

from tests.fuzz.check import DoesNotRun, check
from tests.fuzz.grammar import models
from tests.fuzz.source import write
from tests.fuzz.spec import Model
from tests.fuzz.survey import quick_detector


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_detector():
        yield


class FalsePositive(AssertionError):
    """What is no FFN was accepted."""


class Missed(AssertionError):
    """An FFN was not accepted."""


class StandInFailure(AssertionError):
    """What was accepted does not run as a memory."""


# Hypothesis tells failures apart by their types, and shrinks each.
FAILURES = {"false positive": FalsePositive, "miss": Missed, "stand-in": StandInFailure}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(models())
def test_exactly_the_ffns_are_found_and_run(model: Model):
    note(write(model).code)
    try:
        findings = check(model)
    except DoesNotRun:
        reject()
    for finding in findings:
        raise FAILURES[finding.kind](finding)
