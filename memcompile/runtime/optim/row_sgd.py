"""RowSGD: SGD for every row, at the cost of the rows that a step touches."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from memcompile.errors import OptionError
from memcompile.runtime.optim.row_optimizer import RowOptimizer
from memcompile.runtime.table.rules import SGD


class RowSGD(RowOptimizer):
    """`torch.optim.SGD` without momentum, to rounding, for every row: x -= lr * (g + weight_decay * x).

    Without weight decay a row that a step does not touch stands still, and there is no state but the count of steps.
    With it, a row misses its decay until it is touched or flushed: the product of (1 - lr * weight_decay) over the
    steps that it missed, under any schedule, is the exponential of a difference of prefix sums. The state is then
    `last_step` int32 [slots] and `history`, as of `RowAdamW`.

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

    rule = SGD

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
