"""Traps: what looks like an FFN and is none, or is one that must not be taken out.

Each stands in the second block of a Transformer whose first block has a true FFN, which must be found beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from tests.models import Block, Transformer, plain_ffn
from tests.zoo import trap_layers as layers
from tests.zoo.entry import HIDDEN, VOCABULARY, WIDTH, Build, Entry, token_ids
from tests.zoo.hf import DECODER, huggingface, next_token

_BESIDE = r"^blocks\.0\.ffn\.2\.weight$"


def _beside_an_ffn(trap: Callable[[], nn.Module]) -> Build:
    """A model of two blocks: one with an FFN, one with the trap in its place."""

    def build() -> tuple[nn.Module, dict[str, Any]]:
        blocks = [Block(WIDTH, plain_ffn(WIDTH, HIDDEN)), Block(WIDTH, trap())]
        return Transformer(blocks, WIDTH, VOCABULARY), {"tokens": token_ids()}

    return build


def _in_place_of_ffn(name: str, trap: Callable[[], nn.Module], refused: str, down: str = _BESIDE) -> Entry:
    return Entry(name=name, family="trap", build=_beside_an_ffn(trap), down=down, refused=refused)


def _changed(change: Callable[[nn.Sequential], object]) -> Callable[[], nn.Module]:
    """An FFN to which something was done."""

    def build() -> nn.Module:
        ffn = plain_ffn(WIDTH, HIDDEN)
        change(ffn)
        return ffn

    return build


def _tied_to_embedding() -> tuple[nn.Module, dict[str, Any]]:
    blocks = [Block(WIDTH, plain_ffn(WIDTH, hidden)) for hidden in (HIDDEN, VOCABULARY)]
    model = Transformer(blocks, WIDTH, VOCABULARY)
    model.blocks[1].ffn[0].weight = model.tokens.weight
    return model, {"tokens": token_ids()}


def _quantised() -> nn.Module:
    from torch.ao.quantization import quantize_dynamic  # on its way out of PyTorch

    return quantize_dynamic(plain_ffn(WIDTH, HIDDEN), {nn.Linear})


def _keep_hidden(ffn: nn.Sequential) -> None:
    kept: list[torch.Tensor] = []
    ffn[1].register_forward_hook(lambda module, args, output: kept.append(output))


def _around_body(model: Callable[[nn.Module], nn.Module]) -> Build:
    """Something before or after a model of two true FFNs."""

    def build() -> tuple[nn.Module, dict[str, Any]]:
        body = nn.Sequential(*(Block(WIDTH, plain_ffn(WIDTH, HIDDEN)) for _ in range(2)))
        return model(body), {"x": torch.randn(2, 10, WIDTH)}

    return build


_TRUE_BODY = r"^body\.\d\.ffn\.2\.weight$"
_SEVERAL = "several blocks read one stream"
_COMPUTED = "a weight of it is computed at each call"

TRAPS = [
    _in_place_of_ffn("dense experts", layers.DenseExperts, _SEVERAL),
    _in_place_of_ffn("shared expert", layers.SharedExpert, _SEVERAL),
    _in_place_of_ffn("mixture of depths", layers.MixtureOfDepths, "its tokens are picked by"),
    _in_place_of_ffn("batched experts", layers.BatchedExperts, ""),
    _in_place_of_ffn("indexed expert bank", layers.IndexedBank, _COMPUTED),
    Entry(
        name="Mixtral",
        family="trap",
        build=huggingface("MixtralConfig", "MixtralForCausalLM", next_token, **DECODER, num_local_experts=4),
    ),
    _in_place_of_ffn("serial adapter", layers.SerialAdapter, "its output has several consumers"),
    _in_place_of_ffn("parallel adapter", layers.ParallelAdapter, "", rf"{_BESIDE}|^blocks\.1\.ffn\.ffn\.2\.weight$"),
    _in_place_of_ffn("LoRA", layers.LowRankAdaptedFfn, "another projection adds to its hidden activation"),
    _in_place_of_ffn("low rank", layers.low_rank, "no nonlinearity"),
    _in_place_of_ffn("low rank with norm", layers.low_rank_with_norm, "no nonlinearity"),
    _in_place_of_ffn("tied up and down", layers.TiedProjections, "share one weight"),
    Entry(
        name="tied to the embedding",
        family="trap",
        build=_tied_to_embedding,
        down=_BESIDE,
        refused="is tied to blocks.1.ffn.0.weight",
    ),
    _in_place_of_ffn("weight norm", _changed(lambda ffn: parametrizations.weight_norm(ffn[2])), _COMPUTED),
    _in_place_of_ffn("pruned", _changed(lambda ffn: prune.l1_unstructured(ffn[0], "weight", 0.5)), ""),
    _in_place_of_ffn("dynamic quantisation", _quantised, ""),
    _in_place_of_ffn(
        "gradient hook", _changed(lambda ffn: ffn[2].weight.register_hook(lambda grad: grad / 2)), "has gradient hooks"
    ),
    _in_place_of_ffn("hook on the hidden activation", _changed(_keep_hidden), "has hooks"),
    _in_place_of_ffn("probe", layers.Probed, "is also read by"),
    _in_place_of_ffn("L1 penalty", layers.Penalised, "is also read by"),
    _in_place_of_ffn("token mixing", lambda: layers.TokenMixer(10), "it mixes tokens"),
    _in_place_of_ffn("convolution over tokens", lambda: layers.ConvolutionalFfn(3), ""),
    _in_place_of_ffn("1x1 convolution", lambda: layers.ConvolutionalFfn(1), ""),
    _in_place_of_ffn("token shift", layers.ShiftedFfn, "roll stands between its projections"),
    _in_place_of_ffn("two sources", layers.GateOfAnotherSource, "two different activations"),
    _in_place_of_ffn("hyper-network", layers.HyperNetwork, ""),
    _in_place_of_ffn("recurrent gate", layers.RecurrentGate, "lstm stands between its projections"),
    _in_place_of_ffn("squeeze and excite", layers.SqueezeAndExcite, "not to the residual stream that it read"),
    _in_place_of_ffn("hidden width equals width", lambda: plain_ffn(WIDTH, WIDTH), "its hidden width equals"),
    Entry(
        name="time embedding, heads, pooler",
        family="trap",
        build=_around_body(layers.WithHeads),
        down=_TRUE_BODY,
        refused="a head, not an FFN",
    ),
]
