"""Clipping and unscaling of gradients on different meshes: DTensors of sharded values among plain tensors, or FSDP's.
What `clip_grad_norm_`, `clip_grad_value_` and `GradScaler` are made of: `_get_total_norm`, `_clip_grads_with_norm_`,
`clip_grad_value_` and `_amp_foreach_non_finite_check_and_unscale_`. And `GradScaler.unscale_` and `step`, which refuse
the optimizers of a model with a balance loss: its gradient is not scaled, and would be divided all the same.

No public way: they stack the norms of all gradients, or divide them in one list, which DTensors of another mesh refuse.
Here each mesh has its own norm, and its own list. A scaler has no hooks, and optimizers are not told of it.
Until: https://github.com/pytorch/pytorch/issues/180346 (`clip_grad_norm_` and several meshes); a backward can be told
the scale of its loss.
The same: gradients that are all plain tensors, or all on one mesh; scalers of models without a balance loss, and those
that are switched off.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import utils
from torch.optim import Optimizer

from memcompile.common.patch import Patch, Replaced
from memcompile.errors import OptionError
from memcompile.runtime._torch import clip_grad, local_part
from memcompile.runtime.optimizer_state import parameters_of
from memcompile.runtime.pool import live_pools


def _norm_by_mesh(
    total_norm: Callable[..., Tensor],
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    norms = [total_norm(group, norm_type, *args, **kwargs) for group in _by_mesh(tensors, tensors) or [[]]]
    if len(norms) == 1:
        return norms[0]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack([norm.to(whole[0].device) for norm in whole]), norm_type)


def _clip_by_mesh(clip: Callable[..., None], parameters: Tensor | Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    with_grad = [p for p in parameters if p.grad is not None]
    for group in _by_mesh(with_grad, [p.grad for p in with_grad]):
        clip(group, *args, **kwargs)


def _unscale_by_mesh(unscale: Callable[..., None], tensors: list[Tensor], *args: Any) -> None:
    for group in _by_mesh(tensors, tensors):
        unscale(group, *args)


def _without_balance_loss(
    call: Callable[..., Any], scaler: torch.amp.GradScaler, optimizer: Optimizer, *args: Any, **kwargs: Any
) -> Any:
    if scaler.is_enabled():
        _check_balance_loss(optimizer)
    return call(scaler, optimizer, *args, **kwargs)


@torch.compiler.disable  # where a step is compiled: what is asked here is not for graphs
def _check_balance_loss(optimizer: Optimizer) -> None:
    held = {id(parameter) for parameter in parameters_of(optimizer)}
    for pool in live_pools():
        model, factor = pool.table.model() or pool.owner, pool.config.balance_loss
        if factor and any(id(parameter) in held for parameter in model.parameters()):
            raise OptionError(
                f"balance_loss={factor:g}: GradScaler divides all gradients of {type(optimizer).__name__} by its "
                f"scale, which the balance loss of {type(model).__name__} was not multiplied by, so that hardly "
                f"anything of it would be left. Train in float32 or bfloat16 with GradScaler(enabled=False), or plan "
                f"with balance_loss=0"
            )


def _by_mesh(tensors: list[Tensor], like: list[Any]) -> list[list[Tensor]]:
    """The tensors, apart by the mesh of what they are like."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor, key in zip(tensors, like, strict=True):
        mesh = (key.device_mesh, local_part(key).is_sparse) if isinstance(key, DTensor) else None
        groups.setdefault(mesh, []).append(tensor)
    return list(groups.values())


PATCH = Patch(
    Replaced(clip_grad, "_get_total_norm", _norm_by_mesh),
    Replaced(utils, "get_total_norm", _norm_by_mesh),
    Replaced(clip_grad, "_clip_grads_with_norm_", _clip_by_mesh),
    Replaced(utils, "clip_grads_with_norm_", _clip_by_mesh),
    Replaced(clip_grad, "clip_grad_value_", _clip_by_mesh),
    Replaced(utils, "clip_grad_value_", _clip_by_mesh),
    Replaced(torch, "_amp_foreach_non_finite_check_and_unscale_", _unscale_by_mesh),
    Replaced(torch.amp.GradScaler, "unscale_", _without_balance_loss),
    Replaced(torch.amp.GradScaler, "step", _without_balance_loss),
)
