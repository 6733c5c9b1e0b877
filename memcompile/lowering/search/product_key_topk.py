"""`memcompile::product_key_topk`: the exact k best of all n * n sums of two lists of n scores.

The rule, on every device:
1. each half's keys are ranked by (score descending, index ascending);
2. candidates are the rank pairs (a, b) with (a + 1) * (b + 1) <= k: any other pair has k pairs before it;
3. the hits are the k best candidates by (sum descending, a ascending, b ascending).
NaN counts as larger than every number, as in torch.sort, and -0.0 equals 0.0. So a NaN among the scores
reaches the logits of its own token and head, no others, and every slot stays a valid index.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from memcompile.config import MAX_SLOTS
from memcompile.lowering.register.operators import register_differentiable
from memcompile.lowering.register.schema import expect, operator
from memcompile.lowering.register.vmap import batch_first, unfold_tokens


def _check(scores: Tensor, top_k: int) -> None:
    # Lower precisions would reorder the slots.
    expect("scores", scores, (2, "tokens", "heads", "n_keys"), torch.float32, torch.float64)
    check_top_k(top_k, scores.shape[-1])


def check_top_k(top_k: int, n_keys: int) -> None:
    """Raise ValueError unless 1 <= top_k <= n_keys and n_keys**2 slots can be numbered in int32."""
    if top_k < 1 or top_k > n_keys:
        raise ValueError(f"top_k: expected 1 <= top_k <= n_keys = {n_keys}, got {top_k}")
    if n_keys * n_keys > MAX_SLOTS:
        raise ValueError(f"half_keys: {n_keys}**2 slots do not fit int32; n_keys may be at most 46340")


def rank(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` largest of the last dimension by (score descending, index ascending), NaN first.

    torch.topk orders ties as it likes, so its answer is unique only where the scores strictly descend, the
    one after the last included. Other rows are sorted stably. Scores seldom tie: on [2, 512, 4, 1024] with
    k = 32 this takes 34 ms on one core, topk of (score, index) packed into int64 78 ms, a stable sort of
    every row 200 ms.
    """
    best, index = scores.topk(min(top_k + 1, scores.shape[-1]), dim=-1)
    # Written so that NaN, which compares false, counts as a tie.
    tied = ~(best[..., :-1] > best[..., 1:]).all(dim=-1)
    best, index = best[..., :top_k].contiguous(), index[..., :top_k].contiguous()
    # + 0.0 turns -0.0 into 0.0, which a radix sort would tell apart.
    ranked, order = (scores[tied] + 0.0).sort(dim=-1, descending=True, stable=True)
    best[tied], index[tied] = ranked[..., :top_k], order[..., :top_k]
    return best, index


@lru_cache
def candidate_pairs(top_k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ranks (a, b) with (a + 1) * (b + 1) <= top_k, by a, then by b: 119 pairs for 32."""
    pairs = [(a, b) for a in range(top_k) for b in range(top_k // (a + 1))]
    first, second = zip(*pairs, strict=True)
    return first, second


def _kernel(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    scores = scores.detach()
    n_keys = scores.shape[-1]
    best, index = rank(scores, top_k)  # [2, tokens, heads, k] each
    first, second = (torch.tensor(ranks, device=scores.device) for ranks in candidate_pairs(top_k))
    sums = best[0][..., first] + best[1][..., second]  # [tokens, heads, candidates]
    logits, hit = rank(sums, top_k)  # [tokens, heads, k] each
    i = index[0].gather(-1, first[hit])
    j = index[1].gather(-1, second[hit])
    return logits, (i * n_keys + j).int()


def _fake(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = (scores.shape[1], scores.shape[2], top_k)
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int32)


def _vmap(info: Any, in_dims: Any, scores: Tensor, top_k: int) -> tuple[Any, Any]:
    batch = info.batch_size
    folded = batch_first(scores, in_dims[0], batch).movedim(0, 1).flatten(1, 2)  # [2, batch * tokens, heads, n]
    logits, slots = operator("product_key_topk")(folded, top_k)
    return (unfold_tokens(logits, batch), unfold_tokens(slots, batch)), (0, 0)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.scores_shape = inputs[0].shape
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_logits: Tensor, _: Any) -> tuple[Tensor, None]:
    (slots,) = ctx.saved_tensors  # [tokens, heads, k]
    sides, tokens, heads, n_keys = ctx.scores_shape
    rows, top_k = tokens * heads, slots.shape[-1]
    # Each hit's gradient goes to its two scores: a scatter into a table of one column, a row a score.
    halves = torch.stack([slots // n_keys, slots % n_keys]).long()  # [2, tokens, heads, k]
    start = torch.arange(sides * rows, device=slots.device) * n_keys
    score = halves.reshape(sides * rows, top_k) + start[:, None]
    weights = grad_logits.expand(sides, *grad_logits.shape).reshape(sides * rows, top_k)
    ones = grad_logits.new_ones(sides * rows, 1)
    grad = operator("weighted_scatter")(score, weights, ones, sides * rows * n_keys)
    return grad.reshape(sides, tokens, heads, n_keys), None


register_differentiable(
    "product_key_topk", check=_check, kernel=_kernel, fake=_fake, vmap=_vmap, backward=_backward,
    setup_context=_setup_context,
)  # fmt: skip
