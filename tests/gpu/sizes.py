"""The sizes of the layers that run on the GPU, and small ones to rehearse the tests with."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layer:
    """A memory layer and its input [*leading, width]."""

    leading: tuple[int, ...] = (512,)
    width: int = 1024
    heads: int = 4
    top_k: int = 32
    half_dim: int = 256
    n_keys: int = 1024
    value_dim: int = 1024
    bias: bool = True
    gate: bool = True
    out_dim: int | None = 1024
    pairs: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {"heads": self.heads, "top_k": self.top_k, "pairs": self.pairs}

    def table_bytes(self, itemsize: int) -> int:
        return self.n_keys**2 * (self.value_dim + self.pairs * self.width) * itemsize


@dataclass(frozen=True)
class Sizes:
    layers: dict[str, Layer]
    crowded: Layer  # many hits a slot
    search_tokens: int
    search_keys: tuple[int, ...]
    half_dim: int
    repeats: int
    steps: int
    model: dict[str, int]  # layers and width of a Transformer
    memory: dict[str, int]  # its memory
    batch: tuple[int, int]  # sequences, tokens each
    large_rows: int  # of a table with more than `large_elements`
    large_width: int
    large_elements: int


REAL = Sizes(
    layers={
        "wide": Layer(),
        "plain": Layer(gate=False, out_dim=None, bias=False),
        "widest": Layer(value_dim=4096),
        "many": Layer(n_keys=4096, value_dim=256),
        "pairs": Layer(width=512, value_dim=512, gate=False, out_dim=None, pairs=True),
    },
    crowded=Layer(n_keys=64),
    search_tokens=512,
    search_keys=(1024, 4096),
    half_dim=256,
    repeats=100,
    steps=50,
    model={"layers": 3, "width": 256},
    memory={"n_keys": 128, "heads": 4, "top_k": 32, "key_dim": 128},
    batch=(8, 32),
    large_rows=1049**2,
    large_width=2048,
    large_elements=2**31,
)

_SMALL = Layer(leading=(24,), width=64, half_dim=16, n_keys=40, value_dim=48, out_dim=56)
SMALL = Sizes(
    layers={
        "wide": _SMALL,
        "plain": Layer((24,), 64, half_dim=16, n_keys=40, value_dim=48, gate=False, out_dim=None, bias=False),
        "widest": Layer((24,), 64, half_dim=16, n_keys=40, value_dim=96),
        "many": Layer((24,), 64, half_dim=16, n_keys=70, value_dim=16),
        "pairs": Layer((24,), 64, half_dim=16, n_keys=40, value_dim=48, gate=False, out_dim=None, pairs=True),
    },
    crowded=Layer((64,), 64, half_dim=16, n_keys=33, value_dim=48, out_dim=56),
    search_tokens=16,
    search_keys=(64, 90),
    half_dim=16,
    repeats=3,
    steps=50,
    model={"layers": 3, "width": 64},
    memory={"n_keys": 64, "heads": 2, "top_k": 32, "key_dim": 32},
    batch=(4, 16),
    large_rows=49**2,
    large_width=16,
    large_elements=2**14,
)
