"""Rehearses a plan: runs the model forward and backward, as it was traced, with stand-ins and small memory layers.
Nothing of it has changed yet.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memcompile.common.sites import FfnSite
from memcompile.config import MemoryConfig
from memcompile.errors import MemcompileError
from memcompile.lowering.inductor.caches import traced_to_plan
from memcompile.passes.capture.sandbox import sandbox
from memcompile.passes.capture.state import NotRestored
from memcompile.passes.capture.trace import Capture
from memcompile.runtime.install import RehearsedLayer, rehearsed_stand_ins
from memcompile.runtime.stand_ins.operations import Operations

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What came of it.

    Attributes:
        refusals: why sites cannot have a memory, by the name of their down-projection: what the model's code accepts
            between their projections are tensors alone, it needs another dtype than the memory's, or no gradient
            reaches them.
        operations: what each site does between its projections, in train mode and in eval mode.
    """

    refusals: dict[str, str]
    operations: dict[str, Operations]


@dataclasses.dataclass
class _Run:
    """What one forward and backward showed.

    Attributes:
        dtypes: of what the model returned.
        calls: how often each layer ran in the forward.
        differentiates: whether a gradient reached anything of the model; None where its backward failed.
        error: why it failed.
    """

    dtypes: tuple[torch.dtype, ...] = ()
    calls: tuple[int, ...] = ()
    differentiates: bool | None = None
    error: str = ""


def rehearse(root: nn.Module, captures: Sequence[Capture], sites: Sequence[FfnSite], config: MemoryConfig) -> Rehearsal:
    """What comes of memories in the place of sites, or beside them.

    Raises:
        PlanError: the model's forward keeps what cannot be put back.
    """
    rehearsing = _Rehearsing(root, captures, config, {site.down: Operations() for site in sites})
    if not sites:
        return Rehearsal({}, {})
    with sandbox() as survivors, traced_to_plan():
        refusals = rehearsing.refusals(sites)
        refusals |= rehearsing.refusals_in_the_other_mode([site for site in sites if site.down not in refusals])
        survivors.refuse(capture.graph for capture in captures)
    for down, sentence in refusals.items():
        log.debug("rehearsal of %s: %s", down, sentence)
    return Rehearsal(refusals, rehearsing.operations)


