"""What PyTorch's other ways to use many devices must know of a memory: FSDP2 leaves sharded values alone, and stages of
a pipeline do not share one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from memcompile.errors import PlanError
from memcompile.runtime._torch import fsdp_init
from memcompile.runtime.pool import live_pools

_MARK = "_memcompile_knows"


def install_parallelisms() -> None:
    """Wraps how `fully_shard` finds parameters and how pipeline stages are built. Idempotent; imports both."""
    module = fsdp_init()
    original = module._get_managed_states
    if not hasattr(original, _MARK):

        @functools.wraps(original)
        def managed(*args: Any, **kwargs: Any) -> Any:
            parameters, buffers = original(*args, **kwargs)
            sharded = {id(pool.values) for pool in live_pools() if pool.table.sharded is not None}
            return [p for p in parameters if id(p) not in sharded], buffers

        setattr(managed, _MARK, True)
        module._get_managed_states = managed

    from torch.distributed.pipelining.stage import _PipelineStageBase

    build = _PipelineStageBase.__init__
    if not hasattr(build, _MARK):

        @functools.wraps(build)
        def checked(self: Any, submodule: nn.Module, *args: Any, **kwargs: Any) -> None:
            _check_stage(submodule)
            build(self, submodule, *args, **kwargs)

        setattr(checked, _MARK, True)
        _PipelineStageBase.__init__ = checked  # type: ignore[method-assign]


def _check_stage(stage: nn.Module) -> None:
    """Raises PlanError for a stage with some of the layers that share one table: the others could not read it."""
    inside = set(stage.modules())
    for pool in live_pools():
        here = [name for name, layer in pool.layers.items() if layer in inside]
        away = [name for name, layer in pool.layers.items() if layer not in inside]
        if here and away:
            raise PlanError(
                f"the memory layers of one table lie in several stages of a pipeline: {', '.join(here)} in this one, "
                f"{', '.join(away)} not. Choose blocks of one stage by memory_layers=[...], or plan each stage for "
                f"itself, with a table of its own"
            )
        if here and not any(p is pool.values for p in stage.parameters()):
            raise PlanError(
                f"this stage runs the memory layers {', '.join(here)}, but not the module that holds their table: plan "
                f"the stage itself, memcompile.plan(stage, ...), instead of the model that it was cut from"
            )


def install_if_distributed() -> None:
    """As `install_parallelisms`, where the process is one of several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        install_parallelisms()
