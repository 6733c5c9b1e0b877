"""`nn.Module.to_empty`: the memory in the module is drawn anew, instead of being left without numbers.

A program's own initialisation knows the modules that it was written for. It would not reach the memory's parameters, or
only some of them, and the memory would train on whatever stood in RAM.
No public way: `to_empty` calls no method of submodules but `_apply`, which every cast calls.
Until: PyTorch calls `reset_parameters` of what it has emptied.
The same: all parameters that are no memory's.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from memcompile.runtime.drawing import draw_emptied
from memcompile.runtime.patches.patch import Patch, Replaced


def _drawn(to_empty: Callable[..., Any], module: nn.Module, *args: Any, recurse: bool = True, **kwargs: Any) -> Any:
    result = to_empty(module, *args, recurse=recurse, **kwargs)
    draw_emptied(module.modules() if recurse else [module])
    return result


PATCH = Patch(Replaced(nn.Module, "to_empty", _drawn))
