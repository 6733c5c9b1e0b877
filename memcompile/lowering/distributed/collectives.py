"""Functional collectives along dim 0: nodes of a graph, which start one and wait for it apart.

The first ones have no derivatives: their callers have. `sum_gradients` and `sum_over_ranks` are each other's, for
tensor parallelism: the first where ranks with the same tokens part, the second where they meet again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memcompile.lowering._torch import autograd_kernel, below_autograd

OPERATIONS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
_FUNCTIONAL = torch.ops._c10d_functional


def all_gather(tensor: Tensor, ranks: int, group: str) -> Tensor:
    """[n, ...] of each rank -> [ranks * n, ...] of all."""
    return _FUNCTIONAL.wait_tensor(_FUNCTIONAL.all_gather_into_tensor(tensor.contiguous(), ranks, group))


def reduce_scatter(tensor: Tensor, ranks: int, group: str) -> Tensor:
    """[ranks * n, ...] of each rank -> [n, ...], the own part of their sum."""
    if tensor.device.type == "cpu":  # gloo would sum all for every rank and keep a part, for twice the bytes
        size = tensor.shape[0] // ranks
        elements = [size * tensor.shape[1:].numel()] * ranks
        parts = all_to_all(tensor.reshape(-1), elements, elements, group)
        return parts.view(ranks, size, *tensor.shape[1:]).sum(0)
    return _FUNCTIONAL.wait_tensor(_FUNCTIONAL.reduce_scatter_tensor(tensor.contiguous(), "sum", ranks, group))


def all_reduce(tensor: Tensor, group: str, operation: str = "sum") -> Tensor:
    """The sum over the ranks, or another reduction."""
    return _FUNCTIONAL.wait_tensor(_FUNCTIONAL.all_reduce(tensor.contiguous(), operation, group))


def all_to_all(
    tensor: Tensor, received: Sequence[int | torch.SymInt], sent: Sequence[int | torch.SymInt], group: str
) -> Tensor:
    """Sends `sent[q]` entries of [n] to each rank q, in order, and has `received[q]` from each."""
    return _FUNCTIONAL.wait_tensor(
        _FUNCTIONAL.all_to_all_single(tensor.contiguous(), list(received), list(sent), group)
    )


def _forward_as_is(ctx: Any, tensor: Tensor, group: str) -> Tensor:
    ctx.group = group
    return tensor.view_as(tensor)


def _backward_summed(ctx: Any, grad: Tensor) -> tuple[Any, None]:
    return sum_over_ranks(grad, ctx.group), None


def _forward_summed(ctx: Any, tensor: Tensor, group: str) -> Tensor:
    ctx.group = group
    with below_autograd():
        return all_reduce(tensor, group)


def _backward_as_is(ctx: Any, grad: Tensor) -> tuple[Any, None]:
    return sum_gradients(grad, ctx.group), None


# Of (tensor, group): the tensor, which all ranks have, with the sum of their gradients as its own.
sum_gradients = autograd_kernel("sum_gradients", forward=_forward_as_is, backward=_backward_summed)
# Of (tensor, group): the sum over the ranks, all of which have its gradient.
sum_over_ranks = autograd_kernel("sum_over_ranks", forward=_forward_summed, backward=_backward_as_is)
