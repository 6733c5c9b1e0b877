"""RowAdamW: AdamW for every row, at the cost of the rows that a step touches."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from memcompile.errors import OptionError
from memcompile.runtime.optim.row_optimizer import RowOptimizer
from memcompile.runtime.table.rules import ADAMW


class RowAdamW(RowOptimizer):
    """`torch.optim.AdamW` (Loshchilov & Hutter, arXiv 1711.05101), to rounding, for every row.

    A dense AdamW moves every row in every step: by its momentum, its weight decay, and the decay of its moments. Here
    a row that a step does not touch stays as it is, and does all the steps that it missed, under the learning rates,
    weight decays and betas that they had, when it is touched next or when it is flushed. How, and how exactly, is told
    in `lowering.update.skipped_steps`. So before rows are read, in a forward, an evaluation or a checkpoint of the
    model, call `flush(parameter, rows)` or `flush(parameter)`.

    State of a parameter: `exp_avg` and `exp_avg_sq` of its shape, `last_step` int32 [slots], `step`, `master` fp32 if
    asked for, and `history`, float64, of the rates: one entry a change, at most max(1024, slots) of them; with more,
    all rows are flushed, which costs one row a step on average. `state_dict` saves what rows have missed and changes
    nothing; with the parameter as it is at that time, `load_state_dict` goes on bit for bit.

    A step costs O(touched rows), but for the first, which allocates, and one in which eps has changed, which flushes
    all rows.

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
            to do each.

    Raises:
        OptionError: an option's value is not served.
    """

    rule = ADAMW

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
            raise OptionError("amsgrad: a maximum over skipped steps cannot be made up for; use amsgrad=False")
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(
            params, {**options, "state_dtype": state_dtype, "master_weights": master_weights, "seed": seed}
        )
