"""What every benchmark measures of a contestant and asks of the kernels, and the JSON file that keeps it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FORWARD, BACKWARD = "forward", "forward+backward"


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A median time, with what the forward needs (`Work`)."""

    name: str
    milliseconds: float
    flops: float  # of one forward
    bytes: float  # of one forward

    @property
    def gflop_s(self) -> float:
        return self.flops / self.milliseconds / 1e6

    @property
    def gb_s(self) -> float:
        return self.bytes / self.milliseconds / 1e6


@dataclass(frozen=True)
class Goal:
    """One that was set for one dtype, and what was reached."""

    name: str
    asked: str
    dtype: str
    reached: str
    met: bool


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
