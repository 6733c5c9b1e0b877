"""What a planned model needs of PyTorch and no public hook gives, one file a patch. Its docstring says what it changes,
why there is no public way, what ends it, and what stays the same for models without memory.

A patch is in force while a planned model lives that needs it. A file is imported when the first does: some of what
they change takes long to import.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from memcompile.runtime.pool import MemoryPool


def _always(pool: MemoryPool) -> bool:
    return True


def _has_sparse_gradient(pool: MemoryPool) -> bool:
    return pool.config.gradient != "dense"


def _is_sharded(pool: MemoryPool) -> bool:
    return pool.table.sharded is not None


def _can_be_replicated(pool: MemoryPool) -> bool:
    return torch.distributed.is_available()


def _is_one_of_several(pool: MemoryPool) -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


# The file of each patch, and which planned models need it.
_NEEDED: dict[str, Callable[[MemoryPool], bool]] = {
    "cache_key": _always,
    "loading": _always,
    "optimizer_loading": _always,
    "data_parallel": _can_be_replicated,
    "pipelining": _is_one_of_several,
    "sparse_clipping": _has_sparse_gradient,
    "clipping": _is_sharded,
    "fully_shard": _is_sharded,
    "backward": _is_sharded,
}


def hold(pool: MemoryPool) -> None:
    """Puts the patches in force that a planned model needs, as long as it lives. Idempotent.

    To be called again once its values are sharded, or the process is one of several: it needs more of them then.
    """
    for name, is_needed in _NEEDED.items():
        if is_needed(pool):
            importlib.import_module(f"{__name__}.{name}").PATCH.hold(pool)
