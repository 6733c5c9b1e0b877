"""BatchNorm of the query: "Large Memory Layers with Product Keys" (Lample et al. 2019, arXiv 1907.05242), section 3.1.

    query_scale * (q - mean) / sqrt(var + 1e-5) + query_shift

of each of the heads * key_dim features over the tokens. In training by the batch's own statistics, towards which the
running ones move by a tenth (var then with Bessel's correction); in eval mode by the running ones. This is
`nn.BatchNorm1d`, but for two things: a batch without tokens changes nothing, and a forward that a backward runs, to
recompute activations, does not move the statistics a second time.
"""

import torch
from torch import Tensor

from memcompile.lowering._torch import runs_in_backward
from memcompile.lowering.register.operators import register_for_graphs
from memcompile.lowering.register.schema import operator

EPS, MOMENTUM = 1e-5, 0.1


def normalized(
    query: Tensor, scale: Tensor, shift: Tensor | None, mean: Tensor | None, var: Tensor | None, updating: bool
) -> Tensor:
    """Queries [tokens, features], float32 or float64, normalised.

    Args:
        scale, shift: [features].
        mean, var: the running statistics [features]; None takes those of the batch.
        updating: whether they move, and those of the batch are taken.
    """
    if mean is None or var is None or updating:
        tokens = torch.sym_max(1, query.shape[0])  # type: ignore[no-untyped-call]
        batch_mean = query.sum(0) / tokens
        batch_var = (query - batch_mean).square().sum(0) / tokens
        if updating:
            operator("update_statistics")(mean, var, batch_mean.detach(), batch_var.detach(), query.shape[0])
        mean, var = batch_mean, batch_var
    factor = scale.to(query.dtype) * (var.to(query.dtype) + EPS).rsqrt()
    query = (query - mean.to(query.dtype)) * factor
    return query if shift is None else query + shift.to(query.dtype)


def _kernel(mean: Tensor, var: Tensor, batch_mean: Tensor, batch_var: Tensor, tokens: int) -> None:
    if tokens == 1:
        raise ValueError(
            "x: BatchNorm of the query needs more than one token in training, as nn.BatchNorm1d does: got 1. Give the "
            "layer larger batches, or put it in eval mode"
        )
    if tokens == 0 or runs_in_backward():
        return
    for running, batch in ((mean, batch_mean), (var, batch_var * (tokens / (tokens - 1)))):
        running.mul_(1 - MOMENTUM).add_(batch.to(running.dtype), alpha=MOMENTUM)


def _fake(mean: Tensor, var: Tensor, batch_mean: Tensor, batch_var: Tensor, tokens: int) -> None:
    return None


def _vmap(*args: object) -> None:
    raise NotImplementedError(
        "torch.func.vmap would move the running statistics of one layer once for each element of its batch: put the "
        "layer in eval mode"
    )


register_for_graphs("update_statistics", _kernel, _fake, "CompositeExplicitAutograd", vmap=_vmap)
