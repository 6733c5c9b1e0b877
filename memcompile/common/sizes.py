"""The sizes of a memory that follow from the model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from memcompile.common.sites import FfnSite
from memcompile.config import MemoryConfig
from memcompile.errors import OptionError


def resolve(requested: MemoryConfig, chosen: Sequence[FfnSite], parameters: int) -> MemoryConfig:
    """Fills in the sizes that were not given, for a model of so many ``parameters``, and names the chosen layers.

    Raises:
        OptionError: an option that does not fit to the sizes that follow.
    """
    width = max(site.width for site in chosen)
    value_dim = requested.value_dim or width
    n_keys = requested.n_keys or _default_keys(parameters, value_dim)
    key_dim = requested.key_dim or max(2, width // 4 * 2)
    try:
        return dataclasses.replace(
            requested,
            memory_layers=[site.down for site in chosen],
            n_keys=n_keys,
            key_dim=key_dim,
            value_dim=value_dim,
        )
    except OptionError as error:
        raise OptionError(f"{error} (n_keys={n_keys} was chosen for a model of this size)") from error


def _default_keys(parameters: int, value_dim: int) -> int:
    """The power of two in [64, 1024] whose square times ``value_dim`` stays within four times the model."""
    affordable = math.isqrt(max(1, 4 * parameters // value_dim))
    return min(1024, max(64, 2 ** (affordable.bit_length() - 1)))
