"""`stale_gather` and `stale_dot`: rows are read as they are once they have caught up, and stay as they are.

They are `weighted_gather` and `gather_dot` over the rows that `row_adam` would make, without a gradient, of the values,
moments and missed steps: x = P * x - m * S(sqrt(v)). No row is written, so what is read changes nothing that comes
later; and rows are not copied, which would take longer than to correct each hit of a row. Where missed steps have no
panels, the moments are not read. There is no derivative.
"""

from collections.abc import Iterator

from torch import Tensor

from memcompile.lowering.gather.hits import check_dot, check_slots, check_weights, parts_of_tokens, sum_dtype
from memcompile.lowering.register.operators import register_operator
from memcompile.lowering.update.row_adam import check_missed_steps, steps_a_moment
from memcompile.lowering.update.row_tables import check_moments, check_table, load_rows

# Of one table that the PyTorch operators hold at once. An accelerator wants few launches.
_CHUNK_ELEMENTS = {"cpu": 2**20, "accelerator": 2**26}


def _check(
    values: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    slots: Tensor,
    missed_steps: Tensor,
    decays: Tensor,
    panels: Tensor,
) -> None:
    check_table("values", values, values)
    check_moments(exp_avg, exp_avg_sq, values)
    check_slots(slots)
    check_missed_steps("slots", slots, values, missed_steps, decays, panels)


def _current_rows(
    values: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    slots: Tensor,
    missed_steps: Tensor,
    decays: Tensor,
    panels: Tensor,
    eps: float,
) -> Iterator[tuple[slice, Tensor]]:
    """Some tokens after others, and the rows [tokens, hits, dim] that they hit, as they are by now."""
    dtype, dim = sum_dtype(values), values.shape[1]
    for part in parts_of_tokens(slots, dim, _CHUNK_ELEMENTS):
        rows, missed = slots[part].reshape(-1), missed_steps[part].reshape(-1)
        x, m, v = (load_rows(table, rows) for table in (values, exp_avg, exp_avg_sq))  # [hits of the part, dim]
        moved = m * steps_a_moment(v.sqrt(), panels[missed].to(dtype), eps)
        yield part, (x * decays[missed, :1].to(dtype) - moved).view(*slots[part].shape, dim)


# --- stale_gather -------------------------------------------------------------------------------


def _check_gather(
    values: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    slots: Tensor,
    weights: Tensor,
    missed_steps: Tensor,
    decays: Tensor,
    panels: Tensor,
    eps: float,
) -> None:
    _check(values, exp_avg, exp_avg_sq, slots, missed_steps, decays, panels)
    check_weights(slots, weights)


def _gather(
    values: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    slots: Tensor,
    weights: Tensor,
    missed_steps: Tensor,
    decays: Tensor,
    panels: Tensor,
    eps: float,
) -> Tensor:
    out = values.new_empty(slots.shape[0], values.shape[1])
    for part, rows in _current_rows(values, exp_avg, exp_avg_sq, slots, missed_steps, decays, panels, eps):
        out[part] = (weights[part].to(rows.dtype).unsqueeze(1) @ rows).squeeze(1)
    return out


def _gather_fake(values: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, slots: Tensor, *rest: Tensor) -> Tensor:
    return values.new_empty(slots.shape[0], values.shape[1])


# --- stale_dot ----------------------------------------------------------------------------------


def _check_dot(
    values: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    slots: Tensor,
    grad: Tensor,
    missed_steps: Tensor,
    decays: Tensor,
    panels: Tensor,
    eps: float,
) -> None:
    _check(values, exp_avg, exp_avg_sq, slots, missed_steps, decays, panels)
    check_dot(values, slots, grad)


def _dot(
    values: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    slots: Tensor,
    grad: Tensor,
    missed_steps: Tensor,
    decays: Tensor,
    panels: Tensor,
    eps: float,
) -> Tensor:
    out = values.new_empty(slots.shape, dtype=sum_dtype(values))
    for part, rows in _current_rows(values, exp_avg, exp_avg_sq, slots, missed_steps, decays, panels, eps):
        out[part] = (rows @ grad[part].to(rows.dtype).unsqueeze(-1)).squeeze(-1)
    return out


def _dot_fake(values: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, slots: Tensor, *rest: Tensor) -> Tensor:
    return values.new_empty(slots.shape, dtype=sum_dtype(values))


register_operator("stale_gather", check=_check_gather, kernel=_gather, fake=_gather_fake)
register_operator("stale_dot", check=_check_dot, kernel=_dot, fake=_dot_fake)
