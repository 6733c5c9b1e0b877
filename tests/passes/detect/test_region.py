"""The hidden region of an FFN: what may stand between its projections, and each proof that refuses the rest."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memcompile import find_ffns
from memcompile.passes.capture.trace import trace
from memcompile.passes.detect.projection import find_projections
from memcompile.passes.detect.region import Refusal, find_region
from memcompile.passes.detect.token_wise import prove_token_wise
from tests.models import BATCH, HIDDEN, TIME, VOCABULARY, WIDTH, around


class Ffn(nn.Module):
    """``down(hidden(self, up(x)))``, with a spare norm and vector of the hidden width."""

    def __init__(self, width, hidden, between, factor=1):
        super().__init__()
        self.up, self.down = nn.Linear(width, factor * hidden), nn.Linear(hidden, width)
        self.norm, self.vector = nn.LayerNorm(hidden), nn.Parameter(torch.ones(hidden))
        self.slope, self.by_time = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(TIME))
        self.by_feature_and_time = nn.Parameter(torch.ones(TIME, hidden))
        self.between = between

    def forward(self, x):
        return self.down(self.between(self, self.up(x)))


def sites_with(between, hidden=HIDDEN, factor=1):
    model = around(lambda width, _: Ffn(width, hidden, between, factor), layers=2)
    return find_ffns(model, (torch.randint(VOCABULARY, (BATCH, TIME)),))


def gelu_spelt_out(h):
    return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h.pow(3))))


def rms(h):
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


PLAIN = {
    "relu": lambda ffn, h: F.relu(h),
    "in place": lambda ffn, h: F.relu(h, inplace=True),
    "in place, result ignored": lambda ffn, h: (h.relu_(), h)[1],
    "gelu": lambda ffn, h: F.gelu(h),
    "gelu spelt out": lambda ffn, h: gelu_spelt_out(h),
    "quick gelu": lambda ffn, h: h * torch.sigmoid(1.702 * h),
    "squared relu": lambda ffn, h: F.relu(h).square(),
    "relu times itself": lambda ffn, h: F.relu(h) * F.relu(h),
    "power": lambda ffn, h: F.relu(h) ** 2,
    "clamp": lambda ffn, h: h.clamp(min=0),
    "sine": lambda ffn, h: h.sin(),
    "prelu": lambda ffn, h: F.prelu(h, ffn.slope),
    "dropout": lambda ffn, h: F.dropout(F.gelu(h), 0.1),
    "layer norm": lambda ffn, h: ffn.norm(F.gelu(h)),
    "rms norm": lambda ffn, h: F.rms_norm(F.gelu(h), (HIDDEN,), ffn.vector),
    "rms norm spelt out": lambda ffn, h: rms(F.gelu(h)) * ffn.vector,
    "norm before the activation": lambda ffn, h: F.silu(rms(h)),
    "learned scale": lambda ffn, h: F.relu(h) * ffn.vector,
    "cast": lambda ffn, h: F.gelu(h.double()).to(h.dtype),
    "comparison": lambda ffn, h: h * (h > 0),
    "where": lambda ffn, h: torch.where(h > 0, h, 0.01 * h),
    "maximum with zeros": lambda ffn, h: torch.maximum(h, torch.zeros_like(h)),
    "minimum of two": lambda ffn, h: torch.expm1(torch.min(h, torch.zeros(()))) + h.clamp(min=0),
    "masked fill": lambda ffn, h: h.masked_fill(h < 0, 0),
    "sparsified by statistics": lambda ffn, h: F.relu(h - (h.mean(-1, keepdim=True) + h.std(-1, keepdim=True))),
    "statistics without the dimension": lambda ffn, h: F.gelu(h) / h.square().mean(-1).sqrt().unsqueeze(-1),
    "scaled by two of its features": lambda ffn, h: F.gelu(h) * h[..., :2].mean(-1, keepdim=True),
    "dropout spelt out": lambda ffn, h: F.gelu(h) * (torch.rand_like(h) > 0.1) / 0.9,
    "drop path": lambda ffn, h: F.gelu(h) * h.new_empty(h.shape[0], 1, 1).bernoulli_(0.9),
    "concatenated relu": lambda ffn, h: torch.cat([F.relu(h[..., ::2]), F.relu(-h[..., ::2])], -1),
    "norm of a derived scale": lambda ffn, h: F.layer_norm(F.gelu(h), (HIDDEN,)) * (1 + ffn.vector),
    "learned slope through softplus": lambda ffn, h: F.relu(h) * F.softplus(ffn.slope),
    "groups of features": lambda ffn, h: F.gelu(h).unflatten(-1, (4, -1)).transpose(-1, -2).flatten(-2),
    "tokens in one dimension": lambda ffn, h: F.relu(h.reshape(-1, HIDDEN)).view(h.shape),
}
GATED = {
    "chunk": lambda ffn, h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
    "split": lambda ffn, h: (lambda a, b: F.silu(a) * b)(*h.split(HIDDEN, -1)),
    "slices": lambda ffn, h: F.silu(h[..., :HIDDEN]) * h[..., HIDDEN:],
    "interleaved": lambda ffn, h: F.silu(h[..., ::2]) * h[..., 1::2],
    "narrow": lambda ffn, h: F.silu(h.narrow(-1, 0, HIDDEN)) * h.narrow(-1, HIDDEN, HIDDEN),
    "glu": lambda ffn, h: F.glu(h),
    "unbind": lambda ffn, h: (lambda a, b: F.silu(a) * b)(*h.unflatten(-1, (2, HIDDEN)).unbind(-2)),
    "interleaved pairs": lambda ffn, h: F.silu(h.view(*h.shape[:-1], HIDDEN, 2)[..., 0]) * h[..., 1::2],
    "view and index": lambda ffn, h: (lambda u: F.silu(u[..., 0, :]) * u[..., 1, :])(h.view(*h.shape[:2], 2, -1)),
    "bilinear": lambda ffn, h: h[..., :HIDDEN] * h[..., HIDDEN:],
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain(name):
    sites = sites_with(PLAIN[name])
    assert [(s.refusal, s.hidden) for s in sites] == [(None, HIDDEN)] * 2


@pytest.mark.parametrize("name", GATED)
def test_fused_gates(name):
    sites = sites_with(GATED[name], factor=2)
    assert [(s.refusal, s.hidden, len(s.up)) for s in sites] == [(None, HIDDEN, 1)] * 2


def gelu(ffn, h):
    return F.gelu(h)


NO_NONLINEARITY = "no nonlinearity between its projections"
REFUSED = {  # name -> (what stands between, hidden width, the sentence)
    "equal widths": (gelu, WIDTH, r"hidden width equals the model's \(32\)"),
    "nothing": (lambda ffn, h: h, HIDDEN, NO_NONLINEARITY),
    "dropout alone": (lambda ffn, h: F.dropout(h, 0.1), HIDDEN, NO_NONLINEARITY),
    "layer norm alone": (lambda ffn, h: ffn.norm(h), HIDDEN, NO_NONLINEARITY),
    "rms norm spelt out alone": (lambda ffn, h: rms(h), HIDDEN, NO_NONLINEARITY),
    "rms norm of products": (lambda ffn, h: h * torch.rsqrt((h * h).mean(-1, keepdim=True)), HIDDEN, NO_NONLINEARITY),
    "layer norm spelt out": (
        lambda ffn, h: (h - h.mean(-1, keepdim=True)) / h.std(-1, keepdim=True),
        HIDDEN,
        NO_NONLINEARITY,
    ),
    "unit norm": (lambda ffn, h: h / h.norm(dim=-1, keepdim=True), HIDDEN, NO_NONLINEARITY),
    "slope by position": (
        lambda ffn, h: F.prelu(h, ffn.by_time),
        HIDDEN,
        r"a parameter \[5\] that is no vector of hidden features",
    ),
    "bias by position": (
        lambda ffn, h: F.relu(h + ffn.by_feature_and_time),
        HIDDEN,
        r"a parameter \[5, 128\] that is no vector of hidden features",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_reason(name):
    between, hidden, sentence = REFUSED[name]
    sites = sites_with(between, hidden)
    assert sites and all(s.refusal and re.search(sentence, s.refusal) for s in sites), sites


MIXES_TOKENS = {
    "first token": lambda h: h * h[:, :1],
    "shift": lambda h: h + F.pad(h, (0, 0, 1, 0))[:, :-1],
    "concatenated": lambda h: torch.cat([h[:, :1], h[:, :-1]], 1),
    "roll": lambda h: h + h.roll(1, 1),
    "cumsum": lambda h: h.cumsum(1),
    "flip": lambda h: h * h.flip(1),
    "mean over tokens": lambda h: h - h.mean(1, keepdim=True),
    "variance over tokens": lambda h: h / h.var(1, keepdim=True),
    "maximum over tokens": lambda h: h / h.amax(1, keepdim=True),
    "norm over tokens": lambda h: h / h.norm(dim=1, keepdim=True),
    "mean of all": lambda h: h / h.mean(),
    "softmax over tokens": lambda h: h * h.softmax(1),
    "softmax over features": lambda h: h.softmax(-1),  # token-wise, but a memory or an attention, not an FFN
    "batch norm": lambda h: F.batch_norm(h.transpose(1, 2), None, None, training=True).transpose(1, 2),
    "norm over tokens and features": lambda h: F.layer_norm(h, h.shape[1:]),
    "convolution": lambda h: F.avg_pool1d(h.transpose(1, 2), 3, 1, 1).transpose(1, 2),
    "transposed": lambda h: h.transpose(0, 1).reshape(h.shape) + h,
    "tokens into features": lambda h: h.reshape(BATCH, HIDDEN, TIME).relu().reshape(h.shape) * h,
    "chunk of tokens": lambda h: h * F.pad(h, (0, 0, 0, 1)).chunk(2, 1)[0].mean(1, keepdim=True),
    "attention": lambda h: F.scaled_dot_product_attention(h, h, h),
    "top-k over features": lambda h: h * (h >= h.topk(8, -1).values[..., -1:]),
}


@pytest.mark.parametrize("name", MIXES_TOKENS)
def test_what_mixes_tokens_is_no_ffn(name):
    assert all(s.refusal for s in sites_with(lambda ffn, h: MIXES_TOKENS[name](F.gelu(h))))


class Whole(nn.Module):
    """An FFN whose whole forward is given: ``forward(ffn, x)``."""

    def __init__(self, forward, hidden=HIDDEN):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(WIDTH, hidden), nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        self.low, self.high = nn.Linear(hidden, 4, bias=False), nn.Linear(4, WIDTH, bias=False)
        self.low_in, self.high_in = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, hidden, bias=False)
        self.low_in.bias_by_time = nn.Parameter(torch.ones(TIME))
        self.slope = nn.Parameter(torch.ones(1))
        self.run, self.kept = forward, None

    def forward(self, x):
        return self.run(self, x)


def sites_of(forward):
    model = around(lambda width, hidden: Whole(forward), layers=2)
    return find_ffns(model, (torch.randint(VOCABULARY, (BATCH, TIME)),))


def probe(ffn, x):
    h = F.gelu(ffn.up(x))
    return ffn.down(h) + 0.01 * ffn.low(h).sum()


def l1(ffn, x):
    h = F.gelu(ffn.up(x))
    return ffn.down(h) + h.abs().mean()


def kept_l1(ffn, x):
    h = F.gelu(ffn.up(x))
    ffn.kept = h.abs().mean()
    return ffn.down(h)


def lora_down(ffn, x):
    h = F.gelu(ffn.up(x))
    return ffn.down(h) + ffn.high(ffn.low(h))


def index_assignment(ffn, x):
    h = F.relu(ffn.up(x)).clone()
    h[:, 0] = 0
    return ffn.down(h)


def overwritten_source(ffn, x):
    y = x * 2
    h = ffn.up(y)
    y.zero_()
    return ffn.down(F.relu(h))


def overwritten_view_of_source(ffn, x):
    y = x * 2
    h = ffn.up(y)
    y.view(-1, WIDTH).zero_()
    return ffn.down(F.relu(h))


def pairs_of_tokens(ffn, x):
    h = ffn.up(x)
    return ffn.down(F.relu(h[:, None] + h[:, :, None])).sum(1)


READ_OUTSIDE = "its hidden activation is also read by"
NOT_CLOSED = {
    "probe": (probe, READ_OUTSIDE + " linear"),
    "penalty": (l1, READ_OUTSIDE + " abs"),
    "penalty kept on the module": (kept_l1, READ_OUTSIDE + " abs"),
    "LoRA on the down-projection": (lora_down, READ_OUTSIDE + " linear"),
    "index assignment": (index_assignment, READ_OUTSIDE + " select"),
    "pairs of tokens": (pairs_of_tokens, "its source and its output do not hold the same tokens"),
    "source overwritten": (overwritten_source, "zero_? writes in place to its source before the block ends"),
    "view of the source overwritten": (
        overwritten_view_of_source,
        "zero_? writes in place to its source before the block ends",
    ),
}


@pytest.mark.parametrize("name", NOT_CLOSED)
def test_refused_where_something_else_sees_it(name):
    forward, sentence = NOT_CLOSED[name]
    sites = sites_of(forward)
    assert sites and all(s.refusal and re.search(sentence, s.refusal) for s in sites), sites


def test_source_overwritten_after_the_block_is_fine():
    def forward(ffn, x):
        y = x * 2
        z = ffn.down(F.relu(ffn.up(y)))
        y.zero_()
        return z

    assert [s.refusal for s in sites_of(forward)] == [None, None]


def test_a_parameter_overwritten_within_the_block():
    def decayed_slope(ffn, x):
        with torch.no_grad():
            slope = ffn.slope.mul_(0.9)
        return ffn.down(F.relu(ffn.up(x)) * slope)

    # On one token, where a parameter has as many tokens as the stream.
    (site,) = find_ffns(around(lambda width, hidden: Whole(decayed_slope), layers=1), (torch.zeros(1, 1).long(),))
    assert site.refusal == "mul writes in place to a tensor outside of the block"


def groups(h):
    return h.view(*h.shape[:2], 4, -1)


def mask_by_position(h):
    mask = torch.zeros_like(h)
    mask[:, 1:] = 1
    return mask


NOT_THE_SHAPE = {
    "tokens moved": lambda f, x: f.down(F.gelu(groups(f.up(x)).movedim(1, 2).reshape(*x.shape[:2], -1))),
    "every dimension turned": lambda f, x: f.down(
        F.gelu(groups(f.up(x)).permute(3, 2, 1, 0).reshape(*x.shape[:2], -1))
    ),
    "tokens transposed": lambda f, x: f.down(F.gelu(f.up(x).transpose(0, 1).reshape(*x.shape[:2], -1))),
    "a mask written in part": lambda f, x: f.down(F.gelu(f.up(x)) * mask_by_position(f.up(x))),
    "a mask of zeros and ones": lambda f, x: (lambda h: f.down(F.gelu(h) * mask_by_position(h)))(f.up(x)),
    "a random mask by position": lambda f, x: (
        lambda h: f.down(F.gelu(h) * (torch.rand(TIME, 1) + torch.arange(TIME)[:, None]))
    )(f.up(x)),
    "LoRA on the up-projection": lambda f, x: f.down(F.gelu(f.up(x) + f.high_in(f.low_in(x)))),
    "two sources": lambda f, x: f.down(F.silu(f.gate(x)) * f.up(x.flip(1))),
    "source of half the width": lambda f, x: f.down(F.gelu(f.up(x)) * x.mean(-1, keepdim=True)),
    "three projections": lambda f, x: f.down(F.gelu(f.up(x)) * f.gate(x) * F.linear(x, f.gate.weight[:])),
    "scale by position": lambda f, x: f.down(F.relu(f.up(x) * f.low_in.bias_by_time[:, None])),
    "a mask from outside": lambda f, x: f.down(F.gelu(f.up(x)) * torch.ones(TIME, 1).tril()),
}


@pytest.mark.parametrize("name", NOT_THE_SHAPE)
def test_what_has_not_the_shape_of_an_ffn(name):
    assert all(s.refusal for s in sites_of(NOT_THE_SHAPE[name]))


def test_gated_in_two():
    (site, _) = sites_of(lambda f, x: f.down(F.silu(f.gate(x)) * f.up(x)))
    assert site.refusal is None
    assert site.up == ("blocks.0.ffn.gate.weight", "blocks.0.ffn.up.weight")
    assert site.pattern == "linear > linear > silu > mul > linear"


def test_an_adapter_is_refused_and_not_listed():
    model = around(lambda width, _: Ffn(width, 8, gelu), layers=1)
    (capture,) = trace(model)
    projections = find_projections(capture)
    regions = [find_region(p, projections, capture) for p in projections.values() if p.width_in == 8]
    (region,) = [r for r in regions if r is not None]
    with pytest.raises(Refusal, match="hidden width 8 is below the model's 32: an adapter"):
        prove_token_wise(region, capture)
    assert not find_ffns(model)
