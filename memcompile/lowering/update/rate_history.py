"""What every past step multiplied a row by, in a table with one entry for each change of the rates."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_START, _LR, _LOGS = 0, 1, 2  # columns; then for each factor its logarithm and the sum of those of earlier entries


class RateHistory:
    """The learning rate and factors of every step since the oldest that a row may ask for.

    It is a view: all of it is in the state of a parameter, `rates` float64 [capacity, 2 + 2 * factors] on the CPU and
    `changes`, its entries in use, so that it is saved, copied and loaded with the rest.

    An entry is the first step of a run with the same rates, so a constant rate takes one entry, a warm-up of w steps
    w of them, and a schedule that changes in every step one a step (8 * (2 + 2 * factors) bytes each) until `forget`,
    which an optimizer calls once all rows are caught up. The capacity is at most twice the entries, and at least 8.
    """

    def __init__(self, state: dict[str, Any], factors: int) -> None:
        self._state = state
        self._factors = factors
        if "rates" not in state:
            self.forget()

    def __len__(self) -> int:
        """How many entries there are."""
        return int(self._state["changes"])

    @property
    def entries(self) -> Tensor:
        """[len(self), 2 + 2 * factors]"""
        rates: Tensor = self._state["rates"]
        return rates[: len(self)]

    def record(self, step: int, lr: float, logs: list[float]) -> None:
        """Adds a step: its learning rate and the logarithms of its factors. Steps come in order, each once."""
        rates, count = self._state["rates"], len(self)
        new = [float(step), lr]
        last = rates[count - 1].tolist() if count else None
        for i in range(self._factors):
            at = _LOGS + 2 * i
            new += [logs[i], last[at + 1] + (step - last[_START]) * last[at] if last else 0.0]
        if last and new[_LR] == last[_LR] and new[_LOGS::2] == last[_LOGS::2]:
            return
        if count == len(rates):
            rates = self._state["rates"] = torch.cat([rates, torch.zeros_like(rates)])
        rates[count] = torch.tensor(new, dtype=torch.float64)
        self._state["changes"] = count + 1

    def forget(self) -> None:
        """Every row is up to date: the history starts again, as that of a state which was loaded does. A training that
        resumes there then rounds as the one that goes on.
        """
        self._state["rates"] = torch.zeros(8, _LOGS + 2 * self._factors, dtype=torch.float64)
        self._state["changes"] = 0

    def lr(self, steps: Tensor) -> Tensor:
        """The learning rates, float64, of these steps."""
        return self.entries[self._entry_of(steps), _LR]

    def log(self, factor: int, steps: Tensor) -> Tensor:
        """The logarithms, float64, of a factor in these steps."""
        return self.entries[self._entry_of(steps), _LOGS + 2 * factor]

    def log_product(
        self, factor: int, after: Tensor, until: Tensor, spread: Callable[[Tensor], Tensor] = lambda x: x
    ) -> Tensor:
        """The logarithm, float64, of the product of a factor over the steps `after` + 1 to `until`.

        A product within one entry is a power; across entries it is the difference of two sums. The steps are on the
        CPU, as the entries are; while there is one entry, on any device.

        Args:
            spread: makes of numbers of the shape of `until` the shape of the result, as by an index: what is looked up
                for a step is then looked up once, however often the step occurs.
        """
        if len(self) == 1:
            return (spread(until) - after).double() * float(self.entries[0, _LOGS + 2 * factor])
        first, last = self._entry_of(after), self._entry_of(until)
        at = _LOGS + 2 * factor
        entries = self.entries
        within = (spread(until) - after) * spread(entries[last, at])

        def total(entry: Tensor, steps: Tensor) -> Tensor:
            return entries[entry, at + 1] + (steps + 1 - entries[entry, _START]) * entries[entry, at]

        across = spread(total(last, until)) - total(first, after)
        return torch.where(first == spread(last), within, across)

    def _entry_of(self, steps: Tensor) -> Tensor:
        if len(self) == 1:
            return torch.zeros_like(steps)
        found = torch.searchsorted(self.entries[:, _START].contiguous(), steps.double(), right=True) - 1
        return found.clamp(min=0)  # step 0, before all
