"""One memory layer (Memory+) four times: by memcompile, and as one writes it in PyTorch, eager and under Inductor."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cpu.setting import Contestant, Layer, Setting, Work, compiled, draw, trained
from memcompile.lowering import inductor_patches, memory_lookup

Gather = Callable[[Tensor, Tensor, Tensor], Tensor]  # values, slots and weights [tokens, hits] -> [tokens, value_dim]


def layer_parameters(setting: Setting) -> dict[str, nn.Parameter]:
    """By their names in `memory_lookup`, the same ones at each call; `values` is the shared table."""
    torch.manual_seed(0)
    width, queries = setting.width, setting.heads * setting.key_dim
    return {
        "query_weight": draw(setting, queries, width),
        "query_bias": draw(setting, queries),
        "half_keys": draw(setting, 2, setting.heads, setting.n_keys, setting.key_dim // 2),
        "gate_weight": draw(setting, width, width),
        "gate_bias": draw(setting, width),
        "out_weight": draw(setting, width, width),
        "out_bias": draw(setting, width),
    }


def layer_work(setting: Setting) -> Work:
    width, heads, hits = setting.width, setting.heads, setting.heads * setting.top_k
    queries = heads * setting.key_dim
    keys = setting.n_keys * queries  # numbers in the half-keys of both sides
    weights = queries * width + keys + 2 * width * width
    return Work(2 * weights + 2 * hits * width, weights, hits, width, setting.num_slots)


def bag(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(slots, values, mode="sum", per_sample_weights=weights)


def naive(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    return (values[slots] * weights.unsqueeze(-1)).sum(dim=1)


def plain(x: Tensor, values: Tensor, p: dict[str, nn.Parameter], setting: Setting, gather: Gather) -> Tensor:
    """The mathematics of `memory_lookup`, its scores in fp32 as there."""
    half_keys, top_k = p["half_keys"], setting.top_k
    halves = F.linear(x, p["query_weight"], p["query_bias"]).view(-1, setting.heads, 2, half_keys.shape[-1])
    scores = torch.einsum("thsd,shnd->sthn", halves.float(), half_keys.float())
    best, key = scores.topk(top_k, dim=-1)  # [2, tokens, heads, k]
    sums = (best[0].unsqueeze(-1) + best[1].unsqueeze(-2)).flatten(-2)  # [tokens, heads, k * k]
    logits, pair = sums.topk(top_k, dim=-1)
    slots = key[0].gather(-1, pair // top_k) * setting.n_keys + key[1].gather(-1, pair % top_k)
    weights = logits.softmax(dim=-1).to(values.dtype)  # [tokens, heads, k]
    y = gather(values, slots.flatten(1), weights.flatten(1))
    y = y * F.silu(F.linear(x, p["gate_weight"], p["gate_bias"]))
    return F.linear(y, p["out_weight"], p["out_bias"])


def memory_contestants(setting: Setting, table: Tensor, most_tokens_of_naive: int | None) -> list[Contestant]:
    """The four; the naive gather only where a number of tokens for it is given."""
    values, work = table[: setting.num_slots], layer_work(setting)

    def contestant(
        name: str, layer: Callable[[dict[str, nn.Parameter]], Layer], most_tokens: int | None = None
    ) -> Contestant:
        p = layer_parameters(setting)  # each its own, so that none finds another's in the caches
        return Contestant(name, layer(p), trained(p.values()), work, setting.n_keys, most_tokens)

    def ours(p: dict[str, nn.Parameter]) -> Layer:
        heads, top_k = setting.heads, setting.top_k
        return compiled(
            lambda x: memory_lookup(x, values=values, heads=heads, top_k=top_k, **p), inductor_patches("benchmark")
        )

    found = [
        contestant("memcompile", ours),
        contestant("eager", lambda p: lambda x: plain(x, values, p, setting, bag)),
        contestant("Inductor", lambda p: compiled(lambda x: plain(x, values, p, setting, bag))),
    ]
    if most_tokens_of_naive:
        found.append(
            contestant(
                "Inductor, naive gather",
                lambda p: compiled(lambda x: plain(x, values, p, setting, naive)),
                most_tokens_of_naive,
            )
        )
    return found


def check_agreement(contestants: list[Contestant], tokens: int, width: int, dtype: torch.dtype) -> None:
    """Whether the four compute the same; a benchmark of something else is worth nothing.

    Raises:
        RuntimeError: they do not.
    """
    x = torch.randn(tokens, width, dtype=dtype)
    with torch.no_grad():
        expected = {c.n_keys: c.layer(x).float() for c in contestants if c.name == "eager"}
        for contestant in contestants:
            if contestant.name in ("memcompile", "Inductor", "Inductor, naive gather"):
                right = expected[contestant.n_keys]
                error = ((contestant.layer(x).float() - right).norm() / right.norm()).item()
                # Roundings of a half dtype exchange slots of all but equal scores.
                if not error < (1e-4 if dtype == torch.float32 else 5e-2):
                    raise RuntimeError(f"{contestant.name} differs from eager by {error:.1e} of the output's norm")
