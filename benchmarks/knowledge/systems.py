"""The systems that are compared, their sizes, and what a token costs in each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import memcompile
from benchmarks.harness.package import rows_per_token
from benchmarks.knowledge.models.decoder import Decoder, evaluating
from benchmarks.knowledge.models.experts import Experts
from benchmarks.knowledge.models.ngrams import HASHES, ORDERS, NGrams
from memcompile.config import VARIANTS

DENSE, EXPERTS, NGRAMS, MEMORY = "dense", "experts", "n-grams", "memory"  # kinds of systems


@dataclass(frozen=True)
class Size:
    """Of a dense model, and the options of the memory that takes the place of some of its FFNs at no more FLOPs."""

    width: int
    blocks: int
    memory: Mapping[str, Any]


@dataclass(frozen=True)
class Rates:
    """Learning rates: the peak of all parameters, and the constant one of the table where there is one."""

    lr: float
    values_lr: float | None = None


@dataclass(frozen=True)
class System:
    """Attributes:
    flops: of dense models, how many times the FLOPs of the size.
    memory: options of memcompile, over those of the size.
    rates: the same number for each system, so that all are tuned by the same budget. The first is used where
        nothing is tuned.
    """

    kind: str
    rates: tuple[Rates, ...]
    flops: float = 1.0
    memory: Mapping[str, Any] = field(default_factory=dict)


SIZES = {
    "small": Size(48, 4, {"memory_layers": 3, "n_keys": 256, "heads": 2, "top_k": 32, "key_dim": 16}),
    "medium": Size(96, 4, {"memory_layers": 3, "n_keys": 256, "heads": 4, "top_k": 32, "key_dim": 24}),
}
_DENSE_RATES = tuple(map(Rates, (0.006, 0.0035, 0.01)))
_NGRAM_RATES = tuple(map(Rates, (0.014, 0.01, 0.02)))
_MEMORY_RATES = (Rates(0.01, 0.03), Rates(0.006, 0.03), Rates(0.01, 0.1))
_NORMS = {"memory+": {"query_norm": "batch"}}  # the sweep of query_norm shows what it does
SYSTEMS = {
    "dense": System(DENSE, _DENSE_RATES),
    "dense2x": System(DENSE, _DENSE_RATES, flops=2),
    "dense4x": System(DENSE, _DENSE_RATES, flops=4),
    "moe": System(EXPERTS, _DENSE_RATES),
    "ngram": System(NGRAMS, _NGRAM_RATES),
    **{name: System(MEMORY, _MEMORY_RATES, memory={"variant": name} | _NORMS.get(name, {})) for name in VARIANTS},
}
EQUAL_PARAMETERS = "memory+"  # whose number of parameters experts and n-gram tables get


@dataclass(frozen=True)
class Costs:
    """Attributes:
    parameters: all.
    active: those that one token's forward reads: one row of the embedding, the rows of a table that it hits, one
        expert of each layer, and all other parameters.
    flops: of a token's forward at inference, a multiply-add being two, in sequences of `context` tokens.
    bytes: of the active parameters.
    """

    parameters: int
    active: int
    flops: float
    bytes: int


def build(system: str, size: str, vocabulary: int, options: Mapping[str, Any] | None = None) -> Decoder:
    """A model with new parameters, drawn by the global generator.

    Args:
        options: of memcompile, over those of size and system.
    """
    what, at = SYSTEMS[system], SIZES[size]
    if options and what.kind != MEMORY:
        raise ValueError(f"{system} has no memory: leave {', '.join(options)} out, or choose a system with one")
    if what.kind == EXPERTS:
        return _with_experts(at, vocabulary, _experts(size, vocabulary))
    if what.kind == NGRAMS:
        return _with_ngrams(at, vocabulary, _ngram_rows(size, vocabulary))
    if what.kind == DENSE:
        return Decoder(vocabulary, _dense_width(size, what.flops, vocabulary), at.blocks)
    model = Decoder(vocabulary, at.width, at.blocks)
    memcompile.plan(model, **{**_equal_tables({**at.memory, **what.memory}), **(options or {})})
    return model


def _equal_tables(memory: dict[str, Any]) -> dict[str, Any]:
    """With half the slots where each holds a pair of rows, so that all variants have about the same parameters."""
    pairs = memory["variant"] == "peer"
    return memory | ({"n_keys": math.isqrt(memory["n_keys"] ** 2 // 2)} if pairs else {})


def _with_experts(at: Size, vocabulary: int, experts: int) -> Decoder:
    return Decoder(vocabulary, at.width, at.blocks, ffn=lambda _: Experts(at.width, experts))


def _with_ngrams(at: Size, vocabulary: int, rows: int) -> Decoder:
    return Decoder(vocabulary, at.width, at.blocks, before={1: NGrams(at.width, rows, at.width // 4)})


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@cache
def _asked_parameters(size: str, vocabulary: int) -> int:
    with torch.random.fork_rng():
        return parameters(build(EQUAL_PARAMETERS, size, vocabulary))


@cache
def _experts(size: str, vocabulary: int) -> int:
    """As many for each block as come nearest to the parameters of EQUAL_PARAMETERS."""
    with torch.device("meta"):
        one, two = (parameters(_with_experts(SIZES[size], vocabulary, count)) for count in (1, 2))
    return max(1, round(1 + (_asked_parameters(size, vocabulary) - one) / (two - one)))


@cache
def _ngram_rows(size: str, vocabulary: int) -> int:
    """As many as come nearest to the parameters of EQUAL_PARAMETERS."""
    with torch.device("meta"):
        one = parameters(_with_ngrams(SIZES[size], vocabulary, 1))
    return max(1, 1 + (_asked_parameters(size, vocabulary) - one) // (SIZES[size].width // 4))


@cache
def _dense_width(size: str, factor: float, vocabulary: int) -> int:
    """The smallest multiple of 8 at which the model takes at least `factor` times the FLOPs."""
    at = SIZES[size]
    if factor == 1:
        return at.width

    def flops(width: int) -> float:
        with torch.device("meta"):
            return flops_per_token(Decoder(vocabulary, width, at.blocks))

    asked = factor * flops(at.width)
    width = int(at.width * factor**0.5) // 8 * 8  # not too wide: FLOPs grow with the width's square, or more slowly
    while flops(width) < asked:
        width += 8
    return width


def flops_per_token(model: Decoder, context: int = 64) -> float:
    tokens = torch.zeros(1, context, dtype=torch.long, device=model.head.weight.device)
    with FlopCounterMode(display=False) as counter, evaluating(model):
        model(tokens)
    return counter.get_total_flops() / context


def costs(model: Decoder, context: int) -> Costs:
    embedding = model.tokens.weight
    idle = embedding.numel() - embedding.shape[1]
    for module in model.modules():
        if isinstance(module, Experts):
            idle += (len(module.down) - 1) * (module.down[0].numel() + module.gate_up[0].numel())
        if isinstance(module, NGrams):
            idle += (module.rows - len(ORDERS) * HASHES) * module.table.weight.shape[1]
    for parameter in model.parameters():
        if memcompile.is_table(parameter):
            idle += parameter.numel() - rows_per_token(model) * parameter.shape[1]
    total, itemsize = parameters(model), embedding.element_size()
    return Costs(total, total - idle, flops_per_token(model, context), (total - idle) * itemsize)
