"""With a table for each layer, equal blocks share a compiled graph: which rows are a layer's own is data of the graph,
and the same after whatever is done with the model.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import memcompile
from tests.models import tiny_gpt
from tests.planned import batch, gradients, plain_attention, planned_gpt, stop_before_inductor
from tests.runtime.distributed.sharded import memory_mesh

LAYERS = 3
ALL: dict[str, Any] = {"layers": LAYERS, "memory_layers": "all", "tables": "separate"}


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[fx.GraphModule]]:
    torch._dynamo.reset()
    yield stop_before_inductor(monkeypatch, lambda graph_module, inputs: graph_module)
    torch._dynamo.reset()


def compile_blocks(model: nn.Module, **options: Any) -> nn.Module:
    for block in model.blocks:
        block.compile(backend="memcompile", fullgraph=True, **options)
    return model


def offsets(model: nn.Module) -> list[Tensor]:
    return [block.ffn[2].memory._slot_offset for block in model.blocks]


@pytest.mark.parametrize(("values_grad", "placement"), [("dense", "replace"), ("sparse", "replace"), ("sparse", "add")])
def test_equal_blocks_share_a_graph(values_grad, placement, captured):
    model = planned_gpt(**ALL, values_grad=values_grad, placement=placement)
    twin = copy.deepcopy(model)
    for at, block in enumerate(model.blocks):
        if at % 2:
            block.compile(backend="memcompile", fullgraph=True)
        else:
            model.blocks[at] = torch.compile(block, backend="memcompile", fullgraph=True)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    for step in range(3):
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            m(*batch(step)).backward()
            optimizer.step()
        for ours, theirs in zip(gradients(model).values(), gradients(twin).values(), strict=True):
            assert torch.equal(ours, theirs)
    assert len(captured) == 1
    model.eval()
    twin.eval()
    assert torch.equal(model(*batch(3)), twin(*batch(3)))
    assert len(captured) == 2


@pytest.mark.parametrize("variant", ["pkm", "peer"])
def test_variants_share_a_graph(variant, monkeypatch):
    torch._dynamo.reset()
    captured = stop_before_inductor(monkeypatch, aot_eager)
    model = planned_gpt(**ALL, variant=variant, balance_loss=0.1, values_grad="sparse").double()
    twin = copy.deepcopy(model)
    compile_blocks(model)
    with plain_attention():
        for m in (model, twin):
            m(*batch()).backward()
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=0, atol=1e-12)
    assert len(captured) == 1


@pytest.mark.parametrize("how", [{"by": "columns"}, {"by": "rows"}, {"tokens": "even"}, {"tokens": "shared"}], ids=str)
@pytest.mark.parametrize("values_grad", ["dense", "sparse"])
def test_equal_blocks_share_a_graph_on_shards(values_grad, how, captured):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = planned_gpt(**ALL, values_grad=values_grad)
        twin = copy.deepcopy(model)
        memcompile.shard(model, memory_mesh(1), **how)
        compile_blocks(model)
        losses = [m(*batch()) for m in (model, twin)]
        for loss in losses:
            loss.backward()
        assert torch.equal(*losses)
        for block, other in zip(model.blocks, twin.blocks, strict=True):
            assert torch.equal(block.ffn[2].memory.half_keys.grad, other.ffn[2].memory.half_keys.grad)
        assert len(captured) == 1
    finally:
        dist.destroy_process_group()


def pickled(model: nn.Module, **options: Any) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False, **options)  # type: ignore[no-any-return]


def on_meta_and_back(model: nn.Module) -> nn.Module:
    state = {name: t.clone() for name, t in model.state_dict().items()}
    model.to("meta").to_empty(device="cpu").load_state_dict(state)
    return model


def assigned(model: nn.Module) -> nn.Module:
    shell = pickled(model, map_location="meta")
    shell.load_state_dict(model.state_dict(), assign=True)
    return shell


def assigned_to_a_plan_on_meta(model: nn.Module) -> nn.Module:
    with torch.device("meta"):
        shell = tiny_gpt(layers=LAYERS)
    memcompile.plan(shell, memory=memcompile.config_from(model.state_dict()))
    shell.load_state_dict(model.state_dict(), assign=True)
    return shell


def averaged(model: nn.Module) -> nn.Module:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    return average.module


def emptied_buffers(model: nn.Module) -> nn.Module:
    for buffer in model.buffers():
        buffer.zero_()
    return model


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "to meta and back": on_meta_and_back,
    "assigned to a pickle on meta": assigned,
    "assigned to a plan on meta": assigned_to_a_plan_on_meta,
    "cast": lambda model: model.half().float(),
    "averaged": averaged,
    "buffers": emptied_buffers,
    "inference mode": lambda model: torch.inference_mode()(model.float)(),
    "share_memory": lambda model: model.share_memory(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_done_with_a_model_leaves_its_rows(name, captured):
    model = planned_gpt(**ALL)
    changed = CHANGES[name](model)
    assert [int(offset) for offset in offsets(changed)] == [0, 64, 128]
    assert all(offset.dtype is torch.int32 and not offset.is_inference() for offset in offsets(changed))
    expected = changed(*batch())
    compile_blocks(changed)
    actual = changed(*batch())
    actual.backward()
    assert torch.equal(actual, expected)
    assert len(captured) == 1


def test_it_moves_with_the_layer():
    """On a GPU a tensor of the CPU in a graph keeps it from CUDA graphs."""
    model = planned_gpt(**ALL)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model._apply(lambda tensor: torch.empty_like(tensor, device="cuda"))
    assert {offset.device.type for offset in offsets(model)} == {"cuda"}


def test_no_state_and_no_buffer():
    separate, shared = planned_gpt(**ALL), planned_gpt(**ALL | {"tables": "shared"})
    assert [*separate.state_dict()] == [*shared.state_dict()]
    assert not [*separate.buffers()]
    assert offsets(shared) == [None] * LAYERS


def test_captured_programs_have_the_number():
    """`functional_call` with fake tensors of all parameters, and export, meet no tensor that they were not given."""
    model, (tokens, _) = planned_gpt(**ALL), batch()
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    call = lambda parameters, tokens: torch.func.functional_call(model, parameters, (tokens,))  # noqa: E731
    graph = make_fx(call, tracing_mode="fake")(parameters, tokens)
    program = torch.export.export(model, (tokens,))
    assert not program.constants
    for run in (lambda: graph(parameters, tokens), lambda: program.module()(tokens)):
        assert torch.equal(run(), model(tokens))
