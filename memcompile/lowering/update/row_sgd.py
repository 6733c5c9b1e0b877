"""`row_sgd`: x = decay * x - rate * g for the rows that a step touches, each with the decay of what it has missed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from memcompile.lowering.register.operators import register_arguments
from memcompile.lowering.register.schema import expect
from memcompile.lowering.update.row_tables import RowUpdate


@dataclass(frozen=True)
class RowSgd(RowUpdate):
    """The arguments of `row_sgd`.

    Attributes:
        decays: float64 [n], of each row; None for 1.
        rate: of the gradient.
    """

    decays: Tensor | None
    rate: float

    def check(self) -> None:
        super().check()
        if self.decays is not None:
            expect("decays", self.decays, self.rows.shape, torch.float64)

    def updated(self, part: slice, rows: Tensor, x: Tensor, grad: Tensor | None) -> Tensor:
        if self.decays is not None:
            x.mul_(self.decays[part].to(x.dtype).unsqueeze(1))
        return x if grad is None else x.sub_(grad, alpha=self.rate)


register_arguments("row_sgd", RowSgd)
