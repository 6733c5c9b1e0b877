"""Teach a Transformer with a memory real facts on several devices, which share one table of values.

    torchrun --standalone --nproc-per-node 2 --max-restarts 1 examples/sharded.py
    python examples/sharded.py --evaluate sharded-results

Each rank holds a part of the table; DistributedDataParallel has the rest. A checkpoint is saved every so many steps
while the training goes on, and the same command resumes from the last one, as torchrun does by itself where a rank has
died: batches are a function of seed and step, so the training is the same as without the kill, bit for bit. --evaluate
loads the checkpoint into one process, unsharded. Without torchrun one process trains, with all of the table.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from facts_model import BATCH, Facts, Transformer, answer_logits, right_answers
from facts_options import add_number, add_options, check_options, memory_options
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import memcompile

TIMEOUT = datetime.timedelta(minutes=5)  # a rank that hangs is seen only then
TRAINING, LOSSES = "training.json", "losses.jsonl"  # beside the checkpoints: the options, and each step's loss
OF_TRAINING = ("steps", "batch", "facts", "width", "layers", "memory_layers", "keys", "top_k", "heads", "seed", "lr")


@dataclass
class Job:
    """This process among those that train."""

    rank: int
    ranks: int
    device: torch.device
    mesh: DeviceMesh  # over all ranks, which share one table

    @classmethod
    def start(cls) -> Job:
        """What torchrun started, or a job of one rank."""
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        device = torch.device("cpu")
        if torch.cuda.device_count() >= ranks_here:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        store, rank, ranks = dist.HashStore(), 0, 1
        if dist.is_torchelastic_launched():
            store, rank, ranks = next(dist.rendezvous("env://"))
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                # One store for all starts of the workers: it has the addresses of those that have died, which this
                # start must not read (pytorch#135712). Several nodes, which count restarts each for itself, need
                # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 instead.
                store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=ranks)
        return cls(rank, ranks, device, init_device_mesh(device.type, (ranks,), mesh_dim_names=("memory",)))

    def told_by_first(self, tell: Callable[[], str]) -> str:
        """What rank 0 says, on every rank."""
        told = [tell() if self.rank == 0 else ""]
        dist.broadcast_object_list(told)
        return told[0]

    def sum(self, number: float | torch.Tensor) -> float:
        total = torch.as_tensor(number, device=self.device).detach().clone()
        dist.all_reduce(total)
        return total.item()


def facts_of(options: argparse.Namespace, device: torch.device) -> Facts:
    facts = Facts.encode(random.Random(options.seed).sample(Facts.available(), options.facts))
    return Facts(facts.tokens.to(device), facts.targets.to(device), facts.vocabulary)


def other_training(options: argparse.Namespace) -> str:
    """Where the folder has a training of other options, which they are; otherwise they are written there."""
    mine = {name: getattr(options, name) for name in OF_TRAINING}
    path = options.folder / TRAINING
    if not memcompile.checkpoint.steps(options.folder):  # none, or one that saved nothing
        path.write_text(json.dumps(mine) + "\n")
        return ""
    if not path.exists():
        return f"{options.folder} has checkpoints, and not of this example: give another --folder"
    there = json.loads(path.read_text())
    differing = [f"--{k.replace('_', '-')} {there[k]} there, {mine[k]} here" for k in mine if there[k] != mine[k]]
    if not differing:
        return ""
    return f"{options.folder} has another training ({'; '.join(differing)}): give its options, or another --folder"


def train(options: argparse.Namespace, job: Job) -> None:
    """Trains from the last checkpoint on, or from the beginning, and reports on rank 0."""
    facts = facts_of(options, job.device)
    torch.manual_seed(options.seed)
    model = Transformer(facts.vocabulary, options.width, options.layers).to(job.device)
    # The order matters: plan and shard, then DDP, then the optimizer. All ranks have equally many tokens.
    memcompile.plan(model, memory_mesh=job.mesh, shard_by=options.by, shard_tokens="even", **memory_options(options))
    run: nn.Module = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.steps)
    if options.compile:
        run = torch.compile(run, backend="memcompile")

    done = 0
    if job.told_by_first(lambda: "resume" if memcompile.checkpoint.steps(options.folder) else ""):
        done, extra, _ = memcompile.checkpoint.load(options.folder, model, optimizer, fall_back=True)
        schedule.load_state_dict(extra)
        if job.rank == 0:
            print(f"resumed from step {done:,}", file=sys.stderr)
    with contextlib.ExitStack() as opened:
        losses = opened.enter_context((options.folder / LOSSES).open("a")) if job.rank == 0 else None
        progress = opened.enter_context(
            tqdm(desc="sharded", total=options.steps, initial=done, unit="step", mininterval=0.5, disable=job.rank > 0)
        )
        batches = facts.batches(options.seed, options.batch, skip=done)
        for step, batch in zip(range(done + 1, options.steps + 1), batches):  # noqa: B905 - batches have no end
            optimizer.zero_grad()
            tokens, targets = (part.chunk(job.ranks)[job.rank] for part in batch)
            logits = answer_logits(run, tokens).flatten(0, 1)
            # DDP averages over the ranks, whose shares have more targets or fewer: the loss is the mean over all.
            share = job.ranks / (batch[1] >= 0).sum()
            loss = F.cross_entropy(logits, targets.flatten(), reduction="sum") * share
            if step == options.kill_at and job.rank == job.ranks - 1:
                die_once(options.folder / f"killed-at-{step}")
            loss.backward()
            optimizer.step()
            schedule.step()
            mean = job.sum(loss) / job.ranks
            if losses is not None:
                losses.write(json.dumps({"step": step, "loss": mean}) + "\n")
                losses.flush()
            progress.set_postfix(loss=f"{mean:.3f}", refresh=False)
            progress.update()
            if step % options.save_every == 0 or step == options.steps:
                saved = memcompile.checkpoint.save(
                    options.folder, model, optimizer, step=step, extra=schedule.state_dict(), asynchronous=True
                )
                if step == options.steps:
                    saved.wait()
    right = job.sum(right_answers(run, facts, options.batch, job.rank, job.ranks))
    if job.rank == 0:
        print(f"\n{recall(int(right), facts)}\n{sizes(model, job.ranks)}")


def die_once(marker: Path) -> None:
    """Kills this process as the system would, unless it was done before."""
    if not marker.exists():
        marker.touch()
        print(f"\nrank {dist.get_rank()} kills itself, as --kill-at asks", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


def recall(right: int, facts: Facts) -> str:
    return f"recall             {right / len(facts.tokens):>12.1%}  ({right:,} of {len(facts.tokens):,} facts)"


def sizes(model: nn.Module, ranks: int) -> str:
    """A line a size: of the model, and of rank 0's part of it."""
    table = model.get_parameter("memory_values")
    own = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    lines = {
        "ranks": ranks,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "parameters a rank": sum(part.numel() for part in own.values()),
        "table": table.numel() * table.element_size(),
        "table a rank": own["memory_values"].nbytes,
    }
    return "\n".join(f"{name:19}{size:>12,}{'  bytes' if 'table' in name else ''}" for name, size in lines.items())


