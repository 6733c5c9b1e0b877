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
    affordable = math.isqrt(max(1, 4 * parameters // value_dim))  # with values of four times the model
    n_keys = requested.n_keys or min(1024, max(64, 2 ** (affordable.bit_length() - 1)))
    key_dim = requested.key_dim or max(2, width // 4 * 2)
    try:
        layers = [site.down for site in chosen]
        return dataclasses.replace(requested, memory_layers=layers, n_keys=n_keys, key_dim=key_dim, value_dim=value_dim)
    except OptionError as error:
        raise OptionError(f"{error} (n_keys={n_keys} was chosen for a model of this size)") from error
