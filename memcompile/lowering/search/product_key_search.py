"""`memcompile::product_key_search`: the k best slots of a query, the softmax over their scores as weights, and a
backward that never builds the scores.

Scores are sums in fp32 of products of the query's and the keys' own dtype, which are exact: lower precisions would
reorder them. On the CPU one kernel scores a tile of tokens and searches it while it is in the cache; on a GPU see
`lowering.triton.cost`. Elsewhere the operator comes apart, when it is traced with autograd, into GEMMs, which Inductor
keeps, and `product_key_topk`. Its backward is a gather and a scatter over the half-keys that were hit.
"""

from typing import Any

import torch
from torch import Tensor

from memcompile.lowering import cpu
from memcompile.lowering._torch import functorch_is_active
from memcompile.lowering.gather.hits import sum_dtype
from memcompile.lowering.register.kernels import without_autocast
from memcompile.lowering.register.operators import register_differentiable
from memcompile.lowering.register.schema import expect, operator
from memcompile.lowering.register.vmap import batch_first, fold_into_tokens, unfold_tokens
from memcompile.lowering.search.product_key_topk import check_top_k
from memcompile.lowering.triton.support import supports_search


def _check(query: Tensor, half_keys: Tensor, top_k: int) -> None:
    expect("half_keys", half_keys, (2, "heads", "n_keys", "key_dim / 2"))
    expect("query", query, ("tokens", half_keys.shape[1], 2 * half_keys.shape[3]), half_keys.dtype)
    check_top_k(top_k, half_keys.shape[2])


def _kernel(query: Tensor, half_keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    tokens, heads, key_dim = query.shape
    if query.dtype != sum_dtype(query):  # no operator may return what it is given, which `to` would
        query, half_keys = query.float(), half_keys.float()
    halves = query.reshape(tokens, heads, 2, key_dim // 2).permute(2, 1, 0, 3)  # [2, heads, tokens, key_dim / 2]
    with without_autocast(query.device):  # off already, but where the operator is taken apart
        scores = halves @ half_keys.mT  # [2, heads, tokens, n_keys]
    logits, slots = operator("product_key_topk")(scores.transpose(1, 2), top_k)
    return logits.softmax(dim=-1), slots


def _under_autograd(query: Tensor, half_keys: Tensor, top_k: int) -> Any:
    arguments = query, half_keys, top_k
    has_kernel = supports_search(*arguments) or (query.device.type == "cpu" and cpu.load())
    # The next torch.func transform needs the operator whole, or it would differentiate the dense scores.
    return (operator("product_key_search") if has_kernel or functorch_is_active() else _kernel)(*arguments)


def _fake(query: Tensor, half_keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], query.shape[1], top_k)
    return query.new_empty(shape, dtype=sum_dtype(query)), query.new_empty(shape, dtype=torch.int32)


def _vmap(info: Any, in_dims: Any, query: Tensor, half_keys: Tensor, top_k: int) -> tuple[Any, Any]:
    batch, op = info.batch_size, operator("product_key_search")
    if in_dims[1] is None:
        weights, slots = op(fold_into_tokens(query, in_dims[0], batch), half_keys, top_k)
        return (unfold_tokens(weights, batch), unfold_tokens(slots, batch)), (0, 0)
    # Every element of the batch has keys of its own: they become heads.
    heads = half_keys.movedim(in_dims[1], 0).shape[2]
    keys = half_keys.movedim(in_dims[1], 1).flatten(1, 2)  # [2, batch * heads, n_keys, key_dim / 2]
    folded = batch_first(query, in_dims[0], batch).movedim(0, 1).flatten(1, 2)  # [tokens, batch * heads, key_dim]
    weights, slots = op(folded, keys, top_k)
    return (weights.unflatten(1, (batch, heads)), slots.unflatten(1, (batch, heads))), (1, 1)


def half_key_rows(slots: Tensor, n_keys: int) -> Tensor:
    """The rows [tokens, heads, 2, k] that slots [tokens, heads, k] have of half-keys [2 * heads * n_keys, key_dim / 2]:
    (side * heads + head) * n_keys + key.
    """
    heads = slots.shape[1]
    keys = torch.stack([slots // n_keys, slots % n_keys], dim=2)
    first = torch.arange(2 * heads, device=slots.device, dtype=slots.dtype).view(2, heads, 1) * n_keys
    return first.transpose(0, 1) + keys


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    query, half_keys, _ = inputs
    ctx.save_for_backward(query, half_keys, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_weights: Tensor, _: Any) -> tuple[Tensor | None, Tensor | None, None]:
    query, half_keys, weights, slots = ctx.saved_tensors
    grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    tokens, heads, key_dim = query.shape
    sides, _, n_keys, half_dim = half_keys.shape
    bags, top_k = tokens * heads * sides, slots.shape[-1]
    rows = half_key_rows(slots, n_keys).reshape(bags, top_k)
    factors = grad_logits[:, :, None].expand(-1, -1, sides, -1).reshape(bags, top_k)

    grad_query = grad_half_keys = None
    if ctx.needs_input_grad[0]:
        table = half_keys.reshape(sides * heads * n_keys, half_dim)
        grad_query = operator("weighted_gather")(table, rows, factors).reshape(tokens, heads, key_dim)
    if ctx.needs_input_grad[1]:
        halves = query.reshape(bags, half_dim)
        scattered = operator("weighted_scatter")(rows, factors, halves, sides * heads * n_keys)
        grad_half_keys = scattered.reshape(half_keys.shape)
    return grad_query, grad_half_keys, None


register_differentiable(
    "product_key_search", check=_check, kernel=_kernel, fake=_fake, vmap=_vmap, backward=_backward,
    setup_context=_setup_context, under_autograd=_under_autograd,
)  # fmt: skip
