"""The layers that are compared, with their sizes and work: one memory layer (Memory+) by memcompile and in PyTorch,
and the FFNs that it replaces.
"""

import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.package import compile_options, memory_lookup

HEADS, TOP_K = 4, 32
DRAWN_ROWS = 4096  # of a table, repeated to its end: drawing 2**30 numbers takes longer than the measurements
OURS = "memcompile"
GELU, SWIGLU = "FFN, GELU 4d", "FFN, SwiGLU 8/3 d"

Layer = Callable[[Tensor], Tensor]  # x [tokens, width] -> [tokens, width]
Gather = Callable[[Tensor, Tensor, Tensor], Tensor]  # values, slots and weights [tokens, hits] -> [tokens, value_dim]
Parameters = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class Setting:
    """The sizes of a memory layer: a table of n_keys**2 rows of `value_dim`."""

    width: int
    n_keys: int
    dtype: torch.dtype
    heads: int = HEADS
    top_k: int = TOP_K
    row_size: int | None = None  # None: as wide as the layer

    @property
    def key_dim(self) -> int:
        """Of one head; each half of it has its own n_keys keys."""
        return self.width // 2

    @property
    def num_slots(self) -> int:
        return self.n_keys**2

    @property
    def hits(self) -> int:
        """Rows that a token reads."""
        return self.heads * self.top_k

    @property
    def value_dim(self) -> int:
        return self.row_size or self.width


@dataclass(frozen=True)
class Work:
    """What a layer must do at least, however it is written."""

    flops: int  # a token, a multiply-add being two
    weights: int  # parameters that every call reads
    rows: int = 0  # rows that a token reads
    row_size: int = 0  # numbers in a row
    num_rows: int = 1  # to choose from

    def bytes(self, tokens: int, width: int, itemsize: int) -> float:
        """Of one call that finds nothing in the caches: weights and rows once each, x and y."""
        hits = self.num_rows * (1 - (1 - 1 / self.num_rows) ** (tokens * self.rows))  # expected without repetitions
        return itemsize * (self.weights + hits * self.row_size + 2 * tokens * width)


@dataclass(frozen=True)
class Contestant:
    name: str
    layer: Layer
    parameters: tuple[nn.Parameter, ...]  # that get gradients
    work: Work
    most_tokens: int | None = None  # None: as many as are asked for


def fill_table(table: Tensor) -> None:
    """Draws the rows of a table [slots, value_dim], in place."""
    drawn = torch.randn(min(DRAWN_ROWS, len(table)), table.shape[1], device=table.device) * table.shape[1] ** -0.5
    for rows in table.split(len(drawn)):
        rows.copy_(drawn[: len(rows)])


def draw(setting: Setting, *shape: int) -> nn.Parameter:
    """Parameters of this shape on the default device; the last dimension is summed over where there are two."""
    scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
    return nn.Parameter((torch.randn(shape) * scale).to(setting.dtype))


def compiled(function: Callable[..., Any], options: dict[str, Any] | None = None, dynamic: bool = True) -> Any:
    """The function under torch.compile, for any number of tokens where it is dynamic.

    Dynamo keeps what it compiled by code object, which all lambdas of one line share: each gets its own here, so that
    no contestant waits for the guards of another.
    """
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace()
    own = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    return torch.compile(own, dynamic=dynamic, fullgraph=True, options=options)


def trained(parameters: Iterable[Tensor]) -> tuple[nn.Parameter, ...]:
    """Those that get gradients."""
    return tuple(p for p in parameters if isinstance(p, nn.Parameter) and p.requires_grad)


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
    return gated(x, gather(values, slots.flatten(1), weights.flatten(1)), p)


def gated(x: Tensor, y: Tensor, p: Any) -> Tensor:
    """The end of a layer, after the sums of rows y [tokens, value_dim]."""
    return F.linear(y * F.silu(F.linear(x, p["gate_weight"], p["gate_bias"])), p["out_weight"], p["out_bias"])


def memory_layers(
    setting: Setting, values: Tensor, eager: Mapping[str, Gather], inductor: Mapping[str, Gather]
) -> list[Contestant]:
    """The layer by memcompile, and in PyTorch with each of these gathers, eager and under Inductor.

    All share the values; each has parameters of its own, so that none finds those of another in the caches.
    """

    def contestant(name: str, layer: Callable[[Parameters], Layer]) -> Contestant:
        with values.device:
            p = layer_parameters(setting)
        return Contestant(name, layer(p), trained((values, *p.values())), layer_work(setting))

    def ours(p: Parameters) -> Layer:
        heads, top_k = setting.heads, setting.top_k
        return compiled(lambda x: memory_lookup(x, values=values, heads=heads, top_k=top_k, **p), compile_options())

    def in_pytorch(p: Parameters, gather: Gather) -> Layer:
        return lambda x: plain(x, values, p, setting, gather)

    return [
        contestant(OURS, ours),
        *(contestant(name, lambda p, g=gather: in_pytorch(p, g)) for name, gather in eager.items()),
        *(contestant(name, lambda p, g=gather: compiled(in_pytorch(p, g))) for name, gather in inductor.items()),
    ]


def gelu_ffn(setting: Setting) -> Contestant:
    width, hidden = setting.width, 4 * setting.width
    up, up_bias = draw(setting, hidden, width), draw(setting, hidden)
    down, down_bias = draw(setting, width, hidden), draw(setting, width)
    layer = compiled(lambda x: F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias))
    weights = 2 * width * hidden
    return Contestant(GELU, layer, (up, up_bias, down, down_bias), Work(2 * weights, weights))


def swiglu_hidden(width: int, multiple_of: int) -> int:
    """As in Llama: a hidden size that makes three matrices as large as the two of 4 * width."""
    return -(-8 * width // (3 * multiple_of)) * multiple_of


def swiglu_ffn(
    setting: Setting, multiple_of: int, name: str = SWIGLU, options: dict[str, Any] | None = None
) -> Contestant:
    width, hidden = setting.width, swiglu_hidden(setting.width, multiple_of)
    gate, up, down = draw(setting, hidden, width), draw(setting, hidden, width), draw(setting, width, hidden)
    layer = compiled(lambda x: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down), options)
    weights = 3 * width * hidden
    return Contestant(name, layer, (gate, up, down), Work(2 * weights, weights))


class SwiGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = swiglu_hidden(width, 32)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """An FFN that memcompile replaces, and no more of a model around it: attention would dilute the figures."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.ffn = SwiGLU(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(self.norm(x))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Of the norm. Roundings exchange slots of nearly equal scores, so outputs of the same layer agree only roughly."""
    actual, expected = actual.float(), expected.float()
    return ((actual - expected).norm() / expected.norm()).item()


def agreed_error(dtype: torch.dtype) -> float:
    """The largest `relative_error` of two that compute the same."""
    return 1e-4 if dtype == torch.float32 else 5e-2
