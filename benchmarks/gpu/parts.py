"""Parts of a memory layer alone: the weighted gather of rows, the search, and Adam's update of rows."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from benchmarks.harness.compare import Case, Entry
from benchmarks.harness.layers import OURS, Setting, bag, compiled, draw, naive, plain_scores, plain_topk
from benchmarks.harness.package import adam_steps, compile_options
from benchmarks.harness.results import FORWARD

GATHER, SEARCH, SCORED_SEARCH = "gather", "search of given scores", "search with its scores"
UPDATE, STEP = "Adam's update of a row a token", "step"
OURS_EAGER, STALE = "memcompile, eager", "memcompile, rows that are late"
BAG, NAIVE = "F.embedding_bag", "Inductor, naive gather"
TOPK, TOPK_INDUCTOR = "torch.topk + merge", "torch.topk + merge, Inductor"
SPARSE, FUSED = "torch.optim.SparseAdam", "torch.optim.AdamW, fused, all rows"
_MOST_SLOTS = 2**16
_TABLES = 7  # of which an update reads or writes a row: values and both moments each, and the gradient

Run = Callable[..., object]


def _entries(runs: Mapping[str, Run], flops: float, moved: float) -> tuple[Entry, ...]:
    return tuple(Entry(name, run, flops, moved) for name, run in runs.items())


def gather_case(setting: Setting, table: nn.Parameter, tokens: int, all_peers: bool) -> Case:
    """Rows at random. Bytes count every read of a row: those read twice are too far apart to be found in a cache. (The
    bytes of a whole layer count each row once, whatever its tokens share.)
    """
    hits, itemsize = setting.hits, table.itemsize
    moved = tokens * ((hits + 1) * setting.value_dim * itemsize + hits * 8)  # rows, outputs, slots and weights
    gather = torch.ops.memcompile.weighted_gather

    def draw_hits(count: int) -> tuple[Tensor, ...]:
        slots = torch.randint(setting.num_slots, (count, hits), dtype=torch.int32, device=table.device)
        return slots, torch.rand(count, hits, device=table.device).softmax(dim=-1)

    runs: dict[str, Run] = {
        OURS: compiled(lambda s, w: gather(table, s, w), compile_options(), dynamic=False),
        OURS_EAGER: lambda s, w: gather(table, s, w),
        BAG: lambda s, w: bag(table, s, w.to(table.dtype)),
    }
    if all_peers:
        runs[NAIVE] = compiled(lambda s, w: naive(table, s, w.to(table.dtype)), dynamic=False)
    entries = _entries(runs, 2.0 * tokens * hits * setting.value_dim, moved)
    return Case(GATHER, setting, tokens, FORWARD, draw_hits, entries, frozenset(runs), BAG)


def _softmaxed(found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return found[0].softmax(dim=-1), found[1]


def _search(ours: Run, peer: Run, all_peers: bool) -> dict[str, Run]:
    runs = {OURS: compiled(ours, compile_options(), dynamic=False), OURS_EAGER: ours, TOPK: peer}
    return runs | ({TOPK_INDUCTOR: compiled(peer, dynamic=False)} if all_peers else {})


def search_case(setting: Setting, device: torch.device, tokens: int, all_peers: bool) -> Case:
    """Scores [2, tokens, heads, n] in fp32 -> weights and slots [tokens, heads, k]."""
    heads, top_k = setting.heads, setting.top_k
    search = torch.ops.memcompile.product_key_topk

    def draw_scores(count: int) -> tuple[Tensor, ...]:
        return (torch.randn(2, count, heads, setting.n_keys, device=device),)

    runs = _search(lambda s: _softmaxed(search(s, top_k)), lambda s: _softmaxed(plain_topk(s, top_k)), all_peers)
    entries = _entries(runs, 0.0, tokens * heads * (2 * setting.n_keys + 2 * top_k) * 4)
    return Case(SEARCH, setting, tokens, FORWARD, draw_scores, entries, frozenset(runs), TOPK)


def scored_search_case(setting: Setting, device: torch.device, tokens: int, all_peers: bool) -> Case:
    """Queries [tokens, heads, key_dim] -> weights and slots [tokens, heads, k]."""
    heads, top_k, n_keys, key_dim = setting.heads, setting.top_k, setting.n_keys, setting.key_dim
    with device:
        keys = draw(setting, 2, heads, n_keys, key_dim // 2).detach()
    search = torch.ops.memcompile.product_key_search

    def draw_queries(count: int) -> tuple[Tensor, ...]:
        return (torch.randn(count, heads, key_dim, device=device).to(setting.dtype),)

    def peer(q: Tensor) -> tuple[Tensor, Tensor]:
        return _softmaxed(plain_topk(plain_scores(q, keys), top_k))

    runs = _search(lambda q: search(q, keys, top_k), peer, all_peers)
    moved = keys.nbytes + tokens * heads * (key_dim * setting.dtype.itemsize + 2 * top_k * 4)
    entries = _entries(runs, 2.0 * tokens * heads * key_dim * n_keys, moved)
    return Case(SCORED_SEARCH, setting, tokens, FORWARD, draw_queries, entries, frozenset(runs), TOPK)


def update_case(setting: Setting, device: torch.device, tokens: int, all_peers: bool) -> Case:
    """One row a token, fp32 with fp32 moments. All update the same values, so none is compared with another."""
    slots, dim = max(tokens, min(setting.num_slots, _MOST_SLOTS)), setting.value_dim
    values = nn.Parameter(torch.randn(slots, dim, device=device))
    sparse = torch.optim.SparseAdam([values], lr=1e-3)

    def draw_rows(count: int) -> tuple[Tensor, ...]:
        rows = torch.randperm(slots, device=device)[:count].sort().values
        return rows, torch.randn(count, dim, device=device)

    def sparse_adam(rows: Tensor, grad: Tensor) -> None:
        values.grad = torch.sparse_coo_tensor(rows.unsqueeze(0), grad, values.shape, is_coalesced=True)
        sparse.step()
        values.grad = None

    current, stale = adam_steps(values)
    runs: dict[str, Run] = {OURS: current, STALE: stale, SPARSE: sparse_adam}
    if all_peers:
        runs[FUSED] = _fused(values)
    entries = _entries(runs, 0.0, float(tokens * (_TABLES * dim * values.itemsize + 8)))
    return Case(UPDATE, setting, tokens, STEP, draw_rows, entries, frozenset(), SPARSE)


def _fused(values: nn.Parameter) -> Run:
    """Dense AdamW, with a gradient that is there already."""
    dense, gradient = torch.optim.AdamW([values], lr=1e-3, fused=True), torch.randn_like(values)

    def run(rows: Tensor, grad: Tensor) -> None:
        values.grad = gradient
        dense.step()
        values.grad = None

    return run
