"""What a planned model needs of PyTorch and no public hook gives, one file a patch. Its docstring says what it changes,
why there is no public way, what ends it, and what stays the same for models without memory.

A patch is in force while a planned model lives that needs it. A file is imported when the first does: some of what
they change takes long to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from memcompile.runtime.pool import MemoryPool


def needed_by(pool: MemoryPool) -> dict[str, bool]:
    """The file of each patch, and whether a planned model needs it."""
    is_sharded = pool.table.sharded is not None
    return {
        "cache_key": True,
        "loading": True,
        "optimizer_loading": True,
        "optimizer_step": True,
        "data_parallel": True,
        "emptied": True,
        "pipelining": dist.is_initialized(),
        "sparse_clipping": pool.config.gradient != "dense",
        "clipping": is_sharded or pool.config.balance_loss > 0,
        "fully_shard": is_sharded,
        "backward": is_sharded,
    }


def hold(pool: MemoryPool) -> None:
    """Puts the patches in force that a planned model needs, as long as it lives. Idempotent.

    To be called again once its values are sharded, or the process is one of several: it needs more of them then.
    """
    for name, is_needed in needed_by(pool).items():
        if is_needed:
            importlib.import_module(f"{__name__}.{name}").PATCH.hold(pool)
