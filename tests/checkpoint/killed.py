"""Saves that are killed: this process forks one child after another, which saves until it dies, and loads what is left.

Run by `test_kills.py` as a process of its own, which imports PyTorch once for all children. Save number n is of step
n // 2, so that each second one replaces a step; the state is a function of n, which is saved with it.
"""

from __future__ import annotations

import functools
import io
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memcompile.checkpoint import load, save
from tests.checkpoint.trainings import everything, trained
from tests.planned import assert_same

OPERATIONS = ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir")  # of `os`, which change the disk


def fill(model: nn.Module, optimizer: Optimizer, number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    with torch.no_grad():
        for tensor in [*model.parameters(), *states]:
            tensor.normal_(generator=generator)
    return everything(model, optimizer)


class Trial:
    """Children that save into one folder, and what was saved so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.optimizer = trained()
        self.loaded_into = trained(seed=1)
        self.number = -1  # of the save that the folder has
        self.interrupted = 0  # saves that left something behind
        self.finished = False  # whether the last child was not killed

    def child(self, prepare: Callable[[], None], saves: int, asynchronous: bool = False) -> tuple[int, int]:
        """Forks a child that saves; its id, and the end of a pipe that has the number of each save that returned."""
        read, write = os.pipe()
        child = os.fork()
        if child:
            os.close(write)
            return child, read
        try:
            prepare()
            for number in range(self.number + 1, self.number + 1 + saves):
                fill(self.model, self.optimizer, number)
                extra = {"number": number}
                handle = save(
                    self.folder,
                    self.model,
                    self.optimizer,
                    step=number // 2,
                    extra=extra,
                    keep=2,
                    asynchronous=asynchronous,
                )
                handle.wait()
                os.write(write, f"{number}\n".encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def check(self, child: int, read: int) -> None:
        """Waits for the child's end. What the folder has by then is some save, whole, and none older than the last
        that returned.
        """
        _, status = os.waitpid(child, 0)
        self.finished = os.WIFEXITED(status)
        assert not self.finished or os.WEXITSTATUS(status) == 0
        with os.fdopen(read) as pipe:
            returned = max([self.number, *map(int, pipe.read().split())])
        names = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        self.interrupted += any(not name.startswith(("step_", "LATEST")) or "." in name for name in names)
        if returned < 0 and "LATEST" not in names:
            return
        loaded = load(self.folder, *self.loaded_into)
        self.number = loaded.extra["number"]
        assert returned <= self.number <= returned + 1, (returned, self.number)
        assert loaded.step == self.number // 2
        expected = fill(self.model, self.optimizer, self.number)
        assert_same(everything(*self.loaded_into), expected)


def at_random_times(folder: Path, kills: int) -> dict[str, Any]:
    trial, times = Trial(folder), random.Random(0)
    start = time.perf_counter()
    trial.check(*trial.child(lambda: None, saves=5))
    of_a_save = (time.perf_counter() - start) / 5  # on a machine that may have other work
    for i in range(kills):
        child, read = trial.child(lambda: None, saves=10_000, asynchronous=i % 2 == 1)
        time.sleep(times.uniform(0, 3 * of_a_save))
        os.kill(child, signal.SIGKILL)
        trial.check(child, read)
    return {"kills": kills, "saves": trial.number + 1, "interrupted": trial.interrupted}


def before_each_operation(folder: Path) -> dict[str, Any]:
    """Kills a child that saves twice before the first operation on the disk, before the second ..."""
    trial = Trial(folder)
    trial.check(*trial.child(lambda: None, saves=5))
    count = 0
    while True:
        trial.check(*trial.child(functools.partial(_die_before, count), saves=2))
        if trial.finished:
            return {"kills": count, "saves": trial.number + 1, "interrupted": trial.interrupted}
        count += 1


def _die_before(count: int) -> None:
    left = [count]

    def count_down() -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    def dying(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            count_down()
            return operation(*args, **kwargs)

        return run

    def opening(path: Any, mode: str = "r", *args: Any, whole: Callable[..., Any] = io.open, **kwargs: Any) -> Any:
        file = whole(path, mode, *args, **kwargs)
        if "w" in mode:  # the file is empty now
            count_down()
        return file

    for name in OPERATIONS:
        setattr(os, name, dying(getattr(os, name)))
    io.open = opening


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    print(json.dumps([at_random_times(where / "random", 50), before_each_operation(where / "each")]))
    sys.stdout.flush()
    os._exit(0)
