"""A training whose ranks die: run by `test_elastic.py` under torchrun, which starts the ranks again.

In the first start rank 1 is killed in the middle of a step, in the second rank 0 in an asynchronous save, whose files
are written by then; the third goes on to the end. What each start sees is written to `log.jsonl`, and what the training
ends with to `end.json`.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from memcompile.checkpoint import load, save, saving, steps
from memcompile.runtime._torch import local_part
from tests.checkpoint.trainings import everything
from tests.planned import batch, planned_gpt
from tests.runtime.distributed.sharded import memory_mesh, sharded_gpt

STEPS, EVERY = 12, 3  # steps, and from one save to the next
IN_A_STEP, IN_A_SAVE = 8, 9
SIZE = 4  # sequences of a step
# Of 1,024 rows a step hits at most 160. The values' rate changes in each step, as that of the rest.
PLAN: dict[str, Any] = {"n_keys": 32, "values_lr": None, "values_grad": "sparse"}


def optimizer_of(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def unsharded() -> nn.Module:
    """The model in one process, with other weights."""
    return planned_gpt(seed=1, **PLAN).double()


def digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()


@torch.no_grad()
def evaluation(model: nn.Module) -> float:
    return float(model(*batch(seed=99)))


class Training:
    """The training on this rank, from the last step that was saved on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "saved"
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.model = sharded_gpt(memory_mesh(self.ranks), **PLAN)
        self.run = DistributedDataParallel(self.model)
        self.optimizer = optimizer_of(self.model)
        self.schedule = OneCycleLR(self.optimizer, 1e-2, total_steps=STEPS)
        self.done = 0
        self.saved: Any = None
        if steps(self.folder):
            self.done, schedule, _ = load(self.folder, self.model, self.optimizer)
            self.schedule.load_state_dict(schedule)

    def step(self, dies: bool = False) -> dict[str, Any]:
        """The next one; what is to be logged of it."""
        self.done += 1
        self.optimizer.zero_grad()
        tokens, targets = (part.chunk(self.ranks)[self.rank] for part in batch(seed=self.done, size=SIZE))
        loss = self.run(tokens, targets)
        if dies:
            self.saved.wait()
            die()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        found: dict[str, Any] = {"step": self.done, "loss": (mean.item() / self.ranks).hex()}
        if self.done % EVERY == 0:
            stored = local_part(self.model.memory_values).clone()
            self.model.state_dict()  # brings all rows up to date, as the save does
            moved = (local_part(self.model.memory_values) != stored).any(1)
            found["behind"] = int(moved.sum())
            extra = self.schedule.state_dict()
            self.saved = save(self.folder, self.model, self.optimizer, step=self.done, extra=extra, asynchronous=True)
        return found

    def end(self) -> dict[str, Any]:
        self.saved.wait()
        return {"evaluation": evaluation(self.model), "digest": digest(everything(self.model, self.optimizer))}


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def write_and_die(gone_on: threading.Event, write_files: Any, state: dict[str, Any], folder: Path, *rest: Any) -> None:
    """In the place of `write_files`: writes, and dies when the training has gone on for a step."""
    written = write_files(state, folder, *rest)
    if folder.name == f"step_{IN_A_SAVE}.tmp":  # `folders.being_written`
        assert gone_on.wait(60)
        die()
    return written


def main(folder: Path, kills: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    start, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), dist.get_rank()
    training, gone_on = Training(folder), threading.Event()
    if kills and start == 1 and rank == 0:
        saving.write_files = functools.partial(write_and_die, gone_on, saving.write_files)
    with (folder / "log.jsonl").open("a") as log:
        while training.done < STEPS:
            found = training.step(dies=kills and (start, rank, training.done + 1) == (0, 1, IN_A_STEP))
            if rank == 0:
                log.write(json.dumps({"start": start, **found}) + "\n")
                log.flush()
            if training.done > IN_A_SAVE:
                gone_on.set()
    ended = training.end()
    if rank == 0:
        (folder / "end.json").write_text(json.dumps(ended))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "kills")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo with a device mesh can abort while the interpreter takes itself apart
