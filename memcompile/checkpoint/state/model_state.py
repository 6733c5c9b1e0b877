"""The state of a model, by names that do not depend on its wrappers, and what is loaded into it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

from memcompile.checkpoint._torch import local_part
from memcompile.checkpoint.formats.dcp_files import Part
from memcompile.common.progress import Progress
from memcompile.common.sites import VALUES_NAME
from memcompile.errors import CheckpointError, PlanError
from memcompile.runtime.pool import live_pools
from memcompile.runtime.state_dicts import check_same_plan, checked_plan, config_of, is_plan_name, plan_of
from memcompile.runtime.storage.frozen_values import MappedValues
from memcompile.runtime.storage.values_file import sha256_of
from memcompile.runtime.wrappers import unwrap

Plans = dict[str, dict[str, Any]]
_EXTRA_STATE = "_extra_state"


class SavedModel(NamedTuple):
    """The model of a checkpoint, or of an export."""

    source: Path
    config: str  # the expression that reads its options, for messages
    plans: Plans  # of every memory, by the name of the module that had its table
    tensors: Mapping[str, Tensor]  # on the meta device
    objects: Collection[str]  # the names of all other entries
    read: Callable[[Mapping[str, Part], Progress], None]  # parts of the tensors


class ModelTarget:
    """A model to load into, which was compared with the one that was saved. Its entries have the names that they were
    saved with.

    Attributes:
        parameters: by name.
        names: of the parameters, by their id.
        parts: to read: into the tensors of the model, or into new ones for extra state, which may have another size.
        objects: to read, and to give to `finish`.

    Raises:
        CheckpointError: the entries or their sizes are others.
        PlanError: the memories are others, or the values that lie in a file.
    """

    def __init__(self, model: nn.Module, saved: SavedModel, strict: bool, bar: Progress) -> None:
        self._root, self._strict = root_of(model), strict
        self._moved = _moved_names(saved, self._root)
        before = {new: old for old, new in self._moved.items()}
        named = ((plain(name), parameter) for name, parameter in self._root.named_parameters())
        self.parameters = {before.get(name, name): parameter for name, parameter in named}
        self.names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._own = {before.get(name, name): value for name, value in model_state(self._root).items()}
        _check_entries(saved, self._own, strict)
        self.objects = [name for name in saved.objects if name in self._own]
        self.parts: dict[str, Part] = {}
        for name, tensor in saved.tensors.items():
            values = self.parameters.get(name)
            if isinstance(values, MappedValues):
                _check_mapped(name, values, saved, bar)
            elif name in self._own and not is_plan_name(name):
                if name.endswith(_EXTRA_STATE):
                    self._own[name] = torch.empty_like(tensor, device="cpu")
                self.parts[name] = Part(*local_part(self._own[name]))

    def finish(self, objects: Mapping[str, Any]) -> None:
        """`load_state_dict` of what was read, for the model's extra state and its hooks."""
        self._own.update(objects)
        wrapped = {name.replace("_orig_mod.", ""): name for name in self._root.state_dict()}
        state = {self._moved.get(name, name): value for name, value in self._own.items()}
        with torch.no_grad():
            self._root.load_state_dict({wrapped.get(k, k): v for k, v in state.items()}, strict=self._strict)


def root_of(model: nn.Module) -> nn.Module:
    """The model inside of its wrappers.

    Raises:
        CheckpointError: it is no module, or is wrapped by the first FSDP, which has no parameters of its own.
    """
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"expected an nn.Module, got {type(model).__name__}")
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise CheckpointError("FullyShardedDataParallel hides the parameters: shard with torch's fully_shard() instead")
    return unwrap(model)[0]


def model_state(root: nn.Module) -> dict[str, Any]:
    """`root.state_dict()`, whose tensors are those of the model."""
    return dict(get_model_state_dict(root))


