"""What the tests of the benchmark of knowledge share: made-up facts and text, a tiny size, a plan of it."""

import pytest

from benchmarks.knowledge.data import Corpus, Sizes
from benchmarks.knowledge.facts import Fact
from benchmarks.knowledge.plan import Plan
from benchmarks.knowledge.systems import SIZES, Size

DATA = Sizes(facts=0, text_bytes=4000, vocabulary=320, rows=4, text_rows=2)
TINY = Size(16, 2, {"memory_layers": 1, "n_keys": 8, "heads": 2, "top_k": 4, "key_dim": 8})


def subjects(count=12):
    """Airports with two facts each, whose answers are half of them alike."""
    return [
        (
            Fact("airport country", f"Q{i:02}X", ("Chad", "Peru")[i % 2]),
            Fact("airport elevation", f"Q{i:02}X", str(100 + 7 * i)),
        )
        for i in range(count)
    ]


def corpus(count=12):
    text = "".join(f"def function_{i}(x):\n    return x + {i}\n" for i in range(100))
    other = "".join(f"class Name{i}:\n    value = {i}\n" for i in range(40))
    return Corpus(DATA, subjects(count), text, other)


def plan(**changes):
    return Plan(
        **{"name": "test", "data": DATA, "systems": ("dense", "memory+"), "sizes": ("tiny",), "seeds": (0,), "steps": 4}
        | changes
    )


@pytest.fixture
def tiny(monkeypatch):
    """A size of that name, small enough for tests."""
    monkeypatch.setitem(SIZES, "tiny", TINY)
