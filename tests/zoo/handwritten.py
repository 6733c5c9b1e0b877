"""Models in plain PyTorch: its own Transformer modules, and what people write themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.models import Attention, Block, Transformer, plain_ffn
from tests.zoo.entry import BATCH, HIDDEN, TIME, VOCABULARY, WIDTH, Entry, token_ids


class NanoGpt(nn.Module):
    """The embedding is also the head; returns the loss alone."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.h = nn.ModuleList(Block(WIDTH, plain_ffn(WIDTH, 4 * WIDTH, 0.1)) for _ in range(2))
        self.ln_f, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        return F.cross_entropy(self.lm_head(self.ln_f(x)).view(-1, VOCABULARY), targets.view(-1))


class EinsumFfn(nn.Module):
    """Raw parameters in the layout of JAX."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.wi, self.wo = (
            nn.Parameter(torch.randn(width, hidden) * 0.1),
            nn.Parameter(torch.randn(hidden, width) * 0.1),
        )
        self.bi, self.bo = nn.Parameter(torch.zeros(hidden)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(torch.einsum("btd,df->btf", x, self.wi) + self.bi)
        return torch.einsum("btf,fd->btd", h, self.wo) + self.bo


class CheckpointedTransformer(Transformer):
    """Recomputes every block in the backward pass. Without dropout: only a compiler keeps the random state of a
    checkpoint that Dynamo captured, and the tests stop before it.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(self.norm(x))


class InterleavedBlock(nn.Module):
    """FFN in the block's own forward, gate and up interleaved in one matrix and clamped, as in GPT-OSS."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.RMSNorm(WIDTH), Attention(WIDTH), nn.RMSNorm(WIDTH)
        self.gate_up, self.down = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.gate_up(self.norm2(x))
        gate, up = y[..., ::2].clamp(max=7.0), y[..., 1::2].clamp(-7.0, 7.0)
        return x + self.down((up + 1) * gate * torch.sigmoid(1.702 * gate))


class DiffusionBlock(nn.Module):
    """DiT's: shift, scale and gate of both halves come from a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.attention, self.ffn = Attention(WIDTH), plain_ffn(WIDTH, HIDDEN)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.ffn(self.norm2(x) * (1 + scale2) + shift2)


class DiffusionTransformer(nn.Module):
    """Its time-step embedding is an MLP of the width that is no FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.SiLU(), nn.Linear(4 * WIDTH, WIDTH))
        self.blocks = nn.ModuleList(DiffusionBlock() for _ in range(2))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        condition = self.time(t)
        for block in self.blocks:
            x = block(x, condition)
        return self.out(self.norm(x))


def _on_tokens(model: Callable[[], nn.Module]) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
    return lambda: (model(), {"tokens": token_ids()})


def _pre_norm_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, HIDDEN, 0.1, activation="gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, num_layers=2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)


def _features(size: int = TIME) -> Tensor:
    return torch.randn(BATCH, size, WIDTH)


TORCH = [
    Entry(
        name="nn.TransformerEncoder",
        family="nn.Transformer*",
        build=lambda: (_pre_norm_encoder(), {"src": _features()}),
        down=r"\.linear2\.weight$",
        note="pre-norm; runs as one fused operator in eval mode",
    ),
    Entry(
        name="nn.Transformer",
        family="nn.Transformer*",
        build=lambda: (
            nn.Transformer(WIDTH, 4, 2, 2, HIDDEN, 0.1, batch_first=True),
            {"src": _features(), "tgt": _features(7)},
        ),
        down=r"\.linear2\.weight$",
        note="encoder and decoder, post-norm",
    ),
]

HANDWRITTEN = [
    Entry(
        name="nanoGPT",
        family="hand-written",
        build=lambda: (NanoGpt(), {"idx": token_ids(), "targets": token_ids()}),
        down=r"\.ffn\.2\.weight$",
        note="nn.Sequential; the embedding is also the head",
    ),
    Entry(
        name="einsum",
        family="hand-written",
        build=_on_tokens(
            lambda: Transformer([Block(WIDTH, EinsumFfn(WIDTH, HIDDEN)) for _ in range(2)], WIDTH, VOCABULARY)
        ),
        down=r"\.ffn\.wo$",
        note="raw parameters, einsum, biases added by hand",
    ),
    Entry(
        name="checkpointed",
        family="hand-written",
        build=_on_tokens(
            lambda: CheckpointedTransformer(
                [Block(WIDTH, plain_ffn(WIDTH, HIDDEN)) for _ in range(2)], WIDTH, VOCABULARY
            )
        ),
        down=r"\.ffn\.2\.weight$",
        note="torch.utils.checkpoint around every block",
    ),
    Entry(
        name="interleaved",
        family="hand-written",
        build=_on_tokens(lambda: Transformer([InterleavedBlock() for _ in range(2)], WIDTH, VOCABULARY)),
        down=r"\.down\.weight$",
        note="no FFN module; gate and up interleaved, clamped",
    ),
    Entry(
        name="DiT",
        family="hand-written",
        build=lambda: (DiffusionTransformer(), {"x": _features(), "t": torch.randn(BATCH, WIDTH)}),
        down=r"\.ffn\.2\.weight$",
        note="adaptive norms, a time-step MLP beside",
        guessed=False,
    ),
]
