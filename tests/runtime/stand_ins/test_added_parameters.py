"""Memory added to an FFN: its parameters stay parameters, in whatever way the model is initialised, copied or run."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

import memcompile
from memcompile import PlanError
from memcompile.runtime.stand_ins import added
from memcompile.runtime.stand_ins.added import ActivationProxy, WeightProxy
from tests.models import (
    HIDDEN,
    WIDTH,
    Block,
    around,
)
from tests.planned import MEMORY, assert_same, batch, lookups, planned_gpt
from tests.runtime.stand_ins.operated import OperatedFfn, added_ffn, added_gpt, dense_of, trained, wake


@pytest.fixture
def ffn() -> OperatedFfn:
    return added_ffn()


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
