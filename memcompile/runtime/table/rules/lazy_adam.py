"""Lazy Adam: `torch.optim.SparseAdam`, to rounding, with decoupled weight decay of the rows that a step touches."""

import torch
from torch import Tensor

from memcompile.errors import OptionError
from memcompile.lowering.distributed.sharded_table import Shards
from memcompile.lowering.register.schema import operator
from memcompile.runtime.table.rules.rule import (
    COMMON_OPTIONS,
    MOMENTS,
    Options,
    Rule,
    State,
    check_common,
    check_moments,
    start_moments,
    step_seed,
    tables,
)
from memcompile.runtime.table.touched_rows import as_rows


def _check(options: Options) -> None:
    check_common(options)
    check_moments(options)
    if options.get("amsgrad"):
        raise OptionError("amsgrad: lazy Adam has none, as torch.optim.SparseAdam; use amsgrad=False")


def _step(table: Tensor, state: State, rows: Tensor, grad: Tensor, options: Options, shards: Shards | None) -> None:
    lr, (beta1, beta2) = float(options["lr"]), options["betas"]
    step = state["step"] = state["step"] + 1
    rate = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    decay = 1 - lr * float(options["weight_decay"])
    numbers = torch.tensor([decay, beta1, beta2, rate, 1.0, options["eps"]], dtype=torch.float64, device="cpu")
    moments = (as_rows(state[name]) for name in MOMENTS)
    seed = step_seed(state, options, shards)
    operator("row_adam")(*tables(table, state), rows, grad, seed, *moments, None, None, None, numbers)


LAZY_ADAM = Rule(
    name="lazy_adam",
    defaults={
        **{"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "state_dtype": None},
        **COMMON_OPTIONS,
    },
    check=_check,
    start=start_moments,
    step=_step,
    saved=frozenset(MOMENTS),
)
