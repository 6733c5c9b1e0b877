"""What a run has measured so far, what failed and what was left out, and the JSON file that keeps it."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.results import Goal, write_json
from benchmarks.cpu.neighbours import Neighbours


@dataclass(frozen=True, kw_only=True)
class Median:
    """Of one case, in one of its parts."""

    name: str
    part: str  # STEP or TABLE of the worker
    width: int
    slots: int  # 0: it has no table
    tokens: int
    touched: int  # rows
    milliseconds: float
    ffn_milliseconds: float  # of the FFN's step, in the same turns
    peak_bytes: float
    needed_bytes: float  # values and states

    @property
    def ffns(self) -> float:
        """The time as a multiple of the FFN's step: it may be compared with one of other turns, when clocks drift."""
        return self.milliseconds / self.ffn_milliseconds


@dataclass(frozen=True)
class Missing:
    """A case that failed, or was left out."""

    case: str
    width: int
    reason: str


@dataclass
class Results:
    machine: dict[str, Any]
    medians: list[Median] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    neighbours: Neighbours = field(default_factory=Neighbours)
    complete: bool = False

    def of(self, width: int, part: str) -> dict[str, dict[int, Median]]:
        """By name and slots."""
        found: dict[str, dict[int, Median]] = {}
        for m in self.medians:
            if (m.width, m.part) == (width, part):
                found.setdefault(m.name, {})[m.slots] = m
        return found

    def parts(self, width: int) -> list[str]:
        """Those of which something with a table was measured."""
        return list(dict.fromkeys(m.part for m in self.medians if m.width == width and m.slots))

    def write(self, path: Path) -> None:
        content = {
            "complete": self.complete,
            "machine": self.machine | {"share_of_other_processes": self.neighbours.share},
            **{
                name: [dataclasses.asdict(entry) for entry in getattr(self, name)]
                for name in ("goals", "medians", "missing")
            },
        }
        write_json(path, content)
