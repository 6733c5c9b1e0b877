"""Small Transformers in plain PyTorch, one for each way to write an FFN. None of them knows memcompile.

Sizes differ from each other on purpose, so that a dimension tells what it counts: batch 3, time 5, width 32,
vocabulary 50, hidden 128 (plain) or 80 (gated).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.torch_version import TorchVersion

BATCH, TIME, WIDTH, VOCABULARY = 3, 5, 32, 50
HIDDEN, GATED_HIDDEN = 128, 80


class Attention(nn.Module):
    """Causal self-attention; ``bias`` as in GPT, without as in Llama."""

    def __init__(self, width: int, heads: int = 4, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [batch, heads, time, dim]
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Pre-norm Transformer block around any FFN."""

    def __init__(self, width: int, ffn: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, dropout=dropout)
        self.norm2, self.ffn = nn.LayerNorm(width), ffn

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class PostNormBlock(Block):
    """As in the original Transformer and BERT: the norms stand on the stream itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.ffn(x))


class InlineGatedBlock(nn.Module):
    """Llama's block without an MLP module: SwiGLU in the block's own forward, RMS norm, no bias."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(width), Attention(width, bias=False)
        self.norm2 = nn.RMSNorm(width)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def plain_ffn(width: int, hidden: int, dropout: float = 0.0) -> nn.Module:
    """The FFN of GPT and BERT."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width), nn.Dropout(dropout))


def inner_norm_ffn(width: int, hidden: int) -> nn.Module:
    """Layer norm and dropout between the projections (sub-LN)."""
    inner = [nn.Linear(width, hidden), nn.GELU(), nn.LayerNorm(hidden), nn.Dropout(0.1)]
    return nn.Sequential(*inner, nn.Linear(hidden, width), nn.Dropout(0.1))


def in_place_ffn(width: int, hidden: int) -> nn.Module:
    """The activation overwrites its operand."""
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, width))


class FusedGateFfn(nn.Module):
    """Gate and up-projection in one matrix, parted by ``chunk``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class RawParameterFfn(nn.Module):
    """No module but the FFN itself; the activation is spelt out (GELU's tanh form)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(width, hidden) * width**-0.5), nn.Parameter(torch.zeros(hidden))
        self.w2, self.b2 = nn.Parameter(torch.randn(hidden, width) * hidden**-0.5), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.w1 + self.b1
        h = 0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * h**3)))
        return h @ self.w2 + self.b2


class Conv1D(nn.Module):
    """GPT-2's projection: ``addmm`` with a weight [in, out]."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width_in, width_out) * 0.02)
        self.bias = nn.Parameter(torch.zeros(width_out))

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.shape[:-1], self.weight.shape[1])
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(size)


class Transformer(nn.Module):
    """Tokens [batch, time] -> embedding -> blocks -> norm -> logits [batch, time, vocabulary], or the loss."""

    def __init__(self, blocks: list[nn.Module], width: int = WIDTH, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(64, width)
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def tiny_gpt(layers: int = 4, width: int = WIDTH, vocab: int = VOCABULARY, dropout: float = 0.0) -> Transformer:
    """A GPT whose FFNs are `blocks.N.ffn`, nn.Sequential modules: ``forward(tokens, targets=None)``."""
    blocks = [Block(width, plain_ffn(width, 4 * width, dropout), dropout) for _ in range(layers)]
    return Transformer(blocks, width, vocab)


def around(ffn: Callable[[int, int], nn.Module], hidden: int = HIDDEN, layers: int = 4) -> Transformer:
    """A pre-norm Transformer around the FFN that ``ffn(width, hidden)`` builds for each block."""
    return Transformer([Block(WIDTH, ffn(WIDTH, hidden)) for _ in range(layers)])


def _encoder() -> Transformer:
    layer = nn.TransformerEncoderLayer(WIDTH, nhead=4, dim_feedforward=HIDDEN, batch_first=True, norm_first=True)
    return Transformer([nn.TransformerEncoder(layer, num_layers=4, enable_nested_tensor=False)])


def _tokens() -> tuple[Tensor]:
    return (torch.randint(VOCABULARY, (BATCH, TIME)),)


# Name -> a fresh model in train mode and example inputs.
# Dynamo 2.11 and 2.13 have no rule for `hidden @ weight` between two objects that are no tensors: they run that line
# eagerly, which `fullgraph=True` refuses. 2.15 has one.
DYNAMO_TRACES_MATMUL_OF_OBJECTS = TorchVersion(torch.__version__) >= (2, 14)

ZOO: dict[str, Callable[[], tuple[nn.Module, tuple]]] = {
    "gpt": lambda: (tiny_gpt(), _tokens()),
    "inline_gated": lambda: (Transformer([InlineGatedBlock(WIDTH, GATED_HIDDEN) for _ in range(4)]), _tokens()),
    "fused_gate": lambda: (around(FusedGateFfn, GATED_HIDDEN), _tokens()),
    "raw_parameters": lambda: (around(RawParameterFfn), _tokens()),
    "conv1d": lambda: (around(lambda w, h: nn.Sequential(Conv1D(w, h), nn.GELU(), Conv1D(h, w))), _tokens()),
    "post_norm": lambda: (Transformer([PostNormBlock(WIDTH, plain_ffn(WIDTH, HIDDEN)) for _ in range(4)]), _tokens()),
    "shared": lambda: (Transformer([Block(WIDTH, plain_ffn(WIDTH, HIDDEN))] * 4), _tokens()),
    "torch_encoder": lambda: (_encoder(), _tokens()),
    "inner_norm": lambda: (around(inner_norm_ffn), _tokens()),
    "in_place": lambda: (around(in_place_ffn), _tokens()),
}
