"""`row_adam`: Adam on the rows that a step touches, after the steps that each has skipped.

A row first makes up for what it has missed, in one go. With its plan's decays (P, B1, B2) and panels of (a, M_0 ..
M_{K-1}), which `skipped_steps` derives:

    y     = a * sqrt(v) / (a * sqrt(v) + eps)
    x     = P * x - m * sum over panels of (sum_i M_i * y**i) / (a * sqrt(v) + eps)
    m, v  = B1 * m, B2 * v

A plan leaves moments of zero as they are, B1 = B2 = 1, and its panels are zeros: without a gradient they are then not
written, and not even read.

Then, where there is a gradient g, and with numbers = (decay, beta1, beta2, rate, scale, eps):

    m, v  = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    x     = decay * x - rate * m / (scale * sqrt(v) + eps)

AdamW is rate = lr / (1 - beta1**t) and scale = 1 / sqrt(1 - beta2**t); `torch.optim.SparseAdam` is scale = 1 and
rate = lr * sqrt(1 - beta2**t) / (1 - beta1**t).
"""

import torch
from torch import Tensor

from memcompile.lowering.gather.hits import sum_dtype
from memcompile.lowering.update.row_tables import (
    EXP_AVG,
    EXP_AVG_SQ,
    Gradient,
    check_moments,
    check_rows,
    chunks,
    load_rows,
    register_row_operator,
    store_rows,
    store_values,
)


def moments_of(dtype: torch.dtype) -> int:
    """K: how many moments a panel has, for values of this dtype."""
    return 14 if dtype is torch.float64 else 7


def _check(
    values: Tensor,
    rounded: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor,
    grad: Tensor | None,
    plan_of_row: Tensor | None,
    decays: Tensor | None,
    panels: Tensor | None,
    numbers: Tensor,
    seed: int,
    ends: Tensor | None = None,
    hits: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    check_rows(values, rounded, rows)
    Gradient.check(values, rows, grad, ends, hits, weights)
    check_moments(exp_avg, exp_avg_sq, values)
    if numbers.shape != (6,) or numbers.dtype is not torch.float64 or numbers.device.type not in ("cpu", "meta"):
        raise ValueError(f"numbers: expected float64 [6] on the CPU, got {numbers.dtype} {list(numbers.shape)}")
    if plan_of_row is None or decays is None or panels is None:
        if not (plan_of_row is None and decays is None and panels is None):
            raise ValueError("plan_of_row, decays and panels: expected all of them or none")
        return
    check_plans("row", rows, values, plan_of_row, decays, panels)


def check_plans(name: str, of: Tensor, values: Tensor, plan_of: Tensor, decays: Tensor, panels: Tensor) -> None:
    """Raises ValueError for what are not plans of these values, one of them for each `name` in `of`."""
    if plan_of.shape != of.shape or plan_of.dtype is not torch.int64:
        raise ValueError(f"plan_of_{name}: expected int64 as {name}s, got {plan_of.dtype} {list(plan_of.shape)}")
    if decays.dtype is not torch.float64 or decays.dim() != 2 or decays.shape[1] != 3:
        raise ValueError(f"decays: expected float64 [plans, 3], got {decays.dtype} {list(decays.shape)}")
    size = 1 + moments_of(values.dtype)
    if panels.dtype is not torch.float64 or panels.dim() != 3 or panels.shape[::2] != (len(decays), size):
        raise ValueError(f"panels: expected float64 [plans, panels, {size}], got {panels.dtype} {list(panels.shape)}")


def _kernel(
    values: Tensor,
    rounded: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor,
    grad: Tensor | None,
    plan_of_row: Tensor | None,
    decays: Tensor | None,
    panels: Tensor | None,
    numbers: Tensor,
    seed: int,
    ends: Tensor | None = None,
    hits: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    decay, beta1, beta2, rate, scale, eps = numbers.tolist()
    gradient = None if grad is None else Gradient(grad, ends, hits, weights)
    for part in chunks(rows, values.shape[1]):
        these = rows[part]
        x, m, v = (load_rows(table, these) for table in (values, exp_avg, exp_avg_sq))  # [n, dim]
        if plan_of_row is not None and decays is not None and panels is not None:
            plan = plan_of_row[part]
            root = v.sqrt()
            past = decays[plan].to(sum_dtype(values)).unsqueeze(-1)  # [n, 3, 1]
            x = x * past[:, 0] - m * steps_a_moment(root, panels[plan].to(sum_dtype(values)), eps)
            m, v = m * past[:, 1], v * past[:, 2]
        if gradient is not None:
            g = gradient.of(part, x.dtype)
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            x.mul_(decay).addcdiv_(m, v.sqrt().mul_(scale).add_(eps), value=-rate)
        store_values(values, rounded, these, x, seed)
        if gradient is None and decays is not None and bool((decays[:, 1:] == 1).all()):
            continue
        store_rows(exp_avg, these, m, seed, EXP_AVG)
        store_rows(exp_avg_sq, these, v, seed, EXP_AVG_SQ)


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


register_row_operator("row_adam", _check, _kernel)
