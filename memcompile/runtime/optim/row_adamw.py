"""RowAdamW: AdamW for every row, at the cost of the rows that a step touches."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from memcompile.errors import OptionError
from memcompile.lowering.gather.hits import sum_dtype
from memcompile.lowering.register.schema import operator
from memcompile.lowering.update.row_tables import Gradient
from memcompile.runtime.optim.catching_up import CatchingUpOptimizer
from memcompile.runtime.optim.gradients import as_rows
from memcompile.runtime.optim.row_optimizer import (
    MOMENTS,
    Group,
    State,
    check_betas,
    check_state_dtype,
    require,
    start_moments,
    step_seed,
    tables,
)
from memcompile.runtime.optim.skipped_steps import SkippedSteps, factors_of_step, plan


class RowAdamW(CatchingUpOptimizer):
    """`torch.optim.AdamW` (Loshchilov & Hutter, arXiv 1711.05101), to rounding, for every row.

    A dense AdamW moves every row in every step: by its momentum, its weight decay, and the decay of its moments. Here
    a row that a step does not touch falls behind, and makes up for all the steps that it missed, under the learning
    rates, weight decays and betas that they had, when it is touched next or when `catch_up` is asked for it. How, and
    how exactly, is told in `lowering.skipped_steps`. So before rows are read, in a forward, an evaluation or a
    checkpoint of the model, call `catch_up(parameter, rows)` or `catch_up(parameter)`.

    State of a parameter: `exp_avg` and `exp_avg_sq` of its shape, `last_step` int32 [slots], `step`, `master` fp32 if
    asked for, and the history of the rates (see `CatchingUpOptimizer` for its bound). `state_dict` saves the lag as
    it is and changes nothing; with the parameter as it is at that time, `load_state_dict` goes on bit for bit.

    A step costs O(touched rows), but for the first, which allocates, and one in which eps has changed, which catches
    all rows up.

    Args:
        params: parameters or groups of them.
        lr: learning rate, a number or a tensor of one; any scheduler may change it.
        betas: with beta1**2 < beta2, so that a row's steps without gradients die out. Schedulers may change them.
        eps: positive.
        weight_decay: decoupled; lr * weight_decay < 1.
        maximize, master_weights, seed: see `RowOptimizer`.
        state_dtype: of the moments. None is float32, float64 for float64 parameters; bfloat16 is rounded
            stochastically.
        amsgrad: refused. Its denominator is a maximum over all steps, the skipped ones included, and a row would have
            to live through each.

    Raises:
        OptionError: an option's value is not served.
    """

    factors = 3
    saved = frozenset(MOMENTS)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        seed: int = 0,
    ) -> None:
        if amsgrad:
            raise OptionError("amsgrad: RowAdamW cannot catch up with a maximum over skipped steps; use amsgrad=False")
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(
            params, {**options, "state_dtype": state_dtype, "master_weights": master_weights, "seed": seed}
        )

    def _check_group(self, group: Group) -> None:
        check_betas(group)
        check_state_dtype(group)
        beta1, beta2 = group["betas"]
        require("betas", group["betas"], beta1**2 < beta2, "beta1**2 < beta2")
        if group.get("amsgrad"):
            raise OptionError("amsgrad: RowAdamW cannot catch up with a maximum over skipped steps; use amsgrad=False")

    def _start(self, parameter: Tensor, state: State, group: Group) -> None:
        start_moments(parameter, state, group)
        self._complete(parameter, state, group)

    def _complete(self, parameter: Tensor, state: State, group: Group) -> None:
        if "last_step" not in state:  # every row is as of now
            slots, device = parameter.shape[0], parameter.device
            state["last_step"] = torch.full((slots,), state["step"], dtype=torch.int32, device=device)
            state["eps"] = float(group["eps"])
            self._history(state)

    def _update(self, parameter: Tensor, state: State, group: Group, rows: Tensor, gradient: Gradient) -> None:
        lr, weight_decay, eps = float(group["lr"]), float(group["weight_decay"]), float(group["eps"])
        beta1, beta2 = (float(beta) for beta in group["betas"])
        history = self._history(state)
        if eps != state["eps"]:
            self.catch_up(parameter)
            state["eps"] = eps
        factors = factors_of_step(lr, weight_decay, (beta1, beta2))
        step = state["step"] = state["step"] + 1
        history.record(step, lr, factors)
        rate, scale = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
        self._run(parameter, state, group, rows, gradient, step - 1, [1 - lr * weight_decay, beta1, beta2, rate, scale])
        self._bound_history(parameter, state)

    def _catch_up_rows(self, parameter: Tensor, state: State, group: Group, rows: Tensor) -> None:
        self._run(parameter, state, group, rows, None, state["step"], [1.0, 0.0, 0.0, 0.0, 0.0])

    def _gather_behind(self, parameter: Tensor, state: State, slots: Tensor, weights: Tensor, last: Tensor) -> Tensor:
        rows = self._lagging(parameter, state, last)
        return operator("lagging_gather")(*rows[:3], slots, weights, *rows[3:]).to(parameter.dtype)  # type: ignore[no-any-return]

    def _dot_behind(self, parameter: Tensor, state: State, slots: Tensor, grad: Tensor, last: Tensor) -> Tensor:
        rows = self._lagging(parameter, state, last)
        return operator("lagging_dot")(*rows[:3], slots, grad.to(rows[0].dtype), *rows[3:])  # type: ignore[no-any-return]

    def _lagging(self, parameter: Tensor, state: State, last: Tensor) -> tuple[Any, ...]:
        """What tells the operators that read them what rows are by now."""
        values, _ = tables(parameter, state)
        missed = self._plan(values, state, last, state["step"])
        assert missed is not None, "asked where rows are behind"
        moments = as_rows(state["exp_avg"]), as_rows(state["exp_avg_sq"])
        return values, *moments, missed.plan_of_row, missed.decays, missed.panels, state["eps"]

    def _plan(self, values: Tensor, state: State, last: Tensor, until: int) -> SkippedSteps | None:
        last = last.masked_fill(last == 0, -1)  # no step has touched them: their moments are zeros
        return plan(self._history(state), last, until, sum_dtype(values))

    def _run(
        self,
        parameter: Tensor,
        state: State,
        group: Group,
        rows: Tensor,
        gradient: Gradient | None,
        until: int,
        numbers: list[float],
    ) -> None:
        """Catches the rows up until the step `until`, and then does a step with the gradient, if there is one."""
        values, rounded = tables(parameter, state)
        moments = as_rows(state["exp_avg"]), as_rows(state["exp_avg_sq"])
        missed = self._plan(values, state, state["last_step"][rows], until)
        parts = (None, None, None) if missed is None else (missed.plan_of_row, missed.decays, missed.panels)
        constants = torch.tensor([*numbers, state["eps"]], dtype=torch.float64)
        seed = step_seed(state, group, self.shards)
        grad, factors = (gradient.grad, gradient.factors) if gradient else (None, (None, None, None))
        operator("row_adam")(values, rounded, *moments, rows, grad, *parts, constants, seed, *factors)
        state["last_step"].index_fill_(0, rows, state["step"])
