"""What clipping and unscaling ask of sparse gradients and PyTorch does not have for them: norms (before 2.15), clamps,
and the division of what is the part of a DTensor, where GradScaler does not see that it is sparse.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memcompile.lowering._torch import has_kernel

_LIBRARY = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]


def _vector_norm(
    x: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Of all elements: those that are not stored are zero, and add nothing to a norm of an order above 0."""
    if dim is not None or keepdim or not ord > 0:
        raise NotImplementedError(f"a sparse tensor has norms of all its elements, of orders above 0; got order {ord}")
    stored = x.coalesce().values()
    if stored.numel() == 0:
        return stored.new_zeros((), dtype=dtype)
    return torch.linalg.vector_norm(stored, ord, dtype=dtype)


def _clamp_min_(x: Tensor, min: Any) -> Tensor:
    return _clamp_stored(x, "clamp_min_", min, min <= 0)


def _clamp_max_(x: Tensor, max: Any) -> Tensor:
    return _clamp_stored(x, "clamp_max_", max, max >= 0)


def _clamp_(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    x = x if min is None else _clamp_min_(x, min)
    return x if max is None else _clamp_max_(x, max)


def _clamp_stored(x: Tensor, name: str, bound: Any, keeps_zero: bool) -> Tensor:
    if not keeps_zero:
        raise NotImplementedError(f"{name}({bound}) of a sparse tensor would fill it: its zeros are not stored")
    if not x.is_coalesced():
        raise NotImplementedError(f"{name} of a sparse tensor that is not coalesced")
    getattr(x.values(), name)(bound)
    return x


def _unscale_(tensors: list[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    stored = [sparse._values() for sparse in tensors]  # in place: `values()` is a view that forgets whose it is
    torch._amp_foreach_non_finite_check_and_unscale_(stored, found_inf, inv_scale)


_KERNELS: dict[str, Callable[..., Any]] = {
    "_amp_foreach_non_finite_check_and_unscale_": _unscale_,
    "linalg_vector_norm": _vector_norm,
    "clamp_": _clamp_,
    "clamp_min_": _clamp_min_,
    "clamp_max_": _clamp_max_,
}
for _name, _kernel in _KERNELS.items():
    for _key in ("SparseCPU", "SparseCUDA"):
        if not has_kernel(f"aten::{_name}", _key):
            _LIBRARY.impl(_name, _kernel, _key)  # type: ignore[no-untyped-call]
