"""Stand-ins: token-wise operators pass, everything else names the block; reading a replaced parameter names it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memcompile
from memcompile import CaptureError
from memcompile.runtime.stand_ins.replaced import HiddenActivation, ReplacedParameter
from tests.models import HIDDEN, WIDTH, around
from tests.planned import MEMORY, planned_gpt
from tests.runtime.stand_ins.operated import TOKEN_WISE, OperatedFfn, have_had


@pytest.fixture
def ffn() -> OperatedFfn:
    model = around(OperatedFfn, layers=2)
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    return model.blocks[1].ffn


MIXING: dict[str, Callable] = {
    "roll": lambda h: torch.roll(h, 1, 1),
    "cumsum": lambda h: h.cumsum(1),
    "flip": lambda h: h.flip(1),
    "softmax": lambda h: h.softmax(-1),
    "top-k": lambda h: h.topk(2),
    "transposed": lambda h: h.transpose(1, 2),
    "one token": lambda h: h[:, 0],
    "every token": list,
    "chunk of tokens": lambda h: h.chunk(2, 1)[0],
    "pad": lambda h: F.pad(h, (0, 0, 1, 0)),
    "mean over tokens": lambda h: h - h.mean(1, keepdim=True),
    "mean by keyword": lambda h: h - torch.mean(h, dim=1, keepdim=True),
    "mean of all": lambda h: h / h.mean(),
    "amax over both": lambda h: h / h.amax((1, 2), keepdim=True),
    "variance of all": lambda h: h / h.var(),
    "norm of all": lambda h: h / h.norm(),
    "norm over tokens": lambda h: h / torch.linalg.vector_norm(h, 2, 1, True),
    "glu over tokens": lambda h: F.glu(h, 1),
    "layer norm over tokens": lambda h: F.layer_norm(h, (5, HIDDEN)),
    "batch norm": lambda h: F.batch_norm(h, None, None, training=True),
    "tokens into features": lambda h: h.view(3, -1),
    "flattened features": lambda h: h.flatten(1),
    "behind the features": lambda h: h.unsqueeze(-1),
    "another width": lambda h: h.view(3, 10, HIDDEN // 2),
    "reinterpreted": lambda h: h.view(torch.int32),
    "joined tokens": lambda h: torch.cat([h, h], 1),
    "stacked": lambda h: torch.stack((h, h)).sum(0),
    "broadcast over groups": lambda h: h.unflatten(-1, (2, -1)) * h,
    "squeezed": lambda h: h.squeeze(),
    "einsum": lambda h: torch.einsum("btd,d->btd", h, torch.ones(HIDDEN)),
    "matmul": lambda h: h @ torch.ones(HIDDEN, HIDDEN),
    "matmul from the left": lambda h: torch.ones(3, 5, 5) @ h,
    "conv": lambda h: F.conv1d(h, torch.ones(5, 5, 1)),
    "item": lambda h: h.item(),
    "numpy": lambda h: h.numpy(),
    "data": lambda h: h.data,
    "float()": float,
    "len()": len,
    "if": lambda h: h if h else -h,
    "==": lambda h: h if h == 0 else -h,
    "if >": lambda h: h if h > 0 else -h,
    "item assignment": lambda h: h.__setitem__(0, 0),
    "copied into a tensor": lambda h: torch.empty(3, 5, HIDDEN).copy_(h),
}


@pytest.mark.parametrize("name", TOKEN_WISE)
def test_token_wise_operators_pass_the_input_on(name, ffn, x):
    have_had(ffn, TOKEN_WISE[name], x)
    assert torch.equal(ffn(x), ffn.down.memory(x))


@pytest.mark.parametrize("name", MIXING)
def test_everything_else_names_the_block(name, ffn, x):
    with pytest.raises(CaptureError, match=r"\(blocks\.1\.ffn\).*exclude the block from memory_layers"):
        have_had(ffn, MIXING[name], x)


def test_a_hidden_activation_has_the_shape_that_it_would_have(ffn, x):
    seen: list[HiddenActivation] = []
    have_had(ffn, lambda h: seen.append(h) or h, x.double().float())
    (hidden,) = seen
    assert (hidden.shape, hidden.dtype, hidden.device) == ((3, 5, HIDDEN), torch.float32, x.device)
    assert hidden.is_floating_point()
    assert repr(hidden) == f"HiddenActivation({(3, 5, HIDDEN)} of blocks.1.ffn)"
    assert [part.shape[-1] for part in hidden.split(100, -1)] == [100, HIDDEN - 100]
    assert hidden[..., ::2].shape == (3, 5, HIDDEN // 2)


def test_another_projection_of_the_hidden_activation(ffn, x):
    ffn.operator = ffn.other
    with pytest.raises(CaptureError, match=r"a projection that was not part of the FFN.*\(blocks\.1\.ffn\)"):
        ffn(x)


def test_the_hidden_activations_of_two_ffns_do_not_mix(x):
    model = around(OperatedFfn, layers=2)
    memcompile.plan(model, memory_layers=2, **MEMORY)
    first, second = model.blocks[0].ffn, model.blocks[1].ffn
    with pytest.raises(CaptureError, match=r"add with the hidden activation of another FFN.*blocks\.0\.ffn"):
        first.up(x) + second.up(x)
    with pytest.raises(CaptureError, match=r"blocks\.1\.ffn\.down\.weight.*its own up-projection did not produce"):
        second.down(first.up(x))


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda ffn, x: ffn.down(x.new_ones(3, 5, HIDDEN)), "down.weight"),
        (lambda ffn, x: x + ffn.up.weight, "up.weight"),
        (lambda ffn, x: torch.linalg.norm(ffn.up.weight), "up.weight"),
        (lambda ffn, x: ffn.up.weight @ x.mT, "up.weight"),
        (lambda ffn, x: F.linear(x, torch.ones(HIDDEN, WIDTH), ffn.up.bias), "up.bias"),
        (lambda ffn, x: x + ffn.up.bias, "up.bias"),
        (lambda ffn, x: torch.cat([ffn.up.bias, ffn.up.bias]), "up.bias"),
    ],
)
def test_reading_a_replaced_parameter_names_it(read, name, ffn, x):
    with pytest.raises(CaptureError, match=rf"blocks\.1\.ffn\.{name}"):
        read(ffn, x)


def test_attributes_of_a_replaced_parameter(ffn):
    weight = ffn.up.weight
    assert isinstance(weight, ReplacedParameter)
    assert (weight.shape, weight.dtype, weight.device) == ((HIDDEN, WIDTH), torch.float32, torch.device("cpu"))
    for attribute in ("grad", "item", "norm"):
        assert not hasattr(weight, attribute)
    with pytest.raises(AttributeError, match=r"'grad' of blocks\.1\.ffn\.up\.weight.*replaced by a memory"):
        weight.grad  # noqa: B018
    ffn.double()
    assert weight.dtype == torch.float64


def test_loops_that_initialise_every_module_pass_by(ffn):
    for module in (ffn.up, ffn.down):
        module.reset_parameters()
        nn.init.xavier_uniform_(module.weight)
        module.weight.data.normal_(std=0.02)
        nn.init.zeros_(module.bias)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_stand_ins_of_a_copy_belong_to_the_copy(duplicate, x):
    model = planned_gpt(memory_layers=[1])
    up, _, down, _ = duplicate(model).blocks[1].ffn
    assert up.weight.layer is down.weight.layer is down.memory is not model.blocks[1].ffn[2].memory
    assert torch.equal(down(F.gelu(up(x))), model.blocks[1].ffn(x))


# Dynamo (2.11 to 2.15) has no rule for `torch.cat` of a tuple of such objects, for `rand_like` of one, and, before
# 2.15, for `~`: it breaks the graph there.
BREAKS_THE_GRAPH = {"unbound", "drop path", "masked fill"}


@pytest.mark.parametrize("name", sorted(TOKEN_WISE.keys() - BREAKS_THE_GRAPH))
def test_dynamo_traces_them_without_a_graph_break(name, ffn, x):
    have_had(ffn, TOKEN_WISE[name], x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(ffn, backend="eager", fullgraph=True)(x), ffn.down.memory(x))


@pytest.mark.parametrize("name", sorted(BREAKS_THE_GRAPH))
def test_they_run_where_the_graph_breaks_within_the_ffn(name, ffn, x):
    have_had(ffn, TOKEN_WISE[name], x)
    torch._dynamo.reset()
    compiled = torch.compile(ffn, backend="eager")
    assert torch.equal(compiled(x), ffn.down.memory(x))
    ffn.operator = lambda h: TOKEN_WISE[name](h) * 0
    with pytest.raises(CaptureError, match=r"`mul` .* was not part of the FFN"):
        compiled(x)
