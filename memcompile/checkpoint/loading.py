"""load() reads a saved training into a model and its optimizers, on any number of ranks; config() and steps() tell what
was saved, without a model.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from memcompile.checkpoint._torch import local_part
from memcompile.checkpoint.formats.dcp_files import EXTRA, MODEL, OPTIMIZER, OPTIMIZER_REST, Part, StepReader
from memcompile.checkpoint.formats.safetensors import mapped_export
from memcompile.checkpoint.saving import optimizers_in, ready
from memcompile.checkpoint.state.model_state import ModelTarget, SavedModel, plan_that_was_saved
from memcompile.checkpoint.state.optimizer_state import OptimizerState, unpacked
from memcompile.checkpoint.steps import folders
from memcompile.checkpoint.steps.manifest import Manifest
from memcompile.checkpoint.steps.whole_steps import whole_step
from memcompile.common.progress import Progress
from memcompile.config import MemoryConfig
from memcompile.errors import CheckpointError
from memcompile.runtime.state_dicts import config_of

log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """What a checkpoint has besides the state of model and optimizer.

    Attributes:
        step: of the training.
        extra: what this rank gave `save`, or what rank 0 did if there were fewer ranks. None if it was given nothing.
        world_size: how many ranks saved it.
    """

    step: int
    extra: Any
    world_size: int


def load(
    folder: str | os.PathLike,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    step: int | None = None,
    strict: bool = True,
    fall_back: bool = False,
    progress: bool | None = None,
) -> Loaded:
    """Loads a step that `save` made, bit for bit, on any number of ranks, sharded in any way. Every rank calls it.

    Every file is compared with its checksums, and all that was saved with the model, before anything changes. A part of
    a checkpoint is pickled: load only what you trust.

    Args:
        model: planned as it was saved (see `config`); wrapped or sharded as it is trained.
        optimizer: one or several, built after planning and sharding. None leaves the optimizer's state unread.
        step: None is the last one that was saved.
        strict: whether the parameters must be the same as those saved. The memory must be in any case.
        fall_back: if the step is damaged, loads the newest earlier one that is not, with a warning.
        progress: whether rank 0 shows a bar of its bytes; None shows one from a GiB on.

    Raises:
        CheckpointError: on all ranks: a file is missing, damaged or of another step, or the checkpoint is of another
            model or optimizer.
        PlanError: on all ranks: the model has another memory, or none.
    """
    ranks, bar = ready(progress)
    path = Path(folder)
    asked = {"step": step, "folder": str(path), "strict": strict, "fall_back": fall_back}
    ranks.agree("load", lambda: {**asked, "optimizers": len(optimizers_in(optimizer))})
    optimizers = optimizers_in(optimizer)
    manifest = whole_step(ranks, path, step, fall_back, bar)
    source = folders.step_folder(path, manifest.step)

    def prepare() -> tuple[StepReader, ModelTarget, OptimizerState]:
        reader = StepReader(source, manifest.files)
        config = f"memcompile.checkpoint.config({str(path)!r}{'' if step is None else f', step={step}'})"

        def read(parts: Mapping[str, Part], progress: Progress) -> None:
            reader.read({MODEL + name: part for name, part in parts.items()}, progress)

        saved = SavedModel(source, config, manifest.plans, reader.tensors(MODEL), reader.objects(MODEL), read)
        target, state = ModelTarget(model, saved, strict, bar), OptimizerState()
        if optimizers:
            if OPTIMIZER_REST not in reader.objects(""):
                raise CheckpointError(f"{source} was saved without an optimizer: load it without one")
            state = OptimizerState(**unpacked(reader.read_object(OPTIMIZER_REST)))
            state.check(optimizers, target.names, strict, source)
            state.make_targets(target.parameters, reader.tensors(OPTIMIZER))
        return reader, target, state

    reader, target, state = ranks.each("compare the checkpoint with the model", prepare)

    def read() -> Any:
        parts = {MODEL + name: part for name, part in target.parts.items()}
        parts.update({OPTIMIZER + name: Part(*local_part(tensor)) for name, tensor in state.tensors.items()})
        reader.read(parts, bar)
        target.finish({name: reader.read_object(MODEL + name) for name in target.objects})
        state.put_into(optimizers, target.names, reader.tensors(MODEL))
        of_ranks = reader.objects(EXTRA)
        if not of_ranks:
            return None
        mine = str(ranks.rank)
        return unpacked(reader.read_object(EXTRA + (mine if mine in of_ranks else min(of_ranks, key=int))))

    extra = ranks.each("read the checkpoint", read)
    if extra is not None and manifest.world_size != ranks.size and ranks.rank == 0:
        log.warning(
            "%s was saved by %d rank(s), here are %d: `extra` is of the same rank, or else of rank 0",
            source,
            manifest.world_size,
            ranks.size,
        )
    return Loaded(manifest.step, extra, manifest.world_size)


def config(path: str | os.PathLike, *, step: int | None = None, part: str = "") -> MemoryConfig:
    """The options of the memory that was saved, for ``memcompile.plan(model, memory=...)``. One rank may call it alone.

    Args:
        path: a folder of checkpoints, or safetensors.
        step: of a folder of checkpoints; None is the last one that was saved.
        part: the name of a part of the model, where several have a memory.

    Raises:
        CheckpointError: there is no such step, its manifest is damaged, or it has no memory.
    """
    source = Path(path)
    if step is None and (source.is_file() or next(source.glob("*.safetensors"), None)):
        plans = mapped_export(source)[0]
    else:
        step = folders.latest_step(source) if step is None else step
        plans = Manifest.read(folders.step_folder(source, step)).plans
    inside = [name for name in plans if not part or f"{name}.".startswith(f"{part}.")]
    if len(inside) != 1:
        where, has = f" in {part!r}" if part else "", ", ".join(map(repr, plans))
        problem = f"several memories{where}" if inside else f"no memory{where}"
        raise CheckpointError(f"{source} has {problem}" + (f": it has one in each of {has}, give part=" if has else ""))
    return config_of(plan_that_was_saved(plans[inside[0]], source))


def steps(folder: str | os.PathLike) -> list[int]:
    """The steps that were saved, the last save first; their files are not read. One rank may call it alone."""
    return list(folders.saved_steps(Path(folder)))