def evaluate(options: argparse.Namespace) -> None:
    """Loads what was trained on any number of ranks into this process alone, and prints the recall."""
    saved = json.loads((options.evaluate / TRAINING).read_text())
    trained = argparse.Namespace(**saved)
    facts = facts_of(trained, torch.device("cpu"))
    model = Transformer(facts.vocabulary, trained.width, trained.layers)
    memcompile.plan(model, memory=memcompile.checkpoint.config(options.evaluate))
    step, _, ranks = memcompile.checkpoint.load(options.evaluate, model)
    run = torch.compile(model, backend="memcompile") if options.compile else model
    # In the shares of the ranks that trained: other shapes may round otherwise.
    right = sum(right_answers(run, facts, trained.batch, rank, ranks) for rank in range(ranks))
    print(f"step {step:,} of {trained.steps:,}, saved by {ranks} rank(s), in one process\n{recall(right, facts)}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked: a bad one is named, with exit code 2."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add_number(parser, "steps", 1000, "training steps", least=2)
    add_number(parser, "batch", BATCH, "facts of a step, over all ranks")
    add_number(parser, "save-every", 100, "steps from one checkpoint to the next")
    add_number(parser, "kill-at", 0, "for the demonstration: a rank kills itself in that step, once", least=0)
    add_options(parser, len(Facts.available()))
    parser.add_argument("--by", choices=["columns", "rows"], default="columns", help="how the table is cut (columns)")
    action = argparse.BooleanOptionalAction
    parser.add_argument("--compile", action=action, default=True, help="run compiled, or eagerly")
    default = Path("sharded-results")
    parser.add_argument("--folder", type=Path, default=default, metavar="DIR", help=f"of the checkpoints ({default})")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="the recall of what was trained into this folder")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if options.batch % ranks:
        parser.error(f"argument --batch: needs a multiple of {ranks}, the number of ranks, got {options.batch}")
    if options.evaluate is not None and ranks > 1:
        parser.error("argument --evaluate: is for one process: start it without torchrun")
    if options.evaluate is not None and not (options.evaluate / TRAINING).is_file():
        parser.error(f"argument --evaluate: {options.evaluate} has no training of this example")
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --folder: {error}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Trains or evaluates; returns the exit code, 130 where ctrl-C cut it short."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    try:
        if options.evaluate is not None:
            evaluate(options)
            return 0
        job = Job.start()
        if problem := job.told_by_first(lambda: other_training(options)):
            if job.rank == 0:
                print(f"error: {problem}", file=sys.stderr)
            return 2
        train(options, job)
        dist.destroy_process_group()
    except KeyboardInterrupt:
        print("\ninterrupted: the same command resumes from the last checkpoint", file=sys.stderr)
        return 130
    except memcompile.MemcompileError as error:  # on every rank; a rank that has died is one
        print(f"error: rank {os.environ.get('RANK', 0)}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo with a device mesh can abort ("terminate called") while the interpreter takes itself apart, even where the
    # process group was destroyed: a training that is over would end in an error, which torchrun would start again.
    os._exit(code)
