"""`memcompile::memory_lookup`: a memory layer as one operator: projections, a search and a gather.

It is composite: one node in Dynamo's graph, taken apart by AOTAutograd into GEMMs and pointwise operations,
which Inductor fuses, and the operators `product_key_topk`, `weighted_gather` and their derivatives.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from memcompile.lowering._torch import functorch_is_active
from memcompile.lowering.distributed.collectives import sum_gradients, sum_over_ranks
from memcompile.lowering.distributed.sharded_table import ASK, Shards, have_same_tokens, sharded_gather
from memcompile.lowering.register.schema import LIBRARY, operator
from memcompile.lowering.search.product_key_topk import check_top_k

VALUES_GRADS = ("dense", "sparse")
VALUES_STORAGES = ("device", "host", "mmap")


def memory_lookup(
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
    *,
    heads: int,
    top_k: int,
    values_grad: str = "dense",
    values_storage: str = "device",
    shards: Shards | None = None,
    capacity: int = ASK,
    row_state: Sequence[Tensor] = (),
) -> Tensor:
    """A product-key memory layer (Lample et al. 2019; Memory Layers at Scale, arXiv 2412.09764, section 3).

    A head's query is cut in halves q1, q2, each scored against n half-keys. Slot i * n + j scores
    q1 . k1[i] + q2 . k2[j]; the `top_k` best of the n * n slots are found exactly, a softmax over them gives
    their weights, and the weighted rows of `values` are summed over all heads. With `gate_weight` the sum y
    becomes y * silu(gate(x)) (Memory+); with `out_weight` it is projected.

    Scores and softmax are computed in float32 (float64 where the query is), under autocast too, because lower
    precisions reorder the slots; all but the smallest products of a half dtype are exact in it. The projections
    follow autocast.

    Args:
        x: [..., d]; any leading dimensions, of any size.
        query_weight: [heads * key_dim, d], and query_bias: [heads * key_dim] or None.
        half_keys: [2, heads, n, key_dim / 2].
        values: [n * n, value_dim], of any floating dtype; it may differ from the rest.
        gate_weight: [value_dim, d] or None for no gate, and gate_bias: [value_dim] or None.
        out_weight: [d_out, value_dim] or None for no projection, and out_bias: [d_out] or None.
        temperature: [heads] or None. With it, each half of a query and each half-key is scaled to unit norm,
            and a head's scores are multiplied by its temperature.
        heads: number of heads.
        top_k: slots read by a head, at most n.
        values_grad: "dense", or "sparse" for a gradient of `values` that is a coalesced sparse COO tensor of the rows
            that were hit. Under torch.func transforms it is always dense.
        values_storage: "device", or "host" for values in the CPU's memory, whatever the rest is on: rows are summed
            there, and the sums moved. "mmap" is "host" for a mapped file: its rows are asked for before the gate is
            computed. Both are for values that do not learn.
        shards: how the values lie on the ranks of a memory group, of which `values` is what this rank holds; None for
            the whole table. See `sharded_table`.
        capacity: of a sharded table, the most tokens that a rank of the group has in this call. By default the ranks
            tell each other. With `SAME_TOKENS` all have the same tokens, and `gate_weight`, `gate_bias` and
            `out_weight` are of the own columns too (tensor parallelism).
        row_state: what rows of `values` have missed of their optimizer's steps, as `table_gather` takes it; empty where
            the rows are as they stand.

    Returns:
        [..., d_out], or [..., value_dim] with no projection, in the dtype of `F.linear(x, query_weight)`.

    Raises:
        ValueError: a shape or an option does not fit; the message names the argument.
        NotImplementedError: on forward-mode differentiation. Reverse mode works to any order.
    """
    return operator("memory_lookup")(
        x, query_weight, query_bias, half_keys, values,
        gate_weight, gate_bias, out_weight, out_bias, temperature, heads, top_k, values_grad, values_storage,
        *(("", (), 0, 1) if shards is None else (shards.group, shards.sizes, shards.rank, shards.dim)), capacity,
        [*row_state] or None,
    )  # fmt: skip


def _composite(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    half_keys: Tensor,
    values: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    temperature: Tensor | None,
    heads: int,
    top_k: int,
    values_grad: str = "dense",
    values_storage: str = "device",
    group: str = "",
    parts: Sequence[int] = (),
    part: int = 0,
    shard_dim: int = 1,
    capacity: int = ASK,
    row_state: Sequence[Tensor] | None = None,
) -> Tensor:
    shards = Shards(group, tuple(parts), part, shard_dim) if parts else None
    _check_search(x, query_weight, query_bias, half_keys, temperature, heads, top_k)
    shape = values.shape if shards is None or values.dim() != 2 else shards.whole(values)
    columns = shards.own if shards is not None and have_same_tokens(capacity) else shape[1]
    _check_read(x, half_keys, shape, columns, gate_weight, gate_bias, out_weight, out_bias)
    if values_grad not in VALUES_GRADS:
        raise ValueError(f"values_grad: expected one of {', '.join(VALUES_GRADS)}, got {values_grad!r}")
    _check_storage(values, values_storage)
    half_dim, value_dim = half_keys.shape[3], shape[1]
    tokens = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    query = F.linear(tokens, query_weight, query_bias)  # [tokens, heads * key_dim]
    layer_dtype = query.dtype
    search_dtype = torch.promote_types(layer_dtype, half_keys.dtype)
    if temperature is not None:  # norms are not exact in the half dtypes
        search_dtype = torch.promote_types(search_dtype, torch.float32)

    halves = query.to(search_dtype).reshape(-1, heads, 2, half_dim)
    half_keys = half_keys.to(search_dtype)
    if temperature is not None:
        # A score is linear in the query, so its half-queries carry the temperature.
        halves = F.normalize(halves, dim=-1) * temperature.to(search_dtype)[:, None, None]
        half_keys = F.normalize(half_keys, dim=-1)
    weights, slots = operator("product_key_search")(halves.flatten(-2), half_keys, top_k)  # [tokens, heads, k]
    slots, weights = slots.flatten(1), weights.flatten(1)
    in_parallel = shards is not None and have_same_tokens(capacity) and shards.ranks > 1
    if in_parallel:  # each rank goes on with its own columns, and has their share of the gradients
        weights, tokens = sum_gradients(weights, group), sum_gradients(tokens, group)
    if values_storage != "device":
        slots, weights = slots.to(values.device), weights.to(values.device)
    if values_storage == "mmap":
        slots = operator("prefetch_rows")(values, slots)
    gate = None if gate_weight is None else F.silu(F.linear(tokens, gate_weight, gate_bias))
    if shards is not None:
        y = sharded_gather(values, slots, weights, shards, capacity, values_grad, row_state or ())
    elif functorch_is_active() or (values_grad == "dense" and not row_state):
        y = operator("weighted_gather")(values, slots, weights)  # [tokens, value_dim]
    else:
        y = operator("table_gather")(values, slots, weights, row_state or (), values_grad)
    y = y.to(layer_dtype)
    if values_storage != "device":
        y = y.to(tokens.device)
    if gate is not None:
        y = y * gate
    if in_parallel:
        y = _join_columns(y, out_weight, out_bias, Shards(group, tuple(parts), part, shard_dim))
    elif out_weight is not None:
        y = F.linear(y, out_weight, out_bias)
    d_out = value_dim if out_weight is None else out_weight.shape[0]
    return y.reshape(*x.shape[:-1], d_out)


def _join_columns(y: Tensor, out_weight: Tensor | None, out_bias: Tensor | None, shards: Shards) -> Tensor:
    """The layer's output of y [tokens, own columns]: the sum of what each rank's columns project to."""
    if out_weight is None:  # the columns are the output
        return sum_over_ranks(F.pad(y, (shards.offset, sum(shards.sizes) - shards.offset - shards.own)), shards.group)
    y = sum_over_ranks(F.linear(y, out_weight), shards.group)
    return y if out_bias is None else y + out_bias


def _expect_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name}: expected {meaning} = {list(shape)}, got {list(tensor.shape)}")


def _check_search(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    half_keys: Tensor,
    temperature: Tensor | None,
    heads: int,
    top_k: int,
) -> None:
    if x.dim() < 1:
        raise ValueError("x: expected [..., d], got a scalar")
    if heads < 1:
        raise ValueError(f"heads: expected at least 1, got {heads}")
    if query_weight.dim() != 2 or query_weight.shape[1] != x.shape[-1]:
        raise ValueError(f"query_weight: expected [heads * key_dim, d = {x.shape[-1]}], got {list(query_weight.shape)}")
    rows = query_weight.shape[0]
    if rows == 0 or rows % heads != 0:
        raise ValueError(f"query_weight: {rows} rows do not divide into heads = {heads} queries")
    key_dim = rows // heads
    if key_dim % 2 != 0:
        raise ValueError(f"query_weight: key_dim must be even, got {rows} rows / {heads} heads = {key_dim}")
    _expect_shape("query_bias", query_bias, (rows,), "[heads * key_dim]")
    if half_keys.dim() != 4:
        raise ValueError(f"half_keys: expected [2, heads, n_keys, key_dim / 2], got {list(half_keys.shape)}")
    n_keys = half_keys.shape[2]
    _expect_shape("half_keys", half_keys, (2, heads, n_keys, key_dim // 2), "[2, heads, n_keys, key_dim / 2]")
    _expect_shape("temperature", temperature, (heads,), "[heads]")
    check_top_k(top_k, n_keys)


def _check_read(
    x: Tensor,
    half_keys: Tensor,
    values_shape: Sequence[int],
    value_dim: int,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
) -> None:
    n_keys = half_keys.shape[2]
    if len(values_shape) != 2 or values_shape[0] != n_keys * n_keys:
        raise ValueError(f"values: expected [n_keys**2 = {n_keys * n_keys}, value_dim], got {list(values_shape)}")
    if gate_weight is None and gate_bias is not None:
        raise ValueError("gate_bias: given without gate_weight")
    _expect_shape("gate_weight", gate_weight, (value_dim, x.shape[-1]), "[value_dim, d]")
    _expect_shape("gate_bias", gate_bias, (value_dim,), "[value_dim]")
    if out_weight is None:
        if out_bias is not None:
            raise ValueError("out_bias: given without out_weight")
        return
    if out_weight.dim() != 2 or out_weight.shape[1] != value_dim:
        raise ValueError(f"out_weight: expected [d_out, value_dim = {value_dim}], got {list(out_weight.shape)}")
    _expect_shape("out_bias", out_bias, (out_weight.shape[0],), "[d_out]")


def _check_storage(values: Tensor, values_storage: str) -> None:
    if values_storage not in VALUES_STORAGES:
        raise ValueError(f"values_storage: expected one of {', '.join(VALUES_STORAGES)}, got {values_storage!r}")
    if values_storage != "device" and values.requires_grad:
        raise ValueError(
            f"values: those of values_storage={values_storage!r} do not learn: values.requires_grad_(False), or "
            f"values_storage='device' to train them"
        )


# vmap takes the operator apart as autograd does; without the second line it would loop over the batch.
for _key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"):
    LIBRARY.impl("memory_lookup", _composite, _key)  # type: ignore[no-untyped-call]
