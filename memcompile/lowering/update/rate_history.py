"""What every past step multiplied a row by, in one tensor, with one entry for each change of the rates."""

import torch
from torch import Tensor

_START, LR, LOGS = 0, 1, 2  # columns of an entry; then for each factor its logarithm, and the sum of earlier ones
_FACTORS = 3
DECAY, BETA1, BETA2 = range(_FACTORS)
COLUMNS = LOGS + 2 * _FACTORS
_ROOM = 8  # entries that a new history has room for


class RateHistory:
    """The learning rate and factors of every step since the oldest that a row may ask for.

    It is a view of `tensor`, float64 [1 + capacity, 8] on the CPU, which operators take as an argument, and which is
    saved and copied with the rest of the state. Its first row holds the number of the last step, the number of entries
    in use, and eps. An entry is the first step of a run with the same rates: a constant rate takes one entry, a warm-up
    of w steps takes w, and a schedule that changes in every step takes one a step (64 bytes) until `forget`.

    Attributes:
        tensor: replaced by a larger one when it is full.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @classmethod
    def new(cls, step: int, eps: float = 0.0) -> "RateHistory":
        """A history without entries, of rows that are all as of `step`."""
        tensor = torch.zeros(1 + _ROOM, COLUMNS, dtype=torch.float64, device="cpu")
        tensor[0, 0], tensor[0, 2] = step, eps
        return cls(tensor)

    def __len__(self) -> int:
        """How many entries there are."""
        return int(self.tensor[0, 1])

    @property
    def step(self) -> int:
        """The number of the last step."""
        return int(self.tensor[0, 0])

    @property
    def eps(self) -> float:
        return float(self.tensor[0, 2])

    @property
    def entries(self) -> Tensor:
        """[len(self), 8]"""
        return self.tensor[1 : 1 + len(self)]

    def record(self, lr: float, logs: list[float]) -> None:
        """Adds a step: its learning rate, and the logarithms of its factors DECAY, BETA1 and BETA2."""
        count, step = len(self), self.step + 1
        self.tensor[0, 0] = step
        new = [float(step), lr]
        last = self.tensor[count].tolist() if count else None
        for i in range(_FACTORS):
            at = LOGS + 2 * i
            new += [logs[i], last[at + 1] + (step - last[_START]) * last[at] if last else 0.0]
        if last and new[LR] == last[LR] and new[LOGS::2] == last[LOGS::2]:
            return
        if count + 1 == len(self.tensor):
            self.tensor = torch.cat([self.tensor, torch.zeros_like(self.tensor)])
        self.tensor[1 + count] = torch.tensor(new, dtype=torch.float64, device="cpu")
        self.tensor[0, 1] = count + 1

    def forget(self) -> None:
        """All rows are up to date: the history starts again, as that of a state which was loaded does. A training that
        resumes there then rounds as the one that goes on.
        """
        self.tensor = RateHistory.new(self.step, self.eps).tensor


Located = tuple[Tensor, Tensor]  # steps, and which entries of a history they are in


def located(entries: Tensor, steps: Tensor) -> Located:
    """The steps, and for each the entry that it is in. They are on the CPU, as the entries are; while there is one
    entry, on any device.
    """
    if len(entries) == 1:
        return steps, torch.zeros_like(steps)
    found = torch.searchsorted(entries[:, _START].contiguous(), steps.double(), right=True) - 1
    return steps, found.clamp(min=0)  # step 0 is before all entries


def log_product(entries: Tensor, factor: int, after: Located, until: Located) -> Tensor:
    """The logarithm, float64, of the product of a factor over the steps `after` + 1 to `until`.

    A product within one entry is a power; across entries it is the difference of two sums.
    """
    at = LOGS + 2 * factor
    if len(entries) == 1:
        return (until[0] - after[0]).double() * float(entries[0, at])

    def total(step: Tensor, entry: Tensor) -> Tensor:
        return entries[entry, at + 1] + (step + 1 - entries[entry, _START]) * entries[entry, at]

    within = (until[0] - after[0]) * entries[until[1], at]
    return torch.where(after[1] == until[1], within, total(*until) - total(*after))
