"""Where an FFN's output goes: the residual stream that it read, in every form; or it is a head, a gate, an expert."""

import functools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memcompile import find_ffns
from tests.models import BATCH, HIDDEN, TIME, VOCABULARY, WIDTH, Attention, Transformer, plain_ffn


class Block(nn.Module):
    """``forward(block, x, y)`` with ``y`` the attention's sum; norms, scales and a second FFN to spare."""

    def __init__(self, forward):
        super().__init__()
        self.attention, self.ffn, self.other = Attention(WIDTH), plain_ffn(WIDTH, HIDDEN), plain_ffn(WIDTH, HIDDEN)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.scale, self.alpha = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(1))
        self.condition, self.router = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(plain_ffn(WIDTH, HIDDEN) for _ in range(4))
        self.small = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH))
        self.run, self.kept = forward, []

    def forward(self, x):
        return self.run(self, x + self.attention(self.norm1(x)))


def sites_of(forward):
    model = Transformer([Block(forward) for _ in range(2)])
    return find_ffns(model, (torch.randint(VOCABULARY, (BATCH, TIME)),))


def rms(x):
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)


def stochastic_depth(b, x):
    y = b.ffn(b.norm2(x))
    keep = torch.rand(y.shape[0], 1, 1).add_(0.9).floor_()
    return x + y.div(0.9) * keep


def adaln(b, x):
    shift, scale, gate = b.condition(F.silu(x.mean(1)))[:, None].chunk(3, -1)
    return x + gate * b.ffn(b.norm2(x) * (1 + scale) + shift)


def in_place(b, x):
    x += b.ffn(b.norm2(x))
    return x


JOINS = {
    "pre-norm": lambda b, x: x + b.ffn(b.norm2(x)),
    "no norm": lambda b, x: x + b.ffn(x),
    "post-norm": lambda b, x: b.norm2(x + b.ffn(x)),
    "output first": lambda b, x: b.ffn(b.norm2(x)) + x,
    "sandwich": lambda b, x: x + b.norm3(b.ffn(b.norm2(x))),
    "rms norm spelt out": lambda b, x: x + rms(b.ffn(rms(x))),
    "layer scale": lambda b, x: x + b.scale * b.ffn(b.norm2(x)),
    "rezero": lambda b, x: x + b.alpha * b.ffn(x),
    "residual scale": lambda b, x: (x + 0.5 * b.ffn(b.norm2(x))) * 0.7,
    "scaled stream": lambda b, x: b.norm2(1.7 * x + b.ffn(x)),
    "dropout": lambda b, x: x + F.dropout(b.ffn(b.norm2(x)), 0.1),
    "masked": lambda b, x: x + (x.sum(-1, keepdim=True) * 0 + 1) * b.ffn(b.norm2(x)),
    "subtracted": lambda b, x: x - b.ffn(b.norm2(x)),
    "in place": in_place,
    "stochastic depth": stochastic_depth,
    "adaptive norm": adaln,
    "gated output": lambda b, x: x + torch.sigmoid(b.alpha) * b.ffn(b.norm2(x)),
    "parallel attention": lambda b, x: x + b.attention(b.norm2(x)) + b.ffn(b.norm2(x)),
    "parallel adapter": lambda b, x: x + b.ffn(b.norm2(x)) + b.small(x),
    "tokens in one dimension": lambda b, x: (x.view(-1, WIDTH) + b.ffn(b.norm2(x.view(-1, WIDTH)))).view(x.shape),
    "interpolated": lambda b, x: torch.lerp(x, b.ffn(b.norm2(x)), 0.5),
    "a step towards it": lambda b, x: x + b.scale * (F.normalize(b.ffn(x), dim=-1) - x),
    "fused layer scale": lambda b, x: torch.addcmul(x, b.ffn(b.norm2(x)), b.scale),
    "shifted source": lambda b, x: x + b.ffn(F.pad(b.norm2(x), (0, 0, 1, -1))),
    "squashed source": lambda b, x: x + b.ffn(torch.tanh(b.alpha * x) * b.scale),
    "some tokens": lambda b, x: torch.cat([x[:, :2] + b.ffn(b.norm2(x[:, :2])), x[:, 2:]], 1),
    "drop path": lambda b, x: x + (lambda y: y * y.new_empty(len(y), 1, 1).bernoulli_(0.9))(b.ffn(b.norm2(x))),
    "row by row": lambda b, x: x + torch.stack([b.ffn(b.norm2(row)) for row in x]),
    "batch norm": lambda b, x: x + b.ffn(F.batch_norm(x.mT, None, None, training=True).mT),
    "centred source": lambda b, x: x + b.ffn(x - x.mean(1, keepdim=True)),
}


