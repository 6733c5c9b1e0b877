"""Teach one small Transformer real facts: as it is, and with one line that gives it a memory, of two kinds.

The facts are airport codes and their cities (`JFK>New York`) from the package airportsdata. `Transformer`, in
facts_model.py, is ordinary PyTorch and knows nothing of memcompile; the memory is one line in `build`: a product-key
memory as it was in 2019 (pkm), and Memory+, which is the default. All runs see the same data in the same order under
the same optimizer, schedule and number of steps, and no memory may spend more FLOPs a token than the dense model does.
Prints a table; writes facts.png and facts.json.

The claim is about equal data and FLOPs, not about time: these matrices are so small that on a CPU a step with
memory takes nearly twice as long, and the dense model, given 3,400 steps instead of 1,000, learns every fact
too.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import airportsdata
import matplotlib
import matplotlib.pyplot as plt
import torch
import torch.nn as nn
import torch.nn.functional as F
from facts_model import BATCH, SEQUENCE, Facts, Transformer, answer_logits, exact_recall
from facts_options import add_number, add_options, check_options, memory_options
from matplotlib.ticker import MaxNLocator
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import memcompile

matplotlib.use("Agg")

EVALUATIONS = 30
COLOURS = {"dense": "#7f8c9b", "pkm": "#e0a030", "memory+": "#d1495b"}  # the runs, in order


@dataclass
class History:
    """What one run reached; recalls are in [0, 1]."""

    parameters: int
    flops_per_token: float
    compile_seconds: float = 0.0
    train_seconds: float = 0.0
    steps: list[int] = field(default_factory=list)
    recalls: list[float] = field(default_factory=list)


def build(run: str, vocabulary: int, options: argparse.Namespace) -> tuple[nn.Module, History]:
    """The model of one run, and its size. The FLOPs are a token's forward, memcompile's own operators included."""
    torch.manual_seed(options.seed)
    model = eager = Transformer(vocabulary, options.width, options.layers)
    memory = memory_options(options) | {"variant": run}
    if run == "dense":
        model = model if options.no_compile else torch.compile(model)
    elif options.no_compile:
        memcompile.plan(model, **memory)
    else:
        model = torch.compile(model, backend="memcompile", **memory)  # the one line
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        eager(torch.zeros(1, SEQUENCE, dtype=torch.long))
    parameters = sum(parameter.numel() for parameter in eager.parameters())
    return model, History(parameters, counter.get_total_flops() / SEQUENCE)


def train(model: nn.Module, facts: Facts, options: argparse.Namespace, history: History, name: str) -> None:
    """Trains on the answers' characters; fills the history in as it goes, so that an interrupt keeps it."""

    def loss_of(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(answer_logits(model, tokens).flatten(0, 1), targets.flatten())

    start = time.perf_counter()
    loss_of(*next(facts.batches(options.seed))).backward()  # compiles; no step is taken
    history.recalls.append(exact_recall(model, facts))
    history.steps.append(0)
    history.compile_seconds = time.perf_counter() - start

    start = time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.steps)
    batches = facts.batches(options.seed)
    with tqdm(range(1, options.steps + 1), desc=f"{name:7}", unit="step", mininterval=0.5) as progress:
        for step in progress:
            optimizer.zero_grad()
            loss = loss_of(*next(batches))
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % max(1, options.steps // EVALUATIONS) == 0 or step == options.steps:
                history.recalls.append(exact_recall(model, facts))
                history.steps.append(step)
            progress.set_postfix(loss=f"{loss.item():.3f}", recall=f"{history.recalls[-1]:.1%}", refresh=False)
            history.train_seconds = time.perf_counter() - start


def recall_ratio(runs: dict[str, History]) -> float | None:
    """Memory+'s last recall over dense's; None where a run is missing or unfinished, or dense recalls nothing."""
    if "memory+" not in runs or runs["dense"].steps[-1] != runs["memory+"].steps[-1] or not runs["dense"].recalls[-1]:
        return None
    return runs["memory+"].recalls[-1] / runs["dense"].recalls[-1]


def report(runs: dict[str, History], facts: Facts) -> str:
    """The table, and under it the ratio of the recalls where there is one."""
    heads = ("parameters", "FLOPs/token", "recall", "best recall", "at step", "compile s", "train s")
    lines = [" " * 8 + "".join(f"{head:>13}" for head in heads)]
    for name, run in runs.items():
        sizes = f"{run.parameters:>13,}{run.flops_per_token:>13,.0f}"
        recalls = f"{run.recalls[-1]:>13.1%}{max(run.recalls):>13.1%}{run.steps[-1]:>13,}"
        lines.append(f"{name:8}{sizes}{recalls}{run.compile_seconds:>13.1f}{run.train_seconds:>13.1f}")
    lines.append(f"\nrecall: the share of {len(facts.tokens):,} facts whose whole city greedy decoding gets right")
    if (ratio := recall_ratio(runs)) is not None:
        flops = runs["memory+"].flops_per_token / runs["dense"].flops_per_token
        lines.append(f"memory+ recalls {ratio:.2f} times the facts of dense, at {flops:.2f} times its FLOPs a token")
    return "\n".join(lines)


def draw(runs: dict[str, History], facts: Facts, path: Path) -> None:
    """Recall over training steps: a curve a run, its last value beside it."""
    with plt.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(figsize=(8, 4.8), dpi=150, layout="constrained")
        for name, run in runs.items():
            label = f"{name}: {run.parameters / 1e3:,.0f}k parameters, {run.flops_per_token / 1e3:,.0f}k FLOPs/token"
            step, percent = run.steps[-1], [100 * recall for recall in run.recalls]
            axes.plot(run.steps, percent, color=COLOURS[name], linewidth=2.4, label=label)
            axes.plot(step, percent[-1], "o", color=COLOURS[name], clip_on=False)
            bold = {"color": COLOURS[name], "fontsize": 13, "fontweight": "bold", "va": "center"}
            axes.annotate(f"{percent[-1]:.1f}%", (step, percent[-1]), (9, 0), textcoords="offset points", **bold)
        title = f"{len(facts.tokens):,} airport codes and their cities (airportsdata), one small Transformer"
        axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=12)
        axes.set_xlabel(f"training steps (of {BATCH} facts)")
        axes.set_ylabel("facts recalled exactly (%)")
        axes.set_xlim(0, max(run.steps[-1] for run in runs.values()) or 1)
        axes.set_ylim(0, 100)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color="#e6e6e6")
        axes.set_axisbelow(True)
        axes.legend(loc="upper left", frameon=False)
        figure.savefig(path)
        plt.close(figure)


