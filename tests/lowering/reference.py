"""The whole layer in plain PyTorch: the specification that every kernel is tested against.

Any dtype, any device, differentiable by PyTorch itself. All n * n sums of a head are built: keep n small.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def product_key_topk_reference(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The k best of all n * n sums, by (sum descending, rank of i ascending, rank of j ascending).

    A half's keys are ranked by (score descending, index ascending), NaN above all numbers. This is the rule
    of `product_key_topk` without its short list of candidates; the two agree unless +inf meets -inf in a sum.

    Args:
        scores: [2, tokens, heads, n].
        top_k: at most n.

    Returns:
        logits [tokens, heads, k], descending, in the dtype of scores, and slots [tokens, heads, k], int64.
    """
    n_keys = scores.shape[-1]
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)  # [2, tokens, heads, n]
    sums = (ranked[0].unsqueeze(-1) + ranked[1].unsqueeze(-2)).flatten(-2)  # [tokens, heads, n * n]
    logits, pair = sums.sort(dim=-1, descending=True, stable=True)
    logits, pair = logits[..., :top_k], pair[..., :top_k]
    i = order[0].gather(-1, pair // n_keys)
    j = order[1].gather(-1, pair % n_keys)
    return logits, i * n_keys + j


def _tokens(x: Tensor) -> Tensor:
    """[..., d] to [tokens, d]."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def scores_reference(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    half_keys: Tensor,
    temperature: Tensor | None,
    heads: int,
    batch_norm: tuple[Tensor | None, ...] = (None, None, None, None),
    training: bool = False,
) -> Tensor:
    """Both halves' scores of every key: [2, tokens, heads, n].

    Args:
        batch_norm: scale, shift, running mean and variance; the last two stay as they are.
    """
    query = F.linear(_tokens(x), query_weight, query_bias)
    scale, shift, *running = batch_norm
    if scale is not None:
        mean, var = (None if t is None else t.clone().to(query) for t in running)
        query = F.batch_norm(query, mean, var, scale, shift, training or mean is None)
    halves = query.reshape(-1, heads, 2, half_keys.shape[-1])  # [tokens, heads, 2, key_dim / 2]
    if temperature is not None:
        halves = F.normalize(halves, dim=-1)
        half_keys = F.normalize(half_keys, dim=-1)
    scores = torch.einsum("thsd,shnd->sthn", halves, half_keys)
    return scores if temperature is None else scores * temperature[:, None]


def pair_gather_reference(values: Tensor, slots: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    """The sum over a token's hits of weight * gelu(u . x) * v, of rows (u, v), computed as it is defined.

    Args:
        values: [num_slots, d + value_dim].
        slots: integers [tokens, hits], and weights: [tokens, hits].
        x: [tokens, d].

    Returns:
        [tokens, value_dim].
    """
    rows = values[slots.long()]  # [tokens, hits, d + value_dim]
    u, v = rows[..., : x.shape[1]], rows[..., x.shape[1] :]
    dots = (u * x.unsqueeze(1)).sum(dim=-1)
    return ((weights.to(dots.dtype) * F.gelu(dots)).unsqueeze(-1) * v).sum(dim=1)


def memory_lookup_reference(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    half_keys: Tensor,
    values: Tensor,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    out_weight: Tensor | None = None,
    out_bias: Tensor | None = None,
    temperature: Tensor | None = None,
    query_scale: Tensor | None = None,
    query_shift: Tensor | None = None,
    query_mean: Tensor | None = None,
    query_var: Tensor | None = None,
    *,
    heads: int,
    top_k: int,
    slots: Tensor | None = None,
    weighting: str = "softmax",
    first_slot: int = 0,
    num_tables: int = 1,
    training: bool = False,
    pairs: bool = False,
) -> Tensor:
    """`memory_lookup`, computed as it is defined, in the dtype of its arguments. Running statistics stay as they are.

    Args:
        slots: [tokens, heads, k], to read these slots instead of the best. Two precisions may choose
            differently between slots that score almost the same; given slots compare the rest of the layer.
        The rest is as in `memory_lookup`.
    """
    batch_norm = query_scale, query_shift, query_mean, query_var
    scores = scores_reference(x, query_weight, query_bias, half_keys, temperature, heads, batch_norm, training)
    n_keys = scores.shape[-1]
    assert len(values) == num_tables * n_keys**2
    if slots is None:
        _, slots = product_key_topk_reference(scores, top_k)
    slots = slots.long()
    logits = scores[0].gather(-1, slots // n_keys) + scores[1].gather(-1, slots % n_keys)
    weights = logits.softmax(dim=-1) if weighting == "softmax" else logits.sigmoid()  # [tokens, heads, k]
    slots = first_slot + slots
    if pairs:
        y = pair_gather_reference(values, slots.flatten(1), weights.flatten(1), _tokens(x))
    else:
        y = (weights.unsqueeze(-1) * values[slots]).sum(dim=(1, 2))  # [tokens, value_dim]
    if gate_weight is not None:
        y = y * F.silu(F.linear(_tokens(x), gate_weight, gate_bias))
    if out_weight is not None:
        y = F.linear(y, out_weight, out_bias)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def balance_reference(scores: Tensor, slots: Tensor) -> Tensor:
    """The balance loss of scores [2, tokens, heads, n] and the slots [tokens, heads, k] that were hit: n * sum of
    f_i * P_i, the mean over sides and heads.
    """
    n_keys = scores.shape[-1]
    hit = torch.stack([slots.long() // n_keys, slots.long() % n_keys])  # [2, tokens, heads, k]
    shares = F.one_hot(hit, n_keys).to(scores.dtype).mean(dim=(1, 3))  # [2, heads, n]
    means = scores.softmax(dim=-1).mean(dim=1)
    return n_keys * (shares * means).sum(dim=-1).mean()
