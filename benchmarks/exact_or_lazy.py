"""Whether a training can tell the exact rule for rows, RowAdamW, from the lazy one, LazyAdam, by its loss or recall.

    PYTHONPATH=examples python benchmarks/exact_or_lazy.py [--training NAME ...] [--json FILE]

RowAdamW steps a row as a dense AdamW would: a row that is not touched goes on moving by its momentum. In LazyAdam it
stands still. Three trainings on the airport facts of the examples, eager, with one thread:

- "rests": a million slots, 8 facts a step. A step touches one row in a thousand, and a row rests for 200 steps.
- "quarter": examples/facts.py with a quarter of the facts and of the batch, and half the steps, so that a third of the
  facts is not learned. A step touches two of three rows.
- "demo": examples/facts.py as it is, which learns all. A step touches nine of ten rows. One run a rule.

Each rule is tried at the same rates of the values; its best, by recall, is run with more seeds. As a control, values of
the rate 0 stay as they were drawn. Runs that FILE already has are not run again, so that the tables can be printed
from it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from facts_model import Facts, Transformer, answer_logits, exact_recall
from tqdm import tqdm

import memcompile

RULES = ("row_adamw", "lazy_adam")
PARTS = 10  # of a training, each of which has its mean loss


@dataclass(frozen=True)
class Training:
    """What is trained, and for how long."""

    facts: int
    layers: int
    batch: int
    steps: int
    lr: float  # peak rate of all but the values
    memory: dict[str, object]
    rates: tuple[float, ...]  # constant ones of the values, which each rule is tried at
    seeds: tuple[int, ...]  # the first tunes
    control: bool = False


DEMO = {"n_keys": 64, "heads": 4, "top_k": 16}
LARGE = {"n_keys": 1024, "heads": 4, "top_k": 4, "qk_norm": True}
TRAININGS = {
    "rests": Training(2500, 1, 8, 6000, 0.005, LARGE, (0.003, 0.01, 0.02, 0.03, 0.06, 0.1), (0, 1, 2, 3), control=True),
    "quarter": Training(1500, 2, 64, 500, 0.01, DEMO, (0.003, 0.01, 0.03, 0.1), (0, 1, 2)),
    "demo": Training(5988, 2, 256, 1000, 0.01, DEMO, (0.01,), (0,)),
}


@dataclass
class Run:
    """One training and what came of it."""

    training: str
    rule: str
    rate: float
    weight_decay: float
    seed: int
    recall: float  # of all facts, after the last step
    losses: list[float]  # the mean of each tenth of the training
    step_ms: float  # the median step, by the clock
    step_cpu_ms: float  # the mean step, by the processor's time
    rows_a_step: float
    rows_used: int
    touch_rest: float  # steps since the row was touched before: the mean over touches, of the training's second half
    row_rest: float  # steps from one touch of a row to the next: the mean over the rows that were touched twice

    @property
    def key(self) -> tuple[object, ...]:
        return self.training, self.rule, self.rate, self.weight_decay, self.seed


class Touches:
    """When rows were touched."""

    def __init__(self, slots: int) -> None:
        self.first, self.last, self.count = torch.zeros(3, slots, dtype=torch.long)
        self.rests: list[float] = []
        self.rows: list[int] = []

    def record(self, step: int, rows: torch.Tensor) -> None:
        before = self.last[rows]
        rest = (step - before)[before > 0].double()
        self.rests.append(rest.mean().item() if len(rest) else 0.0)
        self.rows.append(len(rows))
        self.first[rows] = torch.where(before > 0, self.first[rows], step)
        self.last[rows] = step
        self.count[rows] += 1

    def figures(self) -> dict[str, float]:
        twice = self.count > 1
        rests = (self.last - self.first)[twice] / (self.count[twice] - 1)
        half = len(self.rows) // 2
        weighted = sum(rest * rows for rest, rows in zip(self.rests[half:], self.rows[half:], strict=True))
        return {
            "rows_a_step": statistics.fmean(self.rows),
            "rows_used": int((self.count > 0).sum()),
            "touch_rest": weighted / sum(self.rows[half:]),
            "row_rest": rests.mean().item(),
        }


def train(name: str, rule: str, rate: float, weight_decay: float, seed: int) -> Run:
    """Trains with one rule, at one constant rate of the values."""
    training = TRAININGS[name]
    facts = Facts.encode(random.Random(seed).sample(Facts.available(), training.facts))
    torch.manual_seed(seed)
    model = Transformer(facts.vocabulary, 64, training.layers)
    options = {"memory_layers": 1, "values_lr": rate, "values_grad": "sparse", "values_optimizer": rule}
    memcompile.plan(model, **options, **training.memory)
    others = [parameter for parameter in model.parameters() if parameter is not model.memory_values]
    groups = [{"params": others}, {"params": [model.memory_values], "weight_decay": weight_decay}]
    optimizer = torch.optim.AdamW(groups, lr=training.lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.lr, total_steps=training.steps)
    batches, touches = facts.batches(seed, training.batch), Touches(len(model.memory_values))
    losses: list[float] = []
    seconds: list[float] = []
    cpu = 0.0
    label = f"{name} {rule} {rate} decay {weight_decay} seed {seed}"
    for step in tqdm(range(1, training.steps + 1), desc=label, unit="step", mininterval=5):
        tokens, targets = next(batches)
        start, cpu_start = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        loss = F.cross_entropy(answer_logits(model, tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        rows = model.memory_values.grad.indices()[0]
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        cpu += time.process_time() - cpu_start
        schedule.step()
        losses.append(loss.item())
        touches.record(step, rows)
    part = training.steps // PARTS
    return Run(
        name,
        rule,
        rate,
        weight_decay,
        seed,
        exact_recall(model, facts),
        [statistics.fmean(losses[i * part : (i + 1) * part]) for i in range(PARTS)],
        1e3 * statistics.median(seconds),
        1e3 * cpu / training.steps,
        **touches.figures(),
    )


class Runs:
    """Those that were done, also by earlier calls; each is written to the file as it ends."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        found = json.loads(path.read_text()) if path is not None and path.exists() else []
        self.done = {run.key: run for run in (Run(**item) for item in found)}

    def get(self, *key: object) -> Run:
        if key not in self.done:
            self.done[key] = train(*key)  # type: ignore[arg-type]
            if self.path is not None:
                self.path.write_text(json.dumps([asdict(run) for run in self.done.values()], indent=1) + "\n")
        return self.done[key]


