"""Rehearses a plan: runs the model once with stand-ins, as it was traced, before anything of it is changed."""

from __future__ import annotations

import collections
import logging
from collections.abc import Sequence

from torch import nn

from memcompile.common.sites import FfnSite
from memcompile.errors import MemcompileError
from memcompile.passes.capture.sandbox import caches_without_fakes, muted_loggers
from memcompile.passes.capture.trace import Capture
from memcompile.runtime.install import counting_stand_ins

log = logging.getLogger(__name__)


def rehearse(root: nn.Module, captures: Sequence[Capture], chosen: Sequence[FfnSite], adds: bool) -> dict[str, str]:
    """Why chosen sites cannot have a memory, by the name of their down-projection: what stands between their
    projections is token-wise in the graph, but the model's code accepts nothing but tensors there.
    """
    with muted_loggers(), caches_without_fakes():
        together = _failure(root, captures, chosen, adds)
        if together is None:
            return {}
        alone = {site.down: _failure(root, captures, [site], adds) for site in chosen}
    failures = {down: failure[0] for down, failure in alone.items() if failure is not None}
    sentence, ran = together
    if not failures and not ran:
        failures = dict.fromkeys(alone, sentence)
    for down, sentence in failures.items():
        log.debug("rehearsal of %s: %s", down, sentence)
    return failures


def _failure(
    root: nn.Module, captures: Sequence[Capture], sites: Sequence[FfnSite], adds: bool
) -> tuple[str, bool] | None:
    """Why stand-ins do not work; and whether they ran, but not as often, which a random number may explain."""
    calls: collections.Counter[str] = collections.Counter()
    for capture in captures:
        prefix = f"{capture.path}." if capture.path else ""
        read = (site for site in sites if site.down.startswith(prefix) and site.down not in capture.unread)
        inside = [site for site in read if capture.covers(site.down)]
        if capture.forward is None or not inside:
            continue
        with counting_stand_ins(root, inside, adds) as layers:
            try:
                capture.forward.run(root.get_submodule(capture.path))
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
