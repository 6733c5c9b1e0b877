"""Runs a function on a few gloo processes of this machine and returns what each of them returned."""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests import heap

TIMEOUT = 1200  # seconds for everything; two cores that other work shares take half of it for four ranks


def run_on_ranks(function: Callable[[int], Any], world_size: int = 2) -> list[Any]:
    """``function(rank)`` of each rank, which `torch.save` must be able to write.

    Raises:
        AssertionError: with the traceback of every rank that failed, or the ranks that did not finish in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        processes = [
            context.Process(target=_worker, args=(function, rank, world_size, folder), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = datetime.datetime.now() + datetime.timedelta(seconds=TIMEOUT)
        for process in processes:
            process.join(max(0.0, (deadline - datetime.datetime.now()).total_seconds()))
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in late:
            processes[rank].kill()
            processes[rank].join()
        failures = [path.read_text() for path in sorted(Path(folder).glob("failure*"))]
        codes = [process.exitcode for process in processes]
        assert not failures, "\n".join(failures)
        assert not late, f"ranks {late} did not finish in {TIMEOUT} s"
        assert codes == [0] * world_size, f"exit codes {codes}"
        return [torch.load(Path(folder, f"result{rank}"), weights_only=False) for rank in range(world_size)]


def _worker(function: Callable[[int], Any], rank: int, world_size: int, folder: str) -> None:
    code = 1
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(os.path.join(folder, "store"), world_size)
        timeout = datetime.timedelta(seconds=TIMEOUT / 2)
        heap.freeze()
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        torch.save(function(rank), Path(folder, f"result{rank}"))
        dist.barrier()
        code = 0
    except BaseException:
        Path(folder, f"failure{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo with a device mesh can abort while the interpreter takes itself apart
