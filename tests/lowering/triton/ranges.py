"""Ranges of integers, and what MLIR's arithmetic makes of them: what the bounds of `addresses.py` are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Range:
    """Integers from low to high, both included."""

    low: int
    high: int

    @staticmethod
    def of(bits: int) -> Range:
        """All that fit: signed, except for one bit."""
        return Range(0, 1) if bits == 1 else Range(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)

    def __contains__(self, other: Range) -> bool:
        return self.low <= other.low and other.high <= self.high

    def __or__(self, other: Range) -> Range:
        return Range(min(self.low, other.low), max(self.high, other.high))

    @property
    def size(self) -> int:
        """The largest absolute value."""
        return max(abs(self.low), abs(self.high))

    def corners(self, other: Range, operation: Callable[[int, int], int]) -> Range:
        """The range of an operation that is monotonic in each operand."""
        ends = [operation(a, b) for a in (self.low, self.high) for b in (other.low, other.high)]
        return Range(min(ends), max(ends))


def _divided(a: Range, b: Range) -> Range:
    if b.low < 1:
        return Range(-a.size, a.size)
    return a.corners(b, lambda x, y: x // y if x >= 0 else -(-x // y))


def _remainder(a: Range, b: Range) -> Range:
    size = min(a.size, b.size)
    return Range(0 if a.low >= 0 else -size, size)


def _shifted(a: Range, b: Range, operation: Callable[[int, int], int]) -> Range:
    return a.corners(Range(min(63, max(0, b.low)), min(63, max(0, b.high))), operation)


def _combined_bits(a: Range, b: Range) -> Range:
    size = 1 << max(a.size, b.size).bit_length()
    return Range(0 if a.low >= 0 and b.low >= 0 else -size, size - 1)


def _common_bits(a: Range, b: Range) -> Range:
    positive = [value.high for value in (a, b) if value.low >= 0]
    return Range(0, min(positive)) if positive else _combined_bits(a, b)


ARITHMETIC: dict[str, Callable[[Range, Range], Range]] = {
    "arith.addi": lambda a, b: Range(a.low + b.low, a.high + b.high),
    "arith.subi": lambda a, b: Range(a.low - b.high, a.high - b.low),
    "arith.muli": lambda a, b: a.corners(b, lambda x, y: x * y),
    "arith.divsi": _divided,
    "arith.divui": _divided,
    "arith.remsi": _remainder,
    "arith.remui": _remainder,
    "arith.shli": lambda a, b: _shifted(a, b, lambda x, y: x << y),
    "arith.shrsi": lambda a, b: _shifted(a, b, lambda x, y: x >> y),
    "arith.shrui": lambda a, b: _shifted(a, b, lambda x, y: x >> y),
    "arith.andi": _common_bits,
    "arith.ori": _combined_bits,
    "arith.xori": _combined_bits,
    "arith.minsi": lambda a, b: a.corners(b, min),
    "arith.minui": lambda a, b: a.corners(b, min),
    "arith.maxsi": lambda a, b: a.corners(b, max),
    "arith.maxui": lambda a, b: a.corners(b, max),
}
UNSIGNED = {"arith.divui", "arith.remui", "arith.shrui", "arith.minui", "arith.maxui", "arith.extui"}
# The result is one of the operands' numbers, elsewhere or wider. `join` is ours: where paths of the program meet.
PASSED_ON = {
    *("arith.extsi", "arith.extui", "arith.trunci", "arith.index_cast", "arith.select", "join"),
    *("tt.broadcast", "tt.cat", "tt.expand_dims", "tt.gather", "tt.join", "tt.reshape", "tt.splat", "tt.split"),
    *("tt.trans", "tt.unsplat"),
}
