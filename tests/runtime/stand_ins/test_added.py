"""Memory added to an FFN: the dense model to begin with, then FFN plus memory, wherever and however the model runs."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

import memcompile
from memcompile import CaptureError, PlanError
from memcompile.runtime.pool import pool_of
from memcompile.runtime.stand_ins import added
from memcompile.runtime.stand_ins.added import ActivationProxy, WeightProxy
from memcompile.runtime.stand_ins.replaced import Role
from tests.models import (
    DYNAMO_TRACES_MATMUL_OF_OBJECTS,
    HIDDEN,
    WIDTH,
    ZOO,
    Block,
    RawParameterFfn,
    Transformer,
    around,
    plain_ffn,
)
from tests.planned import MEMORY, assert_same, batch, lookups, planned_gpt, stop_before_inductor
from tests.runtime.stand_ins.test_replaced import TOKEN_WISE, OperatedFfn


def wake(model: nn.Module) -> nn.Module:
    """Gives the memory an effect: its output projection is zero at first."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in pool_of(model).layers.values():
            layer.out_weight.normal_(generator=generator)
    return model


def added_gpt(**options) -> nn.Module:
    return wake(planned_gpt(placement="add", **options))


def trained(model: nn.Module, *inputs: Tensor, call: Callable | None = None) -> dict[str, Tensor]:
    """The output of one step, and all gradients."""
    model.zero_grad()
    torch.manual_seed(1)
    output = (model if call is None else call)(*inputs)
    output.square().mean().backward()
    return {"output": output.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


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
    model = around(OperatedFfn, layers=2)
    memcompile.plan(model, memory_layers=[1], placement="add", **MEMORY)
    return wake(model).blocks[1].ffn


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, WIDTH)


def dense_of(ffn: OperatedFfn) -> OperatedFfn:
    """The same FFN without memory."""
    dense = OperatedFfn(WIDTH, HIDDEN).to(ffn.down.weight.dtype)
    dense.up.to(ffn.up.weight.dtype)
    dense.load_state_dict({name: value for name, value in ffn.state_dict().items() if "memory" not in name})
    dense.operator = ffn.operator
    return dense


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


# --- the parameters stay parameters -------------------------------------------------------------------------------


def test_a_weight_passes_for_its_parameter(ffn):
    weight, parameter = ffn.up.weight, ffn.up._parameters["weight"]
    assert isinstance(weight, WeightProxy)
    assert (weight.shape, weight.dtype, weight.device) == (parameter.shape, parameter.dtype, parameter.device)
    assert torch.equal(weight * 2, parameter * 2)
    assert torch.equal(weight.T @ weight, parameter.T @ parameter)
    assert torch.equal(torch.linalg.norm(weight), parameter.norm())
    assert weight.data_ptr() == parameter.data_ptr() and weight.numel() == HIDDEN * WIDTH
    assert type(weight.detach()) is Tensor
    weight.requires_grad = False
    assert not parameter.requires_grad
    assert weight.requires_grad_() is parameter
    parameter.mark = "mine"
    assert weight.mark == "mine"
    assert not hasattr(weight, "no_such_attribute")


def test_initialising_reaches_the_parameter(ffn):
    parameter = ffn.up._parameters["weight"]
    for initialise in (
        nn.init.zeros_,
        nn.init.xavier_uniform_,
        functools.partial(nn.init.constant_, val=3.0),
        nn.init.orthogonal_,
        lambda w: w.data.normal_(),
        lambda w: w.detach().mul_(2),
    ):
        before = parameter.detach().clone()
        initialise(ffn.up.weight)
        assert not torch.equal(parameter, before)
    before = parameter.detach().clone()
    ffn.up.reset_parameters()
    assert not torch.equal(parameter, before)


def test_an_assigned_parameter_keeps_the_memory(ffn, x):
    new = nn.Parameter(torch.randn(HIDDEN, WIDTH))
    ffn.up.weight = new
    ffn.down.weight = nn.Parameter(torch.randn(WIDTH, HIDDEN))
    assert ffn.up._parameters["weight"] is new
    assert torch.equal(ffn(x), dense_of(ffn)(x) + ffn.down.memory(x))


