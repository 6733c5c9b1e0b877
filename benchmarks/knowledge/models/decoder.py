"""The decoder that learns: ordinary PyTorch, with RMSNorm, rotary positions and SwiGLU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = 4
REACH = 3


def ffn_width(width: int) -> int:
    """Of SwiGLU with as many parameters as a GELU FFN of four times the width, up to a multiple of 8."""
    return -(-8 * width // 24) * 8


class SwiGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = ffn_width(width)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) of x [batch, heads, time, head_dim] by angles [time, head_dim / 2]."""
    left, right = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)


class Predecessors(nn.Module):
    """Adds to each token a sum of the REACH tokens before it, weighted for each channel.

    That is a causal depthwise convolution, as in the Canon layers of Allen-Zhu 2025. Names and codes have several
    tokens, and attention alone takes long to learn to join them: without it a short training is spent on that.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(REACH, width).uniform_(-0.5, 0.5))

    def forward(self, x: Tensor) -> Tensor:
        time = x.shape[1]
        before = F.pad(x, (0, 0, REACH, 0))
        return x + sum(before[:, i : i + time] * self.weight[i] for i in range(REACH))


class Block(nn.Module):
    """Causal attention and an FFN, each on the normalised residual stream."""

    def __init__(self, width: int, ffn: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.attention_out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.predecessors, self.ffn = Predecessors(width), ffn

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(self.predecessors(self.attention_norm(x))).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        )
        attended = F.scaled_dot_product_attention(rotate(q, angles), rotate(k, angles), v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(-2))
        return x + self.ffn(self.ffn_norm(x))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode without gradients; in the mode that it was in afterwards."""
    training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(training)


class Decoder(nn.Module):
    """Args:
    ffn: makes the FFN of a block from its index.
    before: what is added to the residual stream before a block, by the block's index, computed from the
        stream and the tokens.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        blocks: int,
        ffn: Callable[[int], nn.Module] | None = None,
        before: dict[int, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, ffn(i) if ffn else SwiGLU(width)) for i in range(blocks))
        self.before = nn.ModuleDict({str(i): module for i, module in (before or {}).items()})
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
        half = width // HEADS // 2
        self.register_buffer("frequencies", 1e4 ** -(torch.arange(half) / half), persistent=False)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits of the next token, [batch, time, vocabulary].

        Args:
            tokens: int64 [batch, time].
            positions: of which alone there are logits, [positions, vocabulary]: indices of batch * time.
        """
        angles = torch.arange(tokens.shape[1], device=tokens.device)[:, None] * self.frequencies
        x = self.tokens(tokens)
        for i, block in enumerate(self.blocks):
            if str(i) in self.before:
                x = x + self.before[str(i)](x, tokens)
            x = block(x, angles)
        x = x if positions is None else x.flatten(0, 1)[positions]
        return self.head(self.norm(x))
