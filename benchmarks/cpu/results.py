"""What a run has measured so far, and the JSON file that keeps it."""

import dataclasses
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.results import Goal, Rate, write_json
from benchmarks.common.setting import Setting
from benchmarks.cpu.limits import Limits
from benchmarks.cpu.neighbours import Neighbours


@dataclass(frozen=True, kw_only=True)
class Median(Rate):
    """Of one contestant in one case."""

    width: int
    n_keys: int | None  # None: it has no table
    dtype: str
    direction: str
    tokens: int


@dataclass
class Results:
    main: Setting  # of which the goals, the rates and the roofline are told
    main_tokens: int
    machine: dict[str, Any]
    limits: dict[str, Limits] = field(default_factory=dict)  # by dtype
    medians: list[Median] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    neighbours: Neighbours = field(default_factory=Neighbours)
    complete: bool = False

    def of(self, width: int, n_keys: int, dtype: str, direction: str) -> list[Median]:
        """The memory layers of this size, and what has no table."""
        return [
            m
            for m in self.medians
            if (m.width, m.dtype, m.direction) == (width, dtype, direction) and m.n_keys in (n_keys, None)
        ]

    def of_main(self, dtype: str, direction: str, tokens: int) -> dict[str, Median]:
        """The contestants of the main setting by name."""
        found = self.of(self.main.width, self.main.n_keys, dtype, direction)
        return {m.name: m for m in found if m.tokens == tokens}

    def write(self, path: Path) -> None:
        content = {
            "complete": self.complete,
            "machine": self.machine | {"share_of_other_processes": self.neighbours.share},
            "limits": {dtype: dataclasses.asdict(limits) for dtype, limits in self.limits.items()},
            "goals": [dataclasses.asdict(goal) for goal in self.goals],
            "medians": [dataclasses.asdict(median) for median in self.medians],
        }
        write_json(path, content)


def machine() -> dict[str, Any]:
    """The processor, the threads and the versions that the figures hold for."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
