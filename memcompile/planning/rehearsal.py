"""Rehearses a plan: runs the model once with stand-ins, as it was traced, before anything of it is changed."""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from memcompile.common.sites import FfnSite
from memcompile.errors import MemcompileError
from memcompile.passes.capture.sandbox import caches_without_fakes, muted_loggers
from memcompile.passes.capture.trace import Capture
from memcompile.runtime.install import counting_stand_ins
from memcompile.runtime.stand_ins.operations import Operations

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What came of it.

    Attributes:
        failures: why chosen sites cannot have a memory, by the name of their down-projection: what stands between
            their projections is token-wise in the graph, but the model's code accepts nothing but tensors there.
        operations: what each chosen site does between its projections, in train mode and in eval mode.
    """

    failures: dict[str, str]
    operations: dict[str, Operations]


def rehearse(root: nn.Module, captures: Sequence[Capture], chosen: Sequence[FfnSite], adds: bool) -> Rehearsal:
    operations = {site.down: Operations() for site in chosen}
    with muted_loggers(), caches_without_fakes():
        together = _failure(root, captures, chosen, adds, operations)
        if together is None:
            if not adds:
                _record_the_other_mode(root, captures, chosen, operations)
            return Rehearsal({}, operations)
        alone = {site.down: _failure(root, captures, [site], adds, operations) for site in chosen}
    failures = {down: failure[0] for down, failure in alone.items() if failure is not None}
    sentence, ran = together
    if not failures and not ran:
        failures = dict.fromkeys(alone, sentence)
    for down, sentence in failures.items():
        log.debug("rehearsal of %s: %s", down, sentence)
    return Rehearsal(failures, operations)


def _failure(
    root: nn.Module,
    captures: Sequence[Capture],
    sites: Sequence[FfnSite],
    adds: bool,
    operations: Mapping[str, Operations],
) -> tuple[str, bool] | None:
    """Why stand-ins do not work; and whether they ran, but not as often, which a random number may explain."""
    calls: collections.Counter[str] = collections.Counter()
    for capture, inside in _runs(captures, sites):
        with counting_stand_ins(root, inside, adds, operations) as layers:
            try:
                capture.forward.run(root.get_submodule(capture.path))  # type: ignore[union-attr]
            except MemcompileError as error:
                return str(error).removeprefix("memcompile: "), False
            except Exception as error:  # the owner's code has an object where it expects a tensor
                described = f"{type(error).__name__}: {error}"
                return f"its code does not run with a stand-in for its hidden activation ({described})", False
        calls.update({site.down: layer.calls for site, layer in zip(inside, layers, strict=True)})
    for site in sites:
        if calls[site.down] != site.calls:
            return f"it ran {calls[site.down]} times with a stand-in, and {site.calls} times without", True
    return None


def _runs(captures: Sequence[Capture], sites: Sequence[FfnSite]) -> Iterator[tuple[Capture, list[FfnSite]]]:
    """The captures that can be run again, each with the sites that it runs."""
    for capture in captures:
        prefix = f"{capture.path}." if capture.path else ""
        read = (site for site in sites if site.down.startswith(prefix) and site.down not in capture.unread)
        inside = [site for site in read if capture.covers(site.down)]
        if capture.forward is not None and inside:
            yield capture, inside


def _record_the_other_mode(
    root: nn.Module, captures: Sequence[Capture], sites: Sequence[FfnSite], operations: Mapping[str, Operations]
) -> None:
    """Runs the model in eval mode where it was traced in train mode, and the other way round: an FFN that spells its
    dropout out does it in one of them. A model may have no forward in a mode; what only runs there is not recorded.
    """
    for capture, inside in _runs(captures, sites):
        module = root.get_submodule(capture.path)
        assert capture.forward is not None
        training = any(m.training for m in module.modules()) and capture.forward.training is not False
        with counting_stand_ins(root, inside, False, operations):
            try:
                dataclasses.replace(capture.forward, training=not training).run(module)
            except Exception as error:  # the owner's code may fail in any way
                log.debug("%s does not run in the other mode: %s", capture.path or "the model", error)
