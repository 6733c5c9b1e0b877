"""Runs the kernels: allocates what they write and picks their sizes. One function an operator, same arguments.

Called as they are they launch at once (on CPU tensors in Triton's interpreter); `traced`, they leave their launches in
the graph, for Inductor to generate.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memcompile.lowering._torch import size_hint
from memcompile.lowering.gather.hits import sum_dtype
from memcompile.lowering.triton import configs, cost, support
from memcompile.lowering.triton.kernels.candidates import rank_candidates
from memcompile.lowering.triton.kernels.gather import gather_dot_rows, weighted_gather_rows
from memcompile.lowering.triton.kernels.row_updates import update_adagrad, update_adam, update_sgd
from memcompile.lowering.triton.kernels.segments import add_atomically, join_chunks, sum_chunks
from memcompile.lowering.triton.kernels.select import select_computed, select_stored
from memcompile.lowering.triton.settings import is_interpreted, uses_atomics
from memcompile.lowering.update.row_adam import RowAdam, moments_of
from memcompile.lowering.update.row_tables import RowAdagrad, RowSgd, RowUpdate

Size = Any  # int or torch.SymInt


_is_traced: ContextVar[bool] = ContextVar("_is_traced", default=False)


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """One of this file's functions, for a graph that is being traced."""

    def body(*args: Any) -> Any:
        token = _is_traced.set(True)
        try:
            return function(*args)
        finally:
            _is_traced.reset(token)

    return body


def _kernel(function: Any, grid: tuple[Size, ...]) -> Callable[..., None]:
    launcher = torch.library.wrap_triton(function) if _is_traced.get() else function
    return launcher[grid]


def _blocks(size: Size, block: int) -> Size:
    return (size + block - 1) // block


# --- search ---------------------------------------------------------------------------------------


def _lists(like: Tensor, tokens: Size, heads: int, top_k: int) -> Tensor:
    return like.new_empty((2, tokens, heads, configs.capacity(top_k)), dtype=torch.int64)


