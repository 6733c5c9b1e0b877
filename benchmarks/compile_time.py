"""Compile time: planning's share, and memcompile against plain Inductor on the same model, forward and backward.

python -m benchmarks.compile_time [--quick] [--output DIR] [--repeats N]

Every measurement is a process of its own with empty compile caches; the two backends take turns.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import transformers
from torch import nn

from benchmarks.harness.processes import fresh_medians
from benchmarks.harness.session import Benchmark, Session
from benchmarks.harness.tables import table

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


Model = tuple[str, Callable[[int], nn.Module], int]  # and its layers
MODELS: list[Model] = [("Llama, 12 layers of 256", llama, 12), ("BERT, 6 layers of 384", bert, 6)]
QUICK: list[Model] = [("Llama, 1 layer of 256", llama, 1)]


def cold(build: Callable[[int], nn.Module], layers: int, backend: str) -> dict[str, float]:
    """Seconds of one cold compilation in this process: the plan, then the first forward and backward."""
    import memcompile

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


class CompileTime(Benchmark):
    module, name, repeats = "benchmarks.compile_time", "compile-time", (3, 1)
    about = "Cold compile time of memcompile and of plain Inductor, forward and backward, and planning's share."
    quick = "one small model, once with each backend"

    def __init__(self, models: Sequence[Model], repeats: int) -> None:
        super().__init__({"torch": torch.__version__, "threads": THREADS, "processes": repeats}, len(models))
        self.models = models

    @classmethod
    def of(cls, args: argparse.Namespace) -> "CompileTime":
        return cls(QUICK if args.quick else MODELS, args.repeats)

    def measure(self, session: Session) -> None:
        for name, build, layers in self.models:
            session.say(name)
            backends = [partial(cold, build, layers, backend) for backend in ("inductor", "memcompile")]
            inductor, ours = fresh_medians(self.results.machine["processes"], *backends)
            figures = {"inductor": inductor["total"], "memcompile": ours["total"], "plan": ours["plan"]}
            self.results.medians.append({"model": name} | figures)
            session.advance()

    def report(self) -> str:
        rows = []
        for r in self.results.medians:
            inductor, total, plan = r["inductor"], r["memcompile"], r["plan"]
            seconds = f"{inductor:.1f} s", f"{total:.1f} s", f"{total / inductor:.2f}", f"{plan:.2f} s"
            rows.append([r["model"], *seconds, f"{plan / inductor:.1%}"])
        processes = self.results.machine["processes"]
        about = f"torch {torch.__version__}, {platform.machine()}, {THREADS} threads, median of {processes} processes"
        header = ["model", "Inductor", "memcompile", "ratio", "of which plan", "plan / Inductor"]
        return f"{about}\n\n{table(header, rows)}"


if __name__ == "__main__":
    sys.exit(CompileTime.main())
