"""The search on its own: of given scores, and with the product that gives them."""

import torch
from torch import Tensor

from benchmarks.common.layer import plain_scores, plain_topk
from benchmarks.common.results import FORWARD
from benchmarks.common.setting import Setting, compiled, draw
from benchmarks.gpu.case import OURS, SCORED_SEARCH, SEARCH, Case, Entry
from memcompile.lowering import inductor_patches

TOPK = "torch.topk + merge"


def _softmaxed(found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return found[0].softmax(dim=-1), found[1]


def search_case(setting: Setting, device: torch.device, tokens: int, all_peers: bool) -> Case:
    """Scores [2, tokens, heads, n] in fp32 -> weights and slots [tokens, heads, k]."""
    heads, top_k = setting.heads, setting.top_k
    search = torch.ops.memcompile.product_key_topk

    def draw_scores(count: int) -> tuple[Tensor, ...]:
        return (torch.randn(2, count, heads, setting.n_keys, device=device),)

    runs = {
        OURS: compiled(lambda s: _softmaxed(search(s, top_k)), inductor_patches("benchmark"), dynamic=False),
        "memcompile, eager": lambda s: _softmaxed(search(s, top_k)),
        TOPK: lambda s: _softmaxed(plain_topk(s, top_k)),
    }
    if all_peers:
        runs["torch.topk + merge, Inductor"] = compiled(lambda s: _softmaxed(plain_topk(s, top_k)), dynamic=False)
    moved = tokens * heads * (2 * setting.n_keys + 2 * top_k) * 4
    entries = tuple(Entry(name, run, 0, moved) for name, run in runs.items())
    return Case(SEARCH, setting, tokens, FORWARD, draw_scores, entries, reference=TOPK)


def scored_search_case(setting: Setting, device: torch.device, tokens: int, all_peers: bool) -> Case:
    """Queries [tokens, heads, key_dim] -> weights and slots [tokens, heads, k]."""
    heads, top_k, n_keys, key_dim = setting.heads, setting.top_k, setting.n_keys, setting.key_dim
    with device:
        keys = draw(setting, 2, heads, n_keys, key_dim // 2).detach()
    search = torch.ops.memcompile.product_key_search

    def draw_queries(count: int) -> tuple[Tensor, ...]:
        return (torch.randn(count, heads, key_dim, device=device).to(setting.dtype),)

    runs = {
        OURS: compiled(lambda q: search(q, keys, top_k), inductor_patches("benchmark"), dynamic=False),
        "memcompile, eager": lambda q: search(q, keys, top_k),
        TOPK: lambda q: _softmaxed(plain_topk(plain_scores(q, keys), top_k)),
    }
    if all_peers:
        runs["torch.topk + merge, Inductor"] = compiled(
            lambda q: _softmaxed(plain_topk(plain_scores(q, keys), top_k)), dynamic=False
        )
    flops = 2.0 * tokens * heads * key_dim * n_keys
    moved = keys.nbytes + tokens * heads * (key_dim * setting.dtype.itemsize + 2 * top_k * 4)
    entries = tuple(Entry(name, run, flops, moved) for name, run in runs.items())
    return Case(SCORED_SEARCH, setting, tokens, FORWARD, draw_queries, entries, reference=TOPK)
