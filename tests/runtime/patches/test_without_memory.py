"""What a model without memory does under each patch, and without: the same, bit for bit, errors included."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from memcompile.common.patch import Patch
from memcompile.runtime.pool import pool_of
from tests.planned import batch, planned_gpt
from tests.runtime.distributed.processes import run_on_ranks

X = torch.linspace(-1, 1, 12).reshape(3, 4)


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


def with_gradients() -> nn.Module:
    model = dense()
    model(X).square().sum().backward()
    return model


def told(call: Callable[[], Any]) -> str:
    """What a call that fails says."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("it should have failed")


# --- one scenario a patch, which returns all that it sees -----------------------------------------------------------


def loading() -> Any:
    model, state = dense(), dict(dense().state_dict())
    wrong = {name: value for name, value in state.items() if name != "2.bias"} | {"memory._extra_state": X}
    return (
        repr(model.load_state_dict(state)),
        repr(model.load_state_dict(wrong, strict=False)),
        told(lambda: model.load_state_dict(wrong)),
        told(lambda: model.load_state_dict(None)),
        model.load_state_dict({"0.bias": state["0.bias"]}, strict=False, assign=True).missing_keys,
        dict(model.state_dict()),
    )


def optimizer_loading() -> Any:
    model, seen = dense().bfloat16(), []
    optimizer = AdamW(model.parameters(), lr=1e-2)
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(("before", sorted(state))))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("after"))
    model(X.bfloat16()).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    for entry in state["state"].values():
        entry["exp_avg"] = entry["exp_avg"].float() + 1e-5
    optimizer.load_state_dict(state)
    twin = pickle.loads(pickle.dumps(optimizer))
    return (
        seen,
        [optimizer.state[p] for p in model.parameters()],
        told(lambda: optimizer.load_state_dict({"state": {}, "param_groups": []})),
        list(twin.state.values()),
        sorted(twin.__getstate__()),
    )


def optimizer_step() -> Any:
    """Of a class of optimizers of which another one holds a table, and has stepped it."""
    planned = planned_gpt()
    other = AdamW(planned.parameters())
    planned(*batch()).backward()
    other.step()
    model, seen = with_gradients(), []
    optimizer = AdamW([{"params": [p]} for p in model.parameters()], lr=1e-2)

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        seen.append(("before", [len(group["params"]) for group in optimizer.param_groups], kwargs))

    def fails() -> None:
        raise ValueError("a closure's")

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    for _ in range(2):
        optimizer.step(closure=None)
    return (
        seen,
        optimizer.step(lambda: 3),
        told(lambda: optimizer.step(fails)),
        told(lambda: optimizer.step(None, None)),
        list(model.parameters()),
        optimizer.state_dict()["state"],
        (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)),
        (AdamW.step.__name__, inspect.signature(AdamW.step)),
    )


def sparse_clipping() -> Any:
    model, sparse = with_gradients(), torch.eye(4).to_sparse()
    total = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    nn.utils.clip_grad_value_(model.parameters(), 0.01)
    return (
        total,
        [p.grad for p in model.parameters()],
        (2 * sparse + sparse).to_dense(),
        torch.norm(sparse),
        torch.linalg.vector_norm(X, 3, dim=1),
        X.clamp(-0.5, 0.5),
        told(lambda: sparse.clamp(min=torch.ones(4, 4))),
        told(lambda: torch.special.erfcx(sparse)),
    )


def cache_key() -> Any:
    """The graph, the guards and the numbers; Inductor's own cache has them under another key."""
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(dense(), backend=backend, fullgraph=True)(X), graphs


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("connection closed: gloo timed out")  # of the user's own communication


def backward() -> Any:
    model = with_gradients()
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with save_on_cpu():
        loss = model(x).sum()
    loss.backward()
    return (
        grad,
        x.grad,
        [p.grad for p in model.parameters()],
        told(lambda: loss.backward()),
        told(lambda: Fails.apply(x).sum().backward()),
    )


def emptied() -> Any:
    with torch.device("meta"):
        model = dense()
    state = torch.get_rng_state()
    model[0].to_empty(device="cpu")
    alone = [p.is_meta for p in model.parameters()]
    model.to_empty(device="cpu", recurse=False)
    model.to_empty(device="cpu")
    return (
        alone,
        [p.device for p in model.parameters()],
        state,
        torch.get_rng_state(),
        told(lambda: model.to_empty("cpu")),
    )


def pretrained() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=9, n_positions=4)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for module in model.modules():
        del module._is_hf_initialized
    model.init_weights()
    return before, dict(model.named_parameters())


