"""Planning's own cost on large models: seconds, and how much the process grew at its peak.

    python benchmarks/planning.py [--repeats 3] [--json FILE]

Every measurement is a process of its own. A model on the meta device has shapes and no memory; planning it computes and
allocates nothing, so what the process grows by is planning's own.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import nn


def llama_8b() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=32,
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    return LlamaForCausalLM(config).bfloat16()


def swin() -> nn.Module:
    from transformers import Swinv2Config, Swinv2ForImageClassification

    return Swinv2ForImageClassification(Swinv2Config(embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48]))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(num_hidden_layers=48, hidden_size=1024, intermediate_size=4096, num_attention_heads=16)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"Llama 8B": llama_8b, "Swin v2 L": swin, "ViT, 48 layers": vit}


def measure(name: str) -> dict[str, float]:
    """Seconds and MiB of one plan in this process."""
    import memcompile

    with torch.device("meta"):
        warm_up, model = nn.TransformerEncoderLayer(8, 1), MODELS[name]()
    memcompile.find_ffns(warm_up)  # imports
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    explanation = memcompile.plan(model, memory_layers=3)
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    modules = sum(1 for _ in model.modules())
    return {"seconds": seconds, "mib": grown, "modules": modules, "ffns": len(explanation.rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes a model; the median is shown")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--measure", metavar="MODEL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    print(f"torch {torch.__version__}, on the meta device, median of {args.repeats} processes\n")
    print(f"{'model':16}{'modules':>9}{'FFNs':>6}{'plan':>9}{'memory':>11}")
    results = {}
    for name in MODELS:
        command = [sys.executable, __file__, "--measure", name]
        runs = [json.loads(subprocess.check_output(command, text=True).splitlines()[-1]) for _ in range(args.repeats)]
        results[name] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        r = results[name]
        print(f"{name:16}{r['modules']:>9.0f}{r['ffns']:>6.0f}{r['seconds']:>7.2f} s{r['mib']:>7.0f} MiB", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
