"""Job: the training whose cost is asked for, validated. Knows no hardware but the number of GPUs."""

import math
from dataclasses import dataclass

from memcompile.config import MAX_KEYS, MAX_SLOTS, TABLES, VARIANTS
from memcompile.errors import OptionError

BYTES = {"bf16": 2, "fp32": 4}
FP32, ROW_NUMBER = 4, 8  # bytes; rows of a sparse gradient are numbered in int64
CHOICES: dict[str, tuple[str, ...]] = {
    "variant": VARIANTS,
    "tables": TABLES,
    "dtype": tuple(BYTES),
    "optimizer": ("adamw", "lazy_adam", "row_wise_adagrad", "sgd"),
    "state_dtype": tuple(BYTES),
    "values_grad": ("sparse", "dense"),
    "by": ("columns", "rows"),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A table of slots x value_dim that memory layers share, or one of each, and the tokens of a step.

    Raises:
        OptionError: naming the option, what it got and what it takes.
    """

    slots: int  # of a layer, n_keys ** 2
    value_dim: int  # elements of a value
    gpus: int  # all ranks of the job, each with tokens of its own
    tokens: int = 8192  # of each rank a step
    layers: int = 3  # memory layers
    variant: str = "memory+"  # of "peer" a row is u and v, taken for as wide as v
    tables: str = "shared"  # by all layers, or "separate"
    heads: int = 4  # queries a token
    top_k: int = 32  # slots that each query reads
    key_dim: int | None = None  # width of a query, even; None is half of value_dim
    dtype: str = "bf16"  # of values, their gradient and activations
    optimizer: str = "adamw"  # of the values
    state_dtype: str = "fp32"  # of Adam's moments; the one number a row of row_wise_adagrad is always fp32
    master_weights: bool = False  # whether bf16 values have fp32 masters; else they are rounded stochastically
    values_grad: str = "sparse"  # of the rows that are hit, or "dense"
    by: str | None = None  # how a group shards the table; None becomes "columns", and for "peer" "rows"
    unique: float = 1.0  # distinct slots that a step hits, over those of as many uniform hits: real hits repeat some
    skew: float = 1.0  # by rows, hits of the busiest rank over the mean

    def __post_init__(self) -> None:
        object.__setattr__(self, "by", self.by or ("rows" if self.has_pairs else "columns"))
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
        if self.slots != self.n_keys**2:
            near = " and ".join(f"{n**2:,} ({n}**2)" for n in (self.n_keys, self.n_keys + 1))
            raise OptionError(f"slots must be a perfect square, n_keys**2; got {self.slots:,}, the nearest are {near}")
        if self.n_keys > MAX_KEYS:
            most = f"{MAX_KEYS**2:,} ({MAX_KEYS}**2, which fit an int32)"
            raise OptionError(f"slots must be at most {most}, got {self.slots:,}")
        if self.rows > MAX_SLOTS:
            raise OptionError(
                f"tables='separate' has {self.rows:,} slots in {self.layers} layers: lower slots or layers"
            )
        if self.has_pairs and self.by == "columns":
            raise OptionError(
                "variant='peer' has rows of two vectors, which columns would cut: shard by rows (--by rows)"
            )
        if self.top_k > self.n_keys:
            raise OptionError(f"top_k={self.top_k} exceeds n_keys={self.n_keys}: lower top_k or raise slots")

    @property
    def n_keys(self) -> int:
        """Half-keys a side."""
        return math.isqrt(self.slots)

    @property
    def rows(self) -> int:
        """Of the table, all layers together."""
        return self.slots * (self.layers if self.tables == "separate" else 1)

    @property
    def has_pairs(self) -> bool:
        """Whether a row is a pair [u | v]."""
        return self.variant == "peer"

    @property
    def row_dim(self) -> int:
        """Elements of a row."""
        return self.value_dim * (2 if self.has_pairs else 1)

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
        """The (rows, columns) that a rank of a group holds, as `torch.chunk` divides: rank 0 has the most, the last
        ranks may have less, or nothing.
        """
        size = self.rows if self.by == "rows" else self.row_dim
        chunk = -(-size // ranks)
        own = min(chunk, max(0, size - rank * chunk))
        return (own, self.row_dim) if self.by == "rows" else (self.rows, own)

    def output_columns(self, columns: int) -> int:
        """The columns of a token's sum, of so many of its rows."""
        return self.value_dim if self.has_pairs else columns

    def touched_rows(self, ranks: int) -> int:
        """Distinct rows that the tokens of so many ranks hit in a step, in all layers: an expectation.

        Of H uniform hits in N rows N (1 - exp(-H / N)), times `unique`.
        """
        hits = ranks * self.tokens * self.hits * self.layers
        return max(1, round(-self.unique * self.rows * math.expm1(-hits / self.rows)))

    def own_rows(self, rows: int, ranks: int) -> int:
        """How many of the rows that are touched lie on a rank: by columns a part of each, by rows their part."""
        return -(-rows // ranks) if self.by == "rows" else rows

    def sent_rows_bytes(self, ranks: int, rank: int = 0) -> int:
        """Bytes of the sums of a sparse gradient that a rank sends to its replicas: of rows that its group touched."""
        _, columns = self.shard(ranks, rank)
        return self.own_rows(self.touched_rows(ranks), ranks) * (ROW_NUMBER + columns * FP32)
