"""The ranks: gloo processes on the loopback interface, one thread each, and what they tell."""

import datetime
import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait

import torch
import torch.distributed as dist

from benchmarks.sharding.cases import Sizes
from benchmarks.sharding.worker import Told, work

_TIMEOUT = datetime.timedelta(minutes=10)  # of a collective, others' turns included
_LOG_LEVEL = "KINETO_LOG_LEVEL"
_SAYS, _TOLD, _FAILED = "says", "told", "failed"


def run(sizes: Sizes, rounds: int, say: Callable[[str], None]) -> list[Told]:
    """Measures on as many processes as the largest case has. Returns what each rank tells.

    Raises:
        RuntimeError: the traceback of a rank that failed.
    """
    context = multiprocessing.get_context("spawn")
    ranks = sizes.ranks[-1]
    told: dict[int, Told] = {}
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = {}, []
        try:
            for rank in range(ranks):
                here, there = context.Pipe()
                process = context.Process(
                    target=_rank, args=(rank, sizes, rounds, os.path.join(folder, "store"), there), daemon=True
                )
                with _quiet_profiler():
                    process.start()
                there.close()  # so that its end is seen
                ends[here] = rank
                processes.append(process)
            while len(told) < ranks:
                for end in wait(list(ends)):
                    rank = ends[end]  # type: ignore[index]
                    kind, content = _received(end, rank)
                    if kind == _FAILED:
                        raise RuntimeError(f"rank {rank}:\n{content}")
                    if kind == _SAYS:
                        say(content)
                    else:
                        told[rank] = content
                        del ends[end]  # type: ignore[arg-type]
        finally:
            for process in processes:
                process.kill()
                process.join()
    return [told[rank] for rank in range(ranks)]


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Processes that start here log none of the profiler's starts and stops, of which each step has one."""
    before = os.environ.get(_LOG_LEVEL)
    os.environ[_LOG_LEVEL] = "99"
    try:
        yield
    finally:
        del os.environ[_LOG_LEVEL]
        if before is not None:
            os.environ[_LOG_LEVEL] = before


def _received(end: Connection, rank: int) -> tuple:
    try:
        return end.recv()
    except EOFError:
        return _FAILED, "it ended without a word: out of memory?"


def _rank(rank: int, sizes: Sizes, rounds: int, store: str, parent: Connection) -> None:
    def say(what: str) -> None:
        if rank == 0:
            parent.send((_SAYS, what))

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the others
    try:
        torch.set_num_threads(1)
        world = sizes.ranks[-1]
        file_store = dist.FileStore(store, world)
        dist.init_process_group("gloo", store=file_store, rank=rank, world_size=world, timeout=_TIMEOUT)
        parent.send((_TOLD, work(rank, sizes, rounds, say)))
    except BaseException:
        parent.send((_FAILED, traceback.format_exc()))
    with suppress(EOFError):
        parent.recv()  # the parent ends it, when no other rank can miss it any more
    os._exit(0)  # gloo with a device mesh can abort while the interpreter takes itself apart
