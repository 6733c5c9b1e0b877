"""What a run has measured so far, what it has not, the goals, and the JSON file that keeps it all."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.processes import WorkerError
from benchmarks.harness.timing import OtherProcesses

FORWARD, BACKWARD, FROZEN = "forward", "forward+backward", "forward+backward, values frozen"


@dataclass(frozen=True, kw_only=True)
class Median:
    """Of one contestant in one case. An FFN's n_keys and value_dim are those of the memory that it ran with."""

    name: str
    kind: str
    width: int
    n_keys: int
    value_dim: int
    dtype: str
    tokens: int
    direction: str
    milliseconds: float
    flops: float  # that one forward needs
    bytes: float  # that one forward needs

    @property
    def gflop_s(self) -> float:
        return self.flops / self.milliseconds / 1e6

    @property
    def gb_s(self) -> float:
        return self.bytes / self.milliseconds / 1e6


@dataclass(frozen=True)
class Limits:
    """Of a machine, for one dtype."""

    gb_s: float  # 10**9 bytes a second
    bandwidth: str  # of what
    gflop_s: float
    product: str


@dataclass(frozen=True)
class Missing:
    """A contestant that did not run or computed something else, or a case that was left out."""

    case: str
    name: str  # "": none takes part
    reason: str


@dataclass(frozen=True)
class Goal:
    """One that was set for one dtype, and what was reached."""

    name: str
    asked: str
    dtype: str
    reached: str
    met: bool


@dataclass
class Results:
    """Attributes:
    medians: dataclasses or dictionaries of the benchmark, one for each figure.
    limits: by dtype.
    more: what else the JSON has.
    """

    machine: dict[str, Any]
    limits: dict[str, Limits] = field(default_factory=dict)
    medians: list[Any] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    others: OtherProcesses = field(default_factory=OtherProcesses)
    more: dict[str, Any] = field(default_factory=dict)
    complete: bool = False

    def where(self, **wanted: Any) -> list[Any]:
        """The medians with these attributes."""
        return [m for m in self.medians if all(getattr(m, name) == value for name, value in wanted.items())]

    def by_name(self, **wanted: Any) -> dict[str, Any]:
        return {m.name: m for m in self.where(**wanted)}

    def miss(self, case: str, name: str, reason: str | BaseException) -> None:
        self.missing.append(Missing(case, name, reason if isinstance(reason, str) else short(reason)))

    def write(self, path: Path) -> None:
        content = {
            "complete": self.complete,
            "machine": self.machine | {"share_of_other_processes": self.others.share},
            "limits": {dtype: _plain(limits) for dtype, limits in self.limits.items()},
            **{name: [*map(_plain, getattr(self, name))] for name in ("goals", "medians", "missing")},
            **self.more,
        }
        path.write_text(json.dumps(content, indent=1) + "\n")


def _plain(entry: Any) -> dict[str, Any]:
    return entry if isinstance(entry, dict) else dataclasses.asdict(entry)


Verdict = Callable[..., tuple[str, bool]]  # medians -> what was reached, and whether that is enough


def judged(name: str, asked: str, dtype: str, medians: Sequence[Any], verdict: Verdict) -> Goal:
    """A goal by these medians, of which one is None where it is missing; then the goal is not met."""
    reached, met = verdict(*medians) if None not in medians else ("not measured", False)
    return Goal(name, asked, dtype, reached, met)


def at_most(most: float) -> Verdict:
    """Of our time as a multiple of another's."""
    return lambda ours, other: _told(ratio := ours.milliseconds / other.milliseconds, ours, other, ratio <= most)


def at_least(least: float) -> Verdict:
    """Times as fast as another."""
    return lambda ours, other: _told(ratio := other.milliseconds / ours.milliseconds, ours, other, ratio >= least)


def _told(ratio: float, ours: Median, other: Median, met: bool) -> tuple[str, bool]:
    return f"{ratio:.2f} x ({ours.milliseconds:.3f} against {other.milliseconds:.3f} ms)", met


def short(error: BaseException) -> str:
    """One line for the report."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line for line in str(error).splitlines() if line.strip()]
    if isinstance(error, WorkerError):
        return lines[-1][:160] if lines else "no reason given"
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
