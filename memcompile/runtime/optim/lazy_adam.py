"""LazyAdam: Adam in which a step is one of the rows that it touches, and others stand still."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from memcompile.runtime.optim.row_optimizer import RowOptimizer
from memcompile.runtime.table.rules import LAZY_ADAM


class LazyAdam(RowOptimizer):
    """`torch.optim.SparseAdam`, to rounding, with weight decay by choice.

    A row's moments decay, and it moves, in the steps that touch it; the bias correction counts all steps. Weight
    decay is decoupled (x = (1 - lr * weight_decay) * x, as in AdamW) and of touched rows alone, so a row that is
    touched in one step out of a hundred decays a hundred times as slowly. No row misses anything.

    State of a parameter: `exp_avg` and `exp_avg_sq` of its shape, `step`, and `master` fp32 if asked for.

    Args:
        params: parameters or groups of them.
        lr: learning rate, a number or a tensor of one.
        betas, eps: as in `torch.optim.SparseAdam`; eps is positive and added to sqrt(exp_avg_sq) before the bias
            correction.
        weight_decay: see above.
        maximize, master_weights, seed: see `RowOptimizer`.
        state_dtype: of the moments. None is float32, float64 for float64 parameters; bfloat16 is rounded
            stochastically.

    Raises:
        OptionError: an option's value is not served.
    """

    rule = LAZY_ADAM

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        seed: int = 0,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(
            params, {**options, "state_dtype": state_dtype, "master_weights": master_weights, "seed": seed}
        )
