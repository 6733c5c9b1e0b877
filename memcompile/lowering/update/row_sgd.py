"""`row_sgd`: x = decay * x - rate * g for the rows that a step touches, each with the decay of what it has missed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from memcompile.lowering.update.row_tables import RowUpdate, chunks, load_rows, register_update


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
        decays = self.decays
        if decays is not None and (decays.shape != self.rows.shape or decays.dtype is not torch.float64):
            raise ValueError(f"decays: expected float64 as rows, got {decays.dtype} {list(decays.shape)}")

    def run(self) -> None:
        for part in chunks(self.rows, self.param.shape[1]):
            rows = self.rows[part]
            x = load_rows(self.table, rows)  # [n, dim]
            if self.decays is not None:
                x.mul_(self.decays[part].to(x.dtype).unsqueeze(1))
            if self.grad is not None:
                x.sub_(self.grad[part], alpha=self.rate)
            self.store(rows, x)


register_update("row_sgd", RowSgd)
