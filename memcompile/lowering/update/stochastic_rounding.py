"""Stochastic rounding of fp32 rows to bf16, the same in PyTorch operators, C++ (`row_updates.h`) and Triton.

An element goes to the next bf16 above or below, with probabilities that make its expectation exact, so that small
steps are not lost. The random bits are a hash of (seed, table, row, column): repeats are bit for bit the same, on any
number of threads and whatever other rows a step touches.
"""

from typing import Any

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_TABLE = 0x85EBCA6B


def _mix(x: Any) -> Any:
    """A 32-bit word, or an int64 tensor of them, hashed ("lowbias32" of C. Wellons). Products that overflow int64 keep
    their low bits.
    """
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def seed_of_step(seed: int, step: int) -> int:
    """One 32-bit word of a seed (any integer of 64 bits) and the number of a step."""
    low, high = _mix(seed & _WORD), _mix((seed >> 32) & _WORD)
    return int(_mix((low + high * _GOLDEN + step * _TABLE) & _WORD))


def round_rows(x: Tensor, rows: Tensor, seed: int, table: int) -> Tensor:
    """`x` as bf16, each element up or down at random.

    Args:
        x: float32 [n, dim].
        rows: int64 [n], the rows' numbers.
        seed: 32 bits, of `seed_of_step`.
        table: which of a step's tables this is, so that no two are rounded by the same bits.
    """
    columns = torch.arange(x.shape[1], device=x.device) * _GOLDEN
    keys = _mix((rows * _GOLDEN + seed + table * _TABLE) & _WORD)  # [n]
    noise = _mix((keys.unsqueeze(1) ^ columns) & _WORD) & 0xFFFF  # [n, dim]
    bits = x.contiguous().view(torch.int32).long() & _WORD
    upper = (((bits + noise) & _WORD) >> 16).to(torch.int32)
    upper = torch.where(x.isnan(), 0x7FC0, upper)  # whose payload a carry could turn into a number
    return (upper << 16).view(torch.float32).to(torch.bfloat16)
