"""What follows from the hits of a search, besides their softmax: their scores, and how evenly the half-keys are hit."""

from typing import Any

import torch
from torch import Tensor

from memcompile.lowering._torch import autograd_kernel, below_autograd, functorch_is_active
from memcompile.lowering.gather.hits import sum_dtype
from memcompile.lowering.register.kernels import without_autocast
from memcompile.lowering.register.operators import register_for_graphs
from memcompile.lowering.register.schema import NAMESPACE, operator
from memcompile.lowering.register.vmap import batch_first
from memcompile.lowering.search.product_key_search import half_key_rows


def hit_scores(halves: Tensor, half_keys: Tensor, slots: Tensor) -> Tensor:
    """The scores of the slots that were found: q1 . k1[i] + q2 . k2[j], computed for these alone, so that the backward
    builds no scores either.

    Args:
        halves: queries [tokens, heads, 2, key_dim / 2].
        half_keys: [2, heads, n, key_dim / 2], of the same dtype.
        slots: [tokens, heads, k].

    Returns:
        [tokens, heads, k] in the dtype of sums.
    """
    rows = half_key_rows(slots, half_keys.shape[2])
    dots = operator("gather_dot")(half_keys.flatten(0, 2), rows.flatten(0, 2), halves.flatten(0, 2))
    return dots.reshape(rows.shape).sum(2)


def balance_of(halves: Tensor, half_keys: Tensor, slots: Tensor) -> Tensor:
    """How evenly the half-keys are hit: n * sum of f_i * P_i, the mean over sides and heads. f_i is the share of hits
    that half-key i has, without a gradient, and P_i the mean over the tokens of its softmax over all n scores. It is 1
    where either is uniform, n where all is of one half-key, and 0 without tokens. The loss of "Switch Transformers"
    (Fedus et al. 2021, arXiv 2101.03961, section 2.2), with half-keys in the place of experts.

    It builds the scores, [2, heads, tokens, n], which nothing else in a layer does.

    Args:
        As `hit_scores` takes them.
    """
    sides, heads, n_keys, _ = half_keys.shape
    tokens, _, top_k = slots.shape
    dtype = sum_dtype(half_keys)
    with without_autocast(half_keys.device):
        scores = halves.to(dtype).permute(2, 1, 0, 3) @ half_keys.to(dtype).mT  # [2, heads, tokens, n]
    rows = half_key_rows(slots, n_keys).flatten().long()
    hits = scores.new_zeros(sides * heads * n_keys).scatter_add(0, rows, scores.new_ones(rows.shape))
    some = torch.sym_max(1, tokens)  # type: ignore[no-untyped-call]
    shares = hits.view(sides, heads, n_keys) / (some * top_k)
    means = scores.softmax(-1).sum(2) / some
    return n_keys * (shares * means).sum(-1).mean()


# --- a loss that the caller's loop need not know --------------------------------------------------------------------


def _copy(output: Tensor, loss: Tensor) -> Tensor:
    return output.clone()


def _vmap(info: Any, in_dims: tuple[int | None, int | None], output: Tensor, loss: Tensor) -> tuple[Tensor, int]:
    return operator("with_loss")(batch_first(output, in_dims[0], info.batch_size), loss), 0


def _forward(ctx: Any, output: Tensor, loss: Tensor) -> Tensor:
    ctx.shape, ctx.dtype = loss.shape, loss.dtype
    with below_autograd():
        return operator("with_loss")(output, loss) if functorch_is_active() else output.clone()


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return grad, grad.new_ones(ctx.shape, dtype=ctx.dtype)


# A copy of the output, in whose backward the loss has the gradient 1.
_derivative = autograd_kernel(f"{NAMESPACE}::with_loss", forward=_forward, backward=_backward)
register_for_graphs("with_loss", _copy, _copy, "CompositeExplicitAutograd", _derivative, _vmap)
