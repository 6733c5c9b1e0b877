"""memcompile: a torch.compile backend that gives any Transformer a large trainable memory.

    import memcompile
    model = torch.compile(model, backend="memcompile", memory_layers=3)

Importing the package adds the backend to `torch.compile`; every other backend stays as it is.
"""

import importlib
from typing import Any

from memcompile.common.sites import FfnSite
from memcompile.compile import install_front_door
from memcompile.config import MemoryConfig
from memcompile.errors import (
    CaptureError,
    CheckpointError,
    CollectiveError,
    MemcompileError,
    OptionError,
    PlanError,
)
from memcompile.explain import ExplainedSite, Explanation, explain
from memcompile.passes.detect.detect import find_ffns
from memcompile.planning.plan import catch_up, config_from, flush, plan, reset_parameters
from memcompile.runtime.distributed.gradients_by_mesh import install_by_mesh
from memcompile.runtime.distributed.replicas import install_replica_hook
from memcompile.runtime.distributed.sharding import shard
from memcompile.runtime.state_dicts import install_load_guard
from memcompile.runtime.storage.store import store_values
from memcompile.runtime.storage.values_file import verify_values
from memcompile.version import __version__

__all__ = [
    "CaptureError",
    "CheckpointError",
    "CollectiveError",
    "ExplainedSite",
    "Explanation",
    "FfnSite",
    "MemcompileError",
    "MemoryConfig",
    "OptionError",
    "PlanError",
    "__version__",
    "catch_up",
    "config_from",
    "explain",
    "find_ffns",
    "flush",
    "plan",
    "reset_parameters",
    "shard",
    "store_values",
    "verify_values",
]


def __getattr__(name: str) -> Any:
    """`memcompile.checkpoint` is imported at the first use: `torch.distributed.checkpoint` takes its time."""
    if name == "checkpoint":
        return importlib.import_module("memcompile.checkpoint")
    raise AttributeError(f"module 'memcompile' has no attribute {name!r}")


install_front_door()
install_load_guard()
install_replica_hook()
install_by_mesh()
