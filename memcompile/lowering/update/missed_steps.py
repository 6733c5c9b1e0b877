"""What rows have missed of AdamW's or SGD's steps, by the steps that they were last touched in."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from memcompile.lowering.register.schema import operator
from memcompile.lowering.update.rate_history import BETA1, BETA2, DECAY, LOGS, RateHistory, located, log_product
from memcompile.lowering.update.row_adam import moments_of

_NONE = 1e-300  # stands for a beta1 of 0 where its logarithm is taken


class MissedSteps(NamedTuple):
    """What n rows have missed, as `row_adam` and `stale_gather` read it."""

    entries: Tensor  # int64, of the shape of the rows: where each is in
    decays: Tensor  # float64 [entries, 3], of the row and both moments, and
    panels: Tensor  # float64 [entries, panels, 1 + K]: centre, moments; a panel without moments adds 0


def factors_of_step(lr: float, weight_decay: float, betas: tuple[float, float]) -> list[float]:
    """The logarithms of the factors of one step, in the order of DECAY, BETA1, BETA2.

    Raises:
        ValueError: lr * weight_decay is 1 or more.
    """
    if lr * weight_decay >= 1:
        raise ValueError(f"weight_decay: lr * weight_decay must be below 1, got {lr} * {weight_decay}")
    return [math.log1p(-lr * weight_decay), math.log(max(betas[0], _NONE)), math.log(max(betas[1], _NONE))]


def missed_steps(history: RateHistory, last: Tensor, until: int, dtype: torch.dtype) -> MissedSteps | None:
    """What rows missed up to step `until`; None where that is nothing.

    Args:
        last: int32 of any shape, the steps that rows were last touched in. No step has touched a row of 0: its moments
            are zeros.
        dtype: of the values' sums, float32 or float64.
    """
    if last.numel() == 0:
        return None
    starts, entries = _distinct(last.masked_fill(last == 0, -1))
    if max(int(starts[0]), 0) >= until:
        return None
    decays, panels = operator("skipped_steps")(
        history.entries, starts, until, _terms(history, dtype), moments_of(dtype)
    )
    # Without waiting for a GPU to have them.
    decays, panels = (tensor.to(last.device, non_blocking=True) for tensor in (decays, panels))
    return MissedSteps(entries, decays, panels)


def missed_decays(history: RateHistory, last: Tensor, until: int) -> Tensor:
    """What values are multiplied by for the steps after `last`, float64 of its shape."""
    after = last.long() if len(history) == 1 else last.long().cpu()
    entries, end = history.entries, torch.full_like(after, until)
    product = log_product(entries, DECAY, located(entries, after), located(entries, end)).exp()
    return product.to(last.device, non_blocking=True)


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
    log_q = float((entries[:, LOGS + 2 * BETA1] - entries[:, LOGS + 2 * BETA2] / 2).max())
    log_u = (-61 if dtype is torch.float64 else -32) * math.log(2)
    return max(1, math.ceil((log_u + math.log(-math.expm1(log_q))) / log_q))
