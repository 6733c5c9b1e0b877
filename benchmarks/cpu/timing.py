"""Times layers on the CPU: one call at a time, with new inputs and threads that are awake."""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.common.setting import Contestant
from benchmarks.common.timing import Rounds, medians_in_turns
from benchmarks.cpu.neighbours import Neighbours

ROUNDS = Rounds(seconds=0.3, fewest=3, most=30, slow=1.5)


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
    samples = [partial(once, contestant, tokens, width, dtype, backward) for contestant in contestants]
    first = []
    for contestant, sample in zip(contestants, samples, strict=True):
        say(f"{contestant.name}, n = {contestant.n_keys}" if contestant.n_keys else contestant.name)
        sample()  # compiles
        first.append(sample())
    with neighbours.watched():
        return medians_in_turns(samples, first, ROUNDS, say)
