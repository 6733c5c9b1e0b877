"""Warns of a table of which training reads few slots: the others hold what they were drawn with."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memcompile.common.sites import VALUES_NAME
from memcompile.config import MemoryConfig

if TYPE_CHECKING:
    from memcompile.runtime.table.rules import State
    from memcompile.runtime.table.table import ValueTable

log = logging.getLogger(__name__)

STEPS = 1000  # after so many, once, a table is judged
LEAST = 0.25
_SAMPLED = 2**16  # slots
_COLUMNS = 8  # of a row


def share_read(state: State) -> float | None:
    """The share of the slots that steps have touched, by their second moments, from a sample of slots; None where the
    rule has no moments.
    """
    moment: Tensor | None = state.get("exp_avg_sq", state.get("sum"))
    if moment is None:
        return None
    slots = len(moment)
    rows = torch.arange(slots) if slots <= _SAMPLED else torch.randint(slots, (_SAMPLED,), generator=_generator())
    sample = moment[rows.to(moment.device)].reshape(len(rows), -1)[:, :_COLUMNS]
    return (sample != 0).any(1).double().mean().item()


def tell_unread(table: ValueTable, state: State) -> None:
    """Warns, when a table has been stepped STEPS times, where less than LEAST of its slots have been read."""
    if state["step"] != STEPS:
        return
    share, config = share_read(state), table.config
    if share is None or share >= LEAST:
        return
    log.warning(
        "memcompile: in %s steps %.1f%% of the %s slots of %s.%s have been read. The others have learned nothing, and "
        "cost memory. Plan with fewer slots (n_keys=%d has as many as have been read), or spread the reads over more "
        "of them (%s)",
        f"{STEPS:,}",
        100 * share,
        f"{config.slots:,}",
        type(table.owner).__name__,
        VALUES_NAME,
        n_keys_of_share(config, share),
        what_spreads(config),
    )


def n_keys_of_share(config: MemoryConfig, share: float) -> int:
    """Half-keys a side that have as many slots as this share of the slots of `config`."""
    assert config.n_keys is not None, "sizes of a plan are resolved"
    return max(config.top_k, math.ceil(config.n_keys * share**0.5))


def what_spreads(config: MemoryConfig) -> str:
    """The options that spread hits over more slots, of those that are not in use."""
    return "balance_loss=0.01" if config.has_batch_norm else "query_norm='batch' or balance_loss=0.01"


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
