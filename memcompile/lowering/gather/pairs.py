"""A table of pairs: `pair_gather`, its derivative `pair_grads`, and `pair_scatter`, the gradient of the table.

Row i of the table is (u_i, v_i), [num_slots, d + value_dim]: an expert of one hidden neuron, its weights in and out
(PEER: He 2024, "Mixture of A Million Experts", arXiv 2407.04153). With slots s and weights w [tokens, hits], x [tokens,
d], (u, v) the row of slot s[t, h], and gelu(z) = z * Phi(z) with the distribution function Phi and the density phi of
the normal distribution:

    dots[t, h] = u . x[t]
    y[t]       = sum_h w[t, h] * gelu(dots[t, h]) * v                          [tokens, value_dim]

and for a gradient g of y:

    grad_weights[t, h] = gelu(dots[t, h]) * (v . g[t])
    into[t, h]         = w[t, h] * gelu'(dots[t, h]) * (v . g[t])              gelu'(z) = Phi(z) + z * phi(z)
    out[t, h]          = w[t, h] * gelu(dots[t, h])
    grad_x[t]          = sum_h into[t, h] * u                                  [tokens, d]
    the table's row n  = sum over its hits of (into[t, h] * x[t], out[t, h] * g[t])

`pair_gather` and `pair_grads` read each row once. x and g have the table's dtype, as y and grad_x have; what has a
number for each hit is in the dtype of sums. No kernel builds [tokens, hits, d]. Slots of -1 are not taken.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memcompile.lowering.gather.hits import check_hits, check_slots, new_dots, parts_of_tokens, sum_dtype, sums_of_hits
from memcompile.lowering.register.operators import register_differentiable, register_operator
from memcompile.lowering.register.schema import expect, operator

# Of rows that the PyTorch operators hold at once, as in `weighted_gather`.
_CHUNK_ELEMENTS = {"cpu": 2**17, "accelerator": 2**26}

Grads = tuple[Tensor, Tensor, Tensor, Tensor]


def gelu_slope(z: Tensor) -> Tensor:
    """The derivative of gelu."""
    return 0.5 * (1 + torch.erf(z * 0.5**0.5)) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def composed(values: Tensor, slots: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    """y by operators that are closed under differentiation, for transforms of torch.func."""
    u, v = values[:, : x.shape[1]], values[:, x.shape[1] :]
    dots = operator("gather_dot")(u, slots, x)
    return operator("weighted_gather")(v, slots, weights * F.gelu(dots))  # type: ignore[no-any-return]


def _composed_grads(values: Tensor, slots: Tensor, weights: Tensor, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the table, of weights and of x, by the same operators: they have derivatives."""
    u, v = values[:, : x.shape[1]], values[:, x.shape[1] :]
    dots, along = operator("gather_dot")(u, slots, x), operator("gather_dot")(v, slots, grad)
    activation = F.gelu(dots)
    into = weights * gelu_slope(dots) * along
    halves = (
        operator("weighted_scatter")(slots, into, x, values.shape[0]),
        operator("weighted_scatter")(slots, weights * activation, grad, values.shape[0]),
    )
    grad_weights = (activation * along).to(weights.dtype)
    return torch.cat(halves, 1), grad_weights, operator("weighted_gather")(u, slots, into)


def _check(values: Tensor, slots: Tensor, weights: Tensor, x: Tensor) -> None:
    expect("values", values, ("num_slots", "d + value_dim"))
    check_slots(slots)
    expect("weights", weights, slots.shape)
    expect("x", x, (slots.shape[0], "d"), values.dtype)
    if x.shape[1] > values.shape[1]:
        raise ValueError(f"values: expected rows of d + value_dim with d = {x.shape[1]}, got {list(values.shape)}")


def _check_grads(values: Tensor, slots: Tensor, weights: Tensor, x: Tensor, dots: Tensor, grad: Tensor) -> None:
    _check(values, slots, weights, x)
    expect("dots", dots, slots.shape, sum_dtype(values))
    expect("grad", grad, (slots.shape[0], values.shape[1] - x.shape[1]), values.dtype)