def data_parallel() -> Any:
    model = dense()
    ddp = DistributedDataParallel(model, bucket_cap_mb=1)
    ddp(X).sum().backward()
    frozen = dense().requires_grad_(False)
    return (
        [p.grad for p in ddp.parameters()],
        sorted(ddp.parameters_to_ignore),
        len(ddp._forward_pre_hooks),
        hasattr(model, "_ddp_params_and_buffers_to_ignore"),
        told(lambda: DistributedDataParallel(frozen)),
    )


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (1,), mesh_dim_names=("data",))


def clipping() -> Any:
    model, norms = with_gradients(), []
    for order in (2.0, torch.inf):
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5, order, foreach=False))
    norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    nn.utils.clip_grads_with_norm_(iter(model.parameters()), 0.25, norms[-1])
    nn.utils.clip_grad_value_(model[0].weight, 0.01)
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=4.0), AdamW(model.parameters())
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    steps = scaler.step(optimizer), told(lambda: scaler.step(optimizer)), told(lambda: scaler.unscale_(optimizer))
    off = torch.amp.GradScaler("cpu", enabled=False)
    steps += off.step(optimizer, lambda: 3.0), off.unscale_(optimizer)
    sharded = nn.Parameter(distribute_tensor(X, mesh(), [Shard(0)]))
    sharded.grad = distribute_tensor(2 * X, mesh(), [Shard(0)])
    norm = nn.utils.clip_grad_norm_([sharded], 0.1)
    bad = nn.Parameter(X)
    bad.grad = X / 0
    return (
        norms,
        steps,
        [*model.parameters(), *(p.grad for p in model.parameters())],
        norm.full_tensor(),
        sharded.grad.full_tensor(),
        nn.utils.clip_grad_norm_([], 1.0),
        told(lambda: nn.utils.clip_grad_norm_(bad, 1.0, error_if_nonfinite=True)),
    )


def fully_shard() -> Any:
    from torch.distributed.fsdp import fully_shard as shard

    model = dense()
    model.register_buffer("buffer", X)
    shard(model[0], mesh=mesh())
    shard(model, mesh=mesh(), ignored_params={model[2].bias})
    model(X).sum().backward()
    placements = {name: getattr(p, "placements", None) for name, p in model.named_parameters()}
    grads = [p.grad for p in model.parameters()]
    return repr(placements), [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]


def pipelining() -> Any:
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    stage = PipelineStage(dense(), 0, 1, torch.device("cpu"))
    output = ScheduleGPipe(stage, 3).step(X)
    return output, told(lambda: PipelineStage(dense(), 1, 1, torch.device("cpu")))


ALONE = [loading, optimizer_loading, optimizer_step, sparse_clipping, cache_key, backward, emptied]
IN_A_GROUP = [data_parallel, clipping, fully_shard, pipelining]


# --- with and without -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def without(patch: Patch) -> Iterator[None]:
    for change in reversed(patch.changes):
        change.remove()
    try:
        yield
    finally:
        for change in patch.changes:
            change.install()


def differences(scenario: Callable[[], Any]) -> list[str]:
    planned = planned_gpt(values_grad="sparse")
    patch = importlib.import_module(f"memcompile.runtime.patches.{scenario.__name__}").PATCH
    patch.hold(planned)
    with without(patch):
        expected = scenario()
    actual = scenario()
    assert len(actual) == len(expected)
    return [f"{i}: {a} and {e}" for i, (a, e) in enumerate(zip(actual, expected, strict=True)) if not same(a, e)]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype is other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("scenario", ALONE)
def test_it_is_the_same(scenario):
    assert differences(scenario) == []


def in_a_group(rank: int) -> dict[str, list[str]]:
    logging.disable(logging.WARNING)
    return {scenario.__name__: differences(scenario) for scenario in IN_A_GROUP}


@pytest.fixture(scope="module")
def found_in_a_group() -> dict[str, list[str]]:
    (found,) = run_on_ranks(in_a_group, world_size=1)
    return found


@pytest.mark.parametrize("scenario", IN_A_GROUP)
def test_it_is_the_same_in_a_group(scenario, found_in_a_group):
    assert found_in_a_group[scenario.__name__] == []


def test_each_patch_has_a_scenario():
    from memcompile.runtime import patches

    assert {scenario.__name__ for scenario in ALONE + IN_A_GROUP} == set(patches.needed_by(pool_of(planned_gpt())))


def test_differences_are_seen():
    assert not same(X, X.double()) and not same([X, 1], [X, 2]) and not same({"a": X}, {"a": X + 1})
