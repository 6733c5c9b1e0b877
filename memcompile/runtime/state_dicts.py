"""State dicts of planned models: the plan travels with the weights, and dense checkpoints still load."""

import json
import logging
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from memcompile.common.sites import LAYER_NAME, VALUES_NAME
from memcompile.config import OPTION_NAMES, STORAGE_OPTIONS, TRAINING_OPTIONS, MemoryConfig
from memcompile.errors import PlanError
from memcompile.runtime.pool import MemoryPool, pool_of, told
from memcompile.runtime.storage.frozen_values import MappedValues, keep_mapped

log = logging.getLogger(__name__)

FORMAT = 2  # the latest; `_format_of` says which a plan has
# Options that saved plans do not have, and what they stand for there: plans were saved before there were these, or the
# option is of the machine.
_LATER_OPTIONS = {
    "placement": "replace",
    "weighting": "softmax",
    "tables": "shared",
    "balance_loss": 0.0,
    "values_grad": "dense",
    "values_optimizer": None,
    "values_state_dtype": "float32",
    "values_storage": "device",
    "values_path": None,
}
PLAN_KEY = f"{LAYER_NAME}._extra_state"
# Buffers of the module that has the table, where there are any: see `slots.background`.
BACKGROUND = ("memory_background_hits", "memory_background_batches")
_CHECKSUM = "values_sha256"  # in the plan of a model whose values lie in a file
_MAGIC = b'{"memcompile"'  # how every encoded plan starts


def watch_state_dicts(pool: MemoryPool, root: nn.Module) -> None:
    """Flushes the table before the owner is saved or overwritten, and checks what it is given before it is copied. The
    model that was planned takes checkpoints that have the table where earlier versions put it, on that model.
    """
    pool.owner.register_state_dict_pre_hook(_before_saving)  # type: ignore[no-untyped-call]
    pool.owner.register_state_dict_post_hook(_after_saving)  # type: ignore[no-untyped-call]
    pool.owner.register_load_state_dict_pre_hook(_check_state_dict)  # type: ignore[no-untyped-call]
    root.register_load_state_dict_post_hook(_find_tied)  # type: ignore[no-untyped-call]
    if root is not pool.owner:
        root.register_load_state_dict_pre_hook(_move_table)  # type: ignore[no-untyped-call]


def encode_plan(pool: MemoryPool) -> Tensor:
    """The plan as a uint8 tensor of JSON: the extra state of each memory layer.

    A tensor, because every checkpoint format stores one (safetensors holds nothing else); extra state and not a
    buffer, because nothing averages, casts, broadcasts or moves extra state.
    """
    return torch.tensor(list(json.dumps(plan_of(pool)).encode()), dtype=torch.uint8, device="cpu")


def plan_in(state_dict: Mapping[str, Any]) -> dict[str, Any] | None:
    """The plan that a checkpoint was saved with: its ``config`` and the ``layers`` chosen. None if it is dense.

    Raises:
        PlanError: the plan is there, but damaged or of a later version.
    """
    entry = next(plan_entries(state_dict), None)
    if entry is None:
        return None
    try:
        return checked_plan(json.loads(_encoded(entry)))
    except (AttributeError, KeyError, NotImplementedError, RecursionError, TypeError, ValueError) as error:
        raise PlanError(f"the plan in the checkpoint ({PLAN_KEY}) is damaged: {error}") from error


def plan_entries(state_dict: Mapping[str, Any]) -> Iterator[Any]:
    """What a state dict has under the names of encoded plans."""
    return (value for name, value in state_dict.items() if is_plan_name(name))


def is_plan_name(name: str) -> bool:
    """Whether an entry of this name is a plan, unless a stranger's module is named ``memory`` too."""
    return f".{name}".endswith(f".{PLAN_KEY}")


def is_plan(entry: Any) -> bool:
    """Whether an entry is ours for certain: a stranger's module named ``memory`` may have extra state too."""
    if not isinstance(entry, Tensor) or entry.is_complex() or entry.is_meta:
        return False
    return _encoded(entry.flatten()[: len(_MAGIC)]) == _MAGIC


def _encoded(entry: Tensor) -> bytes:
    """The bytes of a plan, also of one that was cast with all that a checkpoint has: any float holds them exactly."""
    return bytes(entry.to(torch.uint8).tolist())


_saved_whole: Any = weakref.WeakSet()  # the pools whose owner is being saved


