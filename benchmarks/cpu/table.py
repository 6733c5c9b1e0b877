"""The table that all contestants of one dtype share: the machine has no room for one each."""

import torch
from torch import Tensor

from benchmarks.common.setting import fill_table
from memcompile.lowering.cpu import advise_huge_pages


def shared_table(num_slots: int, value_dim: int, dtype: torch.dtype) -> Tensor:
    """Rows that every contestant reads and none changes."""
    table = torch.empty(num_slots, value_dim, dtype=dtype)
    advise_huge_pages(table)
    fill_table(table)
    return table
