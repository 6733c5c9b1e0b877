"""Compile time: planning's share, and memcompile against plain Inductor on the same model, forward and backward.

python -m benchmarks.compile_time [--quick] [--output DIR] [--repeats N]

Every measurement is a process of its own with empty compile caches; the two backends take turns.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import transformers
from torch import nn

import memcompile
from benchmarks.harness.session import FreshProcesses

TOKENS, VOCABULARY, THREADS = 64, 1024, 2


def llama(layers: int) -> nn.Module:
    config = transformers.LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=256,
        intermediate_size=688,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def bert(layers: int) -> nn.Module:
    config = transformers.BertConfig(
        num_hidden_layers=layers,
        hidden_size=384,
        intermediate_size=1536,
        num_attention_heads=12,
        vocab_size=VOCABULARY,
    )
    return transformers.BertForMaskedLM(config)


Model = tuple[Callable[[int], nn.Module], int]  # and its layers
MODELS: dict[str, Model] = {"Llama, 12 layers of 256": (llama, 12), "BERT, 6 layers of 384": (bert, 6)}
QUICK: dict[str, Model] = {"Llama, 1 layer of 256": (llama, 1)}
BACKENDS = "inductor", "memcompile"


def cold(build: Callable[[int], nn.Module], layers: int, backend: str) -> dict[str, float]:
    """Seconds of one cold compilation in this process: the plan, then the first forward and backward."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = build(layers)
    tokens = torch.randint(VOCABULARY, (2, TOKENS))
    torch.compile(nn.Linear(2, 2), backend="inductor")(torch.ones(1, 2)).sum().backward()  # imports, C++ compiler
    start = time.perf_counter()
    if backend == "memcompile":
        memcompile.plan(model, memory_layers=min(3, layers))
    planned = time.perf_counter()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(input_ids=tokens, labels=tokens).loss.backward()
    end = time.perf_counter()
    return {"plan": planned - start, "total": end - start}


class CompileTime(FreshProcesses):
    module, name = "benchmarks.compile_time", "compile-time"
    about = "Cold compile time of memcompile and of plain Inductor, forward and backward, and planning's share."
    quick = "one small model, once with each backend"
    header = "model", "Inductor", "memcompile", "ratio", "of which plan", "plan / Inductor"

    @classmethod
    def of(cls, args: argparse.Namespace) -> "CompileTime":
        models = QUICK if args.quick else MODELS
        return cls(
            {name: [partial(cold, *model, backend) for backend in BACKENDS] for name, model in models.items()},
            args.repeats,
        )

    def row(self, *figures: dict[str, float]) -> list[str]:
        inductor, ours = (r["total"] for r in figures)
        plan = figures[1]["plan"]
        seconds = f"{inductor:.1f} s", f"{ours:.1f} s", f"{ours / inductor:.2f}", f"{plan:.2f} s"
        return [*seconds, f"{plan / inductor:.1%}"]


if __name__ == "__main__":
    sys.exit(CompileTime.main())
