"""One case, which is built and timed in a process whose peak memory is its own."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.layers import layer_parameters
from benchmarks.harness.machine import own_bytes, update_rows
from benchmarks.harness.package import advise_huge_pages
from benchmarks.harness.timing import wake_threads
from benchmarks.training_step.cases import FFN, HARDWARE, Case
from benchmarks.training_step.trainees import TRAINEES, search

STEP, TABLE = "step", "table"
_TABLES = 3  # that are updated where only the hardware is measured: the values and Adam's moments
_WARM_UPS = 2
_TURN, _MOST = 0.03, 9  # seconds and calls that are timed in a turn
_LONG = 0.3  # seconds of a call that needs no other before it to fill the caches


@dataclass(frozen=True)
class Facts:
    """Of a case that is ready to be timed."""

    seconds: dict[str, float]  # of one call, by what it does: STEP, TABLE
    touched: int  # rows that a step touches
    loss: float | None  # the first


class Worker:
    """Builds a case and times it; the same inputs in the same order for every contestant, each of them once."""

    def __init__(self, case: Case) -> None:
        torch.set_num_threads(case.threads)
        self.case = case
        self._before = own_bytes(peak=False)
        self._generator = torch.Generator().manual_seed(0)
        self._samples: dict[str, Callable[[], float]] = {}
        self._loss: float | None = None
        if case.name == HARDWARE:
            self._tables = [_empty_table(case) for _ in range(_TABLES)]
            self._samples[TABLE] = self._update
        else:
            self._trainee = TRAINEES[case.name](case)
            self._samples[STEP] = self._step
            if self._trainee.lookup is not None:
                self._samples[TABLE] = self._table_part
        touched = 0 if case.name == FFN else touched_rows(case, self._input())
        for sample in self._samples.values():
            sample()  # compiles, and makes the states
        if case.name not in (FFN, HARDWARE):
            self._trainee.age(touched)
        self._seconds = {what: min(sample() for _ in range(_WARM_UPS)) for what, sample in self._samples.items()}
        self._facts = Facts(self._seconds, touched, self._loss)

    def facts(self) -> Facts:
        return self._facts

    def turn(self, what: str) -> float:
        """The median seconds of one call, of some that follow on each other as in training."""
        sample, expected = self._samples[what], self._seconds[what]
        if expected < _LONG:
            sample()
        return statistics.median(sample() for _ in range(min(_MOST, max(1, round(_TURN / expected)))))

    def peak(self) -> float:
        """Bytes at most, above what the process had before there was a model."""
        return own_bytes(peak=True) - self._before

    def _input(self) -> Tensor:
        return torch.randn(self.case.tokens, self.case.width, generator=self._generator)

    def _step(self) -> float:
        x, target = self._input().requires_grad_(), self._input()
        wake_threads()
        start = time.perf_counter()
        loss = F.mse_loss(self._trainee.model(x), target)
        loss.backward()
        self._trainee.finish()
        seconds = time.perf_counter() - start
        self._loss = loss.item() if self._loss is None else self._loss
        return seconds

    def _table_part(self) -> float:
        """Gather, backward and optimizer for slots that are all different."""
        assert self._trainee.lookup is not None
        tokens, hits = self.case.tokens, self.case.setting.hits
        slots = self._distinct_slots().view(tokens, hits).int()
        weights = torch.rand(tokens, hits, generator=self._generator).softmax(dim=-1).requires_grad_()
        grad = self._input() / self.case.width
        wake_threads()
        start = time.perf_counter()
        self._trainee.lookup(slots, weights).backward(grad)
        self._trainee.finish()
        return time.perf_counter() - start

    def _update(self) -> float:
        return update_rows(self._tables, self._distinct_slots())

    def _distinct_slots(self) -> Tensor:
        """As many as the tokens hit, int64, spread over the whole table and in no order."""
        count = self.case.tokens * self.case.setting.hits
        stratum, rest = divmod(self.case.setting.num_slots, count)
        if stratum == 0 or rest:
            raise ValueError(f"{count} different slots cannot be spread evenly over {self.case.setting.num_slots}")
        slots = torch.arange(count) * stratum + torch.randint(stratum, (count,), generator=self._generator)
        return slots[torch.randperm(count, generator=self._generator)]


def _empty_table(case: Case) -> Tensor:
    """In huge pages, with which a walk through page tables costs least."""
    table = torch.empty(case.setting.num_slots, case.width * 4, dtype=torch.uint8)
    advise_huge_pages(table)
    return table.zero_()


@torch.no_grad()
def touched_rows(case: Case, x: Tensor) -> int:
    """How many rows the block reads for x [tokens, width]."""
    hidden = F.rms_norm(x, (case.width,))
    _, slots = search(hidden, layer_parameters(case.setting), case.heads, case.top_k)
    return len(slots.unique())