@pytest.mark.parametrize("name", JOINS)
def test_joins_the_stream(name):
    accepted = [s for s in sites_of(JOINS[name]) if s.refusal is None]
    assert [s.down for s in accepted] == ["blocks.0.ffn.2.weight", "blocks.1.ffn.2.weight"]


def serial_adapter(b, x):
    y = b.ffn(b.norm2(x))
    return x + y + b.small(y)


def kept(b, x):
    y = b.ffn(b.norm2(x))
    b.kept.append(y.detach().norm())
    return x + y


def routed(b, x):
    weights, chosen = b.router(x).softmax(-1).topk(1, -1)
    return x + weights * b.ffn(x) + 0 * chosen.sum()


def shared_expert(b, x):
    """Beside experts that are masked, not gathered; the router reads through its own norm."""
    weight, chosen = b.router(b.norm3(x)).softmax(-1).max(-1, keepdim=True)
    return x + b.ffn(b.norm2(x)) + sum(weight * (chosen == i) * e[0](x).sum() for i, e in enumerate(b.experts))


def gathered(b, x):
    picked = x.flatten(0, 1)[torch.arange(4)]
    return x.flatten(0, 1).index_add(0, torch.arange(4), b.ffn(picked) + picked).view(x.shape)


def dense_mixture(b, x):
    p = b.router(x).softmax(-1)
    return x + sum(p[..., i : i + 1] * e(x) for i, e in enumerate(b.experts))


def mixture_of_depths(b, x):
    weights, chosen = b.router(x)[..., 0].topk(2, -1)
    index = chosen[..., None].expand(-1, -1, WIDTH)
    y = x.gather(1, index)
    y = y + b.attention(b.norm1(y))
    y = y + b.ffn(b.norm2(y))
    return x.scatter_add(1, index, y * weights[..., None])


class Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, b):
        return x + b.ffn(b.norm2(x))

    @staticmethod
    def backward(ctx, grad):
        return grad, None


