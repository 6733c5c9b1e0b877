"""Airport codes and their cities from the package airportsdata, and the model that learns them: ordinary PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import airportsdata
import torch
import torch.nn as nn
import torch.nn.functional as F

PADDING, ARROW, END = 0, 1, 2
CODE_LENGTH, LONGEST_CITY = 3, 12  # one city in seven is longer, and would only pad every other sequence
SEQUENCE = CODE_LENGTH + 1 + LONGEST_CITY
ATTENTION_HEADS, BATCH = 4, 256


class Block(nn.Module):
    """Causal attention and an FFN, each on the normalised residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, ATTENTION_HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, time, head_dim]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.ffn_norm(x))))


class Transformer(nn.Module):
    """A character-level language model: tokens [batch, time] to logits [batch, time, vocabulary]."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(SEQUENCE, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for embedding in (self.characters, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.characters(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass
class Facts:
    """Sequences `C O D E > C i t y`, and what follows each position from the arrow on (-100: nothing to learn)."""

    tokens: torch.Tensor  # [facts, SEQUENCE]
    targets: torch.Tensor  # [facts, LONGEST_CITY + 1], the city and the end
    vocabulary: int

    @staticmethod
    def available() -> list[tuple[str, str]]:
        airports = airportsdata.load("IATA").items()
        return sorted((code, a["city"]) for code, a in airports if 0 < len(a["city"]) <= LONGEST_CITY)

    @classmethod
    def encode(cls, facts: list[tuple[str, str]]) -> Facts:
        characters = sorted({character for code, city in facts for character in code + city})
        number = {character: END + 1 + i for i, character in enumerate(characters)}
        tokens = torch.full((len(facts), SEQUENCE), PADDING)
        targets = torch.full((len(facts), LONGEST_CITY + 1), -100)
        for row, (code, city) in enumerate(facts):
            answer = [number[c] for c in city]
            text = [*(number[c] for c in code), ARROW, *answer]
            tokens[row, : len(text)] = torch.tensor(text)
            targets[row, : len(answer) + 1] = torch.tensor([*answer, END])
        return cls(tokens, targets, END + 1 + len(characters))

    def batches(self, seed: int, size: int = BATCH, skip: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Endless batches, each fact once an epoch (epochs join seamlessly), the same for every run: each is a function
        of the seed and of how many come before it, of which `skip` are left out.
        """
        for rows in itertools.islice(self._rows(seed, size), skip, None):
            yield self.tokens[rows], self.targets[rows]

    def _rows(self, seed: int, size: int) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.long)
        while True:
            while len(order) < size:
                order = torch.cat([order, torch.randperm(len(self.tokens), generator=generator)])
            rows, order = order[:size], order[size:]
            yield rows


def answer_logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the answer's characters: [batch, LONGEST_CITY + 1, vocabulary]."""
    return model(tokens)[:, CODE_LENGTH:]


@torch.no_grad()
def right_answers(model: nn.Module, facts: Facts, size: int = BATCH, rank: int = 0, ranks: int = 1) -> int:
    """How many facts' whole city, its end included, the model writes by greedy decoding; of batches of `size`, of each
    of which a rank takes its share.

    One teacher-forced forward is exact: as long as the characters written so far are right, greedy decoding sees
    the very prefix that teacher forcing shows, and the first wrong character fails the fact in both.
    """
    right, share = 0, size // ranks
    for start in range(rank * share, rank * share + len(facts.tokens), size):
        tokens, targets = facts.tokens[start : start + share], facts.targets[start : start + share]
        padded = F.pad(tokens, (0, 0, 0, share - len(tokens)))  # one shape, so that nothing compiles again
        guess = answer_logits(model, padded)[: len(tokens)].argmax(-1)
        right += int(((guess == targets) | (targets < 0)).all(-1).sum())
    return right


def exact_recall(model: nn.Module, facts: Facts) -> float:
    """The share of facts that the model recalls: see `right_answers`."""
    return right_answers(model, facts) / len(facts.tokens)
