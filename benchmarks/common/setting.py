"""What is measured: the sizes of a layer, what a contestant is, and how its parameters are drawn."""

import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HEADS, TOP_K = 4, 32
DRAWN_ROWS = 4096  # of a table, repeated to its end: drawing 2**30 numbers takes longer than the measurements

Layer = Callable[[Tensor], Tensor]  # x [tokens, width] -> [tokens, width]


@dataclass(frozen=True)
class Setting:
    """The sizes of a memory layer: a table of n_keys**2 rows of `value_dim`."""

    width: int
    n_keys: int
    dtype: torch.dtype
    heads: int = HEADS
    top_k: int = TOP_K
    row_size: int | None = None  # None: as wide as the layer

    @property
    def key_dim(self) -> int:
        """Of one head; each half of it has its own n_keys keys."""
        return self.width // 2

    @property
    def num_slots(self) -> int:
        return self.n_keys**2

    @property
    def hits(self) -> int:
        """Rows that a token reads."""
        return self.heads * self.top_k

    @property
    def value_dim(self) -> int:
        return self.row_size or self.width


@dataclass(frozen=True)
class Work:
    """What a layer cannot do with less of, however it is written."""

    flops: int  # a token, a multiply-add being two
    weights: int  # parameters that every call reads
    rows: int = 0  # rows that a token reads
    row_size: int = 0  # numbers in a row
    num_rows: int = 1  # to choose from

    def bytes(self, tokens: int, width: int, itemsize: int) -> float:
        """Of one call that finds nothing in the caches: weights and rows once each, x and y."""
        hits = self.num_rows * (1 - (1 - 1 / self.num_rows) ** (tokens * self.rows))  # expected without repetitions
        return itemsize * (self.weights + hits * self.row_size + 2 * tokens * width)


@dataclass(frozen=True)
class Contestant:
    name: str
    layer: Layer
    parameters: tuple[nn.Parameter, ...]  # that get gradients
    work: Work
    n_keys: int | None = None  # None: it has no table
    most_tokens: int | None = None  # None: as many as are asked for


def fill_table(table: Tensor) -> None:
    """Draws the rows of a table [slots, value_dim], in place."""
    drawn = torch.randn(min(DRAWN_ROWS, len(table)), table.shape[1], device=table.device) * table.shape[1] ** -0.5
    for rows in table.split(len(drawn)):
        rows.copy_(drawn[: len(rows)])


def draw(setting: Setting, *shape: int) -> nn.Parameter:
    """Parameters of this shape on the default device; the last dimension is summed over where there are two."""
    scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
    return nn.Parameter((torch.randn(shape) * scale).to(setting.dtype))


def compiled(function: Callable[..., Any], options: dict[str, Any] | None = None, dynamic: bool = True) -> Any:
    """The function under torch.compile, for any number of tokens where it is dynamic.

    Dynamo keeps what it compiled by code object, which all lambdas of one line share: each gets its own here, so that
    no contestant waits for the guards of another.
    """
    assert isinstance(function, types.FunctionType)
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return torch.compile(own, dynamic=dynamic, fullgraph=True, options=options)


def trained(parameters: Iterable[Tensor]) -> tuple[nn.Parameter, ...]:
    """Those that get gradients."""
    return tuple(p for p in parameters if isinstance(p, nn.Parameter) and p.requires_grad)
