"""RowwiseAdagrad: Adagrad whose state is one number a row."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from memcompile.errors import OptionError
from memcompile.lowering.distributed import collectives
from memcompile.lowering.gather.hits import sum_dtype
from memcompile.lowering.register.schema import operator
from memcompile.lowering.update.row_tables import Gradient, chunks, load_rows, store_values
from memcompile.runtime.optim.row_optimizer import Group, RowOptimizer, State, require, step_seed, tables


class RowwiseAdagrad(RowOptimizer):
    """Adagrad with the sum, over a row's steps, of the mean of its gradient's squares: FBGEMM's
    `EXACT_ROWWISE_ADAGRAD`.

        squares[row] += mean(g**2);  x -= lr / (sqrt(squares[row]) + eps) * g

    "Exact" is that a row is updated once a step, by its summed gradient. With one number a row it is
    `torch.optim.Adagrad`. Rows that a step does not touch stay as they are, weight decay included, as in FBGEMM; with
    weight_decay = 0 they would in a dense Adagrad too.

    State of a parameter: `sum` [slots], fp32 or, for float64 parameters, float64 (it grows by ever smaller parts of
    itself, and is a row's smallest cost); `step`; and `master` fp32 if asked for.

    Args:
        params: parameters or groups of them.
        lr: learning rate, a number or a tensor of one.
        eps: added to the root.
        weight_decay: of touched rows. By default L2, added to the gradient before its squares; `decoupled` multiplies
            the row by 1 - lr * weight_decay. FBGEMM's weight decay modes 1 and 2.
        initial_accumulator_value: what `sum` starts with.
        maximize, master_weights, seed: see `RowOptimizer`.

    Raises:
        OptionError: an option's value is not served.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = False,
        initial_accumulator_value: float = 0.0,
        maximize: bool = False,
        master_weights: bool = False,
        seed: int = 0,
    ) -> None:
        options = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "decoupled": decoupled, "maximize": maximize}
        options["initial_accumulator_value"] = initial_accumulator_value
        super().__init__(params, {**options, "master_weights": master_weights, "seed": seed})

    def _check_group(self, group: Group) -> None:
        first = group["initial_accumulator_value"]
        require("initial_accumulator_value", first, first >= 0, "0 or more")
        require("eps", group["eps"], group["eps"] > 0, "positive: a row whose gradient is 0 may have sum = 0")

    def _start(self, parameter: Tensor, state: State, group: Group) -> None:
        dtype = sum_dtype(parameter)
        first = group["initial_accumulator_value"]
        state["sum"] = torch.full(parameter.shape[:1], first, dtype=dtype, device=parameter.device)

    def knows(self, parameter: Tensor, state: State) -> bool:
        return "sum" in state and state["sum"].numel() == parameter.shape[0]

    def _complete(self, parameter: Tensor, state: State, group: Group) -> None:
        if "sum" not in state:
            raise OptionError(f"the state is of another optimizer: it has no `sum`, but {', '.join(sorted(state))}")
        shape = state["sum"].shape
        if shape == (parameter.shape[0], 1):  # of torch.optim.Adagrad, where the two are the same
            state["sum"] = state["sum"][:, 0].contiguous()
        elif shape != parameter.shape[:1]:
            raise OptionError(f"sum: expected one number a row, {list(parameter.shape[:1])}; got {list(shape)}")

    def _update(self, parameter: Tensor, state: State, group: Group, rows: Tensor, gradient: Gradient) -> None:
        state["step"] += 1
        decay = float(group["weight_decay"]), bool(group["decoupled"])
        seed = step_seed(state, group, self.shards)
        values, rounded = tables(parameter, state)
        lr, eps = float(group["lr"]), float(group["eps"])
        if self.shards is not None and self.shards.by_columns and self.shards.ranks > 1:
            self._update_columns(values, rounded, state["sum"], rows, gradient, lr, eps, decay, seed)
            return
        rest = (lr, eps, *decay, seed, *gradient.factors)
        operator("row_adagrad")(values, rounded, state["sum"], rows, gradient.grad, *rest)

    def _update_columns(
        self,
        values: Tensor,
        rounded: Tensor | None,
        total: Tensor,
        rows: Tensor,
        gradient: Gradient,
        lr: float,
        eps: float,
        decay: tuple[float, bool],
        seed: int,
    ) -> None:
        """The same where each rank has some columns: a row's mean is over all of them. Every rank of the group has the
        same rows, since each has the hits of all. One all-reduce of a number a row.
        """
        assert self.shards is not None
        weight_decay, decoupled = decay
        grad = gradient.of(slice(0, len(rows)), total.dtype)  # [n, own columns]
        if weight_decay and not decoupled:
            grad = grad + weight_decay * load_rows(values, rows)
        squares = collectives.all_reduce(grad.square().sum(1), self.shards.group) / sum(self.shards.sizes)
        sums = total.index_select(0, rows).add_(squares)  # [n]
        total.index_copy_(0, rows, sums)
        for part in chunks(rows, values.shape[1]):
            x = load_rows(values, rows[part])
            if weight_decay and decoupled:
                x.mul_(1 - lr * weight_decay)
            x.sub_((lr / (sums[part].sqrt() + eps)).unsqueeze(1) * grad[part])
            store_values(values, rounded, rows[part], x, seed)
