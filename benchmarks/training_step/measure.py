"""Times cases in turns, as many side by side as the memory holds, always beside the FFN."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from tqdm import tqdm

from benchmarks.common.layer import agreed_error
from benchmarks.common.session import Stop
from benchmarks.common.timing import Rounds, medians_in_turns
from benchmarks.training_step.cases import FFN, Case, Group, fit, free_bytes, lineups
from benchmarks.training_step.processes import WorkerError
from benchmarks.training_step.results import Median, Missing, Results
from benchmarks.training_step.worker import STEP, Facts


class Contestant(Protocol):
    cpu: float

    def facts(self) -> Facts: ...
    def turn(self, what: str) -> float: ...
    def peak(self) -> float: ...
    def close(self) -> None: ...


class Run:
    def __init__(
        self,
        start: Callable[[Case], Contestant],
        groups: Sequence[Group],
        threads: int,
        rounds: Rounds,
        results: Results,
        stop: Stop,
    ) -> None:
        self._start = start
        self._groups = groups
        self._threads = threads
        self._rounds = rounds
        self._results = results
        self._stop = stop
        self._alive: dict[Case, Contestant] = {}
        self._ended = 0.0  # seconds that workers took that are no more
        self._losses: dict[tuple[int, int], float] = {}
        results.neighbours.own = lambda: time.process_time() + self._ended + sum(c.cpu for c in self._alive.values())

    def all(self) -> None:
        total = sum(len(group.cases(self._threads)) for group in self._groups)
        with tqdm(total=total, unit="case", dynamic_ncols=True, disable=None) as self._progress:
            for group in self._groups:
                reference = group.reference(self._threads)
                for lineup in lineups(group.cases(self._threads), reference, free_bytes()):
                    try:
                        self._lineup(reference, lineup)
                    finally:
                        for case in [*self._alive]:
                            self._close(case)
        self._results.complete = True

    def _say(self, what: str) -> None:
        self._stop.check()
        self._progress.set_description(what)

    def _miss(self, case: Case, reason: str) -> None:
        self._results.missing.append(Missing(str(case), case.width, reason))

    def _close(self, case: Case) -> None:
        contestant = self._alive.pop(case)
        self._ended += contestant.cpu
        contestant.close()

    def _lineup(self, reference: Case, cases: list[Case]) -> None:
        """Starts them, times them in turns and ends them."""
        for case in (reference, *cases):
            if fit([*self._alive, case], free_bytes() + sum(alive.bytes for alive in self._alive)):
                self._alive[case] = self._start(case)
            else:
                self._miss(case, f"needs {case.bytes / 2**30:.1f} GiB of memory, {free_bytes() / 2**30:.1f} are free")
        facts = {}
        for case in [*self._alive]:
            self._say(f"d={case.width}: {case} gets ready")
            try:
                facts[case] = self._checked(case, self._alive[case].facts())
            except WorkerError as error:
                self._miss(case, str(error))
                self._close(case)
        if reference in facts:
            self._time(reference, facts)
        self._progress.update(len(cases))

    def _checked(self, case: Case, facts: Facts) -> Facts:
        """A step of something else is worth nothing: the first loss is the same for all of one size."""
        if facts.loss is not None and case.name != FFN:
            expected = self._losses.setdefault((case.width, case.n_keys), facts.loss)
            if abs(facts.loss - expected) > agreed_error(torch.float32) * expected:
                raise WorkerError(f"the first loss is {facts.loss:.6f}, that of the others {expected:.6f}")
        return facts

    def _time(self, reference: Case, facts: dict[Case, Facts]) -> None:
        parts = [(case, part) for case in facts for part in facts[case].seconds]
        failed: dict[Case, str] = {}

        def sample(case: Case, part: str) -> float:
            if case not in failed:
                try:
                    return self._alive[case].turn(part)
                except WorkerError as error:
                    failed[case] = str(error)
            return math.inf

        samples = [partial(sample, case, part) for case, part in parts]
        first = [facts[case].seconds[part] for case, part in parts]
        names = ", ".join(dict.fromkeys(case.name for case in facts if case != reference))
        with self._results.neighbours.watched():
            seconds = medians_in_turns(
                samples, first, self._rounds, lambda what: self._say(f"d={reference.width}: {names}: {what}")
            )
        for case, reason in failed.items():
            self._miss(case, reason)
        if reference in failed:
            return
        step = seconds[parts.index((reference, STEP))]
        for (case, part), measured in zip(parts, seconds, strict=True):
            if case in failed or (case == reference and self._results.of(case.width, STEP).get(FFN)):
                continue
            self._results.medians.append(
                Median(
                    name=case.name,
                    part=part,
                    width=case.width,
                    slots=0 if case == reference else case.setting.num_slots,
                    tokens=case.tokens,
                    touched=facts[case].touched if part == STEP else case.tokens * case.setting.hits,
                    milliseconds=measured * 1e3,
                    ffn_milliseconds=step * 1e3,
                    peak_bytes=self._alive[case].peak(),
                    needed_bytes=case.states * case.table_bytes,
                )
            )
