"""`memcompile::memory_lookup`: a memory layer as one operator: projections, a search and a gather.

It is composite: one node in Dynamo's graph, taken apart by AOTAutograd into GEMMs and pointwise operations,
which Inductor fuses, and the operators `product_key_topk`, `weighted_gather` and their derivatives.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memcompile.lowering._torch import functorch_is_active, schema_defaults
from memcompile.lowering.distributed.collectives import sum_gradients, sum_over_ranks
from memcompile.lowering.distributed.sharded_pairs import sharded_pairs
from memcompile.lowering.distributed.sharded_table import Shards, sharded_gather
from memcompile.lowering.gather.table_gather import gather
from memcompile.lowering.gather.table_pairs import gather_pairs
from memcompile.lowering.lookup_arguments import LookupArguments
from memcompile.lowering.register.schema import LIBRARY, operator
from memcompile.lowering.search.batch_norm import normalized
from memcompile.lowering.search.hit_scores import balance_of, hit_scores


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
    query_scale: Tensor | None = None,
    query_shift: Tensor | None = None,
    query_mean: Tensor | None = None,
    query_var: Tensor | None = None,
    *,
    heads: int,
    top_k: int,
    values_grad: str = "dense",
    values_storage: str = "device",
    shards: Shards | None = None,
    capacity: int | None = None,
    row_state: Sequence[Tensor] = (),
    weighting: str = "softmax",
    first_slot: int | Tensor = 0,
    num_tables: int = 1,
    balance_loss: float = 0.0,
    training: bool = False,
    pairs: bool = False,
    slot_hits: Tensor | None = None,
    key_hits: Tensor | None = None,
) -> Tensor:
    """A product-key memory layer (Lample et al. 2019; Memory Layers at Scale, arXiv 2412.09764, section 3).

    A head's query is cut in halves q1, q2, each scored against n half-keys. Slot i * n + j scores
    q1 . k1[i] + q2 . k2[j]; the `top_k` best of the n * n slots are found exactly, a softmax over them gives
    their weights, and the weighted rows of `values` are summed over all heads. With `gate_weight` the sum y
    becomes y * silu(gate(x)) (Memory+); with `out_weight` it is projected. With `query_scale` the query has gone
    through BatchNorm (Lample et al. 2019: `search.batch_norm`).

    With `pairs` a row of `values` is a pair (u, v), and y = sum over the hits of w * gelu(u . x) * v, with the exact
    gelu (PEER: He 2024, "Mixture of A Million Experts", arXiv 2407.04153). See `gather/pairs.py`.

    Scores and softmax are computed in float32 (float64 where the query is), under autocast too, because lower
    precisions reorder the slots; all but the smallest products of a half dtype are exact in it. The projections
    follow autocast.

    Args:
        x: [..., d]; any leading dimensions, of any size.
        query_weight: [heads * key_dim, d], and query_bias: [heads * key_dim] or None.
        half_keys: [2, heads, n, key_dim / 2].
        values: [n * n, value_dim], or [n * n, d + value_dim] with `pairs`, of any floating dtype; it may differ from
            the rest. Or `num_tables` of them, one after the other, of which `first_slot` begins the layer's own.
        gate_weight: [value_dim, d] or None for no gate, and gate_bias: [value_dim] or None.
        out_weight: [d_out, value_dim] or None for no projection, and out_bias: [d_out] or None.
        temperature: [heads] or None. With it, each half of a query and each half-key is scaled to unit norm,
            and a head's scores are multiplied by its temperature.
        query_scale, query_shift: [heads * key_dim] or None, of BatchNorm of the query, before the unit norm.
        query_mean, query_var: its running statistics, [heads * key_dim], of any floating dtype. None takes those of
            the batch.
        heads: number of heads.
        top_k: slots read by a head, at most n.
        values_grad: "dense", or "sparse" for a gradient of `values` that is a coalesced sparse COO tensor of the rows
            that were hit. Under torch.func transforms it is always dense.
        values_storage: "device", or "host" for values in the CPU's memory, whatever the rest is on: rows are summed
            there, and the sums moved. "mmap" is "host" for a mapped file: its rows are asked for before the gate is
            computed. Both are for values that do not learn.
        shards: how the values lie on the ranks of a memory group, of which `values` is what this rank holds; None for
            the whole table. See `sharded_table`. Where all ranks have the same tokens (tensor parallelism),
            `gate_weight`, `gate_bias` and `out_weight` are of the own columns too.
        capacity: of a sharded table, the most tokens that a rank of the group has in this call. With None the ranks
            tell each other.
        row_state: what rows of `values` have missed of their optimizer's steps, as `table_gather` takes it; empty where
            the rows are as they stand.
        weighting: a head's weights are the "softmax" over its hits' scores, or the "sigmoid" of each.
        first_slot: the row of `values` that is the layer's slot 0, a multiple of n * n. A tensor [] int32 of it is data
            for graphs, so that layers which differ in it alone share one; its number is not checked.
        num_tables: how many tables of n * n rows `values` has.
        balance_loss: factor of a loss (`search.hit_scores.balance_of`) whose gradient, times this and nothing else, is
            added in each backward through the output.
        training: whether BatchNorm takes the batch's statistics, and moves `query_mean` and `query_var` towards them,
            in place.
        pairs: whether rows are pairs. x is rounded to the values' dtype for the dots with u. Such a table is sharded by
            rows.
        slot_hits, key_hits: int64 [num_tables * n * n] and [2, heads, n], or None for both. With them the call counts
            how often each slot, and each half-key, is hit, in place: see `search.count_hits`.

    Returns:
        [..., d_out], or [..., value_dim] with no projection, in the dtype of `F.linear(x, query_weight)`.

    Raises:
        ValueError: a shape or an option does not fit; the message names the argument.
        NotImplementedError: on forward-mode differentiation. Reverse mode works to any order. Also for a balance loss
            in float16, and for statistics that move under torch.func.vmap.
    """
    placed: tuple[Any, ...] = ("", (), 0, 1, False)
    if shards is not None:
        placed = (shards.group, shards.sizes, shards.rank, shards.dim, shards.same_tokens)
    of_number, of_tensor = (0, first_slot) if isinstance(first_slot, Tensor) else (first_slot, None)
    updates = training and query_mean is not None
    counts = slot_hits is not None or key_hits is not None
    overload = ".counting" if counts else ".updating" if updates else ""
    return operator(f"memory_lookup{overload}")(
        x, query_weight, query_bias, half_keys, values,
        gate_weight, gate_bias, out_weight, out_bias, temperature, heads, top_k, values_grad, values_storage,
        *placed, capacity, [*row_state] or None, weighting, of_number, balance_loss,
        query_scale, query_shift, query_mean, query_var, pairs, num_tables, of_tensor, updates, slot_hits, key_hits,
    )  # fmt: skip


DEFAULTS = schema_defaults(operator("memory_lookup"))


class _Lookup(LookupArguments):
    """One call."""

    def run(self) -> Tensor:
        x, values = self.x, self.values
        tokens = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        query = F.linear(tokens, self.query_weight, self.query_bias)  # [tokens, heads * key_dim]
        if self.balance_loss and query.dtype is torch.float16:
            raise NotImplementedError(
                "balance_loss: its gradient has no loss scale, which float16 needs: train in bfloat16, or with "
                "balance_loss=0"
            )
        weights, slots, loss = self._search(query)  # [tokens, heads * top_k]
        if self.in_parallel:  # each rank goes on with its own columns, and has their share of the gradients
            weights, tokens = sum_gradients(weights, self.group), sum_gradients(tokens, self.group)
        if self.values_storage != "device":
            slots, weights = slots.to(values.device), weights.to(values.device)
        if self.values_storage == "mmap":
            slots = operator("prefetch_rows")(values, slots)
        gate = None if self.gate_weight is None else F.silu(F.linear(tokens, self.gate_weight, self.gate_bias))
        y = self._read(slots, weights, tokens).to(query.dtype)  # [tokens, value_dim]
        if self.values_storage != "device":
            y = y.to(tokens.device)
        if gate is not None:
            y = y * gate
        y = self._join_columns(y) if self.in_parallel else self._project(y, self.out_bias)
        y = y.reshape(*x.shape[:-1], y.shape[1])
        return y if loss is None else operator("with_loss")(y, loss)

    def _search(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weights and slots [tokens, heads * top_k] of the queries [tokens, heads * key_dim]; and the balance loss."""
        dtype = torch.promote_types(query.dtype, self.half_keys.dtype)
        if self.temperature is not None or self.query_scale is not None:  # norms are not exact in the half dtypes
            dtype = torch.promote_types(dtype, torch.float32)
        half_keys = self.half_keys.to(dtype)
        query = query.to(dtype)
        if self.query_scale is not None:
            batch_norm = self.query_scale, self.query_shift, self.query_mean, self.query_var
            query = normalized(query, *batch_norm, self.training)
        halves = query.reshape(-1, self.heads, 2, half_keys.shape[3])
        if self.temperature is not None:
            # A score is linear in the query, so its half-queries carry the temperature.
            halves = F.normalize(halves, dim=-1) * self.temperature.to(dtype)[:, None, None]
            half_keys = F.normalize(half_keys, dim=-1)
        searched = halves.flatten(-2), half_keys
        if self.weighting == "softmax":
            weights, slots = operator("product_key_search")(*searched, self.top_k)
        else:
            _, slots = operator("product_key_search")(*(tensor.detach() for tensor in searched), self.top_k)
            weights = hit_scores(halves, half_keys, slots).sigmoid()
        loss = None
        if self.balance_loss and torch.is_grad_enabled():
            loss = self.balance_loss * balance_of(halves, half_keys, slots)
        if self.slot_hits is not None:
            operator("count_hits")(slots, self.first_slot, self.slot_hits, self.key_hits, self.slot_offset)
        slots = slots.flatten(1)
        if self.slot_offset is not None:
            slots = slots + self.slot_offset.to(slots.device)
        elif self.first_slot:
            slots = slots + self.first_slot
        return weights.flatten(1), slots, loss

    def _read(self, slots: Tensor, weights: Tensor, tokens: Tensor) -> Tensor:
        """The weighted sums of the rows that each token hits."""
        values, row_state = self.values, self.row_state or ()
        if self.pairs:
            return self._read_pairs(slots, weights, tokens.to(values.device, values.dtype))
        if self.shards is not None:
            return sharded_gather(values, slots, weights, self.shards, self.capacity, self.values_grad, row_state)
        if functorch_is_active():
            return operator("weighted_gather")(values, slots, weights)  # type: ignore[no-any-return]
        return gather(values, slots, weights, row_state, self.values_grad)

    def _read_pairs(self, slots: Tensor, weights: Tensor, x: Tensor) -> Tensor:
        hits, row_state = (self.values, slots, weights, x), self.row_state or ()
        if self.shards is not None:
            return sharded_pairs(*hits, self.shards, self.capacity, self.values_grad, row_state)
        return gather_pairs(*hits, row_state, self.values_grad)

    def _project(self, y: Tensor, bias: Tensor | None) -> Tensor:
        return y if self.out_weight is None else F.linear(y, self.out_weight, bias)

    def _join_columns(self, y: Tensor) -> Tensor:
        """The layer's output of y [tokens, own columns]: the sum of what each rank's columns project to."""
        shards = self.shards
        assert shards is not None
        if self.out_weight is None:  # the columns are the output
            y = F.pad(y, (shards.offset, sum(shards.sizes) - shards.offset - shards.own))
        y = sum_over_ranks(self._project(y, None), self.group)
        return y if self.out_bias is None else y + self.out_bias


def _run(overload: str, *args: Any) -> Tensor:
    # PyTorch leaves out those that are defaults.
    lookup = _Lookup(**DEFAULTS | dict(zip(DEFAULTS, args, strict=False)), overload=overload)
    lookup.check()
    return lookup.run()


# vmap takes the operator apart as autograd does; without the second line it would loop over the batch.
for _key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"):
    for _overload in ("", ".updating", ".counting"):
        LIBRARY.impl(f"memory_lookup{_overload}", functools.partial(_run, _overload), _key)  # type: ignore[no-untyped-call]
