"""Runs a plan: the limits, then group after group. What fails is recorded, and the run goes on."""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.common.layer import agreed_error, relative_error
from benchmarks.common.results import BACKWARD, FORWARD, dtype_name
from benchmarks.common.session import Stop
from benchmarks.common.setting import Setting, fill_table
from benchmarks.common.timing import Rounds, medians_in_turns
from benchmarks.gpu.case import FROZEN, Case, Entry
from benchmarks.gpu.device import Device
from benchmarks.gpu.gather import gather_case
from benchmarks.gpu.layers import layer_case, layer_contestants
from benchmarks.gpu.limits import measure_limits
from benchmarks.gpu.plan import SHARE_OF_MEMORY, Group, Plan, fitting_setting
from benchmarks.gpu.results import Failure, Median, Results, Skipped
from benchmarks.gpu.search import scored_search_case, search_case
from benchmarks.gpu.update import update_case

ROUNDS = Rounds(seconds=0.2, fewest=5, most=25)
WARM_UPS = 2
AGREEMENT_TOKENS = 512


def short(error: BaseException) -> str:
    """One line for the report."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


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
            parameter.grad = None


class Run:
    """One run of a plan on a device."""

    def __init__(self, device: Device, plan: Plan, results: Results, stop: Stop) -> None:
        self.device, self.plan, self.results, self.stop = device, plan, results, stop
        self.end = time.perf_counter() + 60 * plan.minutes
        self.progress = tqdm(total=sum(map(self._cases_of, plan.groups)), unit="case", dynamic_ncols=True, disable=None)

    @staticmethod
    def _cases_of(group: Group) -> int:
        return 4 * group.parts + len(group.tokens) + len(group.backward_tokens) + group.frozen

    def say(self, what: str) -> None:
        self.stop.check()
        self.progress.set_description(what)

    def all(self) -> None:
        with self.progress:
            self.say("this device's limits")
            plan = self.plan
            self.results.limits = measure_limits(self.device, plan.copy_bytes, plan.gemm_size, plan.dtype)
            for group in plan.groups:
                try:
                    self.group(group)
                except Exception as error:
                    self.stop.check()  # a compiler may have made another error of it
                    self.results.failures.append(Failure(f"d = {group.width}, n = {group.n_keys}", "all", short(error)))
                torch._dynamo.reset()  # what was compiled keeps the parameters of this group alive
                self.device.tidy()
        self.results.complete = True

    def group(self, group: Group) -> None:
        name = f"d = {group.width}, n = {group.n_keys}"
        setting = fitting_setting(group, self.plan, self.device.free_bytes())
        if setting is None:
            reason = f"its table and the table's gradient exceed {SHARE_OF_MEMORY:.0%} of the free memory"
            self.results.skipped.append(Skipped(name, reason))
            self.progress.update(self._cases_of(group))
            return
        if group is self.plan.main:
            self.results.main = setting
        self.say(f"{name}: filling the table")
        torch.manual_seed(0)
        shape = setting.num_slots, setting.value_dim
        table = nn.Parameter(torch.empty(shape, dtype=setting.dtype, device=self.device.torch_device))
        with torch.no_grad():
            fill_table(table)
        if group.parts:
            self.parts(group, setting, table)
        self.layers(group, setting, table)

    def parts(self, group: Group, setting: Setting, table: nn.Parameter) -> None:
        tokens, where, peers = group.tokens[0], self.device.torch_device, self.plan.all_peers
        makers: list[Callable[[], Case]] = [
            partial(gather_case, setting, table, tokens, peers),
            partial(search_case, setting, where, tokens, peers),
            partial(scored_search_case, setting, where, tokens, peers),
            partial(update_case, setting, where, tokens, peers),
        ]
        for make in makers:
            self.measured([make()])

    def layers(self, group: Group, setting: Setting, table: nn.Parameter) -> None:
        contestants = layer_contestants(setting, table, self.plan.all_peers)
        case = partial(layer_case, setting, table, contestants)
        cases = [case(tokens, FORWARD) for tokens in group.tokens]
        cases += [case(tokens, BACKWARD) for tokens in group.backward_tokens]
        if group.frozen:
            cases.append(case(group.backward_tokens[0], FROZEN))
        self.measured(cases)

    def measured(self, cases: list[Case]) -> None:
        """Measures cases of the same contestants; those that fail in one take part in the next."""
        for case in cases:
            if time.perf_counter() > self.end:
                self.results.skipped.append(Skipped(case.title(), f"{self.plan.minutes:g} minutes were over"))
            else:
                self.case(case)
            self.progress.update()
        self.check_agreement(cases[0])

    def case(self, case: Case) -> None:
        if case.table is not None:
            case.table.requires_grad_(case.direction != FROZEN)
        samples, first, running = [], [], []
        for entry in case.entries:
            self.say(f"{case.title()}: {entry.name}")
            try:
                for _ in range(WARM_UPS):  # the first one compiles
                    sample(self.device, case, entry)
                first.append(sample(self.device, case, entry))
            except Exception as error:
                self.failed(case, entry, error)
                continue
            samples.append(_Sample(self, case, entry))
            running.append(entry)
        medians = medians_in_turns(samples, first, ROUNDS, lambda what: self.say(f"{case.title()}: {what}"))
        for entry, seconds, taken in zip(running, medians, samples, strict=True):
            if not taken.failed:
                self.results.medians.append(_median(case, entry, seconds))

    def failed(self, case: Case, entry: Entry, error: Exception) -> None:
        self.stop.check()
        self.results.failures.append(Failure(case.title(), entry.name, short(error)))
        error.__traceback__ = None  # its frames hold what filled the memory
        self.device.tidy()

    def check_agreement(self, case: Case) -> None:
        """Whether all compute the same: what does not has no times. After them, since it runs on fewer tokens."""
        self.say(f"{case.title()}: do all compute the same?")
        if case.table is not None:
            case.table.requires_grad_()
        expected = None
        tokens = min(case.tokens, AGREEMENT_TOKENS) if case.table is not None else case.tokens
        inputs = case.draw(tokens)
        measured = self.results.of(case.kind, case.setting, case.tokens, case.direction)
        for entry in _reference_first(case):
            if entry.name not in measured or entry.name in case.others:
                continue
            try:
                with torch.no_grad():
                    output = entry.run(*inputs)
            except Exception as error:
                self.failed(case, entry, error)
                self.results.disqualify(case.kind, case.setting, entry.name)
                continue
            if isinstance(output, tuple):  # weights and slots: read as of a table of one column, in any order
                output = (output[0].double() * output[1].double().cos()).sum(-1)
            if entry.name == case.reference:
                expected = output
            elif expected is not None:
                error = relative_error(output, expected)
                if not error < agreed_error(case.setting.dtype):
                    self.results.disqualify(case.kind, case.setting, entry.name)
                    message = f"differs from {case.reference} by {error:.1e} of the output's norm"
                    self.results.failures.append(Failure(case.title(), entry.name, message))


class _Sample:
    """Times an entry; after an error it is over for it."""

    def __init__(self, run: Run, case: Case, entry: Entry) -> None:
        self.run, self.case, self.entry, self.failed = run, case, entry, False

    def __call__(self) -> float:
        if self.failed:
            return math.nan
        try:
            return sample(self.run.device, self.case, self.entry)
        except Exception as error:
            self.failed = True
            self.run.failed(self.case, self.entry, error)
            return math.nan


def _reference_first(case: Case) -> Iterator[Entry]:
    yield from sorted(case.entries, key=lambda entry: entry.name != case.reference)


def _median(case: Case, entry: Entry, seconds: float) -> Median:
    s = case.setting
    return Median(
        name=entry.name,
        milliseconds=seconds * 1e3,
        flops=entry.flops,
        bytes=entry.bytes,
        kind=case.kind,
        width=s.width,
        n_keys=s.n_keys,
        value_dim=s.value_dim,
        dtype=dtype_name(s.dtype),
        tokens=case.tokens,
        direction=case.direction,
    )
