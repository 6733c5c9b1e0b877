"""AdamW for every row, to rounding, at the cost of the rows that a step touches (arXiv 1711.05101).

A dense AdamW moves every row in every step: by its momentum, its weight decay, and the decay of its moments. Here a row
that a step does not touch stays as it is, and does what it has missed, under the learning rates, weight decays and
betas of those steps, when it is touched next. How, and how exactly, is told in `lowering.update.skipped_steps`.
"""

import torch
from torch import Tensor

from memcompile.errors import OptionError
from memcompile.lowering.distributed.sharded_table import Shards
from memcompile.lowering.gather.hits import sum_dtype
from memcompile.lowering.register.schema import operator
from memcompile.lowering.update.missed_steps import factors_of_step, missed_steps
from memcompile.lowering.update.rate_history import RateHistory
from memcompile.runtime.table.rules.rule import (
    COMMON_OPTIONS,
    MOMENTS,
    Options,
    Rule,
    State,
    check_common,
    check_moments,
    flush_rows,
    require,
    start_moments,
    step_seed,
    tables,
)
from memcompile.runtime.table.touched_rows import as_rows


def _check(options: Options) -> None:
    check_common(options)
    check_moments(options)
    beta1, beta2 = options["betas"]
    require("betas", options["betas"], beta1**2 < beta2, "beta1**2 < beta2, so that steps without gradients die out")
    lr, decay = float(options["lr"]), float(options["weight_decay"])
    require("weight_decay", decay, lr * decay < 1, f"lr * weight_decay below 1, with lr = {lr}")
    if options.get("amsgrad"):
        raise OptionError("amsgrad: a maximum over skipped steps cannot be made up for; use amsgrad=False")


def _start(table: Tensor, state: State, options: Options) -> None:
    start_moments(table, state, options)
    start_misses(table, state, float(options["eps"]))


def start_misses(table: Tensor, state: State, eps: float = 0.0) -> None:
    """Adds what tells the steps that rows have missed, where it is missing: every row is as of now."""
    if "last_step" not in state:
        state["last_step"] = torch.full((table.shape[0],), state["step"], dtype=torch.int32, device=table.device)
        state["history"] = RateHistory.new(state["step"], eps).tensor
    else:
        state["last_step"], state["history"] = state["last_step"].to(table.device), state["history"].cpu()


def _step(table: Tensor, state: State, rows: Tensor, grad: Tensor, options: Options, shards: Shards | None) -> None:
    lr, weight_decay, eps = float(options["lr"]), float(options["weight_decay"]), float(options["eps"])
    beta1, beta2 = (float(beta) for beta in options["betas"])
    if eps != RateHistory(state["history"]).eps:
        flush_rows(table, state, ADAMW, options, shards=shards)
        state["history"] = RateHistory.new(state["step"], eps).tensor
    factors = factors_of_step(lr, weight_decay, (beta1, beta2))
    step = state["step"] = state["step"] + 1
    record(state, lr, factors)
    rate, scale = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
    numbers = [1 - lr * weight_decay, beta1, beta2, rate, scale]
    _run(table, state, rows, grad, step - 1, numbers, options, shards)
    bound_history(table, state, ADAMW, options, shards)


def record(state: State, lr: float, factors: list[float]) -> None:
    """Adds the step that is being done to the history."""
    history = RateHistory(state["history"])
    history.record(lr, factors)
    state["history"] = history.tensor


def bound_history(table: Tensor, state: State, rule: Rule, options: Options, shards: Shards | None) -> None:
    """Flushes all rows when the history has more than max(1024, slots) entries: one row a step on average."""
    if len(RateHistory(state["history"])) > max(1024, table.shape[0]):
        flush_rows(table, state, rule, options, shards=shards)
        forget(state)


def forget(state: State) -> None:
    """Starts the history again, where there is one: all rows are up to date."""
    if "history" in state:
        history = RateHistory(state["history"])
        history.forget()
        state["history"] = history.tensor


def _flush(table: Tensor, state: State, rows: Tensor, options: Options, shards: Shards | None) -> None:
    _run(table, state, rows, None, state["step"], [1.0, 0.0, 0.0, 0.0, 0.0], options, shards)


def _run(
    table: Tensor,
    state: State,
    rows: Tensor,
    grad: Tensor | None,
    until: int,
    numbers: list[float],
    options: Options,
    shards: Shards | None,
) -> None:
    """Makes the rows do what they have missed until the step `until`, and then a step with the gradient, if any."""
    moments = (as_rows(state[name]) for name in MOMENTS)
    history, last_step = RateHistory(state["history"]), state["last_step"]
    missed = missed_steps(history, last_step[rows], until, sum_dtype(table))
    parts = (None, None, None) if missed is None else (missed.entries, missed.decays, missed.panels)
    constants = torch.tensor([*numbers, history.eps], dtype=torch.float64, device="cpu")
    seed = step_seed(state, options, shards)
    operator("row_adam")(*tables(table, state), rows, grad, seed, *moments, *parts, constants)
    last_step.data.index_fill_(0, rows, state["step"])  # `data`: a flush is nothing that autograd should know of


ADAMW = Rule(
    name="row_adamw",
    defaults={
        **{"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "state_dtype": None},
        **COMMON_OPTIONS,
    },
    check=_check,
    start=_start,
    step=_step,
    flush=_flush,
    saved=frozenset(MOMENTS),
    misses=True,
)
