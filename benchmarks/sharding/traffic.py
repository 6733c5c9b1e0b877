"""Bytes that really came over the network, of each collective of a step, and what the formulas say.

Counted by the kernel: TCP_INFO of every TCP socket of this process has the bytes of payload that came in by it. These
are this process's alone, whatever else the machine sends meanwhile, without headers of TCP and IP; gloo's own headers
are among them. The counters of the interface `lo` have all processes' bytes and all headers.
"""

import os
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness.package import Collective, Job, layer_collectives
from benchmarks.sharding.cases import Case, Sizes

FUNCTIONAL = "_c10d_functional"
_BYTES_RECEIVED = 128  # where it is in Linux's struct tcp_info, since 4.2
_OPERATIONS = {
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "all_reduce": "all_reduce",
}
_ON_THE_CPU = {"reduce_scatter": "all_to_all"}  # what memcompile runs instead on a CPU


@dataclass(frozen=True)
class Received:
    """A collective of one rank, or all of a step.

    Attributes:
        formula_bytes: by `memcompile.cost.wire`.
        measured_bytes: what came.
    """

    name: str
    operation: str
    formula_bytes: int
    measured_bytes: float

    @property
    def of_formula(self) -> float:
        return self.measured_bytes / self.formula_bytes


def received_bytes() -> int:
    """What all open TCP sockets of this process have received so far. Linux alone.

    Raises:
        OSError: the kernel does not count them.
    """
    total = 0
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            copied = os.dup(int(descriptor))
        except OSError:  # the directory's own, which is closed by now
            continue
        try:
            opened = socket.socket(fileno=copied)
        except OSError:  # a file, not a socket
            os.close(copied)
            continue
        with opened:
            if opened.type == socket.SOCK_STREAM and opened.family in (socket.AF_INET, socket.AF_INET6):
                info = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                if len(info) < _BYTES_RECEIVED + 8:
                    raise OSError("TCP_INFO has no tcpi_bytes_received: Linux 4.2 or newer is needed")
                total += struct.unpack_from("Q", info, _BYTES_RECEIVED)[0]
    return total


class Alone(TorchDispatchMode):
    """Runs each collective alone, all ranks waiting before and after it, and keeps what it brought.

    Args:
        meet: a barrier of the ranks. Its own messages, some 300 bytes around a collective, are counted too.

    Attributes:
        found: (operation, bytes received), in order.
    """

    def __init__(self, meet: Callable[[], object]) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []
        self._meet = meet

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        operation = _OPERATIONS.get(func.overloadpacket.__name__) if func.namespace == FUNCTIONAL else None
        if operation is None:
            return func(*args, **(kwargs or {}))
        before = received_between(self._meet)
        out = torch.ops._c10d_functional.wait_tensor(func(*args, **(kwargs or {})))
        self.found.append((operation, received_between(self._meet) - before))
        return out


def received_between(meet: Callable[[], object]) -> int:
    """What was received when all ranks have ended what came before, and none has begun what follows."""
    meet()
    received = received_bytes()
    meet()
    return received


def formulas(case: Case, sizes: Sizes, rank: int, dtype: str = "fp32") -> tuple[Collective, ...]:
    """The collectives of one layer's forward and backward, in order."""
    job = Job(
        slots=sizes.slots,
        value_dim=sizes.width,
        gpus=case.ranks,
        tokens=case.tokens,
        heads=sizes.heads,
        top_k=sizes.top_k,
        dtype=dtype,
        by=case.by,
    )
    return layer_collectives(job, case.ranks, rank)


def with_formulas(expected: tuple[Collective, ...], found: list[tuple[str, int]]) -> list[Received]:
    """What came of each, with its formula.

    Raises:
        ValueError: other collectives than the formulas know.
    """
    operations = [_ON_THE_CPU.get(c.operation, c.operation) for c in expected]
    if [operation for operation, _ in found] != operations:
        raise ValueError(f"the step has the collectives {[o for o, _ in found]}, the formulas {operations}")
    return [
        Received(c.name, c.operation, c.received_bytes, measured)
        for c, (_, measured) in zip(expected, found, strict=True)
    ]
