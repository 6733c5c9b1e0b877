"""Job: the training whose cost is asked for, validated. Knows no hardware but the number of GPUs."""

import math
from dataclasses import dataclass

from memcompile.config import MAX_KEYS
from memcompile.cost.wire import shard_size
from memcompile.errors import OptionError

BYTES = {"bf16": 2, "fp32": 4}
CHOICES = {
    "dtype": tuple(BYTES),
    "optimizer": ("adamw", "lazy_adam", "row_wise_adagrad", "sgd"),
    "state_dtype": tuple(BYTES),
    "values_grad": ("sparse", "dense"),
    "by": ("columns", "rows"),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A table of slots x value_dim that memory layers share, and the tokens of a step.

    Args:
        slots: rows of the table, ``n_keys ** 2``.
        value_dim: elements of a row.
        gpus: all ranks of the job, each with tokens of its own.
        tokens: of each rank a step.
        layers: memory layers that share the table.
        heads, top_k: queries a token, and slots that each reads.
        key_dim: width of a query, even; None is half of value_dim.
        dtype: of values, their gradient and activations, "bf16" or "fp32".
        optimizer: of the values: "adamw", "lazy_adam", "row_wise_adagrad" or "sgd".
        state_dtype: of Adam's moments. The one number a row of row_wise_adagrad is always fp32.
        master_weights: whether bf16 values have fp32 masters; else they are rounded stochastically.
        values_grad: "sparse", of the rows that are hit, or "dense".
        by: how a group shards the table, by "columns" or by "rows".
        unique: distinct slots that a step hits, over those of as many uniform hits. Real hits repeat some slots.
        skew: by rows, hits of the busiest rank over the mean.

    Raises:
        OptionError: naming the option, what it got and what it takes.
    """

    slots: int
    value_dim: int
    gpus: int
    tokens: int = 8192
    layers: int = 3
    heads: int = 4
    top_k: int = 32
    key_dim: int | None = None
    dtype: str = "bf16"
    optimizer: str = "adamw"
    state_dtype: str = "fp32"
    master_weights: bool = False
    values_grad: str = "sparse"
    by: str = "columns"
    unique: float = 1.0
    skew: float = 1.0

    def __post_init__(self) -> None:
        for name in ("slots", "value_dim", "gpus", "tokens", "layers", "heads", "top_k", "key_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} must be at least 1, got {value}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise OptionError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.key_dim is not None and self.key_dim % 2:
            raise OptionError(f"key_dim must be even (two half-keys share it), got {self.key_dim}")
        if not 0 < self.unique <= 1:
            raise OptionError(f"unique must be a share above 0 and at most 1, got {self.unique:g}")
        if not 1 <= self.skew < math.inf:
            raise OptionError(f"skew must be at least 1, the mean's, got {self.skew:g}")
        _check_square(self.slots)
        if self.top_k > self.n_keys:
            raise OptionError(f"top_k={self.top_k} exceeds n_keys={self.n_keys}: lower top_k or raise slots")

    @property
    def n_keys(self) -> int:
        """Half-keys a side."""
        return math.isqrt(self.slots)

    @property
    def hits(self) -> int:
        """Slots that a token reads in a layer."""
        return self.heads * self.top_k

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of values and activations."""
        return BYTES[self.dtype]

    @property
    def query_width(self) -> int:
        """Width of a head's query, both halves."""
        return self.key_dim or max(2, self.value_dim // 4 * 2)

    def shard(self, ranks: int, rank: int = 0) -> tuple[int, int]:
        """The (slots, columns) that a rank of a group holds; rank 0 has the most."""
        if self.by == "rows":
            return shard_size(self.slots, ranks, rank), self.value_dim
        return self.slots, shard_size(self.value_dim, ranks, rank)

    def touched_rows(self, ranks: int) -> int:
        """Distinct rows that the tokens of so many ranks hit in a step, in all layers: an expectation.

        Of H uniform hits in N slots N (1 - exp(-H / N)), times `unique`.
        """
        hits = ranks * self.tokens * self.hits * self.layers
        return max(1, round(-self.unique * self.slots * math.expm1(-hits / self.slots)))


def _check_square(slots: int) -> None:
    root = math.isqrt(slots)
    if slots != root**2:
        near = " and ".join(f"{n**2:,} ({n}**2)" for n in (root, root + 1))
        raise OptionError(f"slots must be a perfect square, n_keys**2; got {slots:,}, the nearest are {near}")
    if root > MAX_KEYS:
        raise OptionError(f"slots must be at most {MAX_KEYS**2:,} ({MAX_KEYS}**2, which fit an int32), got {slots:,}")
