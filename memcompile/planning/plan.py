"""plan(): the one way in which a model gets a memory."""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from memcompile.backend import register
from memcompile.common.pipeline import Pipeline
from memcompile.common.sizes import resolve
from memcompile.config import MemoryConfig, check_names
from memcompile.errors import OptionError, PlanError
from memcompile.passes.capture.graphs import is_captured
from memcompile.passes.detect.detect import find_in_model
from memcompile.passes.detect.place import place, with_named
from memcompile.planning.explain import Explanation, explain
from memcompile.planning.rehearsal import rehearse
from memcompile.runtime import patches
from memcompile.runtime.adoption import adopt_optimizers
from memcompile.runtime.distributed.ddp import check_rebuildable, rebuild
from memcompile.runtime.distributed.sharding import check_plans_agree, check_same, cut
from memcompile.runtime.install import install, owner_of
from memcompile.runtime.interrupts import uninterrupted
from memcompile.runtime.pool import MemoryPool, memory_of, pool_of, pools_inside
from memcompile.runtime.state_dicts import config_of, plan_in
from memcompile.runtime.storage.drawing import draw_table
from memcompile.runtime.storage.frozen_values import MappedValues
from memcompile.runtime.wrappers import is_in_ddp, is_sharded, unwrap

log = logging.getLogger(__name__)