def test_functional_calls_and_their_gradients():
    model, (tokens, targets) = added_gpt(), batch()
    parameters = {name: 1.1 * p.detach() for name, p in model.named_parameters()}
    twin = copy.deepcopy(model)
    twin.load_state_dict(parameters, strict=False)
    assert torch.equal(torch.func.functional_call(model, parameters, (tokens,)), twin(tokens))
    loss = functools.partial(torch.func.functional_call, model, args=(tokens, targets))
    gradients = torch.func.grad(lambda p: loss(p))(parameters)
    twin(tokens, targets).backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_runs_on_its_own_parameters(duplicate):
    model, (tokens, _) = added_gpt(), batch()
    twin = duplicate(model)
    assert type(twin.blocks[1].ffn[0]) is type(model.blocks[1].ffn[0])
    assert isinstance(twin.blocks[1].ffn[0], nn.Linear) and repr(twin.blocks[1].ffn[0]) == repr(twin.blocks[0].ffn[0])
    expected = model(tokens)
    assert torch.equal(twin(tokens), expected)
    up, _, down, _ = twin.blocks[1].ffn
    assert up.weight.layer is down.weight.layer is down.memory
    with torch.no_grad():
        for parameter in twin.blocks[1].ffn.parameters():
            parameter.zero_()
    assert not torch.equal(twin(tokens), expected)
    assert torch.equal(model(tokens), expected)


def test_a_pickle_is_read_by_another_process():
    model, (tokens, _) = added_gpt(), batch()
    pickled = pickle.dumps(model)
    added._class_with_proxies.cache_clear()
    twin = pickle.loads(pickled)
    assert isinstance(twin.blocks[1].ffn[0].weight, WeightProxy)
    assert torch.equal(twin(tokens), model(tokens))


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_fully_sharded(mesh):
    model, (tokens, targets) = added_gpt(), batch()
    expected = model(tokens)
    for module in (*model.blocks, model):
        dist.fsdp.fully_shard(module, mesh=mesh)
    assert torch.equal(model(tokens), expected)
    model(tokens, targets).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert isinstance(model.blocks[1].ffn[2].weight, DTensor), "after the forward the shards are back"


def test_tensor_parallelism_of_an_ffn_with_memory_is_an_error(mesh):
    linear = added_gpt().blocks[1].ffn[0]
    with pytest.raises(PlanError, match=r"blocks\.1\.ffn\.0\.weight becomes a DTensor.*exclude 'blocks\.1\.ffn'"):
        linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    class Checkpointed(Block):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=use_reentrant)

    model, (tokens, _) = added_gpt(dropout=0.1), batch()
    expected = trained(model, tokens)
    for block in model.blocks:
        block.__class__ = Checkpointed
    assert_same(trained(model, tokens), expected)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    model, (tokens, _) = added_gpt().eval(), batch()
    program = torch.export.export(model, (tokens,), strict=strict)
    assert lookups(program.graph) == 1
    tokens, _ = batch(seed=1)
    assert torch.equal(program.module()(tokens), model(tokens))


def test_casts_move_both():
    model, (tokens, targets) = added_gpt(), batch()
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        assert model(tokens).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert model(tokens).dtype == torch.bfloat16
        model(tokens, targets).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_down_projection_in_higher_precision(x):
    """T5 keeps it in float32 and casts the activation."""
    model = around(OperatedFfn, layers=2)
    memcompile.plan(model, memory_layers=[1], placement="add", **MEMORY)
    ffn = wake(model).blocks[1].ffn
    ffn.up.bfloat16()
    ffn.operator = lambda h: h.to(ffn.down.weight.dtype)
    assert torch.equal(ffn(x.bfloat16()), dense_of(ffn)(x.bfloat16()) + ffn.down.memory(x.bfloat16().float()))


@pytest.mark.parametrize("value_dim", [None, 16])
def test_a_plain_memory_has_an_output_projection_too(value_dim):
    model = planned_gpt(placement="add", gate=False, value_dim=value_dim)
    memory = model.blocks[1].ffn[2].memory
    assert memory.out_weight.shape == (WIDTH, value_dim or WIDTH) and memory.gate_weight is None
    nn.init.ones_(memory.out_weight)
    memcompile.reset_parameters(model)
    assert not memory.out_weight.any() and not memory.out_bias.any()


def test_the_memory_learns_from_the_second_step_on():
    model, (tokens, targets) = planned_gpt(placement="add"), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved = []
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens, targets).backward()
        optimizer.step()
        moved.append({name for name, p in model.named_parameters() if not torch.equal(p, before[name])})
    assert {name for name in before if "memory" in name} & moved[0] == {
        "blocks.1.ffn.2.memory.out_weight",
        "blocks.1.ffn.2.memory.out_bias",
    }
    assert moved[1] == set(before)


def test_what_the_activation_says_of_itself(ffn, x):
    seen: list[ActivationProxy] = []
    ffn.operator = lambda h: seen.append(h) or h
    ffn(x)
    assert repr(seen[0]) == f"ActivationProxy({(3, 5, HIDDEN)} of blocks.1.ffn)"
    assert seen[0].source is x