class _Rehearsing:
    def __init__(
        self,
        root: nn.Module,
        captures: Sequence[Capture],
        config: MemoryConfig,
        operations: dict[str, Operations],
    ) -> None:
        self.root, self.captures, self.config, self.operations = root, captures, config, operations
        self._dense: dict[int, _Run] = {}

    def refusals(self, sites: Sequence[FfnSite]) -> dict[str, str]:
        """Of all sites together, and where they fail of each half of them."""
        failure, untrained = self._run(sites)
        if failure is None:
            return untrained
        sentence, ran = failure
        if len(sites) == 1:
            return {sites[0].down: sentence}
        half = len(sites) // 2
        found = self.refusals(sites[:half]) | self.refusals(sites[half:])
        if not found and not ran:
            return dict.fromkeys((site.down for site in sites), sentence)
        return found

    def _run(self, sites: Sequence[FfnSite]) -> tuple[tuple[str, bool] | None, dict[str, str]]:
        """Why stand-ins do not work, and whether they ran, but not as often, which a random number may explain; and
        which of the sites do not train.
        """
        calls: collections.Counter[str] = collections.Counter()
        outputs: dict[str, list[tuple[Tensor, Tensor]]] = {site.down: [] for site in sites}
        differentiates = True
        for capture, inside in self._runs(sites):
            with rehearsed_stand_ins(self.root, inside, self.config, self.operations) as layers:
                try:
                    run = self._there_and_back(capture, layers)
                except NotRestored:
                    raise
                except Exception as error:  # the owner's code has an object where it expects a tensor
                    return (_sentence(error), False), {}
            if run.dtypes != capture.output_dtypes and len(run.dtypes) == len(capture.output_dtypes):
                return (f"with a memory the model returns {run.dtypes}, and without {capture.output_dtypes}", False), {}
            if run.differentiates is None and self._dense_run(capture).differentiates is not None:
                return (f"its model has no backward with a memory ({run.error})", False), {}
            differentiates &= bool(run.differentiates)
            for site, layer, count in zip(inside, layers, run.calls, strict=True):
                calls[site.down] += count
                outputs[site.down] += layer.outputs
        for site in sites:
            if calls[site.down] != site.calls:
                return (f"it ran {calls[site.down]} times with a stand-in, and {site.calls} times without", True), {}
        if self.config.frozen:
            return None, {}
        untrained = {down: _untrained(calls_of_it, differentiates) for down, calls_of_it in outputs.items()}
        return None, {down: sentence for down, sentence in untrained.items() if sentence}

    def refusals_in_the_other_mode(self, sites: Sequence[FfnSite]) -> dict[str, str]:
        """Runs the model in eval mode where it was traced in train mode, and the other way round: an FFN that spells
        its dropout out does it in one of them. A model may have no forward in a mode; what only runs there is not
        recorded.
        """
        found: dict[str, str] = {}
        for capture, inside in self._runs(sites):
            assert capture.forward is not None
            modules = self.root.get_submodule(capture.path).modules()
            training = not any(m.training for m in modules) or capture.forward.training is False
            other = dataclasses.replace(capture, forward=dataclasses.replace(capture.forward, training=training))
            if self._failure(other, inside) and not self._failure(other, []):
                mode = "train" if training else "eval"
                found |= {down: f"in {mode} mode {why}" for down, why in self._failing(other, inside).items()}
        return found

    def _failing(self, capture: Capture, sites: Sequence[FfnSite]) -> dict[str, str]:
        """Those of the sites whose stand-ins the forward does not run with."""
        sentence = self._failure(capture, sites)
        if not sentence or len(sites) == 1:
            return {sites[0].down: sentence} if sentence else {}
        half = len(sites) // 2
        return self._failing(capture, sites[:half]) | self._failing(capture, sites[half:])

    def _failure(self, capture: Capture, sites: Sequence[FfnSite]) -> str:
        assert capture.forward is not None
        with rehearsed_stand_ins(self.root, sites, self.config, self.operations):
            try:
                capture.forward.run(self.root.get_submodule(capture.path))
            except NotRestored:
                raise
            except Exception as error:  # the owner's code may fail in any way
                return _sentence(error)
        return ""

    def _runs(self, sites: Sequence[FfnSite]) -> Iterator[tuple[Capture, list[FfnSite]]]:
        """The captures that can be run again, each with the sites that it runs."""
        for capture in self.captures:
            prefix = f"{capture.path}." if capture.path else ""
            read = (site for site in sites if site.down.startswith(prefix) and site.down not in capture.unread)
            inside = [site for site in read if capture.covers(site.down)]
            if capture.forward is not None and inside:
                yield capture, inside

    def _dense_run(self, capture: Capture) -> _Run:
        if id(capture) not in self._dense:
            self._dense[id(capture)] = self._there_and_back(capture, [])
        return self._dense[id(capture)]

    def _there_and_back(self, capture: Capture, layers: Sequence[RehearsedLayer]) -> _Run:
        assert capture.forward is not None

        def through(call: Callable[..., list[Tensor]]) -> Callable[..., _Run]:
            def run(parameters: dict[str, Tensor], *others: Any) -> _Run:
                outputs = call(parameters, *others)
                result = _Run(tuple(o.dtype for o in outputs), tuple(len(layer.outputs) for layer in layers))
                ends = [o for o in outputs if o.requires_grad]
                try:
                    torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])
                except Exception as error:  # as in the forward; or the model has none
                    result.error = _described(error)
                    return result
                read = [p for layer in layers for _, p in layer.outputs]
                result.differentiates = any(p.grad is not None for p in (*parameters.values(), *read))
                return result

            return run

        return capture.forward.run(self.root.get_submodule(capture.path), through)


def _untrained(outputs: Sequence[tuple[Tensor, Tensor]], differentiates: bool) -> str:
    """Why a memory would not train, if so. As the block did, it trains where a gradient reaches one of its calls. Where
    the forward differentiates nothing at all, as one for inference, it cannot be told.
    """
    if outputs and not any(output.requires_grad for output, _ in outputs):
        return "it runs under no_grad or in inference mode: it does not train, and a memory would not"
    if differentiates and not any(parameter.grad is not None for _, parameter in outputs):
        return "no gradient reaches it, because its output is detached or not part of what the model returns"
    return ""


def _sentence(error: Exception) -> str:
    if isinstance(error, MemcompileError):
        return str(error).removeprefix("memcompile: ")
    return f"its code does not run with a stand-in ({_described(error)})"


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
