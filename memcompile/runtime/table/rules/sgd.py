"""SGD without momentum for every row, to rounding: x -= lr * (g + weight_decay * x).

Without weight decay a row that a step does not touch stands still. With it, such a row misses a product of
(1 - lr * weight_decay) over steps, under any schedule: the exponential of a difference of prefix sums.
"""

from torch import Tensor

from memcompile.errors import OptionError
from memcompile.lowering.distributed.sharded_table import Shards
from memcompile.lowering.register.schema import operator
from memcompile.lowering.update.missed_steps import factors_of_step, missed_decays
from memcompile.lowering.update.rate_history import RateHistory
from memcompile.runtime.table.rules.adamw import bound_history, record, start_misses
from memcompile.runtime.table.rules.rule import (
    COMMON_OPTIONS,
    Options,
    Rule,
    State,
    check_common,
    require,
    step_seed,
    tables,
)


def _check(options: Options) -> None:
    check_common(options)
    if options.get("momentum") or options.get("nesterov"):
        raise OptionError("momentum: SGD by rows has none; for momentum that untouched rows keep, use row_adamw")
    lr, decay = float(options["lr"]), float(options["weight_decay"])
    require("weight_decay", decay, lr * decay < 1, f"lr * weight_decay below 1, with lr = {lr}")


def _start(table: Tensor, state: State, options: Options) -> None:
    """Nothing: what weight decay needs comes with it."""


def _step(table: Tensor, state: State, rows: Tensor, grad: Tensor, options: Options, shards: Shards | None) -> None:
    lr, weight_decay = float(options["lr"]), float(options["weight_decay"])
    if weight_decay:
        start_misses(table, state)
    state["step"] += 1
    if "last_step" in state:
        record(state, lr, factors_of_step(lr, weight_decay, (0.0, 0.0)))
    _run(table, state, rows, grad, lr, options, shards)
    if "last_step" in state:
        bound_history(table, state, SGD, options, shards)


def _flush(table: Tensor, state: State, rows: Tensor, options: Options, shards: Shards | None) -> None:
    _run(table, state, rows, None, 0.0, options, shards)


def _run(
    table: Tensor,
    state: State,
    rows: Tensor,
    grad: Tensor | None,
    rate: float,
    options: Options,
    shards: Shards | None,
) -> None:
    decays = None
    if "last_step" in state:
        decays = missed_decays(RateHistory(state["history"]), state["last_step"][rows], state["step"])
        state["last_step"].data.index_fill_(0, rows, state["step"])
    operator("row_sgd")(*tables(table, state), rows, grad, step_seed(state, options, shards), decays, rate)


SGD = Rule(
    name="row_sgd",
    defaults={"lr": 1e-3, "weight_decay": 0.0, **COMMON_OPTIONS},
    check=_check,
    start=_start,
    step=_step,
    flush=_flush,
    misses=True,
)
