"""Who takes part in a group of cases: layers of one width and dtype, over one table."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common.setting import Contestant, Setting
from benchmarks.cpu.dense import ffn_contestants, mixture_contestants
from benchmarks.cpu.libraries import library_contestants
from benchmarks.cpu.memory import memory_contestants

MOST_TOKENS = 512  # for those that take seconds for more


@dataclass(frozen=True)
class Group:
    """Cases measured together: memory layers of several sizes, each in the first rows of the largest one's table."""

    width: int
    dtype: torch.dtype
    n_keys: tuple[int, ...]  # ascending
    tokens: tuple[int, ...]

    @property
    def largest(self) -> Setting:
        return Setting(self.width, self.n_keys[-1], self.dtype)


def contestants(group: Group, table: Tensor) -> list[Contestant]:
    """All of a group. The peers are many and slow, and run beside the largest memory only; FFNs have no table."""
    found = []
    for n_keys in group.n_keys:
        setting = Setting(group.width, n_keys, group.dtype)
        found += memory_contestants(setting, table, MOST_TOKENS if setting == group.largest else None)
    others = library_contestants(group.largest, table) + mixture_contestants(group.largest, table)
    found += [dataclasses.replace(other, most_tokens=MOST_TOKENS) for other in others]
    return found + ffn_contestants(group.largest)
