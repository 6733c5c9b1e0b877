"""`stale_gather` and `stale_dot`: rows are read as they are after the steps that they missed, and are not written.

They are `weighted_gather` and `gather_dot` over the rows that `row_adam` would make, without a gradient, of the values,
moments and missed steps: x = P * x - m * S(sqrt(v)). What is read changes nothing that comes later; and rows are not
copied, which would take longer than to correct each hit of a row. Where missed steps have no panels, the moments are
not read. There is no derivative.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from memcompile.lowering.gather.hits import check_dot, check_slots, new_dots, new_sums, parts_of_tokens, sum_dtype
from memcompile.lowering.register.operators import register_arguments
from memcompile.lowering.register.schema import expect
from memcompile.lowering.update.row_adam import check_missed_steps, steps_a_moment
from memcompile.lowering.update.row_tables import check_moments, check_table, load_rows

# Of one table that the PyTorch operators hold at once. An accelerator wants few launches.
_CHUNK_ELEMENTS = {"cpu": 2**20, "accelerator": 2**26}


@dataclass(frozen=True)
class _StaleRows:
    """The arguments of both operators, in the order of their schemas.

    Attributes:
        values, exp_avg, exp_avg_sq: [num_slots, dim], contiguous, as in `row_adam`.
        slots: int32 or int64 [tokens, hits].
        other: weights [tokens, hits], or a gradient [tokens, dim].
        missed_steps: int64 [tokens, hits], the entries of `decays` and `panels`, as in `row_adam`.
    """

    values: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    slots: Tensor
    other: Tensor
    missed_steps: Tensor
    decays: Tensor
    panels: Tensor
    eps: float

    def check(self) -> None:
        check_table("values", self.values)
        check_moments(self.exp_avg, self.exp_avg_sq, self.values)
        check_slots(self.slots)
        check_missed_steps(self.slots, self.values, self.missed_steps, self.decays, self.panels)

    def current(self) -> Iterator[tuple[slice, Tensor]]:
        """Some tokens after others, and the rows that they hit as they are after all steps: [tokens, hits, dim]."""
        dtype, dim = sum_dtype(self.values), self.values.shape[1]
        for part in parts_of_tokens(self.slots, dim, _CHUNK_ELEMENTS):
            rows, missed = self.slots[part].reshape(-1), self.missed_steps[part].reshape(-1)
            x, m, v = (load_rows(table, rows) for table in (self.values, self.exp_avg, self.exp_avg_sq))
            moved = m * steps_a_moment(v.sqrt(), self.panels[missed].to(dtype), self.eps)  # [hits of the part, dim]
            yield part, (x * self.decays[missed, :1].to(dtype) - moved).view(*self.slots[part].shape, dim)


class _Gather(_StaleRows):
    def check(self) -> None:
        super().check()
        expect("weights", self.other, self.slots.shape)

    def fake(self) -> Tensor:
        return new_sums(self.values, self.slots)

    def run(self) -> Tensor:
        out = self.fake()
        for part, rows in self.current():
            out[part] = (self.other[part].to(rows.dtype).unsqueeze(1) @ rows).squeeze(1)
        return out


class _Dot(_StaleRows):
    def check(self) -> None:
        super().check()
        check_dot(self.values, self.slots, self.other)

    def fake(self) -> Tensor:
        return new_dots(self.values, self.slots)

    def run(self) -> Tensor:
        out = self.fake()
        for part, rows in self.current():
            out[part] = (rows @ self.other[part].to(rows.dtype).unsqueeze(-1)).squeeze(-1)
        return out


register_arguments("stale_gather", _Gather)
register_arguments("stale_dot", _Dot)
