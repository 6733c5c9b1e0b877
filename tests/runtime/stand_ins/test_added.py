"""Memory added to an FFN: the dense model to begin with, then FFN plus memory, wherever and however the model runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

import memcompile
from memcompile import CaptureError
from memcompile.runtime.stand_ins.added import WeightProxy
from memcompile.runtime.stand_ins.replaced import Role
from tests.models import (
    DYNAMO_TRACES_MATMUL_OF_OBJECTS,
    HIDDEN,
    WIDTH,
    ZOO,
    Block,
    RawParameterFfn,
    Transformer,
    plain_ffn,
)
from tests.planned import MEMORY, assert_same, batch, lookups, stop_before_inductor
from tests.runtime.stand_ins.operated import TOKEN_WISE, OperatedFfn, added_ffn, added_gpt, dense_of, trained, wake


@pytest.mark.parametrize("name", ZOO)
def test_every_spelling_of_an_ffn(name, monkeypatch):
    captured = stop_before_inductor(monkeypatch, aot_eager)
    model, inputs = ZOO[name]()
    if name != "torch_encoder":
        model.blocks = model.blocks[:2]
    parameters = dict(model.named_parameters())
    dense, dense_eval = trained(model, *inputs), model.eval()(*inputs)
    memcompile.plan(model.train(), memory_layers=1, placement="add", **MEMORY)

    assert all(
        model.get_submodule(n.rpartition(".")[0])._parameters[n.rpartition(".")[2]] is p for n, p in parameters.items()
    )
    beginning = trained(model, *inputs)
    assert_same({n: beginning[n] for n in dense}, dense)
    assert torch.equal(model.eval()(*inputs), dense_eval)
    assert {n.rpartition(".")[2] for n in beginning if n not in dense and beginning[n].any()} == {
        "out_weight",
        "out_bias",
    }

    eager = trained(wake(model.train()), *inputs)
    assert not torch.equal(eager["output"], dense["output"])
    assert all(gradient.any() for gradient in eager.values()), "a parameter without effect"
    whole = name != "raw_parameters" or DYNAMO_TRACES_MATMUL_OF_OBJECTS
    compiled = torch.compile(model, backend="memcompile", fullgraph=whole)
    assert_same(trained(model, *inputs, call=compiled), eager)
    assert sum(lookups(graph_module.graph) for graph_module in captured) == (
        len(model.blocks) if name == "shared" else 1
    )


class BrokenTransformer(Transformer):
    """A graph break after every block, so that Dynamo may run all blocks through one graph."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return self.head(self.norm(x))


@pytest.mark.parametrize("kind", [plain_ffn, RawParameterFfn])
def test_a_dense_block_and_an_equal_one_with_memory_have_graphs_of_their_own(kind, monkeypatch):
    stop_before_inductor(monkeypatch, lambda graph_module, inputs: graph_module.forward)
    model, (tokens, _) = BrokenTransformer([Block(WIDTH, kind(WIDTH, HIDDEN)) for _ in range(3)]), batch()
    compiled = torch.compile(model, backend="memcompile", memory_layers=[1], placement="add", **MEMORY)
    assert_same(trained(wake(model), tokens, call=compiled), trained(model, tokens))


@pytest.fixture
def ffn() -> OperatedFfn:
    return added_ffn()


@pytest.mark.parametrize("name", TOKEN_WISE)
def test_operators_run_on_the_activation_and_keep_the_source(name, ffn, x):
    def operator(h):  # back to the width that the down-projection takes
        result = TOKEN_WISE[name](h)
        return F.pad(result, (0, HIDDEN - result.shape[-1])).to(x.dtype)

    ffn.operator = operator
    dense = dense_of(ffn)
    torch.manual_seed(2)
    expected = dense(x)
    torch.manual_seed(2)
    assert torch.equal(ffn(x), expected + ffn.down.memory(x))


FURTHER = {
    "max": lambda h: h - h.max(-1, keepdim=True).values,
    "mask": lambda h: h.masked_fill(h < 0, 0.0),
    "stacked": lambda h: torch.stack((h, h)).sum(0),
    "concatenated": lambda h: torch.cat([h[..., 64:], h[..., :64]], -1),
    "unbound": lambda h: torch.stack(list(h)),
    "assigned": lambda h: h.__setitem__((..., slice(3)), 0.0) or h,
    "shifted": lambda h: h + 1 if len(h) == 3 and float(h.detach().sum() * 0) == 0 else -h,
    "branch": lambda h: h if (h == h).all() else -h,
    "reversed": lambda h: 1 - (2 / (3 + abs(h))) ** 2,
    "transposed and back": lambda h: h.mT.transpose(-1, -2),
    "right of a tensor": lambda h: torch.ones(HIDDEN) * h + torch.ones(HIDDEN).mul(h),
    "copied into a tensor": lambda h: torch.empty(3, 5, HIDDEN).copy_(h),
    "rolled": lambda h: torch.roll(h, 1, -1),
}


