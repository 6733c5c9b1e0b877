"""`_PipelineStageBase.__init__`: a stage with some of the layers of one table is refused: the others could not read it.

No public way: the constructors of stages have no hook, and take any module.
Until: pipeline stages share parameters.
The same: stages without memory layers.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from memcompile.common.patch import Patch, Replaced
from memcompile.errors import PlanError
from memcompile.runtime._torch import pipeline_stage
from memcompile.runtime.pool import live_pools


def _checked(build: Callable[..., None], stage: Any, submodule: nn.Module, *args: Any, **kwargs: Any) -> None:
    inside = set(submodule.modules())
    for pool in live_pools():
        here = [name for name, layer in pool.layers.items() if layer in inside]
        away = [name for name, layer in pool.layers.items() if layer not in inside]
        if here and away:
            raise PlanError(
                f"the memory layers of one table lie in several stages of a pipeline: {', '.join(here)} in this one, "
                f"{', '.join(away)} not. Choose blocks of one stage by memory_layers=[...], or plan each stage for "
                f"itself, with a table of its own"
            )
        if here and not any(p is pool.values for p in submodule.parameters()):
            raise PlanError(
                f"this stage runs the memory layers {', '.join(here)}, but not the module that holds their table: plan "
                f"the stage itself, memcompile.plan(stage, ...), instead of the model that it was cut from"
            )
    build(stage, submodule, *args, **kwargs)


PATCH = Patch(Replaced(pipeline_stage(), "__init__", _checked))
