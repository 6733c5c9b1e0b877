"""RowSGD: SGD for every row, at the cost of the rows that a step touches."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from memcompile.errors import OptionError
from memcompile.lowering.gather.hits import sum_dtype
from memcompile.lowering.register.schema import operator
from memcompile.lowering.update.row_tables import Gradient
from memcompile.runtime.optim.catching_up import CatchingUpOptimizer
from memcompile.runtime.optim.row_optimizer import Group, State, step_seed, tables
from memcompile.runtime.optim.skipped_steps import log_decay


class RowSGD(CatchingUpOptimizer):
    """`torch.optim.SGD` without momentum, to rounding, for every row: x -= lr * (g + weight_decay * x).

    Without weight decay a row that a step does not touch stands still, and there is no state but the count of steps.
    With it, a row is behind until it is touched or `catch_up` is asked for it: the product of (1 - lr * weight_decay)
    over the steps that it missed, under any schedule, is the exponential of a difference of prefix sums. The state is
    then `last_step` int32 [slots] and the history of the rates (`CatchingUpOptimizer`).

    Momentum is refused. Its buffer would be as large as the table, moves a row long after its last gradient, and
    with it coupled weight decay makes a skipped step a 2 x 2 matrix, whose products over a schedule have no compact
    prefix. Who wants momentum for rows wants `RowAdamW`, where both are served.

    Args:
        params: parameters or groups of them.
        lr: learning rate, a number or a tensor of one.
        momentum: 0.
        weight_decay: as in `torch.optim.SGD`; lr * weight_decay < 1.
        maximize, master_weights, seed: see `RowOptimizer`.

    Raises:
        OptionError: momentum, or another option's value that is not served.
    """

    factors = 1

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        master_weights: bool = False,
        seed: int = 0,
    ) -> None:
        if momentum:
            raise OptionError("momentum: RowSGD has none; for momentum that untouched rows keep, use RowAdamW")
        options = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, {**options, "master_weights": master_weights, "seed": seed})

    def _check_group(self, group: Group) -> None:
        if group.get("momentum") or group.get("nesterov"):
            raise OptionError("momentum: RowSGD has none; for momentum that untouched rows keep, use RowAdamW")

    def _start(self, parameter: Tensor, state: State, group: Group) -> None:
        """Nothing: what weight decay needs comes with it."""

    def _update(self, parameter: Tensor, state: State, group: Group, rows: Tensor, gradient: Gradient) -> None:
        lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
        log = log_decay(lr, weight_decay)
        if weight_decay and "last_step" not in state:
            size, device = parameter.shape[0], parameter.device
            state["last_step"] = torch.full((size,), state["step"], dtype=torch.int32, device=device)
        state["step"] += 1
        if "last_step" in state:
            self._history(state).record(state["step"], lr, [log])
        self._run(parameter, state, group, rows, gradient, lr)
        if "last_step" in state:
            self._bound_history(parameter, state)

    def _catch_up_rows(self, parameter: Tensor, state: State, group: Group, rows: Tensor) -> None:
        self._run(parameter, state, group, rows, None, 0.0)

    def _gather_behind(self, parameter: Tensor, state: State, slots: Tensor, weights: Tensor, last: Tensor) -> Tensor:
        values, _ = tables(parameter, state)
        weights = weights.to(sum_dtype(values))
        decayed = weights * self._decays(state, last).to(weights.dtype)
        return operator("weighted_gather")(values, slots, decayed).to(parameter.dtype)  # type: ignore[no-any-return]

    def _dot_behind(self, parameter: Tensor, state: State, slots: Tensor, grad: Tensor, last: Tensor) -> Tensor:
        values, _ = tables(parameter, state)
        dots: Tensor = operator("gather_dot")(values, slots, grad.to(values.dtype))
        return dots * self._decays(state, last).to(dots.dtype)

    def _decays(self, state: State, last: Tensor) -> Tensor:
        """What rows are multiplied by for the steps after `last`, float64 of its shape."""
        history, after = self._history(state), last.long()
        after = after if len(history) == 1 else after.cpu()
        until = torch.full_like(after, state["step"])
        return history.log_product(0, after, until).exp().to(last.device, non_blocking=True)

    def _run(
        self, parameter: Tensor, state: State, group: Group, rows: Tensor, gradient: Gradient | None, rate: float
    ) -> None:
        values, rounded = tables(parameter, state)
        decays = None
        if "last_step" in state:
            decays = self._decays(state, state["last_step"][rows])
            state["last_step"].index_fill_(0, rows, state["step"])
        grad, factors = (gradient.grad, gradient.factors) if gradient else (None, (None, None, None))
        operator("row_sgd")(values, rounded, rows, grad, decays, rate, step_seed(state, group, self.shards), *factors)
