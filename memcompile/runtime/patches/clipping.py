"""Clipping and unscaling of gradients on different meshes: DTensors of sharded values among plain tensors, or FSDP's.
What `clip_grad_norm_`, `clip_grad_value_` and `GradScaler` are made of: `_get_total_norm`, `_clip_grads_with_norm_`,
`clip_grad_value_` and `_amp_foreach_non_finite_check_and_unscale_`.

No public way: they stack the norms of all gradients, or divide them in one list, which DTensors of another mesh refuse.
Here each mesh has its own norm, and its own list.
Until: https://github.com/pytorch/pytorch/issues/180346 (`clip_grad_norm_` and several meshes).
The same: gradients that are all plain tensors, or all on one mesh.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import utils

from memcompile.common.patch import Patch, Replaced
from memcompile.runtime._torch import clip_grad, local_part


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
)
