"""Where a step's time goes, by the profiler's events of operators, which on a CPU last as long as they run.

Not by a TorchDispatchMode: under one autograd copies the values' sparse gradient, which it takes as it is otherwise,
and a step has 40% more work.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch.autograd.profiler import profile
from torch.autograd.profiler_util import FunctionEvent

SEARCH, GATHER, COMMUNICATION, OPTIMIZER, REST = PARTS = ("search", "gather", "communication", "optimizer", "rest")

FUNCTIONAL = "_c10d_functional"
# The search's backward is a gather and a scatter over its half-keys, by the operators of a dense table; the values
# have a sparse gradient here, and other operators.
_OPERATORS = {
    SEARCH: ("product_key_search", "product_key_topk", "weighted_gather", "gather_dot", "weighted_scatter"),
    GATHER: ("table_gather", "table_dot", "sparse_scatter"),
}
_PART = {f"memcompile::{name}": part for part, names in _OPERATORS.items() for name in names}


@dataclass(frozen=True)
class Step:
    """Seconds of a step.

    Attributes:
        parts: a collective's are those until its result is there, so also those in which this rank waits for slower
            ones, or for a processor.
        processor: that this thread took. They hardly grow where there are more ranks than cores, though caches and
            memory are shared. gloo moves bytes in threads of its own, which they leave out.
    """

    parts: dict[str, float]
    processor: float


def timed(forward_backward: Callable[[], object], optimizer: Callable[[], object]) -> Step:
    """Of one step. What is no operator of another part is the rest."""
    with profile(use_kineto=False) as recorded:
        start = time.perf_counter(), time.thread_time()
        forward_backward()
        passes = _since(start)
    start = time.perf_counter(), time.thread_time()
    optimizer()
    step = _since(start)
    parts = split(recorded.function_events or ())
    rest = passes[0] - sum(parts.values())
    return Step(parts | {OPTIMIZER: step[0], REST: rest}, passes[1] + step[1])


def split(events: Iterable[FunctionEvent]) -> dict[str, float]:
    """Seconds of the search, the gather and the communication: of their outermost events."""
    seconds = dict.fromkeys((SEARCH, GATHER, COMMUNICATION), 0.0)
    for event in events:
        part, caller = part_of(event.name), event.cpu_parent
        while caller is not None and part_of(caller.name) is None:
            caller = caller.cpu_parent
        if part is not None and caller is None:
            seconds[part] += event.time_range.elapsed_us() * 1e-6
    return seconds


def part_of(name: str) -> str | None:
    """The part of a step that an event counts for whole; None where what it calls decides."""
    return COMMUNICATION if name.startswith(f"{FUNCTIONAL}::") else _PART.get(name)


def _since(start: tuple[float, float]) -> tuple[float, float]:
    return time.perf_counter() - start[0], time.thread_time() - start[1]
