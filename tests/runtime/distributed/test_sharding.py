"""`memcompile.shard`: what it makes of a model and its table, and what it says of wrong orders and options."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import memcompile
from memcompile import MemcompileError
from memcompile.runtime.distributed.sharding import cut
from tests.models import tiny_gpt
from tests.planned import MEMORY, planned_gpt
from tests.runtime.distributed.processes import run_on_ranks
from tests.runtime.distributed.sharded import memory_mesh, sharded_gpt, train, whole

ONE_LAYER = {"layers": 2, "memory_layers": 1}


def raised(call: Any, *args: Any, **kwargs: Any) -> str:
    try:
        call(*args, **kwargs)
    except MemcompileError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def wrong_orders(rank: int) -> dict[str, str]:
    mesh = memory_mesh(2)
    told = {"unplanned": raised(memcompile.shard, tiny_gpt(), mesh)}
    held = planned_gpt()
    optimizer = torch.optim.SGD(held.parameters(), lr=0.1)
    told["optimizer"] = raised(memcompile.shard, held, mesh)
    del optimizer
    inside = planned_gpt()
    ddp = DistributedDataParallel(inside)
    told["inside ddp"] = raised(memcompile.shard, inside, mesh)
    del ddp
    told["inside no ddp"] = raised(memcompile.shard, inside, mesh)
    told["ddp"] = raised(memcompile.shard, DistributedDataParallel(planned_gpt()), mesh)
    fsdp = planned_gpt()
    fully_shard(fsdp)
    told["fsdp"] = raised(memcompile.shard, fsdp, mesh)
    sharded = sharded_gpt(mesh)
    told["whole"] = raised(sharded.load_state_dict, planned_gpt().state_dict())
    told["again"] = raised(memcompile.shard, sharded, mesh)
    told["otherwise"] = raised(memcompile.shard, sharded, mesh, by="rows")
    told["by"] = raised(memcompile.shard, planned_gpt(), mesh, by="depth")
    told["tokens"] = raised(memcompile.shard, planned_gpt(), mesh, tokens="odd")
    told["mesh"] = raised(memcompile.shard, planned_gpt(), "cuda")
    told["parallel rows"] = raised(memcompile.shard, planned_gpt(), mesh, by="rows", tokens="shared")
    pairs = SimpleNamespace(config=memcompile.MemoryConfig(variant="peer"))
    told["pairs"] = raised(cut, pairs, mesh, "columns", "even")
    told["parallel pairs"] = raised(cut, pairs, mesh, None, "shared")
    told["no mesh"] = raised(memcompile.plan, tiny_gpt(), shard_by="rows")
    told["planned, unsharded"] = raised(memcompile.plan, planned_gpt(), memory_mesh=mesh)
    told["row optimizer"] = raised(memcompile.optim.RowAdamW, [sharded.memory_values])
    return told


def other_plans(rank: int) -> list[str]:
    """Ranks with another option, with another model, and with other sizes."""
    models = [
        lambda: planned_gpt(top_k=4 + rank),
        lambda: planned_gpt(layers=2 + rank, memory_layers=[0]),
        lambda: planned_gpt(values_lr=1e-3 if rank else None),
    ]
    return [raised(memcompile.shard, build(), memory_mesh(2)) for build in models]


def other_plans_of_replicas(rank: int) -> str:
    """One of four ranks differs: all of the mesh are told, those too that share no group with it."""
    return raised(memcompile.shard, planned_gpt(top_k=4 + (rank == 1)), memory_mesh(4, 2))


def without_common_seeds(rank: int) -> dict[str, Any]:
    """Tensor parallelism of layers that each rank drew for itself; then they are drawn anew."""
    torch.manual_seed(rank)
    model = tiny_gpt(layers=2)
    memcompile.plan(model, memory_layers=1, **MEMORY, memory_mesh=memory_mesh(2), shard_tokens="shared")
    layer = {name: whole(p) for name, p in model.named_parameters() if "memory" in name}
    memcompile.reset_parameters(model)
    again = {name: whole(p) for name, p in model.named_parameters() if "memory" in name}
    return {"drawn": layer, "again": again}


def hooks(rank: int) -> list[str]:
    """Hooks of the user's on the gradients of all parameters."""
    model, seen = sharded_gpt(memory_mesh(2), **ONE_LAYER), []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    model(torch.zeros(1, 5, dtype=torch.long)).sum().backward()
    return sorted(set(dict(model.named_parameters())) - set(seen))


def drawn(rank: int, mesh: DeviceMesh, by: str, seed_of_rank: bool = False) -> dict[str, Any]:
    """Values that were never whole, and what `shard` makes of those of a model that has them all."""
    torch.manual_seed(rank if seed_of_rank else 0)
    model, sizes = tiny_gpt(), []
    original = torch.empty

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = original(*args, **kwargs)
        sizes.append(0 if tensor.is_meta else tensor.numel())
        return tensor

    torch.empty = watched
    try:
        memcompile.plan(model, **MEMORY | {"n_keys": 128}, memory_mesh=mesh, shard_by=by)
    finally:
        torch.empty = original
    return {
        "values": whole(model.memory_values),
        "largest": max(sizes),
        "local": model.memory_values.to_local().numel(),
    }


