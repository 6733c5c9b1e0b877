"""A mixture of experts in the place of an FFN: expert choice in training, top-1 at inference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.knowledge.models.decoder import ffn_width


class Experts(nn.Module):
    """For tokens x_1 .. x_T and E experts, each a SwiGLU FFN as large as the dense one:

        p_te = softmax over e of (W_r x_t)_e
        training:  y_t = sum over the experts that chose t of p_te * FFN_e(x_t); expert e chooses the T / E tokens of
                   its highest p_te (Zhou et al. 2022, capacity factor 1), so that a token is chosen once on average
        inference: y_t = p_te * FFN_e(x_t) for the e of the highest p_te: what a token gets depends on no other token

    Both take the FLOPs of one FFN a token, and the router's.
    """

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        hidden = ffn_width(width)
        self.router = nn.Linear(width, experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * hidden, width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))
        for weight in (self.gate_up, self.down):
            bound = weight.shape[-1] ** -0.5  # as nn.Linear
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        shares = self.router(tokens).softmax(-1)  # [tokens, experts]
        y = self._experts_choose(tokens, shares) if self.training else self._best_expert(tokens, shares)
        return y.view_as(x)

    def _experts_choose(self, tokens: Tensor, shares: Tensor) -> Tensor:
        weights, chosen = shares.t().topk(-(-len(tokens) // shares.shape[1]), dim=-1)  # [experts, capacity] each
        gate, up = (tokens[chosen] @ self.gate_up.mT).chunk(2, dim=-1)
        y = (F.silu(gate) * up @ self.down.mT) * weights[..., None]
        return torch.zeros_like(tokens).index_add(0, chosen.flatten(), y.flatten(0, 1))

    def _best_expert(self, tokens: Tensor, shares: Tensor) -> Tensor:
        weights, best = shares.max(-1)
        y = torch.zeros_like(tokens)
        for expert in best.unique().tolist():
            own = (best == expert).nonzero().flatten()
            gate, up = F.linear(tokens[own], self.gate_up[expert]).chunk(2, dim=-1)
            y[own] = F.linear(F.silu(gate) * up, self.down[expert]) * weights[own, None]
        return y
