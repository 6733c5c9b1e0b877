"""Which dimension counts features: an MLP over tokens (MLP-Mixer) has every size of an FFN, and is none."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memcompile import find_ffns
from memcompile.passes.capture.trace import trace
from memcompile.passes.detect.layout import stream_read
from memcompile.passes.fx import operator_name
from tests.models import BATCH, WIDTH, Block, Transformer, plain_ffn, tiny_gpt

TOKENS = 16


class Mixer(nn.Module):
    """A mixer of 16 tokens with 16 channels: ``mix(mixer, x)`` mixes tokens, the FFN mixes channels."""

    def __init__(self, mix, channels=TOKENS):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.token_norm = nn.LayerNorm(TOKENS)
        self.tokens, self.ffn = plain_ffn(TOKENS, 64), plain_ffn(channels, 64)
        self.mix = mix

    def forward(self, x):
        x = self.mix(self, x)
        return x + self.ffn(self.norm2(x))


class Images(nn.Module):
    """Patches by convolution, so that channels come second and are transposed once."""

    def __init__(self, mix):
        super().__init__()
        self.patches = nn.Conv2d(3, TOKENS, kernel_size=8, stride=8)
        self.blocks = nn.Sequential(Mixer(mix), Mixer(mix))

    def forward(self, x):
        return self.blocks(self.patches(x).flatten(2).transpose(1, 2))


def residual_within(m, x):
    y = x.transpose(1, 2)
    return (y + m.tokens(y)).transpose(1, 2)


def norm_over_tokens(m, x):
    y = m.norm1(x).transpose(1, 2)
    return (y + m.tokens(m.token_norm(y))).transpose(1, 2)


def norm_first(m, x):
    y = m.norm1(x).transpose(1, 2)
    return (y + m.tokens(y)).transpose(1, 2)


def permuted_and_reshaped(m, x):
    y = m.norm1(x).permute(0, 2, 1).reshape(-1, TOKENS)
    return (y + m.tokens(y)).view(BATCH, TOKENS, TOKENS).permute(0, 2, 1)


MIXERS = {
    "MLP-Mixer": lambda m, x: x + m.tokens(m.norm1(x).transpose(1, 2)).transpose(1, 2),
    "residual within": residual_within,
    "norm first": norm_first,
    "norm over tokens": norm_over_tokens,
    "permuted and reshaped": permuted_and_reshaped,
}


@pytest.mark.parametrize("name", MIXERS)
def test_only_channels_are_features(name):
    sites = find_ffns(Images(MIXERS[name]), (torch.randn(BATCH, 3, 32, 32),))
    accepted = [s.name for s in sites if s.refusal is None]
    assert not any("tokens" in n for n in accepted)
    if name == "MLP-Mixer":
        assert accepted == ["blocks.0.ffn", "blocks.1.ffn"]


def test_the_refusal_names_what_holds_the_features():
    sites = find_ffns(Images(norm_first), (torch.randn(BATCH, 3, 32, 32),))
    refusals = {s.name: s.refusal for s in sites if "tokens" in s.name}
    assert refusals["blocks.0.tokens"] == "its features are the tokens of an earlier layer_norm: it mixes tokens"


class Transposed(nn.Module):
    """A Transformer whose stream is [time, batch, width], or [batch, width, time] between its blocks."""

    def __init__(self, there, back):
        super().__init__()
        self.blocks = nn.ModuleList(Block(WIDTH, plain_ffn(WIDTH, 80)) for _ in range(2))
        self.embedding, self.there, self.back = nn.Embedding(50, WIDTH), there, back

    def forward(self, tokens):
        x = self.there(self.embedding(tokens))
        for block in self.blocks:
            x = self.there(block(self.back(x)))
        return x


def test_without_a_norm_the_stem_says_which_are_channels():
    sites = find_ffns(Images(residual_within), (torch.randn(BATCH, 3, 32, 32),))
    refusals = {s.name: s.refusal for s in sites if "tokens" in s.name}
    assert refusals["blocks.0.tokens"] == "its features are the tokens of an earlier conv2d: it mixes tokens"


@pytest.mark.parametrize("dims", [(0, 1), (1, 2)])
def test_transposes_that_are_undone_do_no_harm(dims):
    model = Transposed(lambda x: x.transpose(*dims), lambda x: x.transpose(*dims))
    assert [s.refusal for s in find_ffns(model)] == [None, None]


def test_stream_read_looks_behind_norms_and_scales():
    class Net(Transformer):
        def forward(self, tokens):
            x = self.tokens(tokens) + self.positions(tokens)
            y = F.layer_norm(x, (WIDTH,)).double().float() * 2 * self.norm.weight
            y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True))
            return self.head(y.flatten(0, 1))

    (capture,) = trace(Net([]))
    (head,) = [n for n in capture.graph.nodes if operator_name(n) == "linear"]
    stream = stream_read(head.args[0], capture)
    assert operator_name(stream) == "add"
    assert [operator_name(a) for a in stream.args] == ["embedding", "embedding"]


def test_stream_read_stops_at_sums_of_the_stream():
    (capture,) = trace(tiny_gpt(layers=1))
    linears = [n for n in capture.graph.nodes if operator_name(n) == "linear"]
    reads = [stream_read(n.args[0], capture) for n in linears]
    names = [operator_name(n) for n in reads]
    assert names == ["embedding", "flatten", "add", "linear", "add"]
    assert reads[2] is not reads[4]