def _before_saving(owner: nn.Module, prefix: str, keep_vars: bool) -> None:
    pool = pool_of(owner)
    if pool is not None:
        pool.table.flush()
        _saved_whole.add(pool)


def _after_saving(owner: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    _saved_whole.discard(pool_of(owner))


def tell_part(layer: Any, prefix: str, keep_vars: bool) -> None:
    """Tells when a part of the model that has this layer is saved without its table."""
    if layer.pool not in _saved_whole:
        told(layer.pool, "saved")


def _move_table(root: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Names the values of an older checkpoint as they are named now."""
    pool = pool_of(root)
    if pool is None or prefix + VALUES_NAME not in state_dict or VALUES_NAME in root._parameters:
        return
    inside = next(name for name, module in root.named_modules() if module is pool.owner)
    state_dict.setdefault(f"{prefix}{inside}.{VALUES_NAME}", state_dict.pop(prefix + VALUES_NAME))


def _find_tied(root: nn.Module, keys: Any) -> None:
    """A parameter of several names is loaded where one of them is: safetensors files hold it once."""
    missing = set(keys.missing_keys)
    if not missing:
        return
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    tied = {name: others for others in names.values() if len(others) > 1 for name in others}
    for key in missing:
        for name in (name for name in tied if f".{key}".endswith(f".{name}")):
            if any(key.removesuffix(name) + other not in missing for other in tied[name]):
                keys.missing_keys.remove(key)
                break


def _check_state_dict(owner: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    pool = pool_of(owner)
    assert pool is not None, "the hook is installed on planned models alone"
    pool.table.flush()  # what rows have missed is of the values as they are now
    own = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
    saved = plan_in(own)
    if saved is not None:
        check_same_plan(saved, plan_of(pool))
    elif not any(_is_memory(name[len(prefix) :], pool) for name in own):
        _fill_from_dense(pool, state_dict, prefix)
    else:  # of a captured graph, which has parameters and no extra state
        plans = [name for name in owner.state_dict() if is_plan_name(name)]
        state_dict.update({prefix + name: encode_plan(pool) for name in plans})
    given = state_dict.get(prefix + VALUES_NAME)
    if pool.table.sharded is not None and isinstance(given, Tensor) and not isinstance(given, DTensor):
        raise PlanError(
            f"the state dict has all values, and those of {type(owner).__name__} are sharded: load it before "
            f"memcompile.shard(), or read its file by memcompile.checkpoint.import_safetensors()"
        )
    if isinstance(pool.values, MappedValues):
        keep_mapped(pool.values, state_dict, prefix + VALUES_NAME)
    _take_background(owner, state_dict, prefix)


def _take_background(owner: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Counts of background data are loaded where the checkpoint has them, and stay where it has none."""
    for name in BACKGROUND:
        given, own = state_dict.get(prefix + name), owner._buffers.get(name)
        if given is not None and own is None:
            owner.register_buffer(name, torch.empty_like(given, device=next(owner.parameters()).device))
        elif given is None and own is not None:
            state_dict[prefix + name] = own


def _fill_from_dense(pool: MemoryPool, state_dict: dict[str, Any], prefix: str) -> None:
    """A dense checkpoint has no memory to load: the memory stays as it is, and replaced FFNs are not used."""
    names = [name.removeprefix(pool.prefix) for site in pool.chosen for name in site.parameters]
    ffns = [name for name in names if prefix + name in state_dict]
    if not ffns:  # neither memory nor FFNs: a part of a model, loaded with strict=False
        return
    for name in () if pool.adds else ffns:
        del state_dict[prefix + name]
    for name, value in pool.owner.state_dict().items():
        if _is_memory(name, pool):
            state_dict[prefix + name] = value
    log.warning(
        "memcompile: loading a dense checkpoint into a model with memory: %d weights of %s FFNs (%s) are %s, "
        "and the memory keeps its present values",
        len(ffns),
        "memory-augmented" if pool.adds else "replaced",
        ", ".join(site.name or site.down for site in pool.chosen),
        "loaded" if pool.adds else "not used",
    )


def _is_memory(name: str, pool: MemoryPool) -> bool:
    layers = tuple(f"{down.rpartition('.')[0]}.{LAYER_NAME}.".lstrip(".") for down in pool.layers)
    return name == VALUES_NAME or name.startswith(layers)


def check_same_plan(
    saved: dict[str, Any], own: dict[str, Any], config: str = "memcompile.config_from(state_dict)"
) -> None:
    """Raises PlanError, which lists what differs, unless a plan that was saved is that of this model, but for options
    of training.

    Args:
        config: the expression that reads the saved options, for the message.
    """
    sizes = {k: v for k, v in own["config"].items() if k not in ("memory_layers", *TRAINING_OPTIONS)}
    differing = [
        f"{k}={saved['config'].get(k)!r} (here {v!r})" for k, v in sizes.items() if saved["config"].get(k) != v
    ]
    if not _same_layers(saved["layers"], own["layers"]):
        differing.append(f"layers {saved['layers']} (here {own['layers']})")
    checksums = saved.get(_CHECKSUM), own.get(_CHECKSUM)
    if None not in checksums and checksums[0] != checksums[1]:
        raise PlanError(
            f"the checkpoint was saved beside another file of values (SHA-256 of its rows {checksums[0]}, here "
            f"{checksums[1]}): plan the model with the values_path of its own"
        )
    if differing:
        raise PlanError(
            f"the checkpoint was saved with another memory: {', '.join(differing)}. Plan the model as the "
            f"checkpoint was: memcompile.plan(model, memory={config})"
        )


def _same_layers(saved: list[str], own: list[str]) -> bool:
    """Whether names are the same, from whatever module: earlier versions named layers from the model that was planned,
    and not from the module that holds the table.
    """
    longer, shorter = sorted((saved, own), key=lambda names: len("".join(names)), reverse=True)
    if len(longer) != len(shorter) or not shorter:
        return longer == shorter
    prefix = longer[0].removesuffix(shorter[0])
    return longer == [prefix + name for name in shorter] and (not prefix or prefix.endswith("."))


def _format_of(config: MemoryConfig) -> int:
    """2 where readers of format 1, which do not know all options of a layer, would compute something else."""
    known = config.variant in ("memory+", "memory") and not config.has_batch_norm  # as whether there is a gate
    return 1 if known and (config.weighting, config.tables) == ("softmax", "shared") else 2


def plan_of(pool: MemoryPool) -> dict[str, Any]:
    """The plan in plain JSON types."""
    config = pool.config.to_dict()
    plan = {
        "memcompile": _format_of(pool.config),
        "config": {name: option for name, option in config.items() if name not in STORAGE_OPTIONS},
        "layers": list(pool.layers),
    }
    values = pool.values
    return plan | ({_CHECKSUM: values.checksum} if isinstance(values, MappedValues) else {})


def config_of(plan: Mapping[str, Any]) -> MemoryConfig:
    """The options of a plan that was read, for ``memcompile.plan(model, memory=...)``.

    Raises:
        PlanError: the plan is damaged.
    """
    try:
        return MemoryConfig(**{name: plan["config"][name] for name in OPTION_NAMES} | {"memory_layers": plan["layers"]})
    except (KeyError, OverflowError, TypeError, ValueError) as error:  # an OptionError is a ValueError
        raise PlanError(f"the plan in the checkpoint is damaged: {error}") from error


def checked_plan(plan: Any, where: object = PLAN_KEY) -> dict[str, Any]:
    """A plan that was decoded, with the options that later versions have added.

    Raises:
        PlanError: it is damaged, or of a later version.
    """
    try:
        saved_format, config, layers = plan["memcompile"], plan["config"], plan["layers"]
        is_list = isinstance(layers, list) and all(isinstance(layer, str) for layer in layers)
        if not (isinstance(saved_format, int) and isinstance(config, dict) and is_list):
            raise TypeError(f"unexpected types in {plan}")
    except (KeyError, TypeError) as error:
        raise PlanError(f"the plan in the checkpoint ({where}) is damaged: {error}") from error
    if saved_format > FORMAT:
        raise PlanError(f"the checkpoint's plan has format {saved_format}, this memcompile reads {FORMAT}: upgrade it")
    own = {name: option for name, option in config.items() if name not in STORAGE_OPTIONS}  # a path is of the machine
    variant = "memory" if own.get("gate") is False else "memory+"  # before plans named it
    own = {**_LATER_OPTIONS, "variant": variant, **own}
    query_norm = "batch" if own["variant"] == "pkm" else "none"  # likewise
    return {**plan, "config": {"query_norm": query_norm, **own}}