def _select_stored(scores: Tensor, top_k: int) -> Tensor:
    """Lists of half-keys [2, tokens, heads, capacity] of scores [2, tokens, heads, n_keys]."""
    _, tokens, heads, n_keys = scores.shape
    kept = _lists(scores, tokens, heads, top_k)
    config = configs.stored_config(top_k, n_keys)
    _kernel(select_stored, (_blocks(tokens, config.rows) * heads, 2))(
        scores, kept, tokens, heads, n_keys, *scores.stride(), **configs.list_sizes(top_k),
        GROUPS=config.groups, ROWS=config.rows, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return kept


def _select_computed(halves: Tensor, half_keys: Tensor, top_k: int) -> Tensor:
    """The same of queries [2, tokens, heads, half_dim] and half-keys [2, heads, n_keys, half_dim]."""
    _, tokens, heads, half_dim = halves.shape
    n_keys = half_keys.shape[2]
    kept = _lists(halves, tokens, heads, top_k)
    config = configs.computed_config(top_k, n_keys, half_dim, size_hint(tokens), halves.element_size())
    _kernel(select_computed, (_blocks(tokens, config.rows) * heads, 2))(
        halves, half_keys, kept, tokens, heads, n_keys, half_dim, *halves.stride(), *half_keys.stride(),
        **configs.list_sizes(top_k), GROUPS=config.groups, ROWS=config.rows, DEPTH=config.depth,
        WIDEN=is_interpreted(), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return kept


def _rank(kept: Tensor, n_keys: int, top_k: int, softmax: bool) -> tuple[Tensor, Tensor]:
    """Weights (or logits) and slots [tokens, heads, top_k] of lists [2, tokens, heads, capacity]."""
    _, tokens, heads, _ = kept.shape
    rows = tokens * heads
    weights = kept.new_empty((tokens, heads, top_k), dtype=torch.float32)
    slots = kept.new_empty((tokens, heads, top_k), dtype=torch.int32)
    config = configs.RANK
    _kernel(rank_candidates, (_blocks(rows, config.rows),))(
        kept, weights, slots, rows, n_keys,
        **configs.list_sizes(top_k), **configs.pair_sizes(top_k), ROWS=config.rows, SOFTMAX=softmax,
        num_warps=config.num_warps,
    )  # fmt: skip
    return weights, slots


def _scores(halves: Tensor, half_keys: Tensor) -> Tensor:
    """fp32 scores of queries [2, tokens, heads, half_dim] and half-keys [2, heads, n_keys, half_dim], as a view
    [2, tokens, heads, n_keys], by one batched GEMM.
    """
    sides, tokens, heads, half_dim = halves.shape
    n_keys = half_keys.shape[2]
    # One stride must step through the batch: in the order (side, head) the queries are copied, else the keys.
    copies_queries = size_hint(tokens) <= n_keys
    if copies_queries:
        queries, keys = halves.transpose(1, 2), half_keys
    else:
        queries, keys = halves.permute(2, 0, 1, 3), half_keys.transpose(0, 1)
    queries = queries.reshape(sides * heads, tokens, half_dim)
    keys = keys.reshape(sides * heads, n_keys, half_dim).mT
    if queries.dtype == torch.float32:
        scores = queries @ keys
    elif support.is_gpu(queries.device) and torch.version.hip is None:
        scores = torch.bmm(queries, keys, out_dtype=torch.float32)
    else:
        scores = queries.float() @ keys.float()
    if copies_queries:
        return scores.view(sides, heads, tokens, n_keys).transpose(1, 2)
    return scores.view(heads, sides, tokens, n_keys).permute(1, 2, 0, 3)


def product_key_search(query: Tensor, half_keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """See `memcompile.lowering.search.product_key_search`; query and half_keys of fp32, fp16 or bf16."""
    tokens, heads, key_dim = query.shape
    n_keys = half_keys.shape[2]
    halves = query.reshape(tokens, heads, 2, key_dim // 2).permute(2, 0, 1, 3)
    search = cost.Search(tokens, heads, n_keys, key_dim // 2, query.element_size())
    if cost.stores_scores(search, top_k, cost.device_rates(query.device)):
        kept = _select_stored(_scores(halves, half_keys), top_k)
    else:
        kept = _select_computed(halves, half_keys, top_k)
    return _rank(kept, n_keys, top_k, softmax=True)


def product_key_topk(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """See `memcompile.lowering.search.product_key_topk`; scores of fp32."""
    return _rank(_select_stored(scores, top_k), scores.shape[3], top_k, softmax=False)


# --- the table ------------------------------------------------------------------------------------


def weighted_gather(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """See `memcompile.lowering.gather.weighted_gather`; weights are read as they are, sums are in fp32."""
    (tokens, hits), value_dim = slots.shape, values.shape[1]
    out = values.new_empty((tokens, value_dim))
    config = configs.gather_configs(size_hint(tokens), value_dim)[0]
    _kernel(weighted_gather_rows, (tokens, _blocks(value_dim, config.block_columns)))(
        values, slots.contiguous(), weights.contiguous(), out, hits, value_dim, *values.stride(),
        BLOCK_HITS=config.block_hits, BLOCK_COLUMNS=config.block_columns,
        num_warps=config.num_warps,
    )  # fmt: skip
    return out


def gather_dot(values: Tensor, slots: Tensor, grad: Tensor) -> Tensor:
    """See `memcompile.lowering.gather.weighted_gather`."""
    (tokens, hits), value_dim = slots.shape, values.shape[1]
    dots = values.new_empty((tokens, hits), dtype=torch.float32)
    config = configs.dot_config(value_dim)
    _kernel(gather_dot_rows, (tokens, _blocks(hits, config.block_hits)))(
        values, slots.contiguous(), grad, dots, hits, value_dim, *values.stride(), *grad.stride(),
        BLOCK_HITS=config.block_hits, BLOCK_COLUMNS=config.block_columns,
        num_warps=config.num_warps,
    )  # fmt: skip
    return dots


def weighted_scatter(slots: Tensor, weights: Tensor, grad: Tensor, num_slots: Size) -> Tensor:
    """See `memcompile.lowering.gather.weighted_gather`. Deterministic unless `MEMCOMPILE_ATOMICS` is set."""
    if uses_atomics():
        return _scatter_atomically(slots, weights, grad, num_slots)
    (tokens, hits), value_dim = slots.shape, grad.shape[1]
    total = tokens * hits
    ranked, order = slots.reshape(-1).sort(stable=True)
    tokens_of, weights_of = (order // hits).int(), weights.reshape(-1)[order]
    config = configs.sum_config(value_dim, size_hint(total))
    chunks = _blocks(total, config.chunk)
    out = grad.new_zeros((num_slots, value_dim))
    begun, left_open = (grad.new_empty((chunks, value_dim), dtype=torch.float32) for _ in range(2))
    grid = (chunks, _blocks(value_dim, config.block_columns))
    sizes = {"CHUNK": config.chunk, "BLOCK_COLUMNS": config.block_columns, "num_warps": config.num_warps}
    _kernel(sum_chunks, grid)(
        ranked, tokens_of, weights_of, grad, out, begun, left_open, total, value_dim, *grad.stride(), **sizes
    )  # fmt: skip
    _kernel(join_chunks, grid)(ranked, out, begun, left_open, total, value_dim, **sizes)
    return out


def _scatter_atomically(slots: Tensor, weights: Tensor, grad: Tensor, num_slots: Size) -> Tensor:
    (tokens, hits), value_dim = slots.shape, grad.shape[1]
    out = grad.new_zeros((num_slots, value_dim), dtype=torch.float32)
    config = configs.sum_config(value_dim, 0)
    _kernel(add_atomically, (tokens, _blocks(value_dim, config.block_columns)))(
        slots.contiguous(), weights.contiguous(), grad, out, hits, value_dim, *grad.stride(),
        BLOCK_COLUMNS=config.block_columns, num_warps=config.num_warps,
    )  # fmt: skip
    return out.to(grad.dtype)


# --- rows updated in place ------------------------------------------------------------------------


def row_adam(*args: Any) -> None:
    """See `memcompile.lowering.update.row_adam`."""
    given = RowAdam(*args)
    decay, beta1, beta2, rate, scale, eps = given.numbers.tolist()  # on the CPU
    panels = given.panels
    missed = (given.missed_steps, given.decays, panels, _panel_counts(panels))
    panels_each = 0 if panels is None else panels.shape[1]
    _update(
        update_adam, given, (given.exp_avg, given.exp_avg_sq), missed, (panels_each,),
        (decay, beta1, beta2, rate, scale, eps, 1 - beta1, 1 - beta2), MOMENTS=moments_of(given.param.dtype),
    )  # fmt: skip


def _panel_counts(panels: Tensor | None) -> Tensor | None:
    """int32 [entries]: how many panels each entry has up to its last with moments; None where there is one for each."""
    if panels is None or panels.shape[1] == 1:
        return None
    used = F.pad(panels[:, :, 1:].ne(0).any(2), (1, 0))  # [entries, 1 + panels]
    order = torch.arange(used.shape[1], dtype=torch.int32, device=used.device)
    return (used * order).amax(1)


def row_adagrad(*args: Any) -> None:
    """See `memcompile.lowering.update.row_adagrad`."""
    given = RowAdagrad(*args)
    config = configs.adagrad_config(given.param.shape[1], sum_dtype(given.param).itemsize)
    lr, decay = given.lr, given.weight_decay
    added, kept = (0.0, 1 - lr * decay) if given.decoupled else (decay, 1.0)
    _update(
        update_adagrad, given, (given.squares,), (), (), (lr, given.eps, added, kept), config,
        WHOLE=config.block_columns >= given.param.shape[1],
    )  # fmt: skip


def row_sgd(*args: Any) -> None:
    """See `memcompile.lowering.update.row_sgd`."""
    given = RowSgd(*args)
    _update(update_sgd, given, (), (given.decays,), (), (given.rate,))


def _update(
    kernel: Any,
    given: RowUpdate,
    state: tuple[Tensor, ...],
    of_rows: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    numbers: tuple[float, ...],
    whole_rows: configs.Tile | None = None,
    **constants: Any,
) -> None:
    """Launches an update: arguments in the order that its kernels share. A program has a block of rows and columns, or
    `whole_rows`.
    """
    count, value_dim = len(given.rows), given.param.shape[1]
    if value_dim == 0 or count == 0:
        return
    config = whole_rows or configs.update_config(value_dim, sum_dtype(given.param).itemsize)
    columns = () if whole_rows else (_blocks(value_dim, config.block_columns),)
    inputs = (None if tensor is None else tensor.contiguous() for tensor in (given.rows, given.grad, *of_rows))
    _kernel(kernel, (_blocks(count, config.rows), *columns))(
        given.param, given.master, *state, *inputs, count, *given.param.shape, *sizes, given.seed & 0xFFFFFFFF,
        *map(float, numbers), ROWS=config.rows, BLOCK_COLUMNS=config.block_columns, num_warps=config.num_warps,
        **constants,
    )  # fmt: skip
