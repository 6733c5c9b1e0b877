"""`_get_managed_states`, by which `fully_shard` finds its parameters: it leaves values alone that are sharded already.

No public way: `fully_shard(ignored_params=...)` is for the caller, in each call, who need not know the table.
Until: FSDP2 has an attribute of a parameter that is left alone.
The same: all parameters that are no values of a memory.
"""

from collections.abc import Callable
from typing import Any

from memcompile.common.patch import Patch, Replaced
from memcompile.runtime._torch import fsdp_init
from memcompile.runtime.pool import live_pools


def _without_sharded_values(managed_states: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    parameters, buffers = managed_states(*args, **kwargs)
    sharded = {id(pool.values) for pool in live_pools() if pool.table.sharded is not None}
    return [p for p in parameters if id(p) not in sharded], buffers


PATCH = Patch(Replaced(fsdp_init(), "_get_managed_states", _without_sharded_values))
