"""Trains one model of the comparison; saves its state as it goes, and goes on from there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memcompile
from benchmarks.knowledge.data import NOTHING, Batches, Corpus, Questions
from benchmarks.knowledge.measure import measures, recall
from benchmarks.knowledge.systems import MEMORY, SYSTEMS, Rates, build, costs

EVALUATIONS = 12  # of a training; its state is saved at each
ASKED = 1000  # facts at each, the same ones
WARM_UP = 0.05  # of the steps


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        options: of memcompile, over those of size and system.
        facts, digest: how many facts there are, and which data.
    """

    system: str
    size: str
    seed: int
    rates: Rates
    steps: int
    facts: int
    digest: str
    options: Mapping[str, Any] = field(default_factory=dict)
    compiled: bool = False

    @property
    def key(self) -> str:
        """The name of its files: two runs that differ have different ones."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return f"{self.system.replace('+', '-plus')}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"

    @property
    def title(self) -> str:
        rates = f"lr {self.rates.lr:g}" + (f" and {self.rates.values_lr:g}" if self.rates.values_lr else "")
        options = "".join(f", {name} {value}" for name, value in self.options.items())
        return f"{self.system}, {self.size}, seed {self.seed}, {rates}{options}"


class Trainer:
    """A training at some step: a model, its optimizer, its batches and what was measured so far."""

    def __init__(self, run: Run, corpus: Corpus) -> None:
        torch.manual_seed(run.seed)
        self.run, self._corpus = run, corpus
        self.model = build(run.system, run.size, corpus.vocabulary.size, self._memory())
        self._first_tables = [table.detach().clone() for table in tables(self.model)]
        self._call = self._compiled() if run.compiled else self.model
        parameters = self.model.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=run.rates.lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.batches = Batches(corpus, run.seed)
        self.history: list[dict[str, float]] = []
        self.seconds = self.cpu_seconds = 0.0
        self.diverged = False

    def _memory(self) -> dict[str, Any]:
        if SYSTEMS[self.run.system].kind != MEMORY:
            return dict(self.run.options)
        return {"values_lr": self.run.rates.values_lr, **self.run.options}

    def _compiled(self) -> Callable[..., Tensor]:
        backend = "memcompile" if SYSTEMS[self.run.system].kind == MEMORY else "inductor"
        return torch.compile(self.model, backend=backend)

    def _rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero."""
        warm_up = max(1, round(WARM_UP * self.run.steps))
        done = min(1.0, max(0, step - warm_up) / max(1, self.run.steps - warm_up))
        return min((step + 1) / warm_up, (1 + math.cos(math.pi * done)) / 2)

    def step(self) -> None:
        start, cpu = time.perf_counter(), time.process_time()
        tokens, targets = self.batches.take()
        targets = targets.flatten()
        positions = (targets != NOTHING).nonzero().flatten()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self._call(tokens, positions), targets[positions])
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.diverged = self.diverged or not math.isfinite(loss.item())
        self.seconds += time.perf_counter() - start
        self.cpu_seconds += time.process_time() - cpu

    def evaluate(self, questions: Questions) -> None:
        self.history.append({"step": self.batches.step, "recall": recall(self.model, questions)})

    def slots_used(self) -> float | None:
        """The share of the table's slots whose row is not the first one: they were hit. None without a memory."""
        now = tables(self.model)
        if not now:
            return None
        changed = [(table != first).any(1) for table, first in zip(now, self._first_tables, strict=True)]
        return torch.cat(changed).double().mean().item()

    def save(self, path: Path) -> None:
        state = {name: getattr(self, name) for name in ("history", "seconds", "cpu_seconds", "diverged")}
        state |= {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        state |= {"batches": (self.batches.step, self.batches.shown)}
        replace(path, lambda part: torch.save(state, part))

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=False)
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.batches.step, self.batches.shown = state["batches"]
        for name in ("history", "seconds", "cpu_seconds", "diverged"):
            setattr(self, name, state[name])


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Replaces a file in one piece: what an interrupt leaves is what was there before, or what `write` writes."""
    part = path.with_name(f"{path.name}.part")
    write(part)
    os.replace(part, path)


def result_path(run: Run, folder: Path) -> Path:
    return folder / f"{run.key}.json"


def ended(run: Run, folder: Path) -> dict[str, Any] | None:
    """What it measured, where it has ended before."""
    path = result_path(run, folder)
    return json.loads(path.read_text()) if path.exists() else None


def train(run: Run, corpus: Corpus, folder: Path, advance: Callable[[int], None]) -> dict[str, Any]:
    """What a run measured: from its file where it has ended before, else trained, from its saved state if it has one.

    The state is saved at every evaluation, whether it will be needed or not. So a run that was interrupted goes through
    the same numbers as one that was not, bit for bit.

    Args:
        advance: hears how many steps more are done, of those of a run that had not ended before.
    """
    if content := ended(run, folder):
        return content
    checkpoint = folder / f"{run.key}.pt"
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(run, corpus)
    questions = corpus.seen(ASKED)
    if checkpoint.exists():
        trainer.load(checkpoint)
        advance(trainer.batches.step)
    every = max(1, run.steps // EVALUATIONS)
    while trainer.batches.step < run.steps and not trainer.diverged:
        trainer.step()
        advance(1)
        step = trainer.batches.step
        if step % every == 0 or step == run.steps:
            trainer.evaluate(questions)
            trainer.save(checkpoint)
    advance(run.steps - trainer.batches.step)
    content = {
        **dataclasses.asdict(run),
        **dataclasses.asdict(costs(trainer.model, corpus.sizes.context)),
        "train_seconds": trainer.seconds,
        "train_cpu_seconds": trainer.cpu_seconds,
        "times_shown": trainer.batches.shown / len(corpus.facts),
        "training_tokens": run.steps * corpus.sizes.tokens_per_step,
        "diverged": trainer.diverged,
        "history": trainer.history,
        "slots": sum(map(len, tables(trainer.model))),
        "slots_used": trainer.slots_used(),
        "commit": commit(),
        **({} if trainer.diverged else measures(trainer.model, corpus)),
    }
    replace(result_path(run, folder), lambda part: part.write_text(json.dumps(content, indent=1) + "\n"))
    checkpoint.unlink(missing_ok=True)
    return content


def tables(model: nn.Module) -> list[nn.Parameter]:
    """Of the memory; none without one."""
    return [parameter for parameter in model.parameters() if memcompile.is_table(parameter)]


def commit() -> str | None:
    """Of the source, with "+" where files were changed since; None outside of a repository or without git."""
    describe = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
