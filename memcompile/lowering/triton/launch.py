"""Runs the kernels: allocates what they write and picks their sizes. One function an operator, same arguments."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memcompile.lowering._torch import is_traced, size_hint
from memcompile.lowering.gather.hits import sum_dtype
from memcompile.lowering.gather.pairs import Grads, new_gather, new_grads
from memcompile.lowering.triton import configs, cost, support
from memcompile.lowering.triton.kernels import pairs, row_updates, search, table
from memcompile.lowering.update.row_adam import RowAdam, moments_of
from memcompile.lowering.update.row_tables import RowAdagrad, RowSgd, RowUpdate

Size = Any  # int or torch.SymInt


def _launch(kernel: Any, grid: tuple[Size, ...], *args: Any, **config: Any) -> None:
    """Launches a kernel at once (in Triton's interpreter, on CPU tensors), or, where its first argument is traced,
    leaves the launch in the graph, for Inductor to generate.
    """
    launcher = torch.library.wrap_triton(kernel) if is_traced(args[0]) else kernel
    launcher[grid](*args, **config)


def _blocks(size: Size, block: int) -> Size:
    return (size + block - 1) // block


# --- search ---------------------------------------------------------------------------------------


def _select_stored(scores: Tensor, top_k: int) -> Tensor:
    """Lists of half-keys [2, tokens, heads, capacity] of scores [2, tokens, heads, n_keys]."""
    _, tokens, heads, n_keys = scores.shape
    config = configs.stored_config(top_k, n_keys)
    kept = scores.new_empty((2, tokens, heads, config["CAPACITY"]), dtype=torch.int64)
    grid = (_blocks(tokens, config["ROWS"]) * heads, 2)
    _launch(search.select_stored, grid, scores, kept, tokens, heads, n_keys, *scores.stride(), **config)
    return kept


def _select_computed(halves: Tensor, half_keys: Tensor, top_k: int) -> Tensor:
    """The same of queries [2, tokens, heads, half_dim] and half-keys [2, heads, n_keys, half_dim]."""
    _, tokens, heads, half_dim = halves.shape
    n_keys = half_keys.shape[2]
    config = configs.computed_config(top_k, n_keys, half_dim, size_hint(tokens), halves.element_size())
    kept = halves.new_empty((2, tokens, heads, config["CAPACITY"]), dtype=torch.int64)
    if support.is_interpreted():  # Triton's interpreter multiplies bf16 wrongly
        halves, half_keys = halves.float(), half_keys.float()
    sizes = (tokens, heads, n_keys, half_dim, *halves.stride(), *half_keys.stride())
    grid = (_blocks(tokens, config["ROWS"]) * heads, 2)
    _launch(search.select_computed, grid, halves, half_keys, kept, *sizes, **config)
    return kept


def _rank(kept: Tensor, n_keys: int, top_k: int, softmax: bool) -> tuple[Tensor, Tensor]:
    """Weights (or logits) and slots [tokens, heads, top_k] of lists [2, tokens, heads, capacity]."""
    _, tokens, heads, _ = kept.shape
    rows = tokens * heads
    weights = kept.new_empty((tokens, heads, top_k), dtype=torch.float32)
    slots = kept.new_empty((tokens, heads, top_k), dtype=torch.int32)
    config = configs.rank_config(top_k)
    grid = (_blocks(rows, config["ROWS"]),)
    _launch(search.rank_candidates, grid, kept, weights, slots, rows, n_keys, **config, SOFTMAX=softmax)
    return weights, slots


def _scores(halves: Tensor, half_keys: Tensor) -> Tensor:
    """fp32 scores of queries [2, tokens, heads, half_dim] and half-keys [2, heads, n_keys, half_dim], as a view
    [2, tokens, heads, n_keys], by one batched GEMM.
    """
    # One stride must step through the batch: in the order (side, head) the queries are copied, else the keys.
    copies_queries = size_hint(halves.shape[1]) <= half_keys.shape[2]
    if copies_queries:
        queries, keys = halves.transpose(1, 2), half_keys
    else:
        queries, keys = halves.permute(2, 0, 1, 3), half_keys.transpose(0, 1)
    batch = queries.shape[:2]
    queries, keys = queries.flatten(0, 1), keys.flatten(0, 1).mT
    if queries.dtype == torch.float32:
        scores = queries @ keys
    elif support.is_gpu(queries.device) and torch.version.hip is None:
        scores = torch.bmm(queries, keys, out_dtype=torch.float32)
    else:
        scores = queries.float() @ keys.float()
    scores = scores.view(*batch, *scores.shape[1:])
    return scores.transpose(1, 2) if copies_queries else scores.permute(1, 2, 0, 3)


def product_key_search(query: Tensor, half_keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """See `memcompile.lowering.search.product_key_search`; query and half_keys of fp32, fp16 or bf16."""
    tokens, heads, key_dim = query.shape
    n_keys = half_keys.shape[2]
    halves = query.reshape(tokens, heads, 2, key_dim // 2).permute(2, 0, 1, 3)
    sizes = cost.Search(tokens, heads, n_keys, key_dim // 2, query.element_size())
    if cost.stores_scores(sizes, top_k, cost.device_rates(query.device)):
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
    grid = (tokens, _blocks(value_dim, config["BLOCK_COLUMNS"]))
    inputs = (values, slots.contiguous(), weights.contiguous())
    _launch(table.weighted_gather_rows, grid, *inputs, out, hits, value_dim, *values.stride(), **config)
    return out


def gather_dot(values: Tensor, slots: Tensor, grad: Tensor) -> Tensor:
    """See `memcompile.lowering.gather.weighted_gather`."""
    (tokens, hits), value_dim = slots.shape, values.shape[1]
    dots = values.new_empty((tokens, hits), dtype=torch.float32)
    config = configs.dot_config(value_dim)
    grid = (tokens, _blocks(hits, config["BLOCK_HITS"]))
    strides = (*values.stride(), *grad.stride())
    _launch(table.gather_dot_rows, grid, values, slots.contiguous(), grad, dots, hits, value_dim, *strides, **config)
    return dots


def weighted_scatter(slots: Tensor, weights: Tensor, grad: Tensor, num_slots: Size) -> Tensor:
    """See `memcompile.lowering.gather.weighted_gather`. Deterministic unless `MEMCOMPILE_ATOMICS` is set."""
    return _scatter(slots, _ranked(slots), weights, grad, num_slots)


def _ranked(slots: Tensor) -> tuple[Tensor, Tensor] | None:
    """The slots by number, and which hit each is of; None where sums are atomic."""
    return None if support.uses_atomics() else slots.reshape(-1).sort(stable=True)


def _scatter(slots: Tensor, sorted_hits: Any, weights: Tensor, grad: Tensor, num_slots: Size) -> Tensor:
    (tokens, hits), value_dim = slots.shape, grad.shape[1]
    total = tokens * hits
    config = configs.sum_config(value_dim, size_hint(total))
    columns = _blocks(value_dim, config["BLOCK_COLUMNS"])
    if sorted_hits is None:
        sums = grad.new_zeros((num_slots, value_dim), dtype=torch.float32)
        del config["CHUNK"]
        inputs = (slots.contiguous(), weights.contiguous(), grad)
        _launch(table.add_atomically, (tokens, columns), *inputs, sums, hits, value_dim, *grad.stride(), **config)
        return sums.to(grad.dtype)
    ranked, order = sorted_hits
    by_slot = (ranked, (order // hits).int(), weights.reshape(-1)[order])
    grid = (_blocks(total, config["CHUNK"]), columns)
    out = grad.new_zeros((num_slots, value_dim))
    partial = [grad.new_empty((grid[0], value_dim), dtype=torch.float32) for _ in range(2)]
    _launch(table.sum_chunks, grid, *by_slot, grad, out, *partial, total, value_dim, *grad.stride(), **config)
    _launch(table.join_chunks, grid, ranked, out, *partial, total, value_dim, **config)
    return out


# --- a table of pairs -------------------------------------------------------------------------------


def pair_gather(values: Tensor, slots: Tensor, weights: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """See `memcompile.lowering.gather.pairs`."""
    (tokens, hits), d = slots.shape, x.shape[1]
    value_dim = values.shape[1] - d
    y, dots = new_gather(values, slots, weights, x)
    config = configs.pair_config(d, value_dim)
    inputs = (values, slots.contiguous(), weights.contiguous(), x)
    sizes = (hits, d, value_dim, *values.stride(), *x.stride())
    _launch(pairs.pair_gather_rows, (tokens, _programs(value_dim, config)), *inputs, y, dots, *sizes, **config)
    return y, dots


def pair_grads(values: Tensor, slots: Tensor, weights: Tensor, x: Tensor, dots: Tensor, grad: Tensor) -> Grads:
    """See `memcompile.lowering.gather.pairs`."""
    (tokens, hits), d = slots.shape, x.shape[1]
    value_dim = values.shape[1] - d
    grad_weights, grad_x, into, out = new_grads(values, slots, weights, x)
    config = configs.pair_config(value_dim, d)
    inputs = (values, slots.contiguous(), weights.contiguous(), dots.contiguous(), grad)
    sizes = (hits, d, value_dim, *values.stride(), *grad.stride())
    outputs = (grad_weights, grad_x, into, out)
    _launch(pairs.pair_grads_rows, (tokens, _programs(d, config)), *inputs, *outputs, *sizes, **config)
    return outputs


def _programs(summed: int, config: configs.Config) -> Size:
    """Of a token; one where nothing is summed, which writes the dots."""
    return max(1, _blocks(summed, config["SUMMED"]))


def pair_scatter(slots: Tensor, into: Tensor, x: Tensor, out: Tensor, grad: Tensor, num_slots: Size) -> Tensor:
    """See `memcompile.lowering.gather.pairs`. Deterministic unless `MEMCOMPILE_ATOMICS` is set."""
    ranked = _ranked(slots)
    halves = [_scatter(slots, ranked, *factors, num_slots) for factors in ((into, x), (out, grad))]
    return torch.cat(halves, 1)


# --- rows updated in place ------------------------------------------------------------------------


def row_adam(*args: Any) -> None:
    """See `memcompile.lowering.update.row_adam`."""
    given = RowAdam(*args)
    decay, beta1, beta2, rate, scale, eps = given.numbers.tolist()  # on the CPU
    panels = given.panels
    missed = (given.missed_steps, given.decays, panels, _panel_counts(panels))
    panels_each = 0 if panels is None else panels.shape[1]
    _update(
        row_updates.update_adam, given, (given.exp_avg, given.exp_avg_sq), missed, (panels_each,),
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
    """See `memcompile.lowering.update.row_tables.RowAdagrad`."""
    given = RowAdagrad(*args)
    lr, decay = given.lr, given.weight_decay
    added, kept = (0.0, 1 - lr * decay) if given.decoupled else (decay, 1.0)
    _update(row_updates.update_adagrad, given, (given.squares,), (), (), (lr, given.eps, added, kept), whole_rows=True)


def row_sgd(*args: Any) -> None:
    """See `memcompile.lowering.update.row_tables.RowSgd`."""
    given = RowSgd(*args)
    _update(row_updates.update_sgd, given, (), (given.decays,), (), (given.rate,))


def _update(
    kernel: Any,
    given: RowUpdate,
    state: tuple[Tensor, ...],
    of_rows: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    numbers: tuple[float, ...],
    whole_rows: bool = False,
    **constants: Any,
) -> None:
    """Launches an update: arguments in the order that its kernels share. A program has a block of rows and columns, or
    `whole_rows`.
    """
    (num_slots, value_dim), count = given.param.shape, len(given.rows)
    if value_dim == 0 or count == 0:
        return
    config = configs.update_config(value_dim, sum_dtype(given.param).itemsize, whole_rows)
    grid = [_blocks(count, config["ROWS"])]
    if whole_rows:
        constants["WHOLE"] = config["BLOCK_COLUMNS"] >= value_dim
    else:
        grid.append(_blocks(value_dim, config["BLOCK_COLUMNS"]))
    inputs = (None if tensor is None else tensor.contiguous() for tensor in (given.rows, given.grad, *of_rows))
    tensors = (given.param, given.master, *state, *inputs)
    sizes = (count, num_slots, value_dim, *sizes, given.seed & 0xFFFFFFFF)
    _launch(kernel, tuple(grid), *tensors, *sizes, *map(float, numbers), **config, **constants)