def new_gather(values: Tensor, slots: Tensor, weights: Tensor, x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """Room for y and dots; the fake."""
    return values.new_empty(slots.shape[0], values.shape[1] - x.shape[1]), new_dots(values, slots)


def new_grads(values: Tensor, slots: Tensor, weights: Tensor, x: Tensor, *rest: object) -> Grads:
    """Room for the gradients of weights and x, and the two coefficients; the fake."""
    of_weights, into, out = (new_dots(values, slots) for _ in range(3))
    return of_weights, values.new_empty(x.shape), into, out


def _parts(values: Tensor, slots: Tensor, d: int) -> Any:
    """Some tokens after others, and u and v of the rows that they hit: [tokens, hits, ...] in the dtype of sums."""
    for part in parts_of_tokens(slots, values.shape[1], _CHUNK_ELEMENTS):
        rows = values.detach().index_select(0, slots[part].reshape(-1)).to(sum_dtype(values))
        rows = rows.view(*slots[part].shape, values.shape[1])
        yield part, rows[..., :d], rows[..., d:]


def _dots(rows: Tensor, vectors: Tensor) -> Tensor:
    """[tokens, hits, n] . [tokens, n]."""
    return (rows @ vectors.to(rows.dtype).unsqueeze(-1)).squeeze(-1)


def _sum(rows: Tensor, weights: Tensor) -> Tensor:
    """The sum over hits of weights [tokens, hits] * rows [tokens, hits, n]."""
    return (weights.unsqueeze(1) @ rows).squeeze(1)


def _gather(values: Tensor, slots: Tensor, weights: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    weights, x = weights.detach().to(sum_dtype(values)), x.detach()
    y, dots = new_gather(values, slots, weights, x)
    for part, u, v in _parts(values, slots, x.shape[1]):
        dots[part] = _dots(u, x[part])
        y[part] = _sum(v, weights[part] * F.gelu(dots[part]))
    return y, dots


def _grads(values: Tensor, slots: Tensor, weights: Tensor, x: Tensor, dots: Tensor, grad: Tensor) -> Grads:
    weights = weights.to(dots.dtype)
    grad_weights, grad_x, into, out = new_grads(values, slots, weights, x)
    activation = F.gelu(dots)
    torch.mul(weights, activation, out=out)
    for part, u, v in _parts(values, slots, x.shape[1]):
        along = _dots(v, grad[part])
        grad_weights[part] = activation[part] * along
        into[part] = weights[part] * gelu_slope(dots[part]) * along
        grad_x[part] = _sum(u, into[part])
    return grad_weights, grad_x, into, out


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
    values, slots, weights, x, dots = ctx.saved_tensors
    of_values, _, of_weights, of_x = ctx.needs_input_grad
    if torch.is_grad_enabled():  # a derivative of these is asked for
        grad_values, grad_weights, grad_x = _composed_grads(values, slots, weights, x, grad)
        return grad_values if of_values else None, None, grad_weights if of_weights else None, grad_x if of_x else None
    grad_weights, grad_x, into, out = operator("pair_grads")(values, slots, weights, x, dots, grad)
    of_table = operator("pair_scatter")(slots, into, x, out, grad, values.shape[0]) if of_values else None
    return of_table, None, grad_weights.to(weights.dtype) if of_weights else None, grad_x if of_x else None


def _check_scatter(slots: Tensor, into: Tensor, x: Tensor, out: Tensor, grad: Tensor, num_slots: int) -> None:
    check_hits(slots, into, x, num_slots, out, grad)


def _scatter_fake(slots: Tensor, into: Tensor, x: Tensor, out: Tensor, grad: Tensor, num_slots: int) -> Tensor:
    return x.new_empty(num_slots, x.shape[1] + grad.shape[1])


def _scatter(slots: Tensor, into: Tensor, x: Tensor, out: Tensor, grad: Tensor, num_slots: int) -> Tensor:
    rows, sums = sums_of_hits(slots, (into, x), (out, grad))
    return x.new_zeros(num_slots, sums.shape[1]).index_copy_(0, rows, sums)


register_differentiable(
    "pair_gather", check=_check, kernel=_gather, fake=new_gather, backward=_backward, setup_context=_setup_context
)
register_operator("pair_grads", check=_check_grads, kernel=_grads, fake=new_grads)
register_operator("pair_scatter", check=_check_scatter, kernel=_scatter, fake=_scatter_fake)
