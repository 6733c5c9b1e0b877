"""Compile time: planning's share, and memcompile against plain Inductor on the same model, forward and backward.

    python benchmarks/compile_time.py [--repeats 3] [--json FILE]

Every measurement is a process of its own with empty compile caches; the two backends take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch import nn

TOKENS = 64


def llama(layers: int = 12, width: int = 256, hidden: int = 688, heads: int = 4, vocab: int = 1024) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=layers,
            hidden_size=width,
            intermediate_size=hidden,
            num_attention_heads=heads,
            vocab_size=vocab,
            use_cache=False,
        )
    )


def bert(layers: int = 6, width: int = 384, hidden: int = 1536, heads: int = 12, vocab: int = 1024) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            num_hidden_layers=layers,
            hidden_size=width,
            intermediate_size=hidden,
            num_attention_heads=heads,
            vocab_size=vocab,
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"Llama, 12 layers of 256": llama, "BERT, 6 layers of 384": bert}


def measure(name: str, backend: str) -> dict[str, float]:
    """Seconds of one cold compilation in this process: the plan, then the first forward and backward."""
    import memcompile

    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = MODELS[name]()
    tokens = torch.randint(1024, (2, TOKENS))
    torch.compile(nn.Linear(2, 2), backend="inductor")(torch.ones(1, 2)).sum().backward()  # imports, C++ compiler
    start = time.perf_counter()
    if backend == "memcompile":
        memcompile.plan(model, memory_layers=3)
    planned = time.perf_counter()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(input_ids=tokens, labels=tokens).loss.backward()
    return {"plan": planned - start, "compile": time.perf_counter() - planned}


def in_fresh_process(*arguments: str) -> dict[str, float]:
    """Runs this script with ``arguments`` and empty compile caches; returns what it printed as JSON."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, __file__, *arguments]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes a model and backend; the median is shown")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "BACKEND"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")

    print(f"torch {torch.__version__}, {platform.machine()}, 2 threads, median of {args.repeats} cold processes\n")
    print(f"{'model':26}{'Inductor':>10}{'memcompile':>12}{'ratio':>8}{'of which plan':>15}{'plan / Inductor':>17}")
    results: dict[str, dict[str, float]] = {}
    for name in MODELS:
        dense, memory = [], []
        for _ in range(args.repeats):
            dense.append(in_fresh_process("--measure", name, "inductor"))
            memory.append(in_fresh_process("--measure", name, "memcompile"))
        inductor = statistics.median(r["compile"] for r in dense)
        plan = statistics.median(r["plan"] for r in memory)
        total = statistics.median(r["plan"] + r["compile"] for r in memory)
        results[name] = {"inductor": inductor, "memcompile": total, "plan": plan}
        print(
            f"{name:26}{inductor:>9.1f}s{total:>11.1f}s{total / inductor:>8.2f}{plan:>14.2f}s{plan / inductor:>16.1%}",
            flush=True,
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
