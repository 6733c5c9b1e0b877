"""The state of a model, by names that do not depend on its wrappers, and the plans of its memories."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from memcompile.checkpoint._torch import is_fsdp1, local_part
from memcompile.common.sites import VALUES_NAME
from memcompile.errors import CheckpointError, PlanError
from memcompile.runtime.pool import live_pools
from memcompile.runtime.state_dicts import PLAN_KEY, check_same_plan, checked_plan, plan_of
from memcompile.runtime.storage.mapped_values import MappedValues
from memcompile.runtime.wrappers import unwrap

Plans = dict[str, dict[str, Any]]
_EXTRA_STATE = "_extra_state"


def root_of(model: nn.Module) -> nn.Module:
    """The model inside of its wrappers.

    Raises:
        CheckpointError: it is no module, or is wrapped by the first FSDP, which has no parameters of its own.
    """
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"expected an nn.Module, got {type(model).__name__}")
    if is_fsdp1(model):
        raise CheckpointError("FullyShardedDataParallel hides the parameters: shard with torch's fully_shard() instead")
    return unwrap(model)[0]


def model_state(root: nn.Module) -> dict[str, Any]:
    """`root.state_dict()`, whose tensors are those of the model."""
    return dict(get_model_state_dict(root))


def is_plan(name: str) -> bool:
    """Whether an entry of a model's state is the plan of a memory layer."""
    return f".{name}".endswith(f".{PLAN_KEY}")


def plans_of(root: nn.Module) -> Plans:
    """The plans of the model and of planned parts of it, by the names of the modules that have their tables."""
    pools = {id(pool.owner): pool for pool in live_pools()}
    return {name: plan_of(pools[id(m)]) for name, m in root.named_modules() if id(m) in pools}


def check_plans(saved: Plans, root: nn.Module, config: str) -> dict[str, str]:
    """Compares the memories of the model with those that were saved.

    Args:
        config: the expression that reads the saved options, for the message.

    Returns:
        The names of saved tables that have another one in the model, and that one.

    Raises:
        PlanError: they differ.
    """
    own = plans_of(root)
    moved = moved_tables(saved, own)
    if saved.keys() - own.keys() - moved.keys():
        raise PlanError(
            f"the checkpoint holds a memory, but {type(root).__name__} has none"
            f"{_where(saved.keys() - own.keys())}: plan it first, memcompile.plan(model, memory={config})"
        )
    if own.keys() - saved.keys() - {*moved.values()}:
        raise PlanError(
            f"{type(root).__name__} has a memory{_where(own.keys() - saved.keys())}, but the checkpoint holds none: "
            f"load it into the model before memcompile.plan()"
        )
    for name, plan in saved.items():
        check_same_plan(decoded(plan), own[moved.get(name, name)], config)
    return {_table(old): _table(new) for old, new in moved.items()}


def moved_tables(saved: Collection[str], own: Collection[str]) -> dict[str, str]:
    """The modules that saved tables are of, and those further inside that have them in the model. Earlier versions had
    the table on the module that was planned, and not on the part of it that runs the layers.
    """
    moved = {}
    for name in own:
        path = name.split(".")
        outer = (".".join(path[:depth]) for depth in reversed(range(len(path))))
        old = next((each for each in outer if each in saved and each not in own), None)
        if name not in saved and old is not None:
            moved[old] = name
    return moved


def decoded(plan: Any) -> dict[str, Any]:
    """A plan of a manifest, with the options that later versions have added.

    Raises:
        PlanError: it is damaged, or of a later version.
    """
    try:
        return checked_plan(plan)
    except (KeyError, TypeError) as error:
        raise PlanError(f"the plan in the checkpoint is damaged: {error}") from error


def check_entries(
    saved: Mapping[str, TensorStorageMetadata], objects: list[str], own: dict[str, Any], strict: bool, source: object
) -> None:
    """Raises CheckpointError unless the saved entries are those of the model, and as large; where not `strict`,
    names may differ. A tensor that shares its memory with a saved one need not be there, as in files of Hugging Face.
    The plans, which are compared by their content, may be of any length.
    """
    shared = {_place(own[name]) for name in saved if name in own} - {None}
    missing = [name for name in own if not (name in saved or name in objects or is_plan(name))]
    missing = [name for name in missing if _place(own[name]) not in shared]
    unexpected = [name for name in (*saved, *objects) if name not in own and not is_plan(name)]
    shapes = [
        f"{name} is {list(saved[name].size)} (here {list(value.shape)})"
        for name, value in own.items()
        if name in saved and not name.endswith(_EXTRA_STATE) and _shape(value) != saved[name].size
    ]
    problems = [f"sizes differ: {_few(shapes)}"] if shapes else []
    if strict and missing:
        problems.append(f"not in the checkpoint: {_few(missing)}")
    if strict and unexpected:
        problems.append(f"not in the model: {_few(unexpected)}")
    if problems:
        fix = "build the model as it was saved" if shapes else "build the model as it was saved, or pass strict=False"
        raise CheckpointError(f"{source} is not of this {'; '.join(['model', *problems])}: {fix}")


def mapped_in(root: nn.Module) -> dict[str, MappedValues]:
    """Values that lie in a file (`values_storage="mmap"`) and cannot be written, by their names."""
    return {name: parameter for name, parameter in root.named_parameters() if isinstance(parameter, MappedValues)}


def targets(saved: Mapping[str, TensorStorageMetadata], own: dict[str, Any], root: nn.Module) -> dict[str, Tensor]:
    """The tensors to read into: those of the model, or new ones for extra state, which may have another size. Values
    that lie in a file are left out: see `check_mapped`.
    """
    mapped = mapped_in(root)
    found: dict[str, Tensor] = {}
    for name, value in own.items():
        if name.endswith(_EXTRA_STATE) and name in saved and not is_plan(name):
            own[name] = value = torch.empty(saved[name].size, dtype=saved[name].properties.dtype, device="cpu")
        if name in saved and isinstance(value, Tensor) and not is_plan(name) and name not in mapped:
            found[name] = value
    return found


def run_load_hooks(root: nn.Module, state: dict[str, Any], strict: bool) -> None:
    """`load_state_dict` of what the model has already, for its extra state and its hooks."""
    with torch.no_grad():
        wrapped = {name.replace("_orig_mod.", ""): name for name in root.state_dict()}
        root.load_state_dict({wrapped.get(name, name): value for name, value in state.items()}, strict=strict)


def _table(owner: str) -> str:
    return f"{owner}.{VALUES_NAME}" if owner else VALUES_NAME


def _place(value: Any) -> tuple[Any, ...] | None:
    """What two tensors have in common that are the same memory; None where there is no memory."""
    if not isinstance(value, Tensor):
        return None
    local = local_part(value)[1]
    pointer = 0 if local.is_meta else local.data_ptr()
    return (pointer, local.dtype, local.shape, local.stride()) if pointer else None


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else None


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _where(names: Any) -> str:
    inside = sorted(name for name in names if name)
    return f" in {', '.join(inside)}" if inside else ""
