"""A block with a memory layer whose table a group of ranks shares, trained as a user would, and where its time goes."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.profiler import profile
from torch.autograd.profiler_util import FunctionEvent
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import AdamW

import memcompile
from benchmarks.harness.layers import Block
from benchmarks.harness.package import Table
from benchmarks.sharding.cases import Sizes
from benchmarks.sharding.traffic import FUNCTIONAL

TABLE, STATES = "values", "states"
SEARCH, GATHER, COMMUNICATION, OPTIMIZER, REST = PARTS = ("search", "gather", "communication", "optimizer", "rest")
# The search's backward is a gather and a scatter over its half-keys, by the operators of a dense table; the values
# have a sparse gradient here, and other operators.
_OPERATORS = {
    SEARCH: ("product_key_search", "product_key_topk", "weighted_gather", "gather_dot", "weighted_scatter"),
    GATHER: ("table_gather", "table_dot", "sparse_scatter"),
}
_PART = {f"memcompile::{name}": part for part, names in _OPERATORS.items() for name in names}


class Trainee:
    """Plans, shards, and steps. Built on all ranks of the mesh at the same time.

    The ranks promise equally many tokens: without, each forward has one more all-gather, of 8 bytes a rank. What DDP
    would do for the other parameters is as for any model, and left out.
    """

    def __init__(self, sizes: Sizes, mesh: DeviceMesh, by: str, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.width = sizes.width
        self.model = Block(sizes.width).to(dtype)
        memcompile.plan(
            self.model,
            memory_layers=1,
            n_keys=sizes.n_keys,
            heads=sizes.heads,
            top_k=sizes.top_k,
            values_grad="sparse",
        )
        memcompile.shard(self.model, mesh, by=by, tokens="even")
        self.optimizer = AdamW(self.model.parameters())
        self.dtype = dtype
        self._tokens = torch.Generator().manual_seed(mesh.get_local_rank())

    def forward_backward(self, tokens: int) -> None:
        """Of new tokens: the same again would hit the same rows."""
        x, target = torch.randn(2, tokens, self.width, generator=self._tokens).to(self.dtype)
        F.mse_loss(self.model(x.requires_grad_()), target).backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def memory(self) -> dict[str, int]:
        """Bytes of the table that this rank holds, and of its states. It has stepped before."""
        table = Table(self.model)
        states = [entry for entry in table.state.values() if isinstance(entry, torch.Tensor)]
        return {TABLE: table.values.nbytes, STATES: sum(entry.nbytes for entry in states)}


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
    """Of one step, by the profiler's events of operators, which on a CPU last as long as they run. What is no operator
    of another part is the rest.

    Not by a TorchDispatchMode: under one autograd copies the values' sparse gradient, which it takes as it is
    otherwise, and a step has 40% more work.
    """
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
    """The part of a step that an event counts for as a whole; None where what it calls decides."""
    return COMMUNICATION if name.startswith(f"{FUNCTIONAL}::") else _PART.get(name)


def _since(start: tuple[float, float]) -> tuple[float, float]:
    return time.perf_counter() - start[0], time.thread_time() - start[1]
