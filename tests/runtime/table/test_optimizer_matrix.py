"""docs/optimizers.md says of each optimizer what it does: `make docs` writes it anew."""

from __future__ import annotations

import pytest

from tests.runtime.table.optimizer_kinds import Kind, kinds
from tests.runtime.table.optimizer_matrix import COMMITTED, differences, row


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: f"{kind.package} {kind.name}")
def test_each_optimizer_trains_or_is_refused_as_the_page_says(kind: Kind):
    assert row(kind) in COMMITTED.read_text().splitlines()


def test_the_page_has_no_others():
    lines = [line for line in COMMITTED.read_text().splitlines() if line.startswith("| ")]
    assert len(lines) == len(kinds()) + 2


def test_differences_are_seen():
    assert differences({"a": [1.0, 2.0]}, {"a": [1.0, 2.1]}) == [" a 1: 2.0 and 2.1"]
    assert differences({"a": 1}, {"a": 1, "b": 2}) == [": ['b']"]
