"""What forbids taking parameters out of a model: ties, hooks, weights that are computed or no plain parameters."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from memcompile import find_ffns
from tests.models import (
    GATED_HIDDEN,
    HIDDEN,
    WIDTH,
    InlineGatedBlock,
    Transformer,
    around,
    tiny_gpt,
)


def accepted(sites):
    return [s for s in sites if s.refusal is None]


# What forbids taking the parameters out. Each spoils the first FFN of a GPT of two; the second stays.


def tie_up_and_down(model, ffn):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(WIDTH, HIDDEN)

        def forward(self, x):
            return F.linear(F.gelu(self.up(x)), self.up.weight.t())

    model.blocks[0].ffn = Tied()


def tie_to_embedding(model, ffn):
    embedding = nn.Embedding(HIDDEN, WIDTH)
    model.tokens, model.head = embedding, nn.Linear(WIDTH, HIDDEN, bias=False)
    ffn[0].weight = embedding.weight


def tie_to_unused(model, ffn):
    model.spare = nn.Linear(WIDTH, HIDDEN)
    model.spare.weight = ffn[0].weight


def gradient_hook(model, ffn):
    ffn[2].weight.register_hook(lambda gradient: gradient * 0.5)


def accumulation_hook(model, ffn):
    ffn[2].bias.register_post_accumulate_grad_hook(lambda parameter: None)


def forward_hook(model, ffn):
    ffn[0].register_forward_hook(lambda module, args, output: None)


def forward_pre_hook(model, ffn):
    ffn[2].register_forward_pre_hook(lambda module, args: None)


def backward_hook(model, ffn):
    ffn[0].register_full_backward_hook(lambda module, grad_input, grad_output: None)


def backward_pre_hook(model, ffn):
    ffn[0].register_full_backward_pre_hook(lambda module, grad_output: None)


class Tagged(torch.Tensor):
    """A tensor subclass that does nothing, as quantised and sharded weights begin."""


def subclass(model, ffn):
    ffn[0].weight = nn.Parameter(ffn[0].weight.detach().as_subclass(Tagged))


def reads_weight(function):
    class Reader(nn.Module):
        def forward(self, x):
            return x + function(self.weight, x)

    def spoil(model, ffn):
        reader = Reader()
        reader.weight = ffn[2].weight
        model.norm = reader

    return spoil


def regularised(model, ffn):
    class Regularised(Transformer):
        def forward(self, tokens):
            return super().forward(tokens) + self.blocks[0].ffn[2].weight.square().sum()

    model.__class__ = Regularised


UNTAKEABLE = {
    "tied up and down": (tie_up_and_down, "two of its projections share one weight"),
    "tied to the embedding": (tie_to_embedding, "tokens.weight is tied to blocks.0.ffn.0.weight"),
    "tied to a parameter that does not run": (tie_to_unused, r"blocks.0.ffn.0.weight is tied to spare.weight"),
    "gradient hook": (gradient_hook, "blocks.0.ffn.2.weight has gradient hooks, which would be lost"),
    "hook after accumulation": (accumulation_hook, "blocks.0.ffn.2.bias has gradient hooks, which would be lost"),
    "forward hook": (forward_hook, "module 'blocks.0.ffn.0' has hooks"),
    "forward pre-hook": (forward_pre_hook, "module 'blocks.0.ffn.2' has hooks"),
    "backward hook": (backward_hook, "module 'blocks.0.ffn.0' has hooks"),
    "backward pre-hook": (backward_pre_hook, "module 'blocks.0.ffn.0' has hooks"),
    "tensor subclass": (subclass, "blocks.0.ffn.0.weight is a Tagged of torch.float32: sharded or quantised"),
    "weight decay in the forward": (regularised, "one of its weights is also read by square outside of the block"),
    "weight read under another name": (reads_weight(lambda w, x: w.sum()), "ffn.2.weight is tied to norm.weight"),
}


@pytest.mark.parametrize("name", UNTAKEABLE)
def test_parameters_that_cannot_be_taken_out(name):
    spoil, sentence = UNTAKEABLE[name]
    model = tiny_gpt(layers=2)
    spoil(model, model.blocks[0].ffn)
    spoilt, fine = find_ffns(model)
    assert spoilt.refusal and re.search(sentence, spoilt.refusal), spoilt.refusal
    assert (fine.name, fine.refusal) == ("blocks.1.ffn", None)


def weight_norm(ffn):
    parametrizations.weight_norm(ffn[0])


def old_weight_norm(ffn):
    torch.nn.utils.weight_norm(ffn[2])


def spectral_norm(ffn):
    parametrizations.spectral_norm(ffn[2])


def pruned(ffn):
    prune.l1_unstructured(ffn[0], "weight", 0.5)


def lora_merged_at_use(ffn):
    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(HIDDEN, 4)), nn.Parameter(torch.randn(4, WIDTH))

        def forward(self, weight):
            return weight + self.a @ self.b

    parametrize.register_parametrization(ffn[0], "weight", LowRank())


def nothing_yet(ffn):
    parametrize.register_parametrization(ffn[0], "weight", nn.Identity())


def fake_quantised(ffn):
    class Rounded(nn.Module):
        def forward(self, weight):
            return torch.fake_quantize_per_tensor_affine(weight, 0.1, 0, -128, 127)

    parametrize.register_parametrization(ffn[0], "weight", Rounded())


def quantised_buffer(ffn):
    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.randint(-128, 127, (HIDDEN, WIDTH), dtype=torch.int8))

        def forward(self, x):
            return F.linear(x, self.weight.to(x.dtype) * 0.1)

    ffn[0] = Quantised()


@pytest.mark.parametrize(
    "spoil",
    [
        weight_norm,
        old_weight_norm,
        spectral_norm,
        pruned,
        lora_merged_at_use,
        nothing_yet,
        fake_quantised,
        quantised_buffer,
    ],
)
def test_weights_that_are_no_plain_parameters(spoil):
    model = tiny_gpt(layers=2)
    spoil(model.blocks[0].ffn)
    assert [s.name for s in accepted(find_ffns(model))] == ["blocks.1.ffn"]


def test_a_parametrization_that_does_nothing_yet_is_named():
    model = tiny_gpt(layers=1)
    nothing_yet(model.blocks[0].ffn)
    (site,) = find_ffns(model)
    assert site.refusal == "blocks.0.ffn.0.parametrizations.weight.original is parametrized"


def test_expert_banks():
    class Bank(nn.Module):
        def __init__(self, width, hidden):
            super().__init__()
            self.w1, self.w2 = nn.Parameter(torch.randn(4, hidden, width)), nn.Parameter(torch.randn(4, width, hidden))

        def forward(self, x):
            return F.linear(F.gelu(F.linear(x, self.w1[0])), self.w2[0])

    sites = find_ffns(around(Bank))
    assert len(sites) == 4
    assert all("a weight of it is computed at each call" in s.refusal for s in sites)


def test_hooks_on_the_whole_ffn_stay():
    model = tiny_gpt(layers=1)
    model.blocks[0].ffn.register_forward_hook(lambda module, args, output: output * 1.5)
    (site,) = find_ffns(model)
    assert site.refusal is None


def test_frozen_parameters_are_found():
    model = tiny_gpt(layers=2)
    model.blocks[0].requires_grad_(False)
    assert [s.refusal for s in find_ffns(model)] == [None, None]


def test_inline_blocks_do_not_see_hooks_of_their_attention():
    model = Transformer([InlineGatedBlock(WIDTH, GATED_HIDDEN) for _ in range(2)])
    model.blocks[0].attention.register_forward_hook(lambda module, args, output: None)
    assert [s.refusal for s in find_ffns(model)] == [None, None]


@pytest.mark.parametrize("path", ["ffn.1", "ffn.2"])
def test_hooks_between_the_projections(path):
    model = tiny_gpt(layers=2)
    model.blocks[0].get_submodule(path).register_forward_hook(lambda module, args, output: output)
    first, second = find_ffns(model)
    assert re.search(rf"module 'blocks.0.{path}' has hooks", first.refusal)
    assert second.refusal is None
