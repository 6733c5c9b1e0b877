"""The sizes of a memory that follow from the model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from memcompile.common.sites import FfnSite
from memcompile.config import MemoryConfig
from memcompile.errors import OptionError


def resolve(requested: MemoryConfig, chosen: Sequence[FfnSite], parameters: int) -> MemoryConfig:
    """Fills in the sizes that were not given, for a model of so many ``parameters``, and names the chosen layers. One
    memory has one form of options (:attr:`MemoryConfig.form`): "memory+" without its gate is "memory".

    Raises:
        OptionError: an option that does not fit to the sizes that follow.
    """
    width = max(site.width for site in chosen)
    if requested.has_pairs and any(site.width != width for site in chosen):
        raise OptionError(
            f"variant='peer' has rows as wide as the blocks, and those chosen have the widths "
            f"{sorted({site.width for site in chosen})}: choose blocks of one width by memory_layers"
        )
    value_dim = requested.value_dim or width
    row = value_dim + requested.pair_at(width)
    tables = len(chosen) if requested.tables == "separate" else 1
    affordable = math.isqrt(max(1, 4 * parameters // (row * tables)))  # with values of four times the model
    n_keys = requested.n_keys or min(1024, max(64, 2 ** (affordable.bit_length() - 1)))
    key_dim = requested.key_dim or max(2, width // 4 * 2)
    sizes: dict[str, Any] = {"n_keys": n_keys, "key_dim": key_dim, "value_dim": value_dim}
    try:
        return dataclasses.replace(requested, memory_layers=[site.down for site in chosen], **requested.form, **sizes)
    except OptionError as error:
        if requested.n_keys is not None:
            raise
        raise OptionError(f"{error} (n_keys={n_keys} was chosen for a model of this size)") from error