BROADCAST = "its output is broadcast over the stream: it conditions tokens"
NO_STREAM = "not to the residual stream that it read|its output has several consumers \\(add, layer_norm\\)"
PARALLEL = "several blocks read one stream"
EXPERT = "an expert of a mixture, not a dense FFN"
GATE = "its output scales the stream that it read: a gate"
REFUSED = {
    "no residual": (lambda b, x: b.ffn(b.norm2(x)), NO_STREAM),
    "penalty on the output": (kept, r"its output has several consumers \(add, detach\)"),
    "serial adapter": (serial_adapter, r"its output has several consumers \(add, linear\)"),
    "conditions all tokens": (lambda b, x: x + b.ffn(x.mean(1, keepdim=True)), BROADCAST),
    "first token conditions all": (lambda b, x: x + b.ffn(b.norm2(x[:, :1])), NO_STREAM + "|" + BROADCAST),
    "softmax of the output": (lambda b, x: x + b.ffn(b.norm2(x)).softmax(-1), "its output goes to softmax"),
    "mean over tokens": (lambda b, x: x + b.ffn(x).mean(1, keepdim=True).expand_as(x), "its output goes to mean"),
    "gate": (lambda b, x: x + x * torch.sigmoid(b.ffn(x)), "its output goes to sigmoid"),
    "bare gate": (lambda b, x: x + x * b.ffn(x), GATE),
    "gate around one": (lambda b, x: x * (1 + b.ffn(b.norm2(x))), GATE),
    "divisor": (lambda b, x: x + b.norm2(x) / b.ffn(b.norm2(x)), GATE),
    "autoencoder with a square": (lambda b, x: x + (lambda e: (e * e).mean())(x - b.ffn(x)), "an autoencoder"),
    "autoencoder with a variance": (lambda b, x: x + (lambda e: (e / e.std()).mean())(x - b.ffn(x)), "an autoencoder"),
    "repeated by expand": (lambda b, x: x + b.ffn(x[:, :1]).expand_as(x), BROADCAST),
    "repeated by cat": (lambda b, x: x + torch.cat([b.ffn(x[:, :1])] * x.shape[1], 1), BROADCAST),
    "weight of an interpolation": (
        lambda b, x: torch.lerp(x, b.condition(x)[..., :WIDTH], b.ffn(x)),
        "its output goes to|its output has several consumers",
    ),
    "mixture of depths": (mixture_of_depths, "picked out of the stream and scattered back: a mixture of depths"),
    "custom function": (lambda b, x: Reversible.apply(x, b), "it runs inside Reversible"),
    "autoencoder": (lambda b, x: x + (x - b.ffn(x)).pow(2).mean(), "only feeds a penalty: an autoencoder"),
    "norm over all tokens": (
        lambda b, x: x + (lambda y: y / (1 + y.norm()))(b.ffn(x)),
        r"its output has several consumers \(div, norm\)|linalg_vector_norm",
    ),
    "routed": (routed, "a router reads the same stream: " + EXPERT),
    "shared expert": (shared_expert, "a router reads the same stream: " + EXPERT),
    "gathered tokens": (gathered, "its tokens are picked by index: " + EXPERT),
    "parallel branches": (lambda b, x: x + b.ffn(b.norm2(x)) + b.other(b.norm2(x)), PARALLEL),
    "parallel branches with their own norms": (lambda b, x: x + b.ffn(b.norm2(x)) + b.other(b.norm3(x)), PARALLEL),
    "dense mixture": (dense_mixture, PARALLEL + "|" + EXPERT),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_reason(name):
    forward, sentence = REFUSED[name]
    sites = sites_of(forward)
    assert sites and all(s.refusal and re.search(sentence, s.refusal) for s in sites), sites


def test_router_of_the_next_block():
    """Near enough to be met from a projection of this one that reads the same stream, with no norm as an operator."""

    def parallel(b, x):
        return x + b.ffn(x) + b.condition(x)[..., :WIDTH].mean(1, keepdim=True)

    def unattended(b, x):
        b.attention.forward = torch.zeros_like
        return b.run(b, x)

    blocks = [Block(parallel), Block(lambda b, x: routed(b, rms(x)))]
    for block in blocks:
        block.forward = functools.partial(unattended, block)
    sites = find_ffns(Transformer(blocks), (torch.randint(VOCABULARY, (BATCH, TIME)),))
    refused = {site.down: site.refusal for site in sites if site.down.startswith("blocks.")}
    assert refused["blocks.0.ffn.2.weight"] is None
    assert "a router reads the same stream" in refused["blocks.1.ffn.2.weight"]


def test_unused_output():
    def unused(b, x):
        b.ffn(b.norm2(x))
        return x

    assert [s.refusal for s in sites_of(unused)] == ["its output is not used"] * 2


def test_heads_of_a_wider_stream():
    """Each token cut into four of a quarter of the width."""

    class Grouped(Block):
        def __init__(self):
            super().__init__(lambda b, x: x + b.ffn(x.unflatten(-1, (4, -1))).flatten(-2))
            self.ffn = plain_ffn(WIDTH // 4, HIDDEN)

    sites = find_ffns(Transformer([Grouped()]), (torch.randint(VOCABULARY, (BATCH, TIME)),))
    assert [s.refusal for s in sites] == ["it works on parts of a stream that is 32 wide: heads or groups, not tokens"]


def test_last_block_whose_output_is_not_used():
    class FeaturesBeforeTheLast(Transformer):
        def forward(self, tokens):
            outputs = [self.tokens(tokens)]
            for block in self.blocks:
                outputs.append(block(outputs[-1]))
            return self.head(outputs[-2])

    model = FeaturesBeforeTheLast([Block(JOINS["pre-norm"]) for _ in range(2)])
    assert [s.refusal for s in find_ffns(model)] == [None, None]


class Heads(nn.Module):
    """A Transformer's output under the heads that look most like FFNs."""

    def __init__(self):
        super().__init__()
        self.body = Transformer([Block(JOINS["pre-norm"]) for _ in range(2)])
        self.body.head = nn.Identity()
        self.projector, self.value = plain_ffn(WIDTH, HIDDEN), nn.Sequential(nn.Linear(WIDTH, 80), nn.Tanh())
        self.to_value, self.transform = nn.Linear(80, 1), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.pooler = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens):
        x = self.body(tokens)
        return self.projector(x), self.to_value(self.value(x)), self.transform(x), self.pooler(x[:, 0]).tanh()


def test_heads_are_left_alone():
    sites = find_ffns(Heads())
    assert [s.name for s in sites if s.refusal is None] == ["body.blocks.0.ffn", "body.blocks.1.ffn"]
    (head,) = [s for s in sites if s.name == "projector"]
    assert head.refusal == "its output leaves the model before it joins a residual stream: a head, not an FFN"
