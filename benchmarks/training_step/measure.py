"""Times cases in turns, as many of them together as the memory holds, always with the FFN."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.harness.layers import agreed_error
from benchmarks.harness.machine import free_bytes
from benchmarks.harness.processes import Local, Remote, WorkerError
from benchmarks.harness.session import Session
from benchmarks.harness.timing import Rounds, medians_in_turns
from benchmarks.training_step.cases import FFN, Case, Group, fit, lineups
from benchmarks.training_step.worker import STEP, Facts


@dataclass(frozen=True, kw_only=True)
class Median:
    """Of one case, in one of its parts."""

    name: str
    part: str  # STEP or TABLE of the worker
    width: int
    slots: int  # 0: it has no table
    tokens: int
    touched: int  # rows
    milliseconds: float
    ffn_milliseconds: float  # of the FFN's step, in the same turns
    peak_bytes: float
    needed_bytes: float  # values and states

    @property
    def ffns(self) -> float:
        """The time as a multiple of the FFN's step: it may be compared with one of other turns, when clocks drift."""
        return self.milliseconds / self.ffn_milliseconds


class Run:
    """Args:
    start: makes the worker of a case, without waiting for it.
    """

    def __init__(self, start: Callable[[Case], Local | Remote], threads: int, rounds: Rounds, session: Session) -> None:
        self._start, self._threads, self._rounds = start, threads, rounds
        self._session, self._results = session, session.results
        self._alive: dict[Case, Local | Remote] = {}
        self._losses: dict[tuple[int, int], float] = {}

    def measure(self, groups: Sequence[Group]) -> None:
        for group in groups:
            reference = group.reference(self._threads)
            for lineup in lineups(group.cases(self._threads), reference, free_bytes()):
                try:
                    self._lineup(reference, lineup)
                finally:
                    for case in [*self._alive]:
                        self._alive.pop(case).close()

    def _miss(self, case: Case, reason: Exception | str) -> None:
        self._session.miss(f"d = {case.width}", str(case), reason)

    def _lineup(self, reference: Case, cases: list[Case]) -> None:
        """Starts them, times them in turns and ends them."""
        for case in (reference, *cases):
            if fit([*self._alive, case], free_bytes() + sum(alive.bytes for alive in self._alive)):
                self._alive[case] = self._start(case)
            else:
                self._miss(case, f"needs {case.bytes / 2**30:.1f} GiB of memory, {free_bytes() / 2**30:.1f} are free")
        facts: dict[Case, Facts] = {}
        for case in [*self._alive]:
            self._session.say(f"d={case.width}: {case} gets ready")
            try:
                facts[case] = self._checked(case, self._alive[case].ask("facts"))
            except WorkerError as error:
                self._miss(case, error)
                self._alive.pop(case).close()
        if reference in facts:
            self._time(reference, facts)
        self._session.advance(len(cases))

    def _checked(self, case: Case, facts: Facts) -> Facts:
        """A step of something else is worth nothing: the first loss is the same for all of one size."""
        if facts.loss is not None and case.name != FFN:
            expected = self._losses.setdefault((case.width, case.n_keys), facts.loss)
            if abs(facts.loss - expected) > agreed_error(torch.float32) * expected:
                raise WorkerError(f"the first loss is {facts.loss:.6f}, that of the others {expected:.6f}")
        return facts

    def _time(self, reference: Case, facts: dict[Case, Facts]) -> None:
        parts = [(case, part) for case in facts for part in facts[case].seconds]
        names = ", ".join(dict.fromkeys(case.name for case in facts if case != reference))
        failed: dict[Case, Exception] = {}
        with self._results.others.watched():
            medians = medians_in_turns(
                [partial(self._alive[case].ask, "turn", part) for case, part in parts],
                [facts[case].seconds[part] for case, part in parts],
                self._rounds,
                lambda what: self._session.say(f"d={reference.width}: {names}: {what}"),
                lambda i, error: failed.update({parts[i][0]: failed.get(parts[i][0], error)}),
            )
        for case, error in failed.items():
            self._miss(case, error)
        step = dict(zip(parts, medians, strict=True))[reference, STEP]
        if step is None:
            return
        known = self._results.by_name(width=reference.width, part=STEP)
        for (case, part), seconds in zip(parts, medians, strict=True):
            if case not in failed and not (case == reference and FFN in known):
                assert seconds is not None
                self._results.medians.append(
                    Median(
                        name=case.name,
                        part=part,
                        width=case.width,
                        slots=0 if case == reference else case.setting.num_slots,
                        tokens=case.tokens,
                        touched=facts[case].touched if part == STEP else case.tokens * case.setting.hits,
                        milliseconds=seconds * 1e3,
                        ffn_milliseconds=step * 1e3,
                        peak_bytes=self._alive[case].ask("peak"),
                        needed_bytes=case.states * case.table_bytes,
                    )
                )
