"""What is measured: one model and its optimizer at one size each, and how many of them fit in memory together."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from benchmarks.harness.layers import HEADS, OURS, TOP_K, Setting

LAZY_ADAM, ROW_WISE_ADAGRAD, ROW_SGD = (f"memcompile, {name}" for name in ("lazy_adam", "row_wise_adagrad", "row_sgd"))
DENSE, DENSE_LOOP = "dense AdamW, fused", "dense AdamW"
SPARSE_ADAM = "SparseAdam"
FBGEMM = "FBGEMM, row-wise Adagrad"
FFN = "SwiGLU FFN"  # what all times are compared with
HARDWARE = "rows read and written"

# Copies of the table that a step holds: the values, their states, a dense gradient, what the optimizer allocates.
_TABLES = {OURS: 3, LAZY_ADAM: 3, ROW_WISE_ADAGRAD: 1, ROW_SGD: 1, DENSE: 4, DENSE_LOOP: 6, SPARSE_ADAM: 3}
_TABLES |= {FBGEMM: 1, HARDWARE: 3, FFN: 0}
_PROCESS = 7e8  # bytes of PyTorch, what it compiled, and the other parameters
_ROWS = 6  # copies of the touched rows: gathered, gradients sorted and summed, and the optimizer's
_SIDE_BY_SIDE = 6  # processes
_SHARE = 0.9  # of the free memory


@dataclass(frozen=True)
class Case:
    """One process: a contestant, and the sizes of its layer, whose rows are as wide as it is."""

    name: str
    width: int
    n_keys: int
    tokens: int
    threads: int
    heads: int = HEADS
    top_k: int = TOP_K
    compiled: bool = True

    @property
    def setting(self) -> Setting:
        return Setting(self.width, self.n_keys, torch.float32, self.heads, self.top_k)

    @property
    def table_bytes(self) -> int:
        return self.setting.num_slots * self.width * 4

    @property
    def states(self) -> int:
        """Tables that must be there: the values, and their states."""
        return min(_TABLES[self.name], 3)

    @property
    def bytes(self) -> float:
        """An estimate of what it takes at most."""
        rows = self.tokens * self.setting.hits * self.width * 4
        return _PROCESS + _TABLES[self.name] * self.table_bytes + _ROWS * rows

    def __str__(self) -> str:
        return self.name if self.name == FFN else f"{self.name}, {self.setting.num_slots:,} slots"


@dataclass(frozen=True)
class Group:
    """Layers of one width over tables of several sizes, for one number of tokens."""

    width: int
    tokens: int
    n_keys: tuple[int, ...]  # ascending
    names: tuple[str, ...]
    heads: int = HEADS
    top_k: int = TOP_K
    compiled: bool = True

    def cases(self, threads: int) -> list[Case]:
        sizes = (self.tokens, threads, self.heads, self.top_k, self.compiled)
        return [Case(name, self.width, n, *sizes) for name in self.names for n in self.n_keys]

    def without(self, name: str) -> "Group":
        return dataclasses.replace(self, names=tuple(n for n in self.names if n != name))

    def reference(self, threads: int) -> Case:
        return dataclasses.replace(self.cases(threads)[0], name=FFN)


def fit(cases: Iterable[Case], free: float) -> bool:
    """Whether so many bytes are enough for all of them at the same time."""
    return sum(case.bytes for case in cases) <= _SHARE * free


def lineups(cases: Iterable[Case], reference: Case, free: float) -> list[list[Case]]:
    """Cases in order, cut where no more fit together with the reference. One that does not fit is alone."""
    found: list[list[Case]] = []
    for case in cases:
        if found and len(found[-1]) < _SIDE_BY_SIDE and fit([reference, *found[-1], case], free):
            found[-1].append(case)
        else:
            found.append([case])
    return found
