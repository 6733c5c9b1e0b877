"""One comparison: contestants that are timed in turns on the same inputs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from benchmarks.common.results import BACKWARD
from benchmarks.common.setting import Setting
from benchmarks.common.tables import of_tokens

GATHER, SEARCH, SCORED_SEARCH, LAYER = "gather", "search of given scores", "search with its scores", "layer"
UPDATE = "Adam's update of a row a token"
FROZEN, STEP = "forward+backward, values frozen", "step"
OURS = "memcompile"


@dataclass(frozen=True)
class Entry:
    """A contestant in one case, with what the case's forward needs at least."""

    name: str
    run: Callable[..., Any]  # the case's inputs -> an output
    flops: float
    bytes: float
    parameters: tuple[nn.Parameter, ...] = ()  # whose gradients are dropped after each call


@dataclass(frozen=True)
class Case:
    kind: str
    setting: Setting
    tokens: int
    direction: str
    draw: Callable[[int], tuple[Tensor, ...]]  # tokens -> new inputs
    entries: tuple[Entry, ...]
    reference: str  # the entry that tells what is right
    others: frozenset[str] = field(default_factory=frozenset)  # entries that compute something else
    table: nn.Parameter | None = None  # gets a gradient in the backward, unless it is frozen

    @property
    def backward(self) -> bool:
        return self.direction in (BACKWARD, FROZEN)

    def title(self) -> str:
        s = self.setting
        return f"{self.kind}, d = {s.width}, n = {s.n_keys}, {of_tokens(self.tokens)}, {self.direction}"
