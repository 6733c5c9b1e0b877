"""One memory layer (Memory+): its parameters and its work, by memcompile and as one writes it in PyTorch."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.setting import Layer, Setting, Work, compiled, draw
from memcompile.lowering import inductor_patches, memory_lookup

Gather = Callable[[Tensor, Tensor, Tensor], Tensor]  # values, slots and weights [tokens, hits] -> [tokens, value_dim]


def layer_parameters(setting: Setting) -> dict[str, nn.Parameter]:
    """By their names in `memory_lookup`, the same ones at each call; all but `values`, the shared table."""
    torch.manual_seed(0)
    width, value_dim, queries = setting.width, setting.value_dim, setting.heads * setting.key_dim
    return {
        "query_weight": draw(setting, queries, width),
        "query_bias": draw(setting, queries),
        "half_keys": draw(setting, 2, setting.heads, setting.n_keys, setting.key_dim // 2),
        "gate_weight": draw(setting, value_dim, width),
        "gate_bias": draw(setting, value_dim),
        "out_weight": draw(setting, width, value_dim),
        "out_bias": draw(setting, width),
    }


def layer_work(setting: Setting) -> Work:
    width, value_dim, hits = setting.width, setting.value_dim, setting.hits
    queries = setting.heads * setting.key_dim
    keys = setting.n_keys * queries  # numbers in the half-keys of both sides
    weights = queries * width + keys + 2 * width * value_dim
    return Work(2 * weights + 2 * hits * value_dim, weights, hits, value_dim, setting.num_slots)


def bag(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(slots, values, mode="sum", per_sample_weights=weights)


def naive(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    return (values[slots] * weights.unsqueeze(-1)).sum(dim=1)


def plain_topk(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The k best sums by torch.topk of each half and of all k * k sums of what it found.

    Args:
        scores: [2, tokens, heads, n].

    Returns:
        logits and slots [tokens, heads, k].
    """
    best, key = scores.topk(top_k, dim=-1)  # [2, tokens, heads, k]
    sums = (best[0].unsqueeze(-1) + best[1].unsqueeze(-2)).flatten(-2)  # [tokens, heads, k * k]
    logits, pair = sums.topk(top_k, dim=-1)
    slots = key[0].gather(-1, pair // top_k) * scores.shape[-1] + key[1].gather(-1, pair % top_k)
    return logits, slots


def plain_scores(query: Tensor, half_keys: Tensor) -> Tensor:
    """Scores in fp32, as `product_key_search` has them: [2, tokens, heads, n] of query [tokens, heads, key_dim]."""
    return torch.einsum("thsd,shnd->sthn", query.unflatten(-1, (2, -1)).float(), half_keys.float())


def plain(x: Tensor, values: Tensor, p: Mapping[str, Tensor], setting: Setting, gather: Gather) -> Tensor:
    """The mathematics of `memory_lookup`."""
    query = F.linear(x, p["query_weight"], p["query_bias"]).unflatten(-1, (setting.heads, -1))
    logits, slots = plain_topk(plain_scores(query, p["half_keys"]), setting.top_k)
    weights = logits.softmax(dim=-1).to(values.dtype)  # [tokens, heads, k]
    y = gather(values, slots.flatten(1), weights.flatten(1))
    y = y * F.silu(F.linear(x, p["gate_weight"], p["gate_bias"]))
    return F.linear(y, p["out_weight"], p["out_bias"])


def our_layer(setting: Setting, values: Tensor, p: Mapping[str, Tensor]) -> Layer:
    """`memory_lookup` as memcompile compiles it."""
    heads, top_k = setting.heads, setting.top_k
    return compiled(
        lambda x: memory_lookup(x, values=values, heads=heads, top_k=top_k, **p), inductor_patches("benchmark")
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Of the norm. Roundings exchange slots of all but equal scores, so outputs that should agree do so but roughly."""
    actual, expected = actual.float(), expected.float()
    return ((actual - expected).norm() / expected.norm()).item()


def agreed_error(dtype: torch.dtype) -> float:
    """The largest `relative_error` of two that compute the same."""
    return 1e-4 if dtype == torch.float32 else 5e-2
