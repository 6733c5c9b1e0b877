"""The options that the examples share: which facts, which model, which memory."""

from __future__ import annotations

import argparse

from facts_model import ATTENTION_HEADS


def add_number(
    parser: argparse.ArgumentParser, name: str, default: int, meaning: str, least: int = 1, most: int = 1_000_000
) -> None:
    """An option that takes a whole number."""

    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"needs a whole number from {least} to {most}, got {text!r}")
        return int(text)

    parser.add_argument(f"--{name}", type=number, default=default, metavar="N", help=f"{meaning} ({default})")


def add_options(parser: argparse.ArgumentParser, available: int) -> None:
    """Those of facts, model and memory, of so many facts that are available."""
    add_number(parser, "facts", available, "how many facts, drawn at random", most=available)
    add_number(parser, "width", 64, "the model's width")
    add_number(parser, "layers", 2, "its Transformer blocks")
    add_number(parser, "memory-layers", 1, "how many of their FFNs become memory")
    add_number(parser, "keys", 64, "half-keys on each side: the memory has keys * keys slots", most=1024)
    add_number(parser, "top-k", 16, "slots that each head of the memory reads")
    add_number(parser, "heads", 4, "heads of the memory")
    add_number(parser, "seed", 0, "seed of the weights and of the order of the facts", least=0)
    add_number(parser, "threads", 1, "CPU threads; two pay only where no other program wants the cores")
    # 0.01 is the dense model's best: after 1,200 steps 6, 22, 43, 45 and 40% at 0.0015, 0.003, 0.006, 0.01 and 0.02
    parser.add_argument("--lr", type=float, default=0.01, help="peak rate, and the values' constant one (0.01)")
    gradients = {"choices": ["sparse", "dense"], "default": "sparse"}
    parser.add_argument("--values-grad", **gradients, help="gradient of the memory's values (sparse)")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program, with exit code 2, where options do not fit together."""
    if options.width % (2 * ATTENTION_HEADS):
        parser.error(f"argument --width: needs a multiple of {2 * ATTENTION_HEADS}, got {options.width}")
    if options.memory_layers > options.layers:
        parser.error(f"argument --memory-layers: --layers is {options.layers}, got {options.memory_layers}")
    if options.top_k > options.keys:
        parser.error(f"argument --top-k: --keys is {options.keys}, got {options.top_k}")
    if not 0 < options.lr < 1:
        parser.error(f"argument --lr: needs a number between 0 and 1, got {options.lr}")


def memory_options(options: argparse.Namespace) -> dict[str, object]:
    """What memcompile is asked for."""
    memory = {"memory_layers": options.memory_layers, "n_keys": options.keys, "heads": options.heads}
    return memory | {"top_k": options.top_k, "values_lr": options.lr, "values_grad": options.values_grad}
