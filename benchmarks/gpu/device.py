"""The device that is measured: its clock, its memory and what it is."""

import gc
import math
import statistics
from collections.abc import Callable
from typing import Any, Protocol

import torch

from benchmarks.harness.compare import Device


class Gpu(Device, Protocol):
    """What the benchmark asks of a device; its tests have one without a GPU."""

    torch_device: torch.device

    def free_bytes(self) -> int: ...

    def about(self) -> dict[str, Any]: ...


class Cuda:
    """The current CUDA device, timed by events.

    Before each call the second-level cache is filled with other data, by reading: what was written would still have to
    be written back while the call is timed. That goes on for long enough that the host has launched the call when it
    begins, longer where it had not: the time is the device's own, as under CUDA graphs, and launching is no part of it.
    """

    HEAD_START = 2e-3  # seconds for the host: those of an eager layer's forward and backward
    MOST_HEAD_START = 64e-3

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties()
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self._l2_bytes: int = getattr(properties, "L2_cache_size", 2**26)
        self._other_data = torch.zeros(max(2**28, 4 * self._l2_bytes) // 4, device=self.torch_device)
        self._sum = torch.zeros((), device=self.torch_device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushes = self._most_flushes = 1
        flush = statistics.median(self.seconds(self._flush) for _ in range(9))
        self._flushes = math.ceil(self.HEAD_START / flush)
        self._most_flushes = math.ceil(self.MOST_HEAD_START / flush)

    def _flush(self) -> None:
        for _ in range(self._flushes):
            torch.sum(self._other_data, dim=0, out=self._sum)

    def seconds(self, call: Callable[[], object]) -> float:
        while True:
            self._flush()
            self._start.record()
            output = call()
            self._end.record()
            has_begun = self._start.query()  # before the host was done: then it may have kept the device waiting
            self._end.synchronize()
            del output
            if not has_begun or self._flushes == self._most_flushes:
                return self._start.elapsed_time(self._end) / 1e3
            self._flushes = min(2 * self._flushes, self._most_flushes)

    def free_bytes(self) -> int:
        self.tidy()
        return torch.cuda.mem_get_info()[0]

    def tidy(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def about(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties()
        return {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": properties.total_memory / 1e9,
            "l2_mb": self._l2_bytes / 1e6,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        }
