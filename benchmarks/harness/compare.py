"""Times contestants that compute the same, case after case. What fails is kept in the results, and the run goes on."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.harness.layers import Contestant, Setting, agreed_error, relative_error
from benchmarks.harness.results import BACKWARD, FROZEN, Median, dtype_name
from benchmarks.harness.session import Session
from benchmarks.harness.tables import of_tokens
from benchmarks.harness.timing import Rounds, medians_in_turns

AGREEMENT_TOKENS = 512


class Device(Protocol):
    """What a comparison asks of a device."""

    def seconds(self, call: Callable[[], object]) -> float:
        """Of one call."""
        ...

    def tidy(self) -> None:
        """Gives back the memory of what is not used any more."""
        ...


@dataclass(frozen=True)
class Entry:
    """A contestant in one case, with what the forward of the case needs at least."""

    name: str
    run: Callable[..., Any]  # the case's inputs -> an output
    flops: float
    bytes: float
    parameters: tuple[nn.Parameter, ...] = ()  # whose gradients are dropped after each call


@dataclass(frozen=True)
class Case:
    """Contestants that are timed in turns, each time on new inputs: the same again would be found in the caches."""

    kind: str
    setting: Setting
    tokens: int
    direction: str
    draw: Callable[[int], tuple[Tensor, ...]]  # tokens -> new inputs
    entries: tuple[Entry, ...]
    same: frozenset[str]  # entries that compute the same
    reference: str  # the one of them that tells what is right
    table: nn.Parameter | None = None  # gets a gradient in the backward, unless it is frozen

    @property
    def backward(self) -> bool:
        return self.direction in (BACKWARD, FROZEN)

    @property
    def title(self) -> str:
        s = self.setting
        sizes = f"d = {s.width}, n = {s.n_keys}, {dtype_name(s.dtype)}, {of_tokens(self.tokens)}"
        return f"{self.kind}, {sizes}, {self.direction}"


def layer_case(
    kind: str,
    setting: Setting,
    device: torch.device,
    contestants: Sequence[Contestant],
    same: frozenset[str],
    reference: str,
    tokens: int,
    direction: str,
    table: nn.Parameter | None = None,
) -> Case:
    """Of whole layers; without those that do not take so many tokens."""

    def draw_tokens(count: int) -> tuple[Tensor, ...]:
        return (torch.randn(count, setting.width, device=device).to(setting.dtype),)

    def entry(c: Contestant) -> Entry:
        needed = c.work.bytes(tokens, setting.width, setting.dtype.itemsize)
        return Entry(c.name, c.layer, c.work.flops * tokens, needed, c.parameters)

    present = tuple(entry(c) for c in contestants if c.most_tokens is None or tokens <= c.most_tokens)
    return Case(kind, setting, tokens, direction, draw_tokens, present, same, reference, table)


def sample(device: Device, case: Case, entry: Entry) -> float:
    """Seconds of one call on new inputs."""
    inputs = case.draw(case.tokens)
    if not case.backward:
        with torch.no_grad():
            return device.seconds(lambda: entry.run(*inputs))
    x = inputs[0].requires_grad_()
    ones = torch.ones_like(x)
    try:
        return device.seconds(lambda: entry.run(x).backward(ones))
    finally:
        for parameter in entry.parameters:
            parameter.grad = None  # the gradients of all contestants together would fill the memory


class Comparison:
    """Measures cases on a device.

    Args:
        end: by `time.perf_counter`, after which cases are left out.
    """

    def __init__(self, device: Device, session: Session, rounds: Rounds, warm_ups: int, end: float = math.inf) -> None:
        self._device, self._session, self._results = device, session, session.results
        self._rounds, self._warm_ups, self._end = rounds, warm_ups, end

    def measure(self, cases: Sequence[Case]) -> None:
        """Cases of the same contestants; those that fail in one take part in the next."""
        for case in cases:
            if time.perf_counter() > self._end:
                self._session.miss(case.title, "", "the time was over")
            else:
                self._time(case)
            self._session.advance()
        self._check_agreement(cases[0])

    def _time(self, case: Case) -> None:
        if case.table is not None:
            case.table.requires_grad_(case.direction != FROZEN)
        samples, first, running = [], [], []
        for entry in case.entries:
            self._session.say(f"{case.title}: {entry.name}")
            try:
                for _ in range(self._warm_ups):  # the first one compiles
                    sample(self._device, case, entry)
                first.append(sample(self._device, case, entry))
            except Exception as error:
                self._failed(case, entry, error)
                continue
            samples.append(partial(sample, self._device, case, entry))
            running.append(entry)
        with self._results.others.watched():
            medians = medians_in_turns(
                samples,
                first,
                self._rounds,
                lambda what: self._session.say(f"{case.title}: {what}"),
                lambda i, error: self._failed(case, running[i], error),
            )
        for entry, seconds in zip(running, medians, strict=True):
            if seconds is not None:
                self._results.medians.append(_median(case, entry, seconds))

    def _failed(self, case: Case, entry: Entry, error: Exception | str) -> None:
        self._session.miss(case.title, entry.name, error)
        if isinstance(error, Exception):
            error.__traceback__ = None  # its frames hold what filled the memory
            self._device.tidy()

    def _check_agreement(self, case: Case) -> None:
        """Whether all compute the same: what does not has no times. After the times, since it may run
        on fewer tokens."""
        self._session.say(f"{case.title}: do all compute the same?")
        if case.table is not None:
            case.table.requires_grad_()
        expected = None
        # Parts of a layer are compiled for one number of tokens, whole layers for any.
        inputs = case.draw(case.tokens if case.table is None else min(case.tokens, AGREEMENT_TOKENS))
        measured = self._results.by_name(**_sizes(case), tokens=case.tokens, direction=case.direction)
        for entry in sorted(case.entries, key=lambda entry: entry.name != case.reference):
            if entry.name not in measured or entry.name not in case.same:
                continue
            try:
                with torch.no_grad():
                    output = _number_a_token(entry.run(*inputs))
            except Exception as error:
                self._failed(case, entry, error)
                self._disqualify(case, entry)
                continue
            if entry.name == case.reference:
                expected = output
            elif expected is not None:
                error_of_norm = relative_error(output, expected)
                if not error_of_norm < agreed_error(case.setting.dtype):
                    reason = f"differs from {case.reference} by {error_of_norm:.1e} of the output's norm"
                    self._failed(case, entry, reason)
                    self._disqualify(case, entry)

    def _disqualify(self, case: Case, entry: Entry) -> None:
        """Drops the medians of a contestant that computed something else, of all tokens and directions."""
        wrong = self._results.where(**_sizes(case), name=entry.name)
        self._results.medians = [m for m in self._results.medians if m not in wrong]


def _number_a_token(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Weights and slots as read from a table of one column, which forgets their order; other outputs as they are."""
    return (output[0].double() * output[1].double().cos()).sum(-1) if isinstance(output, tuple) else output


def _sizes(case: Case) -> dict[str, Any]:
    s = case.setting
    return {"kind": case.kind, "width": s.width, "n_keys": s.n_keys, "dtype": dtype_name(s.dtype)}


def _median(case: Case, entry: Entry, seconds: float) -> Median:
    return Median(
        **_sizes(case),
        name=entry.name,
        value_dim=case.setting.value_dim,
        tokens=case.tokens,
        direction=case.direction,
        milliseconds=seconds * 1e3,
        flops=entry.flops,
        bytes=entry.bytes,
    )
