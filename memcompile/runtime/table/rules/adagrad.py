"""Adagrad whose state is one number a row: see `runtime.optim.RowwiseAdagrad`."""

import functools

import torch
from torch import Tensor

from memcompile.errors import OptionError
from memcompile.lowering.distributed import collectives
from memcompile.lowering.gather.hits import sum_dtype
from memcompile.lowering.register.schema import operator
from memcompile.lowering.update.row_tables import RowUpdate, chunks, load_rows
from memcompile.runtime.table.rules.rule import COMMON_OPTIONS, Options, Rule, require


class RowWiseAdagrad(Rule):
    name = "row_wise_adagrad"
    defaults = COMMON_OPTIONS | {"lr": 1e-2, "eps": 1e-8, "decoupled": False, "initial_accumulator_value": 0.0}
    saved = frozenset({"sum"})

    @classmethod
    def check(cls, options: Options) -> None:
        super().check(options)
        first = options["initial_accumulator_value"]
        require("initial_accumulator_value", first, first >= 0, "0 or more")
        require("eps", options["eps"], options["eps"] > 0, "positive: a row whose gradient is 0 may have sum = 0")

    def start(self) -> None:
        table, slots, dtype = self.table, self.table.shape[0], sum_dtype(self.table)
        given = self.state.get("sum")
        if given is None:
            first = self.options["initial_accumulator_value"]
            given = torch.full((slots,), first, dtype=dtype, device=table.device)
        elif given.shape == table.shape and given.dim() > 1:
            # of torch.optim.Adagrad: the mean of its sums is the sum of means
            given = given.to(dtype).flatten(1).mean(1)
        if given.shape != (slots,):
            raise OptionError(f"sum: expected one number a row, {[slots]}; got {list(given.shape)}")
        self.state["sum"] = given.to(table.device, dtype).contiguous()

    def _step(self, rows: Tensor, grad: Tensor) -> None:
        self.state["step"] += 1
        (lr, weight_decay), eps, decoupled = self.rates, float(self.options["eps"]), bool(self.options["decoupled"])
        shards, seed, total = self.shards, self.seed(), self.state["sum"]
        if shards is None or not shards.by_columns or shards.ranks == 1:
            operands = (*self.tables(), rows, grad, seed, total, lr, eps, weight_decay, decoupled)
            self.move(rows, functools.partial(operator("row_adagrad"), *operands))
            return
        # Each rank has some columns, and a row's mean is over all of them. Every rank of the group has the same rows,
        # since each has the hits of all. One all-reduce of a number a row.
        update = RowUpdate(*self.tables(), rows, grad, seed)
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
