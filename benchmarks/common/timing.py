"""Takes turns: what is compared is timed alternately, so that the drift of clocks and machines hits all alike."""

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rounds:
    """How often a call is timed."""

    seconds: float  # for each contestant
    fewest: int
    most: int
    slow: float = math.inf  # seconds a call, of which one is enough

    def of(self, seconds: float) -> int:
        """For a call that takes so long."""
        return 1 if seconds > self.slow else min(self.most, max(self.fewest, math.ceil(self.seconds / seconds)))


def medians_in_turns(
    samples: Sequence[Callable[[], float]], first: Sequence[float], rounds: Rounds, say: Callable[[str], None]
) -> list[float]:
    """The median seconds of each.

    Args:
        samples: what is timed: each call returns its seconds.
        first: of each, the seconds of a call after it was warmed up, which decide how often it is timed.
        say: hears what goes on.
    """
    measured: list[list[float]] = []
    counts = []
    for seconds in first:
        kept = seconds > rounds.seconds  # where a call takes long, none is thrown away
        measured.append([seconds] if kept else [])
        counts.append(rounds.of(seconds) - kept)
    most = max(counts, default=0)
    shuffle = random.Random(0).shuffle
    order = [*range(len(samples))]
    for turn in range(most):
        say(f"round {turn + 1} of {most}")
        shuffle(order)  # who comes after whom decides what is in the caches
        for i in order:
            # Fewer rounds than there are turns are spread over all of them.
            if turn * counts[i] // most != (turn + 1) * counts[i] // most:
                measured[i].append(samples[i]())
    return [statistics.median(seconds) for seconds in measured]
