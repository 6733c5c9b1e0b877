"""RowwiseAdagrad: Adagrad whose state is one number a row."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from memcompile.runtime.optim.row_optimizer import RowOptimizer
from memcompile.runtime.table.rules import ROW_WISE_ADAGRAD


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

    rule = ROW_WISE_ADAGRAD

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