def copies(rank: int) -> dict[str, Any]:
    """A deep copy is a sharded model of its own; the meta device and `reset_parameters` work as ever."""
    mesh = memory_mesh(2)
    model = sharded_gpt(mesh, **ONE_LAYER)
    other = copy.deepcopy(model)
    before = whole(model.memory_values)
    moved = train(other, other, (2, 2), rank, steps=1)["parameters"]["memory_values"]
    with torch.device("meta"):
        late = tiny_gpt(layers=2)
        memcompile.plan(late, memory_layers=1, **MEMORY, memory_mesh=mesh)
    was_meta = late.memory_values.is_meta
    late.to_empty(device="cpu")
    torch.manual_seed(5)
    memcompile.reset_parameters(late)
    torch.manual_seed(5)
    single = planned_gpt(**ONE_LAYER)
    torch.manual_seed(5)
    memcompile.reset_parameters(single)
    frozen = sharded_gpt(mesh, **ONE_LAYER)
    frozen.memory_values.requires_grad_(False)
    frozen(torch.zeros(1, 5, dtype=torch.long)).sum().backward()
    return {
        "original untouched": torch.equal(before, whole(model.memory_values)),
        "copy trained": not torch.equal(before, moved),
        "own storage": model.memory_values.to_local().data_ptr() != other.memory_values.to_local().data_ptr(),
        "meta": was_meta,
        "reset as on one process": torch.equal(whole(late.memory_values), single.memory_values),
        "frozen": frozen.memory_values.grad is None and frozen.head.weight.grad is not None,
        "by columns": model.memory_values.placements == (Shard(1),),
    }


def on_two(rank: int) -> dict[str, Any]:
    mesh, alone = memory_mesh(2), memory_mesh(2, replicas=2)
    return {
        "wrong orders": wrong_orders(rank),
        "other plans": other_plans(rank),
        "copies": copies(rank),
        "hooks": hooks(rank),
        "without common seeds": without_common_seeds(rank),
        "drawn": {by: drawn(rank, mesh, by) for by in ("columns", "rows")},
        "drawn alone": {by: drawn(rank, alone, by) for by in ("columns", "rows")},
        "drawn apart": drawn(rank, mesh, "columns", seed_of_rank=True),
    }


def on_four(rank: int) -> dict[str, Any]:
    return {
        "drawn": {by: drawn(rank, memory_mesh(4), by) for by in ("columns", "rows")},
        "other plans": other_plans_of_replicas(rank),
    }


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[dict[str, Any]]]:
    return {2: run_on_ranks(on_two, 2), 4: run_on_ranks(on_four, 4)}


@pytest.mark.parametrize("by", ["columns", "rows"])
def test_the_table_is_the_same_for_any_number_of_ranks(ranks, by):
    torch.manual_seed(0)
    model = tiny_gpt()
    memcompile.plan(model, **MEMORY | {"n_keys": 128})
    for found in (*ranks[2], *ranks[4]):
        assert torch.equal(found["drawn"][by]["values"], model.memory_values)
    assert all(torch.equal(found["drawn alone"][by]["values"], model.memory_values) for found in ranks[2])


def test_no_rank_ever_has_the_whole_table(ranks):
    for number in (2, 4):
        for found in ranks[number]:
            for drawn_by in found["drawn"].values():
                assert drawn_by["largest"] == drawn_by["local"] == drawn_by["values"].numel() // number


def test_ranks_with_other_seeds_have_one_table(ranks):
    first, second = (found["drawn apart"]["values"] for found in ranks[2])
    assert torch.equal(first, second)


def test_wrong_orders_name_the_right_one(ranks):
    told = ranks[2][0]["wrong orders"]
    for name in ("unplanned", "optimizer", "ddp", "inside ddp", "fsdp"):
        assert told[name].startswith("PlanError") and "plan, shard, then DDP or fully_shard" in told[name], name
    assert "AdamW" not in told["optimizer"] and "SGD holds the memory's parameters" in told["optimizer"]
    assert told["again"] == "" and told["inside no ddp"] == ""
    assert "has all values, and those of Transformer are sharded" in told["whole"]
    assert "sharded over" in told["otherwise"]
    assert "memory_mesh" not in told["planned, unsharded"] and "not sharded" in told["planned, unsharded"]


def test_wrong_options_are_told(ranks):
    told = ranks[2][0]["wrong orders"]
    for name, says in {
        "by": "'columns' or 'rows'",
        "tokens": "'uneven', 'even' or 'shared'",
        "mesh": "DeviceMesh",
        "parallel rows": "by='columns'",
        "pairs": "(by='rows' of shard, shard_by='rows' of plan, or neither)",
        "parallel pairs": "tokens='even' or 'uneven'",
        "row optimizer": "values_optimizer",
        "no mesh": "memory_mesh",
    }.items():
        assert told[name].startswith("OptionError") and says in told[name], name


def test_other_plans_are_told_on_every_rank_before_any_lookup(ranks):
    for found in ranks[2]:
        options, model, rate = found["other plans"]
        assert options.startswith("PlanError: ranks 0 and 1") and "top_k 4 and 5" in options
        assert "parameters['blocks.2" in model and "layers" not in model.split("parameters[")[0]
        assert "values_lr None and 0.001" in rate
    assert all("ranks 0 and 1" in found["other plans"] for found in ranks[4])


def test_hooks_on_gradients_see_the_values(ranks):
    assert all(found["hooks"] == [] for found in ranks[2])


def test_tensor_parallel_layers_are_one_layer_whatever_the_seeds(ranks):
    first, second = (found["without common seeds"] for found in ranks[2])
    for when in ("drawn", "again"):
        assert all(torch.equal(first[when][name], second[when][name]) for name in first[when])
    assert not torch.equal(first["drawn"]["memory_values"], first["again"]["memory_values"])
    gate = next(tensor for name, tensor in first["again"].items() if name.endswith("gate_weight"))
    halves = gate.chunk(2)
    assert not torch.equal(*halves), "ranks drew the same columns"


def test_copies_meta_and_frozen_values(ranks):
    for found in ranks[2]:
        wrong = [name for name, holds in found["copies"].items() if not holds]
        assert not wrong
