"""Kernels of aten for sparse tensors, by which clipping and unscaling serve the sparse gradient of a table: norms
(before 2.15), clamps, and the division of the part of a DTensor, where `GradScaler` does not see that it is sparse.

No public way: `clip_grad_norm_` and `clip_grad_value_` call these operators, and have no hook.
Until: https://github.com/pytorch/pytorch/issues/4829 (clipping of sparse gradients).
The same: dense tensors, and every operator that has a kernel for sparse tensors already.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memcompile.common.patch import Patch
from memcompile.lowering._torch import has_kernel, unregister


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


def _clamp_(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    if (min is not None and min > 0) or (max is not None and max < 0):
        raise NotImplementedError(f"clamp_({min}, {max}) of a sparse tensor would fill it: its zeros are not stored")
    if not x.is_coalesced():
        raise NotImplementedError("clamp_ of a sparse tensor that is not coalesced")
    x.values().clamp_(min, max)
    return x


def _clamp_max_(x: Tensor, max: Any) -> Tensor:
    return _clamp_(x, max=max)


def _unscale_(tensors: list[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    stored = [sparse._values() for sparse in tensors]  # in place: `values()` is a view that forgets whose it is
    torch._amp_foreach_non_finite_check_and_unscale_(stored, found_inf, inv_scale)


_KERNELS: dict[str, Callable[..., Any]] = {
    "_amp_foreach_non_finite_check_and_unscale_": _unscale_,
    "linalg_vector_norm": _vector_norm,
    "clamp_": _clamp_,
    "clamp_min_": _clamp_,
    "clamp_max_": _clamp_max_,
}


class _SparseKernels:
    def __init__(self) -> None:
        self._library: torch.library.Library | None = None

    def install(self) -> None:
        self._library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        for name, kernel in _KERNELS.items():
            for key in ("SparseCPU", "SparseCUDA"):
                if not has_kernel(f"aten::{name}", key):
                    self._library.impl(name, kernel, key)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        if self._library is not None:
            unregister(self._library)
            self._library = None


PATCH = Patch(_SparseKernels())
