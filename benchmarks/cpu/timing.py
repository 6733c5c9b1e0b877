"""Times several layers in turns, so that the drift of a shared machine hits all alike."""

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.cpu.neighbours import Neighbours
from benchmarks.cpu.setting import Contestant

SECONDS = 0.3  # for each contestant and case
FEWEST_ROUNDS, MOST_ROUNDS = 3, 30
SLOW = 1.5  # seconds a call, of which one is enough


def wake_threads() -> None:
    """Work for all threads: without any they fall asleep, and in a model the layer before has kept them awake."""
    torch.ones(2**18).add_(1)


def once(contestant: Contestant, tokens: int, width: int, dtype: torch.dtype, backward: bool) -> float:
    """Seconds of one call, or of it and its backward.

    The input is new each time: the same again would read the same rows, from the caches.
    """
    x = torch.randn(tokens, width, dtype=dtype)
    if not backward:
        with torch.no_grad():
            wake_threads()
            start = time.perf_counter()
            y = contestant.layer(x)
            return time.perf_counter() - start
    x.requires_grad_()
    ones = torch.ones_like(x)
    for parameter in contestant.parameters:
        parameter.grad = None
    wake_threads()
    start = time.perf_counter()
    y = contestant.layer(x)
    y.backward(ones)
    seconds = time.perf_counter() - start
    for parameter in contestant.parameters:
        parameter.grad = None  # the gradients of all contestants at once would fill the memory
    return seconds


def rounds_for(seconds: float) -> int:
    """How often a call that takes so long is timed."""
    return 1 if seconds > SLOW else min(MOST_ROUNDS, max(FEWEST_ROUNDS, math.ceil(SECONDS / seconds)))


def medians(
    contestants: Sequence[Contestant],
    tokens: int,
    width: int,
    dtype: torch.dtype,
    backward: bool,
    neighbours: Neighbours,
    say: Callable[[str], None],
) -> list[float]:
    """The median seconds of each contestant; `say` hears what goes on."""
    measured: list[list[float]] = []
    rounds = []
    for contestant in contestants:
        say(f"{contestant.name}, n = {contestant.n_keys}" if contestant.n_keys else contestant.name)
        once(contestant, tokens, width, dtype, backward)  # compiles
        second = once(contestant, tokens, width, dtype, backward)
        counts = second > SECONDS  # where a call takes long, none is thrown away
        measured.append([second] if counts else [])
        rounds.append(rounds_for(second) - counts)
    most = max(rounds)
    shuffle = random.Random(0).shuffle
    order = [*range(len(contestants))]
    with neighbours.watched():
        for turn in range(most):
            say(f"round {turn + 1} of {most}")
            shuffle(order)  # who comes after whom decides what is in the caches
            for i in order:
                # Fewer rounds than there are turns are spread over all of them.
                if turn * rounds[i] // most != (turn + 1) * rounds[i] // most:
                    measured[i].append(once(contestants[i], tokens, width, dtype, backward))
    return [statistics.median(seconds) for seconds in measured]
