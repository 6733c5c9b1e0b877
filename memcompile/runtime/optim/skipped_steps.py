"""What rows have missed of AdamW's steps: plans of `lowering.skipped_steps`, by the steps that rows were last in."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from memcompile.lowering.register.schema import operator
from memcompile.lowering.update.rate_history import RateHistory
from memcompile.lowering.update.row_adam import moments_of
from memcompile.lowering.update.skipped_steps import BETA1, BETA2

_NONE = 1e-300  # stands for a beta1 of 0 where its logarithm is taken


@dataclass(frozen=True)
class SkippedSteps:
    """What n rows have missed, as `row_adam` reads it."""

    plan_of_row: Tensor  # int64, of the shape of the rows
    decays: Tensor  # float64 [plans, 3], of the value and both moments
    panels: Tensor  # float64 [plans, panels, 1 + K]: centre, moments; a panel without moments adds 0


def factors_of_step(lr: float, weight_decay: float, betas: tuple[float, float]) -> list[float]:
    """The logarithms of the factors of one step, in the order of DECAY, BETA1, BETA2.

    Raises:
        ValueError: lr * weight_decay is 1 or more.
    """
    return [log_decay(lr, weight_decay), math.log(max(betas[0], _NONE)), math.log(betas[1])]


def log_decay(lr: float, weight_decay: float) -> float:
    """log(1 - lr * weight_decay).

    Raises:
        ValueError: lr * weight_decay is 1 or more.
    """
    if lr * weight_decay >= 1:
        raise ValueError(f"weight_decay: lr * weight_decay must be below 1, got {lr} * {weight_decay}")
    return math.log1p(-lr * weight_decay)


def plan(history: RateHistory, last: Tensor, until: int, dtype: torch.dtype) -> SkippedSteps | None:
    """What rows missed up to step `until`; None where that is nothing.

    Args:
        history: of the factors DECAY, BETA1 and BETA2.
        last: int32 of any shape, the steps that rows were last touched in; -1 where no step has, and the moments are
            zeros.
        dtype: of the values' sums, float32 or float64.
    """
    if last.numel() == 0:
        return None
    starts, plan_of_row = _distinct(last)
    if max(int(starts[0]), 0) >= until:
        return None
    decays, panels = operator("skipped_steps")(
        history.entries, starts, until, _terms(history, dtype), moments_of(dtype)
    )
    # Without waiting for a GPU to have them.
    decays, panels = (tensor.to(last.device, non_blocking=True) for tensor in (decays, panels))
    return SkippedSteps(plan_of_row, decays, panels)


def _distinct(last: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct steps, int64 on the CPU, ascending; and which of them each is, int64.

    Steps lie close together: they are marked in a table, in a fraction of the time that it takes to sort them.
    """
    lowest, highest = (int(step) for step in torch.aminmax(last))
    span = highest - lowest + 1
    if span > 4 * last.numel() + 2**14:
        starts, place = torch.unique(last, return_inverse=True)
        return starts.long().cpu(), place
    offset = last.reshape(-1).long() - lowest
    marks = torch.zeros(span, dtype=torch.int64, device=last.device).index_fill_(0, offset, 1)
    place = (marks.cumsum(0) - 1).index_select(0, offset).view(last.shape)
    return marks.nonzero()[:, 0].cpu() + lowest, place


def _terms(history: RateHistory, dtype: torch.dtype) -> int:
    """J, for the largest beta1 / sqrt(beta2) in the history."""
    entries = history.entries
    log_q = float((entries[:, 2 + 2 * BETA1] - entries[:, 2 + 2 * BETA2] / 2).max())
    log_u = (-61 if dtype is torch.float64 else -32) * math.log(2)
    return max(1, math.ceil((log_u + math.log(-math.expm1(log_q))) / log_q))
