"""Random training runs of a table: which rows each step touches, with what gradients, at which learning rate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda step: 1e-2,
    "warm-up and cosine": lambda step: 1e-2 * min(1, step / 30) * (1 + math.cos(step / 90)) / 2,
    "rising by orders": lambda step: 10 ** (-6 + min(step, 200) / 50),
    "on and off": lambda step: 1e-2 if step // 17 % 3 else 0.0,
}


@dataclasses.dataclass(frozen=True)
class Sequence:
    """A run of `steps` steps; half of them touch nothing, some rows are never touched, some in nearly every step."""

    seed: int
    steps: int
    slots: int
    dim: int
    schedule: str
    weight_decay: float

    def wide(self) -> Sequence:
        """The same run of more columns, or of more rows where there must be one column.

        Roundings add up over a run, by luck too: of two runs as accurate, the largest error of one number is often
        twice the other's, that of many is not.
        """
        more = {"slots": 20 * self.slots} if self.dim == 1 else {"dim": 64 + self.dim}
        return dataclasses.replace(self, **more)

    def initial(self, dtype: torch.dtype) -> Tensor:
        return torch.randn(self.slots, self.dim, generator=self._generator(), dtype=torch.float64).to(dtype)

    def gradients(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, float]]:
        """Uncoalesced gradients [slots, dim] with repeats, and learning rates. Those of fp64 are those of fp32."""
        generator = self._generator()
        for step in range(self.steps):
            busy = torch.rand((), generator=generator) < 0.5
            count = int(torch.randint(1, 9, (), generator=generator)) if busy else 0
            rows = (torch.rand(count, generator=generator) ** 3 * (self.slots - 1)).long()
            size = 10 ** (4 * torch.rand(count, 1, generator=generator) - 3)
            values = (torch.randn(count, self.dim, generator=generator) * size).to(dtype)
            shape = (self.slots, self.dim)
            yield (
                torch.sparse_coo_tensor(rows[None], values, shape, check_invariants=False),
                SCHEDULES[self.schedule](step),
            )

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


class ExactSequence(Sequence):
    """The numbers of an fp32 run, in fp64."""

    def gradients(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, float]]:
        return ((grad.to(dtype), lr) for grad, lr in super().gradients(torch.float32))

    def initial(self, dtype: torch.dtype) -> Tensor:
        return super().initial(torch.float32).to(dtype)


def sequences(steps: int = 250) -> st.SearchStrategy[Sequence]:
    return st.builds(
        Sequence,
        seed=st.integers(0, 2**32),
        steps=st.integers(1, steps),
        slots=st.integers(2, 40),
        dim=st.sampled_from([1, 3, 16, 37]),
        schedule=st.sampled_from(sorted(SCHEDULES)),
        weight_decay=st.sampled_from([0.0, 0.01, 1.0]),
    )


def train(
    sequence: Sequence,
    make: Callable[[nn.Parameter], Optimizer],
    dtype: torch.dtype,
    dense: bool = False,
    after_step: Callable[[Optimizer, nn.Parameter, int], None] | None = None,
) -> tuple[nn.Parameter, Optimizer]:
    """The parameter after the run, and its optimizer, flushed where its rows can miss steps."""
    parameter = nn.Parameter(sequence.initial(dtype))
    optimizer = make(parameter)
    for step, (grad, lr) in enumerate(sequence.gradients(dtype)):
        optimizer.param_groups[0]["lr"] = lr
        parameter.grad = grad.to_dense() if dense else grad
        optimizer.step()
        if after_step is not None:
            after_step(optimizer, parameter, step)
    if hasattr(optimizer, "flush"):
        optimizer.flush(parameter)
    return parameter, optimizer
