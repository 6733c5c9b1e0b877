"""save(): writes one step of a training into its own folder, at once or in a thread."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer

from memcompile.checkpoint.formats.dcp_files import EXTRA, MODEL, OPTIMIZER, OPTIMIZER_REST, write_files
from memcompile.checkpoint.ranks import Ranks, all_ranks
from memcompile.checkpoint.state.model_state import Plans, model_state, plans_of, root_of
from memcompile.checkpoint.state.optimizer_state import OptimizerState, packed
from memcompile.checkpoint.steps import folders
from memcompile.checkpoint.steps.manifest import Manifest
from memcompile.common.progress import Progress
from memcompile.errors import CheckpointError
from memcompile.runtime.storage.frozen_values import MappedValues

log = logging.getLogger(__name__)


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
    state, plans = ranks.each("collect the state", lambda: _collected(model, optimizer, extra, ranks.rank))
    if asynchronous:
        start = time.perf_counter()
        state = ranks.each("copy the state", lambda: _copied(state))
        log.info("copied the state of step %d in %.2f s", step, time.perf_counter() - start)
    number = ranks.first("prepare the folder", lambda: folders.begin(path, step))
    being_written, save_id = folders.being_written(path, step), uuid.uuid4().hex  # rank 0's is in the files
    handle = SaveHandle(folders.step_folder(path, step))

    def see_the_folder() -> None:
        if not being_written.is_dir():
            raise CheckpointError(f"{path} is not the folder that rank 0 sees: all ranks must share its file system")

    def write() -> None:
        try:
            ranks.each("see the folder, which all ranks must share,", see_the_folder)
            written = ranks.gather("write", lambda: write_files(state, being_written, save_id, ranks, bar))
            files = {name: record for records in written for name, record in records.items()}
            manifest = Manifest(
                step=step, number=number, save_id=save_id, world_size=ranks.size, plans=plans, files=files
            )
            ranks.first("finish the step", lambda: folders.publish(path, manifest))
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


class SaveHandle:
    """A save that was begun. One that is not asynchronous is done."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    @property
    def done(self) -> bool:
        """Whether it has ended on this rank, with an error or without."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> Path:
        """Waits until it has ended on every rank, and returns the folder of the step.

        Raises:
            CheckpointError: it failed; earlier checkpoints are as they were. It is raised once: here, or by the next
                `save` or `load`.
        """
        if self._thread is not None:
            self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._folder

    def start(self, write: Callable[[], object]) -> None:
        """Runs the rest of the save in a thread, which the process waits for when it ends."""

        def run() -> None:
            try:
                write()
            except Exception as error:
                log.error("the asynchronous save into %s failed: %s", self._folder, error)
                self._error = error

        global _last
        _last = self
        self._thread = threading.Thread(target=run, name="memcompile checkpoint")
        self._thread.start()


_last: SaveHandle | None = None


def wait() -> None:
    """Waits for the last asynchronous save. Call it before `os._exit`, which would end the save.

    Raises:
        CheckpointError: it failed, and its error was not raised yet.
    """
    global _last
    last, _last = _last, None
    if last is not None:
        last.wait()


def ready(progress: bool | None) -> tuple[Ranks, Progress]:
    """All ranks of the job, when the save before has ended on each, and a bar, which rank 0 alone shows."""
    ranks = all_ranks()
    ranks.each("finish the save before", wait)
    return ranks, Progress(progress if ranks.rank == 0 else False)


def optimizers_in(optimizer: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    """Those that were given; raises CheckpointError where one is no optimizer."""
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
    if type(step) is not int or step < 0:
        raise CheckpointError(f"step must be an integer >= 0, got {step!r}")
    if keep is not None and (type(keep) is not int or keep < 1):
        raise CheckpointError(f"keep must be an integer >= 1 or None, got {keep!r}")
    return {"step": step, "folder": str(folder), "keep": keep, "asynchronous": asynchronous}


def _collected(
    model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None, extra: Any, rank: int
) -> tuple[dict[str, Any], Plans]:
    root = root_of(model)
    if mapped := [name for name, p in root.named_parameters() if isinstance(p, MappedValues)]:
        raise CheckpointError(
            f"{', '.join(mapped)} lie in a file, for inference: save the rest by torch.save(), or the model before "
            f"memcompile.store_values()"
        )
    state = {MODEL + name: value for name, value in model_state(root).items()}
    if optimizer is not None:
        of_optimizers = OptimizerState.of(optimizers_in(optimizer), root)
        state.update({OPTIMIZER + name: value for name, value in of_optimizers.tensors.items()})
        state[OPTIMIZER_REST] = of_optimizers.packed()
    if extra is not None:
        state[f"{EXTRA}{rank}"] = packed(extra)
    return state, plans_of(root)


def _copied(state: dict[str, Any]) -> Any:
    """A copy in the CPU's memory, by DCP."""
    options = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
    )
    with contextlib.closing(DefaultStager(options)) as stager:
        return stager.stage(state)
