"""`row_adam`: Adam on the rows that a step touches, after the steps that each has skipped.

A row first makes up for the steps that it has missed, in one go. With their decays (P, B1, B2) and their panels of
(a, M_0 .. M_{K-1}), which `skipped_steps` derives:

    y     = a * sqrt(v) / (a * sqrt(v) + eps)
    x     = P * x - m * sum over panels of (sum_i M_i * y**i) / (a * sqrt(v) + eps)
    m, v  = B1 * m, B2 * v

Missed steps leave moments of zero as they are, B1 = B2 = 1 and panels of zeros: without a gradient such moments are not
written, and not even read.

Then, where there is a gradient g, and with numbers = (decay, beta1, beta2, rate, scale, eps):

    m, v  = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    x     = decay * x - rate * m / (scale * sqrt(v) + eps)

AdamW is rate = lr / (1 - beta1**t) and scale = 1 / sqrt(1 - beta2**t); `torch.optim.SparseAdam` is scale = 1 and
rate = lr * sqrt(1 - beta2**t) / (1 - beta1**t).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from memcompile.lowering.register.operators import register_arguments
from memcompile.lowering.register.schema import expect
from memcompile.lowering.update.row_tables import EXP_AVG, EXP_AVG_SQ, RowUpdate, check_moments, load_rows, store_rows


def moments_of(dtype: torch.dtype) -> int:
    """K: how many moments a panel has, for values of this dtype."""
    return 14 if dtype is torch.float64 else 7


@dataclass(frozen=True)
class RowAdam(RowUpdate):
    """The arguments of `row_adam`.

    Attributes:
        exp_avg, exp_avg_sq: [slots, dim], contiguous, both in the dtype that rows are updated in, or in bfloat16, which
            is rounded stochastically.
        missed_steps, decays, panels: int64 [n], float64 [entries, 3] and [entries, panels, 1 + K], the fields of
            `MissedSteps`; None where no row has missed a step.
        numbers: float64 [6] on the CPU, see above.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    missed_steps: Tensor | None
    decays: Tensor | None
    panels: Tensor | None
    numbers: Tensor

    def check(self) -> None:
        super().check()
        check_moments(self.exp_avg, self.exp_avg_sq, self.param)
        expect("numbers", self.numbers, (6,), torch.float64)
        missed = [part for part in (self.missed_steps, self.decays, self.panels) if part is not None]
        if len(missed) == 3:
            check_missed_steps(self.rows, self.param, *missed)
        elif missed:
            raise ValueError("missed_steps, decays and panels: expected all of them or none")

    def updated(self, part: slice, rows: Tensor, x: Tensor, grad: Tensor | None) -> Tensor:
        decay, beta1, beta2, rate, scale, eps = self.numbers.tolist()
        m, v = (load_rows(table, rows) for table in (self.exp_avg, self.exp_avg_sq))  # [n, dim]
        if self.missed_steps is not None and self.decays is not None and self.panels is not None:
            missed = self.missed_steps[part]
            past = self.decays[missed].to(x.dtype).unsqueeze(-1)  # [n, 3, 1]
            x = x * past[:, 0] - m * steps_a_moment(v.sqrt(), self.panels[missed].to(x.dtype), eps)
            m, v = m * past[:, 1], v * past[:, 2]
        if grad is not None:
            m.lerp_(grad, 1 - beta1)
            v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            x.mul_(decay).addcdiv_(m, v.sqrt().mul_(scale).add_(eps), value=-rate)
        if grad is not None or self.decays is None or not bool((self.decays[:, 1:] == 1).all()):
            store_rows(self.exp_avg, rows, m, self.seed, EXP_AVG)
            store_rows(self.exp_avg_sq, rows, v, self.seed, EXP_AVG_SQ)
        return x


def check_missed_steps(of: Tensor, table: Tensor, missed_steps: Tensor, decays: Tensor, panels: Tensor) -> None:
    """Raises ValueError for what are not missed steps of rows of this table, for each of the rows, or hits, `of`."""
    expect("missed_steps", missed_steps, of.shape, torch.int64)
    expect("decays", decays, ("entries", 3), torch.float64)
    expect("panels", panels, (len(decays), "panels", 1 + moments_of(table.dtype)), torch.float64)


def steps_a_moment(root: Tensor, panels: Tensor, eps: float) -> Tensor:
    """The sum of the skipped steps for m = 1 [n, dim], of sqrt(v) [n, dim] and panels [n, panels, 1 + K]."""
    total = torch.zeros_like(root)
    for panel in panels.unsqueeze(-1).unbind(1):  # [n, 1 + K, 1]
        scaled = root * panel[:, 0]
        below = scaled + eps
        y = scaled / below
        powers = panel[:, -1]
        for i in range(panel.shape[1] - 2, 0, -1):
            powers = powers * y + panel[:, i]
        total += powers / below
    return total


register_arguments("row_adam", RowAdam)
