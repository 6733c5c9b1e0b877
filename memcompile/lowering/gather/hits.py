"""Hits: slots and weights [tokens, hits] with a gradient [tokens, value_dim]; what they must be; their sums by slot.

A hit's number is token * hits + its place among the token's. The sums are in PyTorch's operators here.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from memcompile.lowering.register.schema import expect


def sum_dtype(rows: Tensor) -> torch.dtype:
    """The dtype that rows are summed and updated in: float64 for float64, else float32."""
    return torch.promote_types(rows.dtype, torch.float32)


def check_slots(slots: Tensor) -> None:
    """Raises ValueError unless they are int32 or int64 [tokens, hits]."""
    expect("slots", slots, ("tokens", "hits"), torch.int32, torch.int64)


def check_hits(
    slots: Tensor,
    weights: Tensor,
    grad: Tensor,
    num_slots: int = 0,
    more_weights: Tensor | None = None,
    more_grad: Tensor | None = None,
) -> None:
    """Raises ValueError for what are not slots, weights and a gradient of the same tokens. The arguments are those of
    `weighted_scatter` and `row_sums`.
    """
    check_slots(slots)
    expect("weights", weights, slots.shape)
    expect("grad", grad, (slots.shape[0], "value_dim"))
    if (more_weights is None) != (more_grad is None):
        raise ValueError("more_weights and more_grad: expected both or neither")
    if more_weights is not None and more_grad is not None:
        expect("more_weights", more_weights, slots.shape)
        expect("more_grad", more_grad, (slots.shape[0], "value_dim"), grad.dtype)


def check_dot(values: Tensor, slots: Tensor, grad: Tensor) -> None:
    """Raises ValueError unless rows of the values at these slots have dots with the gradient."""
    expect("values", values, ("num_slots", "value_dim"))
    check_slots(slots)
    expect("grad", grad, (slots.shape[0], values.shape[1]), values.dtype)


def new_sums(values: Tensor, slots: Tensor, *rest: object) -> Tensor:
    """Room for weighted sums of rows: [tokens, value_dim]. It is the fake of what returns them."""
    return values.new_empty(slots.shape[0], values.shape[1])


def new_dots(values: Tensor, slots: Tensor, *rest: object) -> Tensor:
    """Room for dots with rows: [tokens, hits], in the dtype of sums."""
    return values.new_empty(slots.shape, dtype=sum_dtype(values))


def parts_of_tokens(slots: Tensor, dim: int, elements: Mapping[str, int]) -> Iterator[slice]:
    """Some tokens after others, whose rows [tokens, hits, dim] have at most so many `elements`, of "cpu" or of
    "accelerator"; at least one token.
    """
    tokens, hits = slots.shape
    held = elements["cpu" if slots.device.type == "cpu" else "accelerator"]
    size = max(1, held // max(1, hits * dim))
    return (slice(start, start + size) for start in range(0, tokens, size))


def sums_of_hits(slots: Tensor, *factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The distinct slots, ascending, int64 [n]; and for each the sum of weights[hit] * grad[token of the hit] over its
    hits, [n, value_dim] in grad's dtype; of several factors (weights, grad) side by side.
    """
    ranked, hits = slots.reshape(-1).sort(stable=True)
    rows, counts = torch.unique_consecutive(ranked, return_counts=True)
    if len(rows) == 0:
        return rows.long(), torch.cat([grad.new_empty(0, grad.shape[1]) for _, grad in factors], 1)
    # The hits of a slot are a bag of (token, weight), its sum a gather.
    tokens, starts, sums = hits // slots.shape[1], counts.cumsum(0) - counts, []
    for weights, grad in factors:
        weights_of = weights.detach().reshape(-1)[hits].to(grad.dtype)
        sums.append(F.embedding_bag(tokens, grad.detach(), starts, per_sample_weights=weights_of, mode="sum"))
    return rows.long(), sums[0] if len(sums) == 1 else torch.cat(sums, 1)