def spread(numbers: list[float], form: str) -> str:
    return f"{statistics.fmean(numbers):{form}} ({min(numbers):{form}} to {max(numbers):{form}})"


def table(name: str, runs: Runs, weight_decay: float) -> Iterator[str]:
    """The lines of one training's tables, as their runs end."""
    training, best = TRAININGS[name], {}
    rates, first = training.rates, training.seeds[0]
    yield f"\n{name}: {training}, weight decay of the values {weight_decay}"
    yield f"{'rule':10}{'rate':>7}{'recall':>9}{'loss of the last tenth':>24}"
    if training.control:
        still = runs.get(name, RULES[0], 0.0, 0.0, first)
        yield f"{'neither':10}{0:>7}{still.recall:>9.1%}{still.losses[-1]:>24.4f}"
    for rule in RULES:
        for rate in rates:
            run = runs.get(name, rule, rate, weight_decay, first)
            yield f"{rule:10}{rate:>7}{run.recall:>9.1%}{run.losses[-1]:>24.4f}"
        best[rule] = max(rates, key=lambda rate: runs.get(name, rule, rate, weight_decay, first).recall)
    yield f"at the best rate, seeds {training.seeds}: mean (least to most)"
    for rule, rate in best.items():
        many = [runs.get(name, rule, rate, weight_decay, seed) for seed in training.seeds]
        recall, loss = spread([r.recall for r in many], ".1%"), spread([r.losses[-1] for r in many], ".4f")
        yield f"{rule} at {rate}: recall {recall}, loss {loss}"
        ms, cpu = (spread([getattr(r, kind) for r in many], ".1f") for kind in ("step_ms", "step_cpu_ms"))
        yield f"    ms a step {ms}, of the processor {cpu}"
        kinds = ("rows_a_step", "rows_used", "touch_rest", "row_rest")
        rows, used, touch, row = (statistics.fmean(getattr(r, kind) for r in many) for kind in kinds)
        yield f"    a step touches {rows:,.0f} rows of {used:,.0f} that any does"
        yield f"    steps since the touch before: {touch:.1f}, mean of touches; {row:.1f}, mean of rows"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", choices=TRAININGS, nargs="+", default=[*TRAININGS], help="only these")
    parser.add_argument("--weight-decay", type=float, default=0.0, metavar="RATE", help="of the values (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="of all runs; those that it has are not run again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(arguments.json)
    for name in arguments.training:
        for line in table(name, runs, arguments.weight_decay):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