def parse(arguments: list[str] | None, available: int) -> argparse.Namespace:
    """The options, checked: a bad one is named, with exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])

    add_number(parser, "steps", 1000, "training steps of each run", least=2)
    add_options(parser, available)
    parser.add_argument("--out", type=Path, default=Path("facts-results"), metavar="DIR", help="(facts-results)")
    parser.add_argument("--no-compile", action="store_true", help="run both models eagerly")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Trains all models and reports; returns the exit code, 130 where ctrl-C cut it short."""
    available = Facts.available()
    options = parse(arguments, len(available))
    torch.set_num_threads(options.threads)
    facts = Facts.encode(random.Random(options.seed).sample(available, options.facts))
    built = {name: build(name, facts.vocabulary, options) for name in COLOURS}
    dense, most = built["dense"][1].flops_per_token, max(history.flops_per_token for _, history in built.values())
    if most > dense:
        print(f"error: a memory takes {most:,.0f} FLOPs a token, dense {dense:,.0f}", file=sys.stderr)
        print("which would be no fair comparison: lower --keys, --heads or --top-k", file=sys.stderr)
        return 2
    interrupted = False
    try:
        for name, (model, history) in built.items():
            train(model, facts, options, history, name)
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted: what follows is what was reached", file=sys.stderr)
    runs = {name: history for name, (_, history) in built.items() if history.steps}
    if runs:
        plot, figures = options.out / "facts.png", options.out / "facts.json"
        print("\n" + report(runs, facts))
        draw(runs, facts, plot)
        result = {"interrupted": interrupted, "facts": options.facts, "recall_ratio": recall_ratio(runs)}
        result |= {"torch": torch.__version__, "airportsdata": airportsdata.__version__}
        result |= {"options": {**vars(options), "out": str(options.out)}}
        result |= {"runs": {name: asdict(run) for name, run in runs.items()}}
        figures.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\n{plot}\n{figures}")
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
