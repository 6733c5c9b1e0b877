"""Checkpoints of 1, 2, 3 and 4 ranks, sharded in any way, loaded by any number of them: bit for bit.

Four processes run everything once, as jobs of different sizes one after another; each test reads one part of it.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from memcompile import CheckpointError, PlanError
from memcompile.checkpoint import export_safetensors, import_safetensors, load, save, steps
from memcompile.checkpoint.formats import dcp_files as files
from memcompile.checkpoint.formats import safetensors as safetensors_files
from memcompile.checkpoint.steps.manifest import Recorded
from tests.checkpoint.trainings import everything, sharded_gpt, step_by_noise, trained
from tests.planned import assert_same, batch, planned_gpt
from tests.runtime.distributed.processes import TIMEOUT, run_on_ranks

WORLDS = (1, 4, 3, 2, 1)  # jobs, one after another; each loads what it and those before it have saved
SAVED = {1: ["plain"], 4: ["plain", "columns", "rows", "grid", "fsdp"], 3: ["rows"], 2: ["columns"]}
LOADED = {1: ["plain"], 4: ["columns", "grid"], 3: ["columns", "rows", "fsdp"], 2: ["columns", "rows", "fsdp"]}
LARGER = {"n_keys": 16, "top_k": 4, "value_dim": 40}  # values of 40 KB


def save_all(folder: Path, world: int) -> None:
    for seed, kind in enumerate(SAVED[world]):
        model, optimizer = trained(kind, seed=seed)
        target = folder / f"{world}-{kind}"
        save(target, model, optimizer, step=7, extra={"rank": dist.get_rank() if world > 1 else 0})
        whole = everything(model, optimizer)
        if world == 1 or dist.get_rank() == 0:
            torch.save(whole, target / "expected")


def load_all(folder: Path, world: int) -> dict[str, Any]:
    """By (saved, loaded as): True, or what is not as it was saved."""
    results: dict[str, Any] = {}
    saved = [f"{w}-{k}" for w in SAVED for k in SAVED[w] if (folder / f"{w}-{k}").exists()]
    for name, kind in itertools.product(saved, LOADED[world]):
        expected: dict[str, Tensor] = torch.load(folder / name / "expected")
        model, optimizer = trained(kind, steps=0 if kind == "rows" else 1, seed=9)
        if kind == "rows":  # an optimizer without any state
            optimizer.state.clear()
        loaded = load(folder / name, model, optimizer)
        rank = dist.get_rank() if world > 1 else 0
        assert loaded.step == 7
        assert loaded.extra == {"rank": rank if rank < loaded.world_size else 0}
        assert_same(everything(model, optimizer), expected)
        step_by_noise(model, optimizer, 0)
        results[f"{name} into {kind}"] = True
    return results


def safetensors_of(folder: Path, world: int) -> None:
    """Out of checkpoints and out of sharded models, in files smaller than the values and in one; into any sharding."""
    whole, safetensors_files.BUFFER = safetensors_files.BUFFER, 4000
    for kind, size in itertools.product(LOADED[world], (10_000, 10**9)):
        model, _ = trained(kind, seed=3, **LARGER)
        save(folder / f"{kind}-{size}", model, step=1)
        for source in (model, folder / f"{kind}-{size}"):
            target = folder / f"{'model' if source is model else 'folder'}-{world}-{kind}-{size}"
            export_safetensors(source, target, max_shard_size=size)
            other = sharded_gpt("rows" if world > 1 else "plain", seed=8, **LARGER)
            import_safetensors(target, other)
            assert_same(everything(other), everything(model))
    safetensors_files.BUFFER = whole


def pieces_of(folder: Path) -> None:
    """Tables that are stored in pieces of some rows."""
    whole, files.PIECE = files.PIECE, 2000
    for kind, into in (("columns", "rows"), ("plain", "columns"), ("rows", "plain")):
        model, optimizer = trained(kind, **LARGER)
        save(folder / kind, model, optimizer, step=1)
        other, other_optimizer = trained(into, seed=1, **LARGER)
        load(folder / kind, other, other_optimizer)
        assert_same(everything(other, other_optimizer), everything(model, optimizer))
    files.PIECE = whole


def pairs_of(folder: Path, world: int) -> bool:
    """Whether a table of pairs that four ranks saved is loaded bit for bit; the first job has none yet."""
    kind = "plain" if world == 1 else "rows"
    model, optimizer = trained(kind, seed=world, variant="peer")
    if world == 4:
        save(folder, model, optimizer, step=1)
        whole = everything(model, optimizer)
        if dist.get_rank() == 0:
            torch.save(whole, folder / "expected")
    elif (folder / "expected").exists():
        load(folder, model, optimizer)
        assert_same(everything(model, optimizer), torch.load(folder / "expected"))
        return True
    return False


def failures(folder: Path) -> dict[str, str]:
    """What each rank is told where one of them fails; the checkpoint before is loaded after each."""
    rank = dist.get_rank()
    model, optimizer = trained("columns")
    save(folder, model, optimizer, step=1)
    expected = everything(model, optimizer)
    told: dict[str, str] = {}

    def attempt(name: str, run: Any) -> None:
        try:
            run()
            told[name] = "nothing"
        except (CheckpointError, PlanError) as error:
            told[name] = str(error)
        other, other_optimizer = trained("rows", seed=1)
        assert load(folder, other, other_optimizer).step == 1
        assert_same(everything(other, other_optimizer), expected)
        assert steps(folder) == [1]

    def with_a_full_disk(on: int, **options: Any) -> Any:
        whole = Recorded.write

        def write(self: Any, data: Any) -> int:
            raise OSError(28, "No space left on device")

        if rank == on:
            Recorded.write = write
        try:
            handle = save(folder, model, optimizer, step=2, **options)
            if options:
                handle._thread.join()  # the error is left for who comes next
        finally:
            Recorded.write = whole

    attempt("full disk", lambda: with_a_full_disk(2))
    attempt("full disk of rank 0", lambda: with_a_full_disk(0))
    attempt("not picklable", lambda: save(folder, model, step=2, extra=(lambda: 0) if rank == 1 else None))
    attempt("other steps", lambda: save(folder, model, step=2 + rank))
    attempt("no such rank", lambda: save(folder if rank != 3 else folder / "other", model, step=2))
    attempt("other modes", lambda: save(folder, model, step=2, asynchronous=rank == 1))
    attempt("other steps loaded", lambda: load(folder, model, step=1 + rank))
    with_a_full_disk(3, asynchronous=True)
    attempt("in the background", lambda: save(folder, model, optimizer, step=2))
    attempt("other plan on a rank", lambda: load(folder, sharded_gpt("columns", heads=1 if rank == 1 else 2)))
    save(folder, model, optimizer, step=2)
    assert steps(folder) == [2, 1]
    return told


def in_the_background(folder: Path) -> None:
    model, optimizer = trained("columns")
    handles, expected = [], []
    for step in range(3):
        handles.append(save(folder, model, optimizer, step=step, asynchronous=True))
        expected.append(everything(model, optimizer))  # a collective of the training, beside those of the save
        step_by_noise(model, optimizer, 50 + step)
    assert handles[-1].wait() == folder / "step_2"
    for step in range(3):
        other, other_optimizer = trained("rows", seed=1)
        load(folder, other, other_optimizer, step=step)
        assert_same(everything(other, other_optimizer), expected[step])


def replicas(folder: Path) -> None:
    """DDP around values that are stepped by rows, on half of the batch each; a rank that lags is brought up to date."""

    def training(seed: int) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
        model = planned_gpt(seed=seed, n_keys=16, memory_layers=2, values_grad="sparse")
        return model, DistributedDataParallel(model), AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)

    def train(run: nn.Module, optimizer: torch.optim.Optimizer, numbers: Any) -> None:
        for step in numbers:
            tokens, targets = batch(step, size=4)
            part = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
            optimizer.zero_grad()
            run(tokens[part], targets[part]).backward()
            optimizer.step()

    model, ddp, optimizer = training(0)
    train(ddp, optimizer, range(3))
    save(folder, ddp, optimizer, step=3)
    other, other_ddp, other_optimizer = training(1)
    train(other_ddp, other_optimizer, [7])
    load(folder, other_ddp, other_optimizer)
    for run, o in ((ddp, optimizer), (other_ddp, other_optimizer)):
        train(run, o, range(3, 6))
    assert_same(everything(other, other_optimizer), everything(model, optimizer))


def begin_job(rank: int, world: int, store: Path) -> bool:
    """Ends the job before, and begins one of so many ranks; whether this one is among them."""
    if dist.is_initialized():
        dist.barrier()  # a rank that is still connecting would be cut off
        dist.destroy_process_group()
    if world > 1 and rank < world:
        timeout = datetime.timedelta(seconds=TIMEOUT / 2)
        file = dist.FileStore(str(store), world)
        dist.init_process_group("gloo", store=file, rank=rank, world_size=world, timeout=timeout)
    return rank < world


def run_all(rank: int, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for number, world in enumerate(WORLDS):
        if begin_job(rank, world, folder / f"store-{number}"):
            save_all(folder / "jobs", world)
            results[f"job {number}"] = load_all(folder / "jobs", world)
            results[f"pairs {number}"] = pairs_of(folder / "pairs", world)
            if number in (0, 1):
                safetensors_of(folder / "safetensors", world)
                results[f"safetensors {number}"] = True
            if world == 2:
                replicas(folder / "replicas")
            if world == 4:
                pieces_of(folder / "pieces")
                in_the_background(folder / "background")
                results["failures"] = failures(folder / "failures")
    begin_job(rank, 4, folder / "store")  # all meet
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return run_on_ranks(functools.partial(run_all, folder=tmp_path_factory.mktemp("ranks")), world_size=4)


@pytest.mark.parametrize("job", range(len(WORLDS)))
def test_what_any_job_saved_is_loaded_bit_for_bit(ranks, job):
    loaded = ranks[0][f"job {job}"]
    assert all(loaded.values())
    saved_by = set(WORLDS[: job + 1])
    assert len(loaded) == sum(len(SAVED[w]) for w in saved_by) * len(LOADED[WORLDS[job]])


def test_pairs_are_loaded_by_any_number_of_ranks(ranks):
    assert [ranks[0][f"pairs {number}"] for number in range(len(WORLDS))] == [False, False, True, True, True]
    assert ranks[1]["pairs 3"] and ranks[2]["pairs 2"]


def test_safetensors_of_sharded_models(ranks):
    assert ranks[0]["safetensors 0"]
    assert all(rank["safetensors 1"] for rank in ranks)


MESSAGES = {
    "full disk": "step 2 was not saved.* is as it was: .*on rank 2 OSError: .*No space left on device",
    "full disk of rank 0": "step 2 was not saved.* is as it was: .*on rank 0 OSError: .*No space left on device",
    "not picklable": "rank 1 could not collect the state: ",
    "other steps": "ranks save different things: step is ",
    "no such rank": "ranks save different things: folder is ",
    "other modes": "ranks save different things: asynchronous is False on rank 0 and True on rank 1",
    "other steps loaded": "ranks load different things: step is 1 on rank 0 and 2 on rank 1",
    "in the background": "step 2 was not saved.*on rank 3 OSError: .*No space left on device",
    "other plan on a rank": r"saved with another memory: heads=2 \(here 1\)",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_all_ranks_are_told_of_the_failure_of_one(ranks, name):
    for rank in ranks:
        assert re.search(MESSAGES[name], rank["failures"][name]), rank["failures"][name]