def plain(name: str) -> str:
    """A parameter's name without the wrappers of parts of the model."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def plans_of(root: nn.Module) -> Plans:
    """The plans of the model and of planned parts of it, by the names of the modules that have their tables."""
    pools = {id(pool.owner): pool for pool in live_pools()}
    return {name: plan_of(pools[id(m)]) for name, m in root.named_modules() if id(m) in pools}


def moved_tables(saved: Collection[str], own: Collection[str]) -> dict[str, str]:
    """The modules that saved tables are of, and those further inside that have them in the model. Earlier versions had
    the table on the module that was planned, and not on the part of it that runs the layers.
    """
    moved = {}
    for name in (name for name in own if name not in saved):
        outer = [each for each in saved if each not in own and (not each or name.startswith(f"{each}."))]
        if outer:
            moved[max(outer, key=len)] = name
    return moved


def _moved_names(saved: SavedModel, root: nn.Module) -> dict[str, str]:
    """The names of saved tables that have another one in the model, and that one. Raises PlanError where the memories
    differ.
    """
    own = plans_of(root)
    moved = moved_tables(saved.plans, own)
    if missing := saved.plans.keys() - own.keys() - moved.keys():
        raise PlanError(
            f"the checkpoint holds a memory, but {type(root).__name__} has none{_where(missing)}: plan it first, "
            f"memcompile.plan(model, memory={saved.config})"
        )
    if unexpected := own.keys() - saved.plans.keys() - {*moved.values()}:
        raise PlanError(
            f"{type(root).__name__} has a memory{_where(unexpected)}, but the checkpoint holds none: load it into the "
            f"model before memcompile.plan()"
        )
    for name, plan in saved.plans.items():
        check_same_plan(plan_that_was_saved(plan, saved.source), own[moved.get(name, name)], saved.config)
    return {f"{old}.{VALUES_NAME}".lstrip("."): f"{new}.{VALUES_NAME}" for old, new in moved.items()}


def plan_that_was_saved(plan: Any, source: Path) -> dict[str, Any]:
    """A plan of a checkpoint; raises CheckpointError where it is damaged."""
    try:
        checked = checked_plan(plan, source)
        config_of(checked)
    except PlanError as error:
        raise CheckpointError(str(error)) from error
    return checked


def _check_entries(saved: SavedModel, own: Mapping[str, Any], strict: bool) -> None:
    """Raises CheckpointError unless the saved entries are those of the model, and as large; where not `strict`,
    names may differ. A tensor that shares its memory with a saved one need not be there, as in files of Hugging Face.
    The plans, which are compared by their content, may be of any length.
    """
    names = {*saved.tensors, *saved.objects}
    shared = {_place(own[name]) for name in saved.tensors if name in own} - {None}
    missing = [name for name in own if name not in names and not is_plan_name(name) and _place(own[name]) not in shared]
    unexpected = [name for name in (*saved.tensors, *saved.objects) if name not in own and not is_plan_name(name)]
    shapes = [
        f"{name} is {list(saved.tensors[name].shape)} (here {list(value.shape)})"
        for name, value in own.items()
        if name in saved.tensors and not name.endswith(_EXTRA_STATE) and value.shape != saved.tensors[name].shape
    ]
    differing = {"sizes differ": shapes}
    if strict:
        differing |= {"not in the checkpoint": missing, "not in the model": unexpected}
    problems = [f"{what}: {_few(names)}" for what, names in differing.items() if names]
    if problems:
        fix = "build the model as it was saved" if shapes else "build the model as it was saved, or pass strict=False"
        raise CheckpointError(f"{saved.source} is not of this {'; '.join(['model', *problems])}: {fix}")


def _check_mapped(name: str, values: MappedValues, saved: SavedModel, bar: Progress) -> None:
    """Values that lie in a file are not loaded: raises PlanError unless the saved ones are the same, by their checksum
    in the dtype of the file.
    """

    def rows(first: int, end: int) -> Tensor:
        block = torch.empty(end - first, values.shape[1], dtype=values.dtype, device="cpu")
        saved.read({name: Part((first, 0), block)}, Progress(False))
        return block

    if sha256_of(values, rows, "comparing", bar) != values.checksum:
        raise PlanError(
            f"{saved.source} has other {name} than {values.path!r}, where the model's lie, and loading does not write "
            f"them: plan with values_storage='device', load, and store_values() anew"
        )


def _place(value: Any) -> tuple[Any, ...] | None:
    """What two tensors have in common that are the same memory; None where there is no memory."""
    if not isinstance(value, Tensor):
        return None
    local = local_part(value)[1]
    pointer = 0 if local.is_meta else local.data_ptr()
    return (pointer, local.dtype, local.shape, local.stride()) if pointer else None


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _where(names: Collection[str]) -> str:
    inside = sorted(name for name in names if name)
    return f" in {', '.join(inside)}" if inside else ""
