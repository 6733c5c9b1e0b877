"""What is added to a replaced FFN after planning raises at the first forward; what the FFN did itself goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import memcompile
from memcompile import CaptureError
from tests.models import HIDDEN, WIDTH, Transformer, around
from tests.planned import MEMORY, batch

ADDED = r"in blocks\.1\.ffn, .* was not part of the FFN when the model was planned .*placement='add'.*the memory layer"


class SteppedFfn(nn.Module):
    """Runs `steps` between its projections. A step that returns nothing has worked in place."""

    def __init__(self, steps: list[Callable]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.norm, self.drop = nn.LayerNorm(HIDDEN), nn.Dropout(0.1)
        self.gamma = nn.Parameter(torch.ones(HIDDEN))
        self.register_buffer("scale", torch.rand(HIDDEN))
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        for step in self.steps:
            result = step(self, h)
            h = h if result is None else result
        return self.down(h)


def stepped(steps: list[Callable], layers: int = 2) -> Transformer:
    torch.manual_seed(0)
    return around(lambda width, hidden: SteppedFfn(list(steps)), layers=layers)


def planned(steps: list[Callable]) -> Transformer:
    model = stepped(steps)
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    return model


def nothing(operate: Callable) -> Callable:
    """The step that does this in place and returns nothing, as a hook may."""

    def step(ffn: SteppedFfn, h: Tensor) -> None:
        operate(ffn, h)

    return step


def _spelt_dropout(ffn: SteppedFfn, h: Tensor) -> Tensor:
    return h * (torch.rand_like(h) > 0.1) / 0.9 if ffn.training else h


OWN: dict[str, Callable] = {
    "activation": lambda ffn, h: F.gelu(h),
    "activation in place": lambda ffn, h: F.relu(h, inplace=True),
    "gate of itself": lambda ffn, h: h * torch.sigmoid(h),
    "numbers": lambda ffn, h: 0.5 * h + 1,
    "numbers in place": nothing(lambda ffn, h: h.mul_(2).clamp_(max=3)),
    "a buffer": lambda ffn, h: h * ffn.scale,
    "a learned vector": lambda ffn, h: h * (1 + ffn.gamma),
    "norm": lambda ffn, h: ffn.norm(h),
    "dropout": lambda ffn, h: ffn.drop(h),
    "dropout spelt out": _spelt_dropout,
    "mask": lambda ffn, h: h.masked_fill(h < 0, 0.0),
    "halves": lambda ffn, h: torch.cat([h[..., :64].tanh(), h[..., 64:]], -1),
    "a copy": lambda ffn, h: h.clone(),
    "views": lambda ffn, h: h.flatten(0, -2).unflatten(0, h.shape[:-1]).contiguous(),
}


@pytest.mark.parametrize("name", OWN)
def test_what_the_ffn_did_itself_goes_on(name):
    model, (tokens, targets) = planned([OWN["activation"], OWN[name]]), batch()
    for mode in (True, False):
        assert model.train(mode)(tokens, targets).isfinite()
    model(tokens[:1, :3])
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, targets).backward()
    model.bfloat16()(tokens)


def test_it_was_planned_in_eval_mode():
    model = stepped([OWN["activation"], OWN["dropout spelt out"]]).eval()
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    assert not any(module.training for module in model.modules())
    model.train()(*batch()).backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_that_comes_later(use_reentrant):
    model, (tokens, targets) = planned([OWN["activation"], OWN["norm"], OWN["numbers in place"]]), batch()
    expected = model(tokens, targets)
    ffn, forward = model.blocks[1].ffn, model.blocks[1].ffn.forward
    ffn.forward = lambda x: checkpoint(forward, x, use_reentrant=use_reentrant)
    loss = model(tokens, targets)
    loss.backward()
    assert torch.equal(loss, expected)


def test_numbers_and_dropouts_of_the_ffn_may_change():
    """Like its weights, they are gone."""
    model, (tokens, _) = planned([OWN["activation"], OWN["numbers"], OWN["dropout"]]).eval(), batch()
    expected = model(tokens)
    ffn = model.blocks[1].ffn
    ffn.steps[1] = lambda ffn, h: 0.25 * h + 2
    assert torch.equal(model(tokens), expected)
    ffn.drop.p = 0.7
    assert torch.equal(model(tokens), expected)
    ffn.drop = nn.Identity()
    assert torch.equal(model(tokens), expected)


ADDITIONS: dict[str, Callable] = {
    "steering vector": lambda ffn, h: h + torch.ones(HIDDEN),
    "vector in place": nothing(lambda ffn, h: h.add_(torch.ones(HIDDEN))),
    "mask": lambda ffn, h: h * (torch.arange(HIDDEN) < 3),
    "mask in place": nothing(lambda ffn, h: h.mul_(torch.arange(HIDDEN) < 3)),
    "augmented assignment": nothing(lambda ffn, h: h.__imul__(torch.zeros(HIDDEN))),
    "a view in place": nothing(lambda ffn, h: h[..., :3].mul_(0)),
    "a part in place": nothing(lambda ffn, h: h.chunk(2, -1)[0].sub_(1)),
    "items": nothing(lambda ffn, h: h.__setitem__((..., slice(3)), 0)),
    "data": nothing(lambda ffn, h: setattr(h, "data", torch.zeros(h.shape))),
    "out": nothing(lambda ffn, h: torch.mul(h, 0, out=h)),
    "learned scale": lambda ffn, h: h * nn.Parameter(torch.zeros(HIDDEN)),
    "scale of a parameter": lambda ffn, h: h * (ffn.gamma * nn.Parameter(torch.zeros(HIDDEN))),
    "zero": lambda ffn, h: h * 0,
    "masked_fill_": nothing(lambda ffn, h: h.masked_fill_(torch.arange(HIDDEN) < 3, 0.0)),
    "where": lambda ffn, h: torch.where(torch.arange(HIDDEN) < 3, h, 0.0),
    "joined": lambda ffn, h: torch.cat([h[..., :64], torch.zeros(*h.shape[:-1], 64)], -1),
    "fewer features": lambda ffn, h: h[..., :64],
    "activation": lambda ffn, h: h.relu(),
    "dropout": lambda ffn, h: F.dropout(h, 0.5),
    "detached": lambda ffn, h: h.detach(),
    "statistics": nothing(lambda ffn, h: h.abs().mean(-1)),
    "a float": nothing(lambda ffn, h: h.mean().item()),
    "another tensor": lambda ffn, h: torch.zeros(*h.shape),
    "like it": lambda ffn, h: torch.zeros_like(h),
    "adapter of it": lambda ffn, h: h + F.linear(h, torch.ones(HIDDEN, HIDDEN)),
    "written into a tensor": lambda ffn, h: torch.zeros(HIDDEN).add_(h),
}


@pytest.fixture(scope="module")
def plain() -> Transformer:
    return planned([OWN["activation"]])


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("name", ADDITIONS)
def test_what_is_added_raises(name, at, plain):
    model, (tokens, _) = plain, batch()
    model.blocks[1].ffn.steps.insert(at, ADDITIONS[name])
    try:
        with pytest.raises(CaptureError, match=r"blocks\.1\.ffn"):
            model(tokens)
    finally:
        del model.blocks[1].ffn.steps[at]
    model(tokens)


def test_the_error_says_what_where_and_the_fix():
    model, (tokens, _) = planned([OWN["activation"]]), batch()
    model.blocks[1].ffn.steps.append(ADDITIONS["mask"])
    message = rf"`mul` of {HIDDEN} features with a tensor of shape \({HIDDEN},\) {ADDED}"
    with pytest.raises(CaptureError, match=message):
        model(tokens)
    with pytest.raises(CaptureError, match=message):
        torch.compile(model, backend="eager")(tokens)
    with pytest.raises(CaptureError, match=message):
        torch.export.export(model, (tokens,), strict=False)
    with pytest.raises(Exception, match="was not part of the FFN"):  # Dynamo quotes it in an error of its own
        torch.compile(model, backend="eager", fullgraph=True)(tokens)


def test_what_is_left_out_raises():
    model, (tokens, _) = planned([OWN["norm"], OWN["activation"]]), batch()
    model.blocks[1].ffn.steps = [OWN["norm"]]
    with pytest.raises(CaptureError, match=rf"`projection` of {HIDDEN} features {ADDED[:20]}.*\(gelu came next\)"):
        model(tokens)


_NEUTRAL = {
    "views": OWN["views"],
    "no dropout": lambda ffn, h: F.dropout(h, 0.0),
    "eval": lambda ffn, h: F.dropout(h, 0.5, False),
}


@given(
    st.lists(st.sampled_from(sorted(OWN)), max_size=4),
    st.sampled_from(sorted(ADDITIONS.items()) + sorted(_NEUTRAL.items())),
    st.integers(0, 5),
)
@settings(max_examples=15, deadline=None)
def test_a_forward_is_as_before_or_raises(own, addition, at):
    """Whatever the FFN is made of, and wherever something is added to it, which would change the dense model."""
    steps = [OWN["activation"], *(OWN[name] for name in own)]
    dense, (tokens, _) = stepped(steps, layers=1), batch()
    model = copy.deepcopy(dense)
    memcompile.plan(model, memory_layers=1, **MEMORY)
    name, step = addition
    expected = [_run(m, tokens) for m in (dense, model)]
    for m in (dense, model):
        m.blocks[0].ffn.steps.insert(min(at, len(steps)), step)
    try:
        changes = not torch.equal(_run(dense, tokens), expected[0])
    except RuntimeError:  # nor does it fit the dense FFN
        changes = True
    try:
        output = _run(model, tokens)
    except CaptureError:
        assert name not in _NEUTRAL
    else:
        assert torch.equal(output, expected[1]) and not changes, f"{name} was dropped"


def _run(model: nn.Module, tokens: Tensor) -> Tensor:
    torch.manual_seed(3)
    return model(tokens).detach()
