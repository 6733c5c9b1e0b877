"""save(): writes one step of a training into its own folder, at once or in a thread."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer

from memcompile.checkpoint.asynchronous import SaveHandle, ready
from memcompile.checkpoint.formats.dcp_files import write_files
from memcompile.checkpoint.state.model_state import Plans, mapped_in, model_state, plans_of, root_of
from memcompile.checkpoint.state.optimizer_state import OptimizerState, packed
from memcompile.checkpoint.steps import folders
from memcompile.checkpoint.steps.manifest import NAME, Manifest
from memcompile.common.files import write_text
from memcompile.errors import CheckpointError

log = logging.getLogger(__name__)

MODEL, OPTIMIZER, OPTIMIZER_REST, EXTRA = "model.", "optimizer.state.", "optimizer.rest", "extra."


def save(
    folder: str | os.PathLike,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    step: int,
    extra: Any = None,
    keep: int | None = 3,
    asynchronous: bool = False,
    progress: bool | None = None,
) -> SaveHandle:
    """Saves a training into ``folder/step_N``, and names it in ``folder/LATEST``. Every rank calls it.

    The step is written under another name, together with a manifest of checksums, and is renamed when the disk has all
    of it: a kill at any time loses nothing that was saved before. Each rank writes its own shards, and a part of what
    all ranks have. The folder is on a file system that all ranks share, and has the checkpoints of one job.

    Args:
        model: planned or not, sharded or not, in DDP, `torch.compile` or `fully_shard`.
        optimizer: one, or several; all of their parameters are the model's.
        step: of the training; a save of the same step is replaced.
        extra: whatever `torch.save` takes, of each rank: the state of a scheduler, of generators, of a data loader.
        keep: how many saves are kept, this one included; None keeps all. Only files that a save wrote are deleted.
        asynchronous: returns when the state is copied in memory, and writes it in a thread. There is one at a time: the
            next `save` or `load` waits for it.
        progress: whether rank 0 shows a bar of its bytes; None shows one from a GiB on, unless asynchronous.

    Returns:
        A handle; ``wait()`` returns the folder of the step when it is saved.

    Raises:
        CheckpointError: on all ranks, where one failed; earlier checkpoints are as they were.
    """
    ranks, bar = ready(False if asynchronous and progress is None else progress)
    path = Path(folder)
    ranks.agree("save", lambda: _checked(step, path, keep, asynchronous))
    state: dict[str, Any] = {}
    plans = ranks.each("collect the state", lambda: _collect(state, model, optimizer, extra, ranks.rank))
    if asynchronous:
        start = time.perf_counter()
        state = ranks.each("copy the state", lambda: _copied(state))
        log.info("copied the state of step %d in %.2f s", step, time.perf_counter() - start)
    save_id, number = ranks.first("prepare the folder", lambda: _begin(path, step))
    handle = SaveHandle(folders.step_folder(path, step))

    def write() -> None:
        try:
            ranks.each("see the folder, which all ranks must share,", lambda: _see(path, step))
            written = ranks.gather(
                "write", lambda: write_files(state, folders.being_written(path, step), save_id, ranks, bar)
            )
            files = {name: record for records in written for name, record in records.items()}
            manifest = Manifest(
                step=step, number=number, save_id=save_id, world_size=ranks.size, plans=plans, files=files
            )
            ranks.first("finish the step", lambda: _finish(path, manifest))
        except CheckpointError as error:
            if ranks.rank == 0:  # a disk that is full needs the room
                folders.discard(path, step)
            raise CheckpointError(f"step {step} was not saved, and what {path} had is as it was: {error}") from error
        if keep is not None:
            ranks.first("delete old steps", lambda: folders.delete_old(path, step, keep))

    if asynchronous:
        handle.start(write)
    else:
        write()
    return handle


def optimizers_in(optimizer: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    """Those that were given.

    Raises:
        CheckpointError: one is no optimizer.
    """
    if optimizer is None:
        return []
    given: list[Any] = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    for each in given:
        if not hasattr(each, "param_groups"):
            raise CheckpointError(
                f"expected a torch.optim.Optimizer, got {type(each).__name__}: the state of anything else is saved by "
                f"extra=...state_dict()"
            )
    return given


def _checked(step: int, folder: Path, keep: int | None, asynchronous: bool) -> dict[str, Any]:
    """The arguments that are the same on all ranks."""
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise CheckpointError(f"step must be an integer >= 0, got {step!r}")
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise CheckpointError(f"keep must be an integer >= 1 or None, got {keep!r}")
    return {"step": step, "folder": str(folder), "keep": keep, "asynchronous": asynchronous}


def _collect(
    state: dict[str, Any], model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None, extra: Any, rank: int
) -> Plans:
    root = root_of(model)
    if mapped_in(root):
        raise CheckpointError(
            f"{', '.join(mapped_in(root))} lie in a file, for inference: save the rest by torch.save(), or the model "
            f"before memcompile.store_values()"
        )
    state.update({MODEL + name: value for name, value in model_state(root).items()})
    if optimizer is not None:
        of_optimizers = OptimizerState.of(optimizers_in(optimizer), root)
        state.update({OPTIMIZER + name: value for name, value in of_optimizers.tensors.items()})
        state[OPTIMIZER_REST] = of_optimizers.packed()
    if extra is not None:
        state[f"{EXTRA}{rank}"] = packed(extra)
    return plans_of(root)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """A copy in the CPU's memory, by DCP."""
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
    )
    try:
        copied: Any = stager.stage(state)
    finally:
        stager.close()
    return dict(copied)


def _begin(folder: Path, step: int) -> tuple[str, int]:
    folders.begin(folder, step)
    return uuid.uuid4().hex, folders.next_number(folder)


def _see(folder: Path, step: int) -> None:
    if not folders.being_written(folder, step).is_dir():
        raise CheckpointError(f"{folder} is not the folder that rank 0 sees: all ranks must share its file system")


def _finish(folder: Path, manifest: Manifest) -> None:
    write_text(folders.being_written(folder, manifest.step) / NAME, manifest.text())
    folders.publish(folder, manifest.step)
