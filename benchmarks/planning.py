"""Planning's own cost on large models: seconds, and how much the process grows at its peak.

python -m benchmarks.planning [--quick] [--output DIR] [--repeats N]

Every measurement is a process of its own. A model on the meta device has shapes and no memory; planning it computes and
allocates nothing, so what the process grows by is planning's own.
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
from benchmarks.harness.machine import own_bytes
from benchmarks.harness.session import FreshProcesses


def llama_8b() -> nn.Module:
    config = transformers.LlamaConfig(
        num_hidden_layers=32,
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    return transformers.LlamaForCausalLM(config).bfloat16()


def swin() -> nn.Module:
    config = transformers.Swinv2Config(embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48])
    return transformers.Swinv2ForImageClassification(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        num_hidden_layers=48, hidden_size=1024, intermediate_size=4096, num_attention_heads=16
    )
    return transformers.ViTForImageClassification(config)


MODELS: dict[str, Callable[[], nn.Module]] = {"Llama 8B": llama_8b, "Swin v2 L": swin, "ViT, 48 layers": vit}


def plan(name: str) -> dict[str, float]:
    """Seconds and MiB of one plan in this process."""
    with torch.device("meta"):
        warm_up, model = nn.TransformerEncoderLayer(8, 1), MODELS[name]()
    memcompile.find_ffns(warm_up)  # imports
    before = own_bytes(peak=True)
    start = time.perf_counter()
    explanation = memcompile.plan(model, memory_layers=3)
    seconds = time.perf_counter() - start
    grown = (own_bytes(peak=True) - before) / 2**20
    modules = sum(1 for _ in model.modules())
    return {"seconds": seconds, "mib": grown, "modules": modules, "ffns": len(explanation.rows)}


class Planning(FreshProcesses):
    module, name = "benchmarks.planning", "planning"
    about = "Planning's own cost on large models: seconds, and how much the process grows at its peak."
    quick = "one model in one process"
    header = "model", "modules", "FFNs", "plan", "memory"

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Planning":
        names = [*MODELS][: 1 if args.quick else None]
        return cls({name: [partial(plan, name)] for name in names}, args.repeats)

    def row(self, *figures: dict[str, float]) -> list[str]:
        (r,) = figures
        return [f"{r['modules']:.0f}", f"{r['ffns']:.0f}", f"{r['seconds']:.2f} s", f"{r['mib']:.0f} MiB"]


if __name__ == "__main__":
    sys.exit(Planning.main())
