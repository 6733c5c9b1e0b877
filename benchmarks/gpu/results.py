"""What a run has measured so far, what failed and what was left out, and the JSON file that keeps it."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.results import Goal, Rate, write_json
from benchmarks.common.setting import Setting
from benchmarks.gpu.limits import Limits


@dataclass(frozen=True, kw_only=True)
class Median(Rate):
    """Of one contestant in one case. An FFN's n_keys and value_dim are those of the memory that it ran beside."""

    kind: str
    width: int
    n_keys: int
    value_dim: int
    dtype: str
    tokens: int
    direction: str


@dataclass(frozen=True)
class Failure:
    """A contestant that did not run, or computed something else."""

    case: str
    name: str
    error: str


@dataclass(frozen=True)
class Skipped:
    """A case that was not measured."""

    case: str
    reason: str


@dataclass
class Results:
    about: dict[str, Any]
    limits: Limits | None = None
    main: Setting | None = None  # None: it did not fit
    medians: list[Median] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    complete: bool = False

    def of(self, kind: str, setting: Setting, tokens: int, direction: str) -> dict[str, Median]:
        """The contestants of a case by name."""
        wanted = kind, setting.width, setting.n_keys, tokens, direction
        found = [m for m in self.medians if (m.kind, m.width, m.n_keys, m.tokens, m.direction) == wanted]
        return {m.name: m for m in found}

    def disqualify(self, kind: str, setting: Setting, name: str) -> None:
        """Drops the medians of a contestant that computed something else."""
        wrong = name, kind, setting.width, setting.n_keys
        self.medians = [m for m in self.medians if (m.name, m.kind, m.width, m.n_keys) != wrong]

    def write(self, path: Path) -> None:
        content = {
            "complete": self.complete,
            "device": self.about,
            "limits": dataclasses.asdict(self.limits) if self.limits else None,
            **{
                name: [dataclasses.asdict(entry) for entry in getattr(self, name)]
                for name in ("goals", "medians", "failures", "skipped")
            },
        }
        write_json(path, content)
