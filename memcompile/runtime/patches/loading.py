"""`nn.Module.load_state_dict`: a module without memory refuses a checkpoint that has one, before anything is copied.

`strict=False` would leave random FFNs where the memory was; the strict error lists keys, and does not say that
planning first is the fix.
No public way: hooks of loading are of one module, and this module is one that was not planned.
Until: it stays; a process in which no planned model lives has PyTorch's own behaviour.
The same: state dicts without a plan; loading into planned models.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from memcompile.common.patch import Patch, Replaced
from memcompile.common.sites import VALUES_NAME
from memcompile.errors import PlanError
from memcompile.runtime.pool import pool_of, pools_inside
from memcompile.runtime.state_dicts import is_plan, is_plan_name, plan_entries


def _guarded(
    load: Callable[..., Any], module: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any
) -> Any:
    entries = plan_entries(state_dict) if isinstance(state_dict, Mapping) else ()
    if any(map(is_plan, entries)) and pool_of(module) is None and not pools_inside(module):
        if not any(VALUES_NAME in part._parameters for part in module.modules()):
            raise PlanError(
                f"the checkpoint holds a memory, but {type(module).__name__} has none: plan it first, "
                f"memcompile.plan(model, memory=memcompile.config_from(state_dict)), then load"
            )
        # a captured graph has the parameters, and no extra state
        state_dict = {k: v for k, v in state_dict.items() if not (is_plan_name(k) and is_plan(v))}
    return load(module, state_dict, *args, **kwargs)


PATCH = Patch(Replaced(nn.Module, "load_state_dict", _guarded))
