"""What the tests of sharded models share: a training that is the same on one process and on ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import memcompile
from memcompile.runtime._torch import local_part, whole_like
from tests.models import VOCABULARY
from tests.planned import batch, planned_gpt

VALUES = "memory_values"


def memory_mesh(ranks: int, replicas: int = 1) -> DeviceMesh:
    """A mesh of CPUs: `memory`, or `replicate` before it."""
    if replicas == 1:
        return init_device_mesh("cpu", (ranks,), mesh_dim_names=("memory",))
    return init_device_mesh("cpu", (replicas, ranks // replicas), mesh_dim_names=("replicate", "memory"))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, dense, on every rank."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = whole_like(tensor, local_part(tensor).to_dense()).full_tensor()
    return (tensor.to_dense() if tensor.is_sparse else tensor).clone()


def train(
    model: nn.Module,
    run: Callable,
    sizes: Sequence[int],
    rank: int | None = None,
    steps: int = 3,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    reduce: bool = True,
    clip: float | None = None,
    accumulate: Callable[[bool], contextlib.AbstractContextManager] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains on `sizes` sequences of each rank, or all of them where `rank` is None.

    The loss is a sum over all tokens, so that ranks may have none.

    Args:
        reduce: averages the gradients of all parameters but the values', as DDP would.
        scaler: scales the losses; where a norm is clipped, the gradients are unscaled first.
        accumulate: the second step has two backwards; the context of each, told whether it is the last.
    """
    stepper = optimizer(model.parameters(), lr=1e-2, **options)
    first: dict[str, Tensor] = {}
    losses, norms = [], []
    for step in range(steps):
        stepper.zero_grad()
        tokens, _ = batch(seed=step, size=sum(sizes))
        weight = torch.randn(*tokens.shape, VOCABULARY, generator=torch.Generator().manual_seed(step))
        weight = weight.to(model.get_parameter("norm.weight").dtype) / tokens.numel()
        if rank is not None:
            part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
            tokens, weight = tokens[part], weight[part] * len(sizes)
        for last in (False, True) if accumulate is not None and step == 1 else (True,):
            with accumulate(last) if accumulate is not None else contextlib.nullcontext():
                loss = (run(tokens) * weight).sum()
                (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(stepper)
        if rank is not None and reduce:
            for name, parameter in model.named_parameters():
                if name != VALUES:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= len(sizes)
        if not first:
            first = {name: whole(p.grad) for name, p in model.named_parameters()}
        if clip is not None:
            norms.append(float(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))))
        stepper.step() if scaler is None else scaler.step(stepper)
        if scaler is not None:
            scaler.update()
        losses.append(float(loss.detach()))
    saved = model.state_dict()  # brings all rows up to date
    return {
        "gradients": first,
        "parameters": {name: whole(p) for name, p in saved.items() if p.is_floating_point()},
        "losses": losses,
        "norms": norms,
        "state": {name: whole(t) for name, t in stepper.state[model.get_parameter(VALUES)].items()},
    }


def sharded_gpt(mesh: DeviceMesh, by: str | None = None, tokens: str = "uneven", **options: Any) -> nn.Module:
    """`planned_gpt`, sharded."""
    model = planned_gpt(**options).double()
    memcompile.shard(model, mesh, by=by, tokens=tokens)
    return model


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference of two dicts of tensors, and where it is."""
    assert one.keys() == other.keys()
    return max((float((one[name] - other[name]).abs().max()) if one[name].numel() else 0.0, name) for name in one)
