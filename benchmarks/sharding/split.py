"""Where a step's time goes: operators are timed as they are dispatched, which on a CPU is when they run."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SEARCH, GATHER, COMMUNICATION, OPTIMIZER, REST = PARTS = ("search", "gather", "communication", "optimizer", "rest")

FUNCTIONAL = "_c10d_functional"
# The search's backward is a gather and a scatter over its half-keys, by the operators of a dense table; the values
# have a sparse gradient here, and other operators.
_SEARCH = {"product_key_search", "product_key_topk", "weighted_gather", "gather_dot", "weighted_scatter"}
_GATHER = {"table_gather", "table_dot", "sparse_scatter"}


class Split(TorchDispatchMode):
    """Adds up the time of operators by part. A collective's is that until its result is there, so also that in which
    this rank waits for slower ones, or for a processor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock: Counter[str] = Counter()
        self.processor: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        clock, processor = time.perf_counter(), time.thread_time()
        out = func(*args, **(kwargs or {}))
        part = part_of(func.namespace, func.overloadpacket.__name__)
        self.processor[part] += time.thread_time() - processor
        self.clock[part] += time.perf_counter() - clock
        return out


def part_of(namespace: str, name: str) -> str:
    """The part of a step that an operator belongs to.

    Raises:
        ValueError: an operator of memcompile that has none.
    """
    if namespace == FUNCTIONAL:
        return COMMUNICATION
    if namespace != "memcompile":
        return REST
    if name in _SEARCH:
        return SEARCH
    if name in _GATHER:
        return GATHER
    raise ValueError(f"memcompile::{name} belongs to no part of a step: name one in {__name__}")


@dataclass(frozen=True)
class Step:
    """Seconds of a step by part: of the clock, and of a processor.

    A processor's are this thread's own: they do not grow where there are more ranks than cores, though caches and
    memory are shared. gloo moves bytes in threads of its own, which they leave out.
    """

    clock: dict[str, float]
    processor: dict[str, float]


def timed(forward_backward: Callable[[], object], optimizer: Callable[[], object]) -> Step:
    """Of one step. What is no operator of another part is the rest."""
    start = time.perf_counter(), time.thread_time()
    with Split() as split:
        forward_backward()
    between = time.perf_counter(), time.thread_time()
    optimizer()
    end = time.perf_counter(), time.thread_time()
    found = []
    for measured, first, second, last in zip((split.clock, split.processor), start, between, end, strict=True):
        parts = {part: measured[part] for part in (SEARCH, GATHER, COMMUNICATION)}
        found.append(parts | {OPTIMIZER: last - second, REST: second - first - sum(parts.values())})
    return Step(*found)


def wait(started: Tensor) -> Tensor:
    """The result of a collective, when it is there."""
    return torch.ops._c10d_functional.wait_tensor(started)