@pytest.mark.parametrize("name", FURTHER)
def test_other_operators_run_on_the_activation_too(name, ffn, x):
    ffn.operator = FURTHER[name]
    expected = dense_of(ffn)(x)
    assert torch.equal(ffn(x), expected + ffn.down.memory(x))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor) -> Tensor:
        return 2 * h

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 2 * gradient


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (lambda h: h @ torch.eye(HIDDEN), r"\(blocks\.1\.ffn\) is projected by something else"),
        (lambda h: torch.eye(5) @ h, r"\(blocks\.1\.ffn\) is projected by something else"),
        (lambda h: torch.zeros(3, 5, HIDDEN), r"blocks\.1\.ffn\.down\.weight, but it projects Tensor"),
        (Doubled.apply, r"\(blocks\.1\.ffn\) lost its gradient between the projections: an autograd\.Function"),
    ],
)
def test_what_loses_the_source_names_the_block(operator, message, ffn, x):
    ffn.operator = operator
    with pytest.raises(CaptureError, match=rf"{message}.*exclude .* from memory_layers"):
        ffn(x)


def test_an_autograd_function_without_gradients(ffn, x):
    ffn.operator = Doubled.apply
    with torch.no_grad():
        assert torch.equal(ffn(x), dense_of(ffn)(x) + ffn.down.memory(x))


def test_two_ffns_do_not_mix(x):
    model = added_gpt(memory_layers=2)
    (first, _, down, _), (second, _, other, _) = (block.ffn for block in model.blocks)
    with pytest.raises(CaptureError, match=r"\(blocks\.0\.ffn\) meets that of blocks\.1\.ffn"):
        first(x) + second(x)
    with pytest.raises(CaptureError, match=r"blocks\.1\.ffn\.2\.weight, but it projects ActivationProxy"):
        other(first(x))
    with pytest.raises(CaptureError, match=r"\(blocks\.0\.ffn\) is projected by blocks\.1\.ffn\.0\.weight"):
        second(down.weight.t().new_zeros(1) + first(x)[..., :WIDTH])


def test_a_module_that_is_exchanged_does_not_drop_the_memory_silently(ffn, x):
    up, ffn.up = ffn.up, nn.Linear(WIDTH, HIDDEN)
    with pytest.raises(CaptureError, match=r"blocks\.1\.ffn\.down\.weight, but it projects Tensor"):
        ffn(x)
    ffn.up, ffn.down = up, nn.Linear(HIDDEN, WIDTH)
    with pytest.raises(CaptureError, match=r"\(blocks\.1\.ffn\) is projected by something else"):
        ffn(x)


class Spelt(nn.Module):
    """An FFN of raw parameters, its projections spelt as asked."""

    def __init__(self, up: Callable, down: Callable) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(WIDTH, HIDDEN) * WIDTH**-0.5)
        self.w2 = nn.Parameter(torch.randn(HIDDEN, WIDTH) * HIDDEN**-0.5)
        self.up, self.down = up, down

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x, self.w1)), self.w2)


SPELLINGS: dict[str, Callable] = {
    "@": lambda x, w: x @ w,
    "method": lambda x, w: x.matmul(w.to(x.dtype)),
    "linear of the transposed": lambda x, w: F.linear(x, w.t()),
    "linear by keyword": lambda x, w: F.linear(input=x, weight=w.mT.type_as(x)),
    "mm": lambda x, w: torch.mm(x.flatten(0, 1), w.contiguous()).view(*x.shape[:-1], -1),
    "addmm": lambda x, w: torch.addmm(w.new_zeros(w.shape[1]), x.reshape(-1, x.shape[-1]), w).unflatten(0, (3, 5)),
    "einsum": lambda x, w: torch.einsum("btd,df->btf", x, w),
    "einsum of a list": lambda x, w: torch.einsum("df,btd->btf", [w, x]),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_a_projection(spelling, x):
    """Put before the weights by hand: what is a projection here is wider than what the detector finds."""
    project = SPELLINGS[spelling]
    block = Spelt(project, project)
    expected = block(x)
    memory = nn.Linear(WIDTH, WIDTH)
    memory.width, memory.query_weight, memory.name = WIDTH, memory.weight, "block"
    block.memory = memory
    for name, role in (("w1", Role.UP), ("w2", Role.DOWN)):
        WeightProxy(name, role, memory, block, name).install()
    assert torch.equal(block(x), expected + memory(x))