def plan(
    model: nn.Module,
    *,
    memory: MemoryConfig | None = None,
    example_inputs: Any = None,
    memory_mesh: DeviceMesh | None = None,
    shard_by: str | None = None,
    shard_tokens: str = "uneven",
    **options: Any,
) -> Explanation:
    """Replaces feed-forward blocks of ``model`` by memory layers, or adds memory to them, in place.

    The model's new parameters exist when the call returns, trainable, in a frozen model too; everything that runs the
    model afterwards (compiled, eager, exported, checkpointed) runs the memory. Optimizers that hold the replaced
    parameters are adopted. A second call with the same options, or with none, changes nothing.

    Args:
        model: any module; may be wrapped by DDP or ``torch.compile``. Plan before ``fully_shard``.
        memory: every option at once; or give them as keywords, see :class:`memcompile.MemoryConfig`.
        example_inputs: a tuple of positional or a dict of keyword arguments of one forward, for models whose inputs
            cannot be guessed. Of its tensors only shapes and dtypes are read, unless values decide the path: then a
            copy of the model runs on them once.
        memory_mesh, shard_by, shard_tokens: shards the values over a mesh as they are made, so that no rank ever has
            all of them: `mesh`, `by` and `tokens` of :func:`memcompile.shard`. A collective then.
        options: fields of :class:`memcompile.MemoryConfig`.

    Returns:
        What was found and chosen; its ``repr`` is a table.

    Raises:
        OptionError: an unknown option, a wrong type or value, or a model that is no module.
        PlanError: no or too few feed-forward blocks, already planned with other options, already sharded, or a
            ``values_path`` that is not the file of this memory.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"plan() takes an nn.Module, got {model!r}")
    start = time.perf_counter()
    register()
    requested = _config(memory, options)
    if memory_mesh is None and (shard_by or "columns", shard_tokens) != ("columns", "uneven"):
        raise OptionError("shard_by and shard_tokens say how values lie on a memory_mesh: give it, too")
    root, parallel = unwrap(model)
    if is_captured(root):
        raise PlanError(
            "a captured graph is not changed in place: memcompile.passes.rewrite(graph_module, sites) returns one with "
            "memory, for sites of memcompile.find_ffns(graph_module); compile that with any other backend"
        )
    given = requested.as_options()
    if memory is None:
        given = {name: given[name] for name in options}
    if _is_planned(root, given):
        planned = memory_of(root)
        if memory_mesh is not None:
            check_same(planned, cut(planned, memory_mesh, shard_by, shard_tokens))
        patches.hold(planned)  # the process may be one of several now
        return explain(model)
    if is_sharded(root):
        raise PlanError(
            f"{type(root).__name__} is already sharded: plan before fully_shard() and distribute_tensor(), "
            f"so that the memory's parameters are sharded with the rest"
        )
    if not parallel and dist.is_initialized() and is_in_ddp(root):
        raise PlanError(
            f"{type(root).__name__} is in DDP already, whose reducer waits for the gradients of what is replaced: pass "
            f"the DDP itself, or plan first, then wrap the model"
        )
    for wrapper in parallel:
        check_rebuildable(wrapper, memory_mesh is not None)
    mesh = None if memory_mesh is None else (memory_mesh, shard_by, shard_tokens)
    _run_steps(root, requested, example_inputs, mesh, parallel)
    explanation = explain(model)
    log.info("planned in %.2f s\n%r", time.perf_counter() - start, explanation)
    return explanation


def _run_steps(
    root: nn.Module,
    requested: MemoryConfig,
    example_inputs: Any,
    mesh: tuple[DeviceMesh, str | None, str] | None,
    wrappers: Sequence[DistributedDataParallel],
) -> None:
    pipeline = Pipeline("plan")
    captures, blocks = find_in_model(pipeline, root, example_inputs)
    sites = [block.site for block in blocks]
    with pipeline.step("rehearse", "blocks rehearsed"):
        sites = with_named(sites, requested.memory_layers)
        rehearsed = [site for site in sites if site.refusal is None]
        rehearsal = rehearse(root, captures, rehearsed, requested)
        refusals = [rehearsal.refusals.get(site.down, site.refusal) for site in sites]
        sites = [dataclasses.replace(s, refusal=refusal) for s, refusal in zip(sites, refusals, strict=True)]
        pipeline.count = len(rehearsed)
    with pipeline.step("place", "blocks chosen"):
        chosen = place(sites, requested.memory_layers)
        pipeline.count = len(chosen)
    with pipeline.step("size", "slots"):
        owner, prefix = owner_of(root, chosen)
        config = resolve(requested, chosen, sum(p.numel() for p in root.parameters()))
        config = dataclasses.replace(config, memory_layers=[site.down.removeprefix(prefix) for site in chosen])
        width = max(site.width for site in chosen)
        pool = MemoryPool(
            owner=owner, prefix=prefix, config=config, requested=requested, width=width, sites=tuple(sites)
        )
        pool.table.model = weakref.ref(root)
        if mesh is not None:
            pool.table.sharded = cut(pool, *mesh)
            check_plans_agree(pool, pool.table.sharded)
        pipeline.count = pool.values_shape[0]
    patches.hold(pool)
    with uninterrupted():  # half a change could not be mended by a second call
        with pipeline.step("install", "layers installed"):
            ffns = install(pool, root, chosen, rehearsal.operations)
            pipeline.count = len(pool.layers)
        with pipeline.step("adopt", "optimizers adopted"):
            pipeline.count = adopt_optimizers(ffns, pool, root)
        with pipeline.step("rebuild", "wrappers rebuilt"):
            for wrapper in wrappers:
                rebuild(wrapper)
            pipeline.count = len(wrappers)


def reset_parameters(model: nn.Module) -> None:
    """Draws the memory of a planned model anew, values and layers. A collective where they are DTensors.

    Raises:
        PlanError: the model has no memory, or its values lie in a file.
    """
    pool = memory_of(model)
    if isinstance(pool.values, MappedValues):
        raise PlanError(f"the values lie in {pool.values.path!r}, for inference: plan with values_storage='device'")
    draw_table(pool)
    for layer in pool.layers.values():
        layer.reset_parameters()


def flush(model: nn.Module) -> None:
    """Makes all rows of a planned model's table do, in place, the steps that they have missed: for code that reads
    `memory_values` itself. The model's layers and `state_dict()` need no such call.

    Raises:
        PlanError: the model has no memory.
    """
    memory_of(model).table.flush()


def catch_up(model: nn.Module) -> None:
    """The former name of :func:`flush`."""
    warnings.warn("memcompile.catch_up is memcompile.flush now", FutureWarning, stacklevel=2)
    flush(model)


def config_from(state_dict: Mapping[str, Any]) -> MemoryConfig:
    """The options of the memory that a checkpoint was saved with, for ``plan(model, memory=...)``.

    Raises:
        PlanError: the checkpoint holds no memory, or its plan is damaged.
    """
    saved = plan_in(state_dict)
    if saved is None:
        inner = [name for name, value in state_dict.items() if isinstance(value, Mapping) and plan_in(value)]
        hint = f"pass what it has under {inner[0]!r}" if inner else "it was saved from a model that was not planned"
        raise PlanError(f"the state dict holds no memory: {hint}")
    return config_of(saved)


def _config(memory: MemoryConfig | None, options: Mapping[str, Any]) -> MemoryConfig:
    if memory is None:
        return MemoryConfig.from_dict(options)
    if not isinstance(memory, MemoryConfig):
        raise OptionError(f"memory must be a memcompile.MemoryConfig, got {memory!r}")
    if options:
        check_names(options)
        raise OptionError(f"give memory=MemoryConfig(...) or the options {sorted(options)}, not both")
    return memory


def _is_planned(root: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether the model, or one that it is part of, has the memory asked for; other options are an error."""
    pool = pool_of(root)
    inner = pools_inside(root)
    names = [next(n for n, m in root.named_modules() if m is pool.owner) for pool in inner]
    parts = [name.split(".") for name in names]
    above = [root.get_submodule(".".join(part[:depth])) for part in parts for depth in range(len(part))]
    is_of_many = any(isinstance(module, nn.ModuleList) and len(module) > 1 for module in above)  # not just wrapped
    if len(inner) > 1 or is_of_many:
        raise PlanError(
            f"parts of {type(root).__name__} already have a memory ({', '.join(map(repr, names))}): compile the parts "
            f"alone, or plan the whole model once"
        )
    if pool is None:
        return False
    differing = {}
    form = {name: value for name, value in given.items() if name in pool.config.form}
    if not _is_form_of(form, pool):
        differing = {name: value for name, value in form.items() if value != getattr(pool.requested, name)}
    for name, value in given.items():
        as_planned = name in form or value in (getattr(pool.requested, name), getattr(pool.config, name))
        if not as_planned and (name != "memory_layers" or place(pool.sites, value) != pool.chosen):
            differing[name] = value
    if differing:
        now = {k: getattr(pool.requested, k) for k in differing}
        raise PlanError(
            f"{type(pool.owner).__name__} already has a memory planned with {now}, now asked for {differing}: "
            f"build the model anew to plan it otherwise, or leave the options out"
        )
    return True


def _is_form_of(form: Mapping[str, Any], pool: MemoryPool) -> bool:
    """Whether options of `MemoryConfig.form` are those that the pool was planned with, or has now, or mean the same."""
    as_planned = (all(getattr(config, n) == v for n, v in form.items()) for config in (pool.requested, pool.config))
    return any(as_planned) or MemoryConfig(**form).form == pool.config.form
