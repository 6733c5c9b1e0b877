"""`PreTrainedModel._initialize_weights` of transformers: a memory that a dense checkpoint lacks is drawn.

A class that plans in its `__init__` is built on the meta device by `from_pretrained`, which makes tensors without
numbers of what the checkpoint lacks, and has the class draw those that it knows.
No public way: `_init_weights` is the class's own, and knows no memory.
Until: transformers calls `reset_parameters` of modules that it does not know.
The same: all modules that are no memory's; parameters that were loaded; models that were not built on the meta device.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from memcompile.runtime.drawing import draw_parameters, draw_table
from memcompile.runtime.layer import MemoryLayer
from memcompile.runtime.patches.patch import Patch, Replaced
from memcompile.runtime.pool import MemoryPool, live_pools

_DRAWN = "_is_hf_initialized"  # on a module that transformers has initialised, and on a parameter that it has loaded


def _initialized(initialize: Callable[..., Any], model: nn.Module, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if isinstance(module, MemoryLayer) and _is_new(module.pool):
        draw_parameters(module)  # by functions of `nn.init`, which transformers keeps from what was loaded
    for pool in live_pools():
        if pool.owner is module and _is_new(pool) and not getattr(pool.values, _DRAWN, False):
            draw_table(pool)
    return initialize(model, module, *args, **kwargs)


def _is_new(pool: MemoryPool) -> bool:
    """Whether the model is being built: transformers comes to the owner after its children."""
    return not getattr(pool.owner, _DRAWN, False)


PATCH = Patch(Replaced(PreTrainedModel, "_initialize_weights", _initialized))
