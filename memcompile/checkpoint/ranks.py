"""What the processes of a job do together: an error on one is raised on all, so that none waits for another."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from memcompile.errors import CheckpointError, MemcompileError

log = logging.getLogger(__name__)

T = TypeVar("T")

_made: tuple[weakref.ref[dist.ProcessGroup], dist.ProcessGroup] | None = None


class Ranks:
    """All ranks of the job, or the one process of a job without `torch.distributed`.

    Attributes:
        group: a gloo group of its own, in which a thread may wait while the training uses other groups; None without.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def gather(self, doing: str, run: Callable[[], T]) -> list[T]:
        """What `run()` returns on every rank, in their order. All ranks call this.

        Raises:
            MemcompileError: `run` raised on some rank: that error, or a CheckpointError of any other that says which
                rank it was on, and what that rank was `doing`.
        """
        result: Any = None
        error: MemcompileError | None = None  # which every rank can unpickle
        cause: BaseException | None = None
        try:
            result = run()
        except (Exception, CheckpointException) as caught:  # DCP's is no Exception
            failed = f"rank {self.rank} could not {doing}: {_described(caught)}"
            cause, error = caught, caught if isinstance(caught, MemcompileError) else CheckpointError(failed)
        everyones = [(result, error)] * self.size
        if self.size > 1:
            try:
                dist.all_gather_object(everyones, (result, error), group=self.group)
            except RuntimeError as lost:  # of gloo
                raise CheckpointError(
                    f"rank {self.rank} lost the connection to another, and could not {doing}: {lost}"
                ) from lost
        failure = error or next((other for _, other in everyones if other is not None), None)
        if failure is not None:
            raise failure from (None if cause is failure else cause)
        return [result for result, _ in everyones]

    def each(self, doing: str, run: Callable[[], T]) -> T:
        """What `run()` returns on this rank, once every rank has run it. Raises as `gather` does."""
        result: list[T] = []
        self.gather(doing, lambda: result.append(run()))
        return result[0]

    def agree(self, doing: str, arguments: Callable[[], dict[str, Any]]) -> None:
        """Raises as `gather` does, or where all ranks, which call this, were called with different arguments."""
        everyones = self.gather("take the arguments", arguments)
        for name, mine in everyones[0].items():
            for rank, others in enumerate(everyones):
                if others[name] != mine:
                    here = f"{others[name]!r} on rank {rank}"
                    raise CheckpointError(f"ranks {doing} different things: {name} is {mine!r} on rank 0 and {here}")

    def first(self, doing: str, run: Callable[[], T]) -> T:
        """What `run()` returns on rank 0, which alone runs it. Raises as `gather` does."""
        return cast(T, self.gather(doing, lambda: run() if self.rank == 0 else None)[0])


def all_ranks() -> Ranks:
    """The ranks of this job. The first call makes their group, so all ranks make it."""
    global _made
    if not (dist.is_available() and dist.is_initialized()):
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            log.warning(
                "this is one of WORLD_SIZE=%s processes, but torch.distributed is not initialised: it saves and loads "
                "as if it were the only one, and other processes that do so write the same files",
                os.environ["WORLD_SIZE"],
            )
        return Ranks(None)
    world = cast(dist.ProcessGroup, dist.group.WORLD)
    if _made is None or _made[0]() is not world:
        _made = weakref.ref(world), cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
    return Ranks(_made[1])


def _described(error: BaseException) -> str:
    """One line; DCP's error holds those of the ranks, with their tracebacks."""
    if isinstance(error, CheckpointException):
        return "; ".join(
            f"on rank {rank} {_described(failure)}" for rank, (failure, _) in sorted(error.failures.items())
        )
    return f"{type(error).__name__}: {error}"
