"""memcompile: a torch.compile backend that gives any Transformer a large trainable memory.

    import memcompile
    model = torch.compile(model, backend="memcompile", memory_layers=3)

Importing the package adds the backend to `torch.compile`, and changes and imports nothing else: what `plan()` needs is
imported at its first use, so that a process that plans no model (a data loader's worker) does not pay for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from memcompile.common.sites import FfnSite
from memcompile.compile import install_front_door
from memcompile.config import MemoryConfig
from memcompile.errors import CaptureError, CheckpointError, CollectiveError, MemcompileError, OptionError, PlanError
from memcompile.version import __version__

if TYPE_CHECKING:
    from memcompile import checkpoint, lowering, optim, passes
    from memcompile.passes.detect.detect import find_ffns
    from memcompile.planning.explain import ExplainedGroup, ExplainedSite, Explanation, explain
    from memcompile.planning.plan import catch_up, config_from, flush, plan, reset_parameters
    from memcompile.runtime.distributed.sharding import shard
    from memcompile.runtime.stand_ins.modules import replaced_modules
    from memcompile.runtime.storage.store import store_values
    from memcompile.runtime.storage.values_file import verify_values
    from memcompile.runtime.table.table import is_table
    from memcompile.slots.counting import count_usage
    from memcompile.slots.finetuning import finetune_slots
    from memcompile.slots.usage import usage

__all__ = [
    "CaptureError",
    "CheckpointError",
    "CollectiveError",
    "ExplainedGroup",
    "ExplainedSite",
    "Explanation",
    "FfnSite",
    "MemcompileError",
    "MemoryConfig",
    "OptionError",
    "PlanError",
    "__version__",
    "catch_up",
    "checkpoint",
    "config_from",
    "count_usage",
    "explain",
    "find_ffns",
    "finetune_slots",
    "flush",
    "is_table",
    "lowering",
    "optim",
    "passes",
    "plan",
    "replaced_modules",
    "reset_parameters",
    "shard",
    "store_values",
    "usage",
    "verify_values",
]

# Where the public names are that are imported at their first use; the others are modules of this package.
_LATER = {
    "planning.explain": ("ExplainedGroup", "ExplainedSite", "Explanation", "explain"),
    "planning.plan": ("catch_up", "config_from", "flush", "plan", "reset_parameters"),
    "passes.detect.detect": ("find_ffns",),
    "runtime.distributed.sharding": ("shard",),
    "runtime.stand_ins.modules": ("replaced_modules",),
    "runtime.table.table": ("is_table",),
    "runtime.storage.store": ("store_values",),
    "runtime.storage.values_file": ("verify_values",),
    "slots.counting": ("count_usage",),
    "slots.finetuning": ("finetune_slots",),
    "slots.usage": ("usage",),
}


def __getattr__(name: str) -> Any:
    if name in ("checkpoint", "lowering", "optim", "passes"):
        return importlib.import_module(f"memcompile.{name}")
    module = next((module for module, names in _LATER.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module 'memcompile' has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(f"memcompile.{module}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install_front_door()
