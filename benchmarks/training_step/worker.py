"""One case in a process of its own, whose peak memory is its own: it is told what to time, and answers in JSON."""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.layer import layer_parameters
from benchmarks.cpu.timing import wake_threads
from benchmarks.training_step.cases import FFN, HARDWARE, Case
from benchmarks.training_step.contestants import TRAINEES, search
from benchmarks.training_step.hardware import new_tables, update_rows

STEP, TABLE = "step", "table"
_STATUS, _KILLED_FIRST = Path("/proc/self/status"), Path("/proc/self/oom_score_adj")
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
        self.case = case
        self._before = memory("VmRSS")
        self._generator = torch.Generator().manual_seed(0)
        self._samples: dict[str, Callable[[], float]] = {}
        self._loss: float | None = None
        if case.name == HARDWARE:
            self._tables = new_tables(case.setting.num_slots, case.width * 4)
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
        self.facts = Facts(self._seconds, touched, self._loss)

    def turn(self, what: str) -> float:
        """The median seconds of one call, of some that follow on each other as in training."""
        sample, expected = self._samples[what], self._seconds[what]
        if expected < _LONG:
            sample()
        return statistics.median(sample() for _ in range(min(_MOST, max(1, round(_TURN / expected)))))

    def peak(self) -> float:
        """Bytes at most, above what the process had before there was a model."""
        return memory("VmHWM") - self._before

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


@torch.no_grad()
def touched_rows(case: Case, x: Tensor) -> int:
    """How many rows the block reads for x [tokens, width]."""
    hidden = F.rms_norm(x, (case.width,))
    _, slots = search(hidden, layer_parameters(case.setting), case.heads, case.top_k)
    return len(slots.unique())


def memory(field: str) -> float:
    """Bytes of this process: VmRSS now, VmHWM at most. Elsewhere than on Linux, at most for both."""
    if _STATUS.exists():
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(lines[field].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    case = Case(**json.loads(sys.argv[1]))
    if _KILLED_FIRST.exists():
        _KILLED_FIRST.write_text("1000")  # where others come to need the memory, this goes, and the report says so
    torch.set_num_threads(case.threads)
    worker = Worker(case)

    def answer(content: object) -> None:
        print(json.dumps({"answer": content, "cpu": time.process_time()}), flush=True)

    answer(asdict(worker.facts))
    for line in sys.stdin:
        asked = line.strip()
        answer(worker.peak() if asked == "peak" else worker.turn(asked))


if __name__ == "__main__":
    main()
