"""A table that learns by the rows that were hit: `table_gather`, whose gradient is sparse, and the operators behind it.

    table_gather  (V, s, w)[t]    = sum_h w[t, h] * V[s[t, h]]              [tokens, value_dim]
    table_dot     (V, s, u)[t, h] = V[s[t, h]] . u[t]                       [tokens, hits]
    sparse_scatter(V, [s], [w], [u]) = the sum of weighted_scatter(s, w, u) over the layers, in the rows that they hit:
                                       coalesced sparse COO [num_slots, value_dim]; a slot of -1 is no hit

They are `weighted_gather`, `gather_dot` and `weighted_scatter` for values that an optimizer for rows steps. It leaves
rows behind until they are touched; so what is read is what the rows are by now, and whoever steps them is asked:
`Stepper`, which `set_stepper_of` finds by the table. What a call returns changes with a step alone, as with any
optimizer: graphs may reorder, merge or repeat calls. `fused_scatter` makes no gradient: it gives its factors to the
stepper, and returns one that holds no row.

How many rows are hit is known at run time only, so graphs hold these operators whole, and `merge_scatters` sums those
of the layers that share a table. They have no second derivative.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from memcompile.lowering._torch import autograd_kernel, below_autograd, in_backward, is_keyed, is_traced
from memcompile.lowering.gather.hits import check_hits, sum_dtype
from memcompile.lowering.register.schema import LIBRARY, NAMESPACE, operator


class Stepper(Protocol):
    """Who steps the rows of a table; gather and dot are of the rows as they are now."""

    def gather(self, slots: Tensor, weights: Tensor) -> Tensor:
        """As `weighted_gather`."""

    def dot(self, slots: Tensor, grad: Tensor) -> Tensor:
        """As `gather_dot`."""

    def take_factors(self, slots: Tensor, weights: Tensor, grad: Tensor) -> None:
        """Takes the factors of one layer's gradient, to update the rows by those of all layers."""


def _nobody(values: Tensor, needed: bool = False) -> Stepper | None:
    return None


_stepper_of = _nobody


def set_stepper_of(find: Callable[..., Stepper | None]) -> None:
    """Says how the stepper of a table is found, by `find(values, needed)`; None is one whose rows are as they stand.
    Where a table cannot do without, it is `needed`, and worth a search.
    """
    global _stepper_of
    _stepper_of = find


def _gather(values: Tensor, slots: Tensor, weights: Tensor, gradient: str) -> Tensor:
    if gradient == "fused" and in_backward():
        raise RuntimeError(
            "values_grad='fused' cannot serve activation checkpointing: a layer would be run again when its values may "
            "be updated already. Use values_grad='sparse'"
        )
    stepper = _stepper_of(values)
    if stepper is not None:
        return stepper.gather(slots, weights)
    return operator("weighted_gather")(values, slots, weights)


def _gather_fake(values: Tensor, slots: Tensor, weights: Tensor, gradient: str) -> Tensor:
    return values.new_empty(slots.shape[0], values.shape[1])


def _dot(values: Tensor, slots: Tensor, grad: Tensor) -> Tensor:
    stepper = _stepper_of(values)
    return operator("gather_dot")(values, slots, grad) if stepper is None else stepper.dot(slots, grad)


def _dot_fake(values: Tensor, slots: Tensor, grad: Tensor) -> Tensor:
    return values.new_empty(slots.shape, dtype=sum_dtype(values))


Factors = Sequence[Tensor]  # slots, weights or gradients, of one layer each


def _sparse_scatter(values: Tensor, slots: Factors, weights: Factors, grads: Factors, opaque: bool = False) -> Tensor:
    joined, *factors = _joined(slots, weights, grads)
    if joined.numel() == 0 or bool((joined >= 0).all()):
        rows, sums = operator("row_sums")(joined, *factors, values.shape[0])
        return coalesced(rows, sums, values.shape[0])
    rows, sums = operator("row_sums")(joined + 1, *factors, values.shape[0] + 1)
    first = int(rows[0] == 0)  # the row of what hits none
    return coalesced(rows[first:] - 1, sums[first:], values.shape[0])


def _fused_scatter(values: Tensor, slots: Factors, weights: Factors, grads: Factors, opaque: bool = False) -> Tensor:
    stepper = _stepper_of(values, needed=True)
    if stepper is None:
        raise RuntimeError(
            "values_grad='fused' updates the memory's values in the backward, but no optimizer steps them by rows: "
            "build one from model.parameters() before the first backward, or use values_grad='sparse'"
        )
    stepper.take_factors(*_joined(slots, weights, grads))
    return _without_rows(values)


def _scatter_fake(values: Tensor, slots: Factors, weights: Factors, grads: Factors, opaque: bool = False) -> Tensor:
    # How many rows there are is nobody's question in a graph. For opaque ones see `merge_scatters`: their sizes and
    # strides are what a sparse tensor reports.
    return values.new_empty_strided(values.shape, (0, 0)) if opaque else _without_rows(values)


def _joined(slots: Factors, weights: Factors, grads: Factors) -> tuple[Tensor, ...]:
    for factors in zip(slots, weights, grads, strict=True):
        check_hits(*factors)
    return tuple(parts[0] if len(parts) == 1 else torch.cat([*parts]) for parts in (slots, weights, grads))


def _without_rows(values: Tensor) -> Tensor:
    rows = torch.empty(0, dtype=torch.int64, device=values.device)
    return coalesced(rows, values.new_empty(0, values.shape[1]), values.shape[0])


def coalesced(rows: Tensor, sums: Tensor, num_slots: int) -> Tensor:
    """The sparse COO tensor [num_slots, dim] of distinct ascending rows int64 [n] and their sums [n, dim]."""
    return torch.sparse_coo_tensor(
        rows.unsqueeze(0), sums, (num_slots, sums.shape[1]), check_invariants=False, is_coalesced=True
    )


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.gradient = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "the gradient of memory values is sparse and has no derivative of its own: for create_graph=True plan the "
            "model with values_grad='dense'"
        )
    values, slots, weights = ctx.saved_tensors
    grad_values = grad_weights = None
    if ctx.needs_input_grad[2]:
        grad_weights = operator("table_dot")(values, slots, grad).to(weights.dtype)
    if ctx.needs_input_grad[0] and is_traced(grad) and not is_keyed():
        # A graph of a backend that has not `merge_scatters`: Inductor's own cannot add sparse tensors.
        grad_values = operator("weighted_scatter")(slots, weights, grad, values.shape[0])
    elif ctx.needs_input_grad[0]:
        grad_values = operator(f"{ctx.gradient}_scatter")(values, [slots], [weights], [grad])
    return grad_values, None, grad_weights, None


def _forward(*args: Any) -> Any:
    with below_autograd():
        return operator("table_gather")(*args)


def _no_forward_mode(ctx: Any, *tangents: Any) -> Any:
    raise NotImplementedError(f"{NAMESPACE}::table_gather has no forward-mode derivative: use backward()")


_KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "table_gather": (_gather, _gather_fake),
    "table_dot": (_dot, _dot_fake),
    "sparse_scatter": (_sparse_scatter, _scatter_fake),
    "fused_scatter": (_fused_scatter, _scatter_fake),
}
for _name, (_kernel, _fake) in _KERNELS.items():
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=LIBRARY)
_derivative = autograd_kernel(
    "TableGather", forward=_forward, setup_context=_setup_context, backward=_backward, jvp=_no_forward_mode
)
LIBRARY.impl("table_gather", _derivative, "Autograd")  # type: ignore[no-untyped-call]
