"""Flop formulas, so that `torch.utils.flop_counter.FlopCounterMode` counts the operators of this layer.

As in PyTorch's own formulas a multiply-add is two flops; comparisons are none.
"""

from collections.abc import Sequence
from typing import Any

from torch.utils.flop_counter import register_flop_formula

from memcompile.lowering.register.schema import operator
from memcompile.lowering.search.product_key_topk import candidate_pairs

Shape = Sequence[int]


_READERS = ["weighted_gather", "gather_dot", "table_gather", "table_dot"]
# A number of a pair is multiplied once too, and a gelu for each hit counts as none, as PyTorch's own does.
_READERS += ["pair_gather", "pair_grads", "table_pairs", "table_pair_grads"]


@register_flop_formula([operator(name).overloadpacket for name in _READERS])
def _rows_read(values: Shape, slots: Shape, other: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * slots[0] * slots[1] * values[1]


@register_flop_formula(operator("onednn_mm").overloadpacket)
def _product(left: Shape, right: Shape, bias: Shape | None, *args: Any, **kwargs: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


@register_flop_formula(operator("weighted_scatter").overloadpacket)
def _rows_written(slots: Shape, weights: Shape, grad: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * slots[0] * slots[1] * grad[1]


@register_flop_formula(operator("pair_scatter").overloadpacket)
def _pairs_written(slots: Shape, into: Shape, x: Shape, out: Shape, grad: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * slots[0] * slots[1] * (x[1] + grad[1])


@register_flop_formula(operator("sparse_scatter").overloadpacket)
def _rows_summed(
    values: Shape, slots: Sequence[Shape], weights: Sequence[Shape], grads: Sequence[Shape], *args: Any, **kwargs: Any
) -> int:
    return sum(2 * tokens * hits * values[1] for tokens, hits in slots)


@register_flop_formula(operator("product_key_topk").overloadpacket)
def _candidates(scores: Shape, top_k: int, *args: Any, **kwargs: Any) -> int:
    return scores[1] * scores[2] * len(candidate_pairs(top_k)[0])


@register_flop_formula(operator("product_key_search").overloadpacket)
def _scores_and_candidates(query: Shape, half_keys: Shape, top_k: int, *args: Any, **kwargs: Any) -> int:
    # Met whole only where autograd is absent (inference mode); elsewhere its GEMMs are counted one by one.
    tokens, heads, key_dim = query
    n_keys = half_keys[2]
    return 2 * tokens * heads * key_dim * n_keys + _candidates((2, tokens, heads, n_keys), top_k)
