"""A table that is addressed by n-grams of tokens: a small form of Engram (DeepSeek 2026)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ORDERS = (2, 3)
HASHES = 2  # for each order
_FACTORS = (2_654_435_761, 40_503, 2_246_822_519)  # odd numbers, one for each place of an n-gram


class NGrams(nn.Module):
    """What is added to the residual stream x_t of the tokens s_1 .. s_T:

        e_t = rows of a table at hash_j(s_(t-n+1) .. s_t), for n in ORDERS and HASHES hashes each, joined
        y_t = sigmoid(norm(x_t) . norm(W_k e_t) / sqrt(width)) * W_v e_t

    The addresses depend on tokens alone, the gate on the context. W_v is zero at first.
    """

    def __init__(self, width: int, rows: int, row_size: int) -> None:
        super().__init__()
        self.rows = rows
        self.table = nn.Embedding(rows, row_size)
        joined = len(ORDERS) * HASHES * row_size
        self.key, self.value = nn.Linear(joined, width, bias=False), nn.Linear(joined, width, bias=False)
        self.x_norm, self.key_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        nn.init.normal_(self.table.weight, std=row_size**-0.5)
        nn.init.zeros_(self.value.weight)

    def addresses(self, tokens: Tensor) -> Tensor:
        """int64 [batch, time, ORDERS * HASHES]."""
        found = []
        for order in ORDERS:
            padded = F.pad(tokens, (order - 1, 0))
            grams = padded.unfold(1, order, 1)  # [batch, time, order]
            for number in range(HASHES):
                mixed = torch.zeros_like(tokens)
                for place in range(order):
                    mixed = (mixed ^ (grams[..., place] + 1 + number * 977)) * _FACTORS[place] % 2**31
                found.append((mixed ^ (mixed >> 15)) % self.rows)
        return torch.stack(found, dim=-1)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        rows = self.table(self.addresses(tokens)).flatten(-2)
        gate = (self.x_norm(x) * self.key_norm(self.key(rows))).sum(-1, keepdim=True) * x.shape[-1] ** -0.5
        return gate.sigmoid() * self.value(rows)
