"""`nn.Module.to_empty`, and `_initialize_weights` of transformers' `PreTrainedModel`: the memory is drawn anew, and not
left without numbers.

A program's own initialisation knows the modules that it was written for. It would not reach the memory's parameters, or
only some of them, and the memory would train on whatever stood in RAM. `from_pretrained` of a class that plans in its
`__init__` builds it on the meta device, makes tensors without numbers of what a dense checkpoint lacks, and has the
class draw those that it knows.
No public way: `to_empty` calls no method of submodules but `_apply`, which every cast calls, too; transformers calls a
method of the user's class.
Until: both call `reset_parameters` of modules that are left without numbers.
The same: all parameters that are no memory's, and in transformers those that were loaded.
"""

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from memcompile.common.patch import Patch, Replaced
from memcompile.runtime.layer import MemoryLayer
from memcompile.runtime.pool import MemoryPool, live_pools
from memcompile.runtime.storage.drawing import draw_emptied, draw_parameters, draw_table


def _emptied(to_empty: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    result = to_empty(module, *args, **kwargs)
    draw_emptied(module.modules() if kwargs.get("recurse", True) else [module])
    return result


def _initialized(initialize: Callable[..., Any], model: nn.Module, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if isinstance(module, MemoryLayer) and _is_new(module.pool) and not all(map(_is_drawn, module.parameters())):
        draw_parameters(module)  # by functions of `nn.init`, which transformers keeps from what was loaded
    for pool in live_pools():
        if pool.owner is module and _is_new(pool) and not _is_drawn(pool.values):
            draw_table(pool)
    return initialize(model, module, *args, **kwargs)


def _is_new(pool: MemoryPool) -> bool:
    """Whether the model is being built: transformers comes to the owner after its children."""
    return not _is_drawn(pool.owner)


def _is_drawn(module: nn.Module | nn.Parameter) -> bool:
    return getattr(module, "_is_hf_initialized", False)  # transformers' mark of what it has initialised or loaded


class _OfTransformers:
    """The change of a library that a process may import at any time, or never."""

    change: Replaced | None = None

    def install(self) -> None:
        model: Any = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
        if hasattr(model, "_initialize_weights"):
            self.change = self.change or Replaced(model, "_initialize_weights", _initialized)
            self.change.install()

    def remove(self) -> None:
        if self.change is not None:
            self.change.remove()


class _Emptied(Patch):
    def hold(self, owner: object) -> None:
        super().hold(owner)
        _OF_TRANSFORMERS.install()  # it may have been imported since the first model


_OF_TRANSFORMERS = _OfTransformers()
PATCH = _Emptied(Replaced(nn.Module, "to_empty", _emptied), _OF_TRANSFORMERS)
