"""What the tests of checkpoints share: small models sharded in any way, steps of their training, all of their state."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import AdamW, Optimizer

from tests.planned import batch, planned_gpt

# 9 slots of 5: over 4 ranks the last shard is empty, in rows and in columns; over 3 and 2 it is smaller.
SIZES: dict[str, Any] = {"n_keys": 3, "top_k": 2, "value_dim": 5, "values_grad": "dense"}


_planned = functools.cache(planned_gpt)  # planning takes longer than what is tested


def sharded_gpt(kind: str = "plain", seed: int = 0, **options: Any) -> nn.Module:
    """A planned model, and its values sharded over all ranks.

    Args:
        kind: "plain", "columns", "rows", "grid" (replicas of columns), or "fsdp" (columns, the rest by `fully_shard`).
    """
    model = copy.deepcopy(_planned(seed=seed, **SIZES | options))
    if kind == "plain":
        return model
    ranks = dist.get_world_size()
    if kind == "grid":
        mesh, placements = init_device_mesh("cpu", (2, ranks // 2)), [Replicate(), Shard(1)]
    else:
        mesh, placements = init_device_mesh("cpu", (ranks,)), [Shard(0 if kind == "rows" else 1)]
    values = nn.Parameter(distribute_tensor(model.memory_values.detach(), mesh, placements))
    model.register_parameter("memory_values", values)
    if kind == "fsdp":
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params={values})
    return model


def adamw(model: nn.Module, **options: Any) -> Optimizer:
    """The values in a group of their own."""
    values = model.memory_values
    others = [p for p in model.parameters() if p is not values]
    return AdamW([{"params": others}, {"params": [values]}], **{"lr": 1e-2, "weight_decay": 0.1} | options)


def step_by_noise(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    """A step with gradients that depend on the seed alone, however the model is sharded."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        if isinstance(parameter, DTensor):
            grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.grad = grad
    optimizer.step()
    optimizer.zero_grad()


def trained(kind: str = "plain", steps: int = 2, seed: int = 0, **options: Any) -> tuple[nn.Module, Optimizer]:
    """A model and its optimizer after some steps, whose values have a state for each row too."""
    model = sharded_gpt(kind, seed=seed, **options)
    optimizer = adamw(model)
    for step in range(steps):
        step_by_noise(model, optimizer, 100 * seed + step)
    optimizer.state[model.memory_values]["hits"] = _row_state(model.memory_values)
    return model, optimizer


def train(model: nn.Module, optimizer: Optimizer, steps: Any) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(*batch(step)).backward()
        optimizer.step()


def everything(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Tensor]:
    """A copy of all state of both, whole tensors, by names."""
    state = {f"model.{name}": value for name, value in model.state_dict().items() if "_extra_state" not in name}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, entries in optimizer.state.items() if optimizer is not None else ():
        state.update({f"optimizer.{names[parameter]}.{k}": v for k, v in entries.items()})
    whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items() if isinstance(v, Tensor)}
    return copy.deepcopy({name: value.detach() for name, value in whole.items()})


def _row_state(values: Tensor) -> Tensor:
    rows = torch.arange(values.shape[0], dtype=torch.float32) + 0.5
    if not isinstance(values, DTensor):
        return rows
    placements = [p if p == Shard(0) else Replicate() for p in values.placements]
    return distribute_tensor(rows, values.device_mesh, placements, src_data_rank=None)
