"""`skipped_steps`: AdamW's steps without a gradient, many at once: the plans by which `row_adam` does them.

A row was last touched in step t0 with value x and moments m, v. A dense AdamW goes on moving it: step k = t0 + j
without a gradient decays m to beta1**j * m and v to beta2**j * v and does

    x = (1 - lr_k * weight_decay) * x - lr_k / (1 - beta1**k) * beta1**j * m
                                        / (sqrt(beta2**j * v / (1 - beta2**k)) + eps)

so that in step t, with P the products of (1 - lr_k * weight_decay),

    x_t = P(t0+1..t) * x - m * S(sqrt(v)),   S(r) = sum over j of c_j / (a_j * r + eps),                         (1)
    c_j = P(k+1..t) * lr_k / (1 - beta1**k) * beta1**j,   a_j = beta2**(j/2) / sqrt(1 - beta2**k).

eps and the schedule deny the sum a closed form. Two facts make it cheap and exact to rounding:

* It may stop. A term is at most lr_k * q**j * m / sqrt(v) with q = beta1 / sqrt(beta2) < 1 (and P <= 1), and
  |m| / sqrt(v) is at most (1 - beta1) / sqrt((1 - beta2) * (1 - q**2)), 7.3 by default. After J steps, with
  q**J / (1 - q) = u, the rest is below u times the largest learning rate in it. u is 2**-32 for fp32 and 2**-61 for
  fp64: 2**-8 of a rounding of one step's movement. J is 234 and 426 by default. After J only P goes on, and it is a
  matter of prefix sums of logarithms (`RateHistory`).
* Its terms are alike. The a_j that remain span little: in late steps a_J is 0.89 * a_1 (fp64: 0.81). They are divided
  into panels, each within (1 +- 1/16) of its centre a. With d = (a_j - a) / a and y = a * r / (a * r + eps) in [0, 1],

      c_j / (a_j * r + eps) = c_j / (a * r + eps) * 1 / (1 + d * y),   1 / (1 + d * y) = sum over i of (-d * y)**i,

  whose first K terms have a relative error of at most 16**-K, whatever r and eps are: below 2**-24 for K = 7 (fp32)
  and 2**-53 for K = 14 (fp64). So a panel is its centre and K moments M_i = sum of c_j * (-d_j)**i, which all rows
  last touched in the same step share, and an element costs one square root and one division a panel: one panel
  (fp64: two) in all but the first steps, when 1 - beta2**k changes fast (23 and 26 from t0 = 0).

What it costs is O(distinct t0 * J) for the plans, of which there are at most as many as rows, and O(rows * dim). A term
is split in what its step alone decides, P(k+1..t) * lr_k / (1 - beta1**k) and 1 / sqrt(1 - beta2**k), which is computed
once a step, and powers of the betas, so that the C++ has a few multiplications a term: 2,000 plans in a fraction of a
millisecond. Where betas change within the J steps, the powers are products, made for that plan.
"""

import math

import torch
from torch import Tensor

from memcompile.lowering.register.operators import register_operator
from memcompile.lowering.register.schema import expect
from memcompile.lowering.update.rate_history import BETA1, BETA2, COLUMNS, DECAY, LOGS, LR, located, log_product

_HALF_WIDTH = 1 / 16  # of a panel, relative to its centre
_RATIO = math.log((1 + _HALF_WIDTH) / (1 - _HALF_WIDTH))
_STARTS = 2**10  # whose terms the PyTorch operators hold at once


def _check(rates: Tensor, starts: Tensor, until: int, terms: int, moments: int) -> None:
    expect("rates", rates, ("changes", COLUMNS), torch.float64)
    expect("starts", starts, ("n",), torch.int64)
    if not len(rates) or terms < 1 or moments not in (7, 14):
        raise ValueError(
            f"rates, terms, moments: expected 1 or more, and 7 or 14; got {len(rates)}, {terms}, {moments}"
        )


def _kernel(rates: Tensor, starts: Tensor, until: int, terms: int, moments: int) -> tuple[Tensor, Tensor]:
    """The plans of rows that were last touched in the steps `starts`.

    Args:
        rates: the entries of a `RateHistory`, on the CPU, as the rest.
        starts: int64 [n], ascending, each once; -1 is of rows whose moments are zeros. None is after `until`.
        terms: J.
        moments: K.

    Returns:
        decays float64 [n, 3], of the value and both moments, 1 for moments of zero; panels float64 [n, panels, 1 + K],
        each a centre and moments. A panel without moments adds 0.
    """
    if len(starts) and (starts[0] < -1 or starts[-1] > until or not bool((starts.diff() > 0).all())):
        raise ValueError(f"starts: expected steps from -1 to {until}, ascending and each once")
    after, end = located(rates, starts.clamp(min=0)), located(rates, torch.full_like(starts, until))
    decays = torch.stack([log_product(rates, factor, after, end) for factor in (DECAY, BETA1, BETA2)], 1).exp()
    decays[starts < 0, BETA1:] = 1.0  # moments of zero stay as they are: `row_adam` need not read them
    moved = ((starts >= 0) & (starts < until)).nonzero()[:, 0]
    parts = [some for some in torch.split(moved, _STARTS) if len(some)]
    filled = [_panels(rates, starts[some, None], until, terms, moments) for some in parts]
    most = max((part.shape[1] for part in filled), default=0)
    panels = rates.new_zeros(len(starts), most, 1 + moments)
    for some, part in zip(parts, filled, strict=True):
        panels[some, : part.shape[1]] = part
    return decays, panels


def _panels(rates: Tensor, starts: Tensor, until: int, terms: int, moments: int) -> Tensor:
    """[plans, panels, 1 + K] for starts [plans, 1], ascending."""
    steps = starts + torch.arange(1, 1 + min(until - int(starts[0]), terms), device=starts.device)  # [plans, terms]
    missed = steps <= until
    after, now, end = (located(rates, some) for some in (starts, steps.clamp(max=until), steps.new_tensor(until)))

    def without_power(factor: int) -> Tensor:  # 1 - beta**step
        return -torch.expm1(now[0] * rates[now[1], LOGS + 2 * factor])

    log_c = log_product(rates, BETA1, after, now) + log_product(rates, DECAY, now, end)
    c = torch.where(missed, rates[now[1], LR] * log_c.exp_() / without_power(BETA1), 0.0)
    log_a = (log_product(rates, BETA2, after, now) - without_power(BETA2).log()) / 2
    highest = log_a.amax(1, keepdim=True)  # [plans, 1]
    panel = ((highest - log_a) / _RATIO).long()  # [plans, terms]
    count = int(panel.max()) + 1
    log_top = highest - torch.arange(count, device=highest.device) * _RATIO
    centres = log_top.exp() / (1 + _HALF_WIDTH)  # [plans, count]
    minus_d = 1 - log_a.exp() / centres.gather(1, panel)
    into = (panel + torch.arange(len(starts), device=starts.device).unsqueeze(1) * count).view(-1)
    columns = [centres]
    for _ in range(moments):
        moment = c.new_zeros(len(starts) * count).index_add_(0, into, c.reshape(-1))
        columns.append(moment.view(len(starts), count))
        c = c * minus_d
    return torch.stack(columns, 2)


def _fake(rates: Tensor, starts: Tensor, until: int, terms: int, moments: int) -> tuple[Tensor, Tensor]:
    panels = torch.library.get_ctx().new_dynamic_size()
    return rates.new_empty(len(starts), 3), rates.new_empty(len(starts), panels, 1 + moments)


register_operator("skipped_steps", check=_check, kernel=_kernel, fake=_fake)
