"""All that the benchmarks take from inside memcompile: where a name there changes, this file alone follows."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memcompile.cost.groups import Candidate as Candidate
from memcompile.cost.groups import best_by_gpus as best_by_gpus
from memcompile.cost.job import Job as Job
from memcompile.cost.report import assumptions as assumptions
from memcompile.cost.time import Hardware as Hardware
from memcompile.cost.wire import Collective as Collective
from memcompile.cost.wire import layer_collectives as layer_collectives
from memcompile.lowering import cpu
from memcompile.lowering import memory_lookup as memory_lookup
from memcompile.lowering import operator as operator
from memcompile.lowering.cpu.build import build as build
from memcompile.lowering.inductor.gemm import mkl_is_held_back as mkl_is_held_back
from memcompile.lowering.update.row_adam import moments_of
from memcompile.runtime.pool import pool_of
from memcompile.runtime.storage.frozen_values import open_values as open_values
from memcompile.runtime.storage.values_file import write

advise_huge_pages, write_values = cpu.advise_huge_pages, write


def load_kernels() -> None:
    """Builds the C++ kernels where this machine has none yet, and says so where that fails."""
    if not cpu.load():
        message = "memcompile's kernels could not be built (the log says why): its operators run as PyTorch's"
        print(message, file=sys.stderr)


def compile_options() -> dict[str, Any]:
    """Options of torch.compile with which Inductor lowers memcompile's operators."""
    from memcompile.lowering.inductor.graph_pass import (
        inductor_patches,  # imports Inductor, which eager workers do not need
    )

    return inductor_patches("benchmark")


def rows_per_token(model: nn.Module) -> int:
    """Rows of the table of a planned model that a token reads, in all layers together."""
    pool = pool_of(model)
    assert pool is not None
    return len(pool.layers) * pool.config.heads * pool.config.top_k


class Table:
    """The table of a planned model."""

    def __init__(self, model: nn.Module) -> None:
        pool = pool_of(model)
        assert pool is not None
        self._table = pool.table

    @property
    def values(self) -> Tensor:
        """[slots, value_dim]; of a sharded table, the part of this rank."""
        return self._table.part

    @property
    def state(self) -> dict[str, Any]:
        """Of its rows; nothing before the first step or with a dense gradient."""
        return self._table._state or {}

    def lookup(self, slots: Tensor, weights: Tensor) -> Tensor:
        """What the memory layers do with slots and weights [tokens, hits]."""
        values, gradient = self.values, self._table.gradient
        if gradient == "dense":
            return operator("weighted_gather")(values, slots, weights)
        return operator("table_gather")(values, slots, weights, self._table.row_state(values), gradient)

    def age(self, optimizer: Optimizer, steps: int, touched: int, fill: Callable[[Tensor], None]) -> None:
        """Makes the state that of a training of so many steps, each of which touched so many rows at random.

        Rows that were never touched have all missed the same steps and have moments of zero, which is too easy. What
        dense optimizers do takes as long with any state.

        Args:
            optimizer: what holds the values, and has stepped them once.
        """
        state = self.state
        if not state:
            return
        state["step"] = steps
        optimizer.state[self._table.values]["step"].fill_(steps)
        if "last_step" in state:  # int32 [slots]
            state["history"][0, 0] = steps  # with the rates of the first one
            missed = torch.empty(len(state["last_step"])).geometric_(touched / len(state["last_step"])) - 1
            state["last_step"].copy_(steps - missed.clamp(max=steps - 1))
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in state:
                fill(state[moment])
                state[moment].abs_()


def adam_steps(values: Tensor) -> tuple[Callable[[Tensor, Tensor], None], Callable[[Tensor, Tensor], None]]:
    """Two ways to step rows int64 [n] of values by gradients [n, dim]: rows that missed no step, and rows that did."""
    moments = [torch.zeros_like(values) for _ in range(2)]
    numbers = torch.tensor([1.0, 0.9, 0.999, 1e-3, 1.0, 1e-8], dtype=torch.float64)
    decays = torch.full((1, 3), 0.9, dtype=torch.float64, device=values.device)
    panels = torch.full((1, 1, 1 + moments_of(values.dtype)), 1e-3, dtype=torch.float64, device=values.device)

    def current(rows: Tensor, grad: Tensor) -> None:
        operator("row_adam")(values, None, rows, grad, 0, *moments, None, None, None, numbers)

    def stale(rows: Tensor, grad: Tensor) -> None:
        missed = torch.zeros_like(rows), decays, panels
        operator("row_adam")(values, None, rows, grad, 0, *moments, *missed, numbers)

    return current, stale
