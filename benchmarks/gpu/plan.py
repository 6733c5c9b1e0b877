"""Which cases are measured, in the order of their weight: where time runs out, the last ones are left out."""

from dataclasses import dataclass

import torch

from benchmarks.harness.layers import Setting

SHARE_OF_MEMORY = 0.6  # of what is free, for a table and its dense gradient
NARROWEST = 64


@dataclass(frozen=True)
class Group:
    """Memory layers over one table, and FFNs of their width."""

    width: int
    n_keys: int
    tokens: tuple[int, ...]  # of the forward, the most first: Inductor chooses its kernels for that
    backward_tokens: tuple[int, ...]  # without one token, on which no training runs
    parts: bool = False  # gather, search and an optimizer's update alone, too
    frozen: bool = False  # the backward without the values' gradient, too

    @property
    def cases(self) -> int:
        return 4 * self.parts + len(self.tokens) + len(self.backward_tokens) + self.frozen

    def __str__(self) -> str:
        return f"d = {self.width}, n = {self.n_keys}"


@dataclass(frozen=True)
class Plan:
    groups: tuple[Group, ...]  # the first one is what the goals are about
    all_peers: bool
    minutes: float
    dtype: torch.dtype = torch.bfloat16
    copy_bytes: int = 2**32
    gemm_size: int = 8192
    top_k: int = 32

    @property
    def main(self) -> Group:
        return self.groups[0]


def quick_plan() -> Plan:
    """What the goals are about, and no more: most of the time goes into compiling."""
    return Plan((Group(4096, 1024, (8192,), (8192,), parts=True),), all_peers=False, minutes=1.5)


def full_plan() -> Plan:
    tokens, backward_tokens = (8192, 512, 1), (8192, 512)
    return Plan(
        (
            Group(4096, 1024, tokens, backward_tokens, parts=True, frozen=True),
            Group(1024, 1024, tokens, backward_tokens, parts=True),
            Group(2048, 1024, tokens, backward_tokens),
            Group(1024, 4096, tokens, backward_tokens, parts=True),
            Group(4096, 4096, tokens, backward_tokens),
            Group(2048, 4096, tokens, backward_tokens),
        ),
        all_peers=True,
        minutes=7.5,
    )


def fitting_setting(group: Group, plan: Plan, free_bytes: int) -> Setting | None:
    """The group's layer, its value_dim halved until the table and its gradient fit; None where none does."""
    value_dim = group.width
    while 2 * group.n_keys**2 * value_dim * plan.dtype.itemsize > SHARE_OF_MEMORY * free_bytes:
        value_dim //= 2
        if value_dim < NARROWEST:
            return None
    return Setting(group.width, group.n_keys, plan.dtype, top_k=plan.top_k, row_size=value_dim)
