"""load(): reads a saved training into a model and its optimizers, on any number of ranks."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from memcompile.checkpoint._torch import local_part
from memcompile.checkpoint.asynchronous import ready
from memcompile.checkpoint.formats.reading import Part, StepReader
from memcompile.checkpoint.saving import EXTRA, MODEL, OPTIMIZER, OPTIMIZER_REST, optimizers_in
from memcompile.checkpoint.state.mapped import check_mapped
from memcompile.checkpoint.state.model_state import (
    check_entries,
    check_plans,
    model_state,
    root_of,
    run_load_hooks,
    targets,
)
from memcompile.checkpoint.state.optimizer_state import OptimizerState, unpacked
from memcompile.checkpoint.steps import folders
from memcompile.checkpoint.steps.whole_steps import whole_step
from memcompile.errors import CheckpointError

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

    def prepare() -> tuple[StepReader, nn.Module, dict[str, Any], OptimizerState | None, dict[str, Part]]:
        reader, root = StepReader(source), root_of(model)
        moved = check_plans(manifest.plans, root, _config_call(path, step))
        own = model_state(root)
        reader.rename({MODEL + old: MODEL + new for old, new in moved.items()})
        saved = reader.tensors(MODEL)
        check_entries(saved, reader.objects(MODEL), own, strict, source)
        check_mapped(root, saved, lambda name, part: reader.read({MODEL + name: part}), source, bar)
        parts = {MODEL + name: Part(*local_part(tensor)) for name, tensor in targets(saved, own, root).items()}
        if not optimizers:
            return reader, root, own, None, parts
        if OPTIMIZER_REST not in reader.objects(""):
            raise CheckpointError(f"{source} was saved without an optimizer: load it without one")
        state = OptimizerState.unpacked(reader.read_object(OPTIMIZER_REST), moved)
        for old, new in moved.items():
            entries = state.entries.get(new, ())
            reader.rename({f"{OPTIMIZER}{old}.{entry}": f"{OPTIMIZER}{new}.{entry}" for entry in entries})
        state.check(optimizers, root, strict, source)
        state.make_targets(root, reader.tensors(OPTIMIZER))
        parts.update({OPTIMIZER + name: Part(*local_part(tensor)) for name, tensor in state.tensors.items()})
        return reader, root, own, state, parts

    reader, root, own, state, parts = ranks.each("compare the checkpoint with the model", prepare)

    def read() -> Any:
        reader.read(parts, bar)
        own.update({name: reader.read_object(MODEL + name) for name in reader.objects(MODEL) if name in own})
        run_load_hooks(root, own, strict)
        if state is not None:
            state.put_into(optimizers, root, reader.tensors(MODEL))
        return _extra(reader, ranks.rank)

    extra = ranks.each("read the checkpoint", read)
    if extra is not None and manifest.world_size != ranks.size and ranks.rank == 0:
        log.warning(
            "%s was saved by %d rank(s), here are %d: `extra` is of the same rank, or else of rank 0",
            source,
            manifest.world_size,
            ranks.size,
        )
    return Loaded(manifest.step, extra, manifest.world_size)


def _config_call(folder: Path, step: int | None) -> str:
    return f"memcompile.checkpoint.config({str(folder)!r}{'' if step is None else f', step={step}'})"


def _extra(reader: StepReader, rank: int) -> Any:
    ranks = reader.objects(EXTRA)
    if not ranks:
        return None
    return unpacked(reader.read_object(EXTRA + (str(rank) if str(rank) in ranks else min(ranks, key=int))))
