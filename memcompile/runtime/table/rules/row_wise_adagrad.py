"""Adagrad whose state is one number a row: FBGEMM's `EXACT_ROWWISE_ADAGRAD`.

    sum[row] += mean(g**2);  x -= lr / (sqrt(sum[row]) + eps) * g

Rows that a step does not touch stay as they are, weight decay included.
"""

import torch
from torch import Tensor

from memcompile.errors import OptionError
from memcompile.lowering.distributed import collectives
from memcompile.lowering.distributed.sharded_table import Shards
from memcompile.lowering.gather.hits import sum_dtype
from memcompile.lowering.register.schema import operator
from memcompile.lowering.update.row_tables import RowUpdate, chunks, load_rows
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
    first = options["initial_accumulator_value"]
    require("initial_accumulator_value", first, first >= 0, "0 or more")
    require("eps", options["eps"], options["eps"] > 0, "positive: a row whose gradient is 0 may have sum = 0")


def _start(table: Tensor, state: State, options: Options) -> None:
    slots, dtype = table.shape[0], sum_dtype(table)
    if "sum" not in state:
        first = options["initial_accumulator_value"]
        state["sum"] = torch.full((slots,), first, dtype=dtype, device=table.device)
        return
    given = state["sum"]
    if (
        given.shape == table.shape and given.dim() > 1
    ):  # of torch.optim.Adagrad: the mean of its sums is the sum of means
        given = given.to(dtype).flatten(1).mean(1)
    if given.shape != (slots,):
        raise OptionError(f"sum: expected one number a row, {[slots]}; got {list(given.shape)}")
    state["sum"] = given.to(table.device, dtype).contiguous()


def _step(table: Tensor, state: State, rows: Tensor, grad: Tensor, options: Options, shards: Shards | None) -> None:
    state["step"] += 1
    weight_decay, decoupled = float(options["weight_decay"]), bool(options["decoupled"])
    seed = step_seed(state, options, shards)
    update = RowUpdate(*tables(table, state), rows, grad, seed)
    lr, eps = float(options["lr"]), float(options["eps"])
    if shards is None or not shards.by_columns or shards.ranks == 1:
        parameters = update.param, update.master
        operator("row_adagrad")(*parameters, rows, grad, seed, state["sum"], lr, eps, weight_decay, decoupled)
        return
    # Each rank has some columns, and a row's mean is over all of them. Every rank of the group has the same rows, since
    # each has the hits of all. One all-reduce of a number a row.
    total = state["sum"]
    if weight_decay and not decoupled:
        grad = grad + weight_decay * load_rows(update.table, rows)
    squares = collectives.all_reduce(grad.square().sum(1), shards.group) / sum(shards.sizes)
    sums = total.index_select(0, rows).add_(squares)  # [n]
    total.index_copy_(0, rows, sums)
    for part in chunks(rows, grad.shape[1]):
        x = load_rows(update.table, rows[part])
        if weight_decay and decoupled:
            x.mul_(1 - lr * weight_decay)
        x.sub_((lr / (sums[part].sqrt() + eps)).unsqueeze(1) * grad[part])
        update.store(rows[part], x)


ROW_WISE_ADAGRAD = Rule(
    name="row_wise_adagrad",
    defaults={
        **{"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.0, "decoupled": False, "initial_accumulator_value": 0.0},
        **COMMON_OPTIONS,
    },
    check=_check,
    start=_start,
    step=_step,
    saved=frozenset({"sum"}),
)
