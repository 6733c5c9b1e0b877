"""A model whose table lies on the module that was planned, as an earlier version saved it, and the numbers that it has.

`data/format_1` was written by that version: a step of `memcompile.checkpoint.save`, and an export of it. Its table is
named `memory_values` after the planned model, although all of its layers are in the decoder.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import memcompile

DATA = Path(__file__).parent / "data" / "format_1"
STEP, WIDTH, WORDS = 7, 8, 10


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.blocks = nn.Embedding(WORDS, WIDTH), nn.ModuleList([Block(), Block()])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        for block in self.blocks:
            x = block(x)
        return x


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.head = Decoder(), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.decoder(tokens))


def planned() -> tuple[LanguageModel, Optimizer]:
    """The model as it was planned, and its optimizer, with a group of its own for the table."""
    model = LanguageModel()
    memcompile.plan(model, memory_layers=2, n_keys=4, top_k=2, heads=1, key_dim=4, values_grad="sparse")
    table = table_of(model)
    rest = [parameter for parameter in model.parameters() if parameter is not table]
    return model, AdamW([{"params": rest}, {"params": [table], "weight_decay": 0.5}], lr=0.125)


def table_of(model: nn.Module) -> nn.Parameter:
    """The values, wherever they lie."""
    (table,) = (p for name, p in model.named_parameters() if name.endswith("memory_values"))
    return table


def numbers(name: str, shape: torch.Size) -> Tensor:
    """What was saved under a name, of a parameter or of an entry of its state; the table's does not depend on where it
    lies.
    """
    name = name[name.index("memory_values") :] if "memory_values" in name else name
    count = torch.arange(shape.numel(), dtype=torch.float32).view(shape)
    return (count + sum(name.encode()) % 97) / 64


def expected(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """All state of both after loading, by the names that `everything` gives it."""
    found = {}
    for name, parameter in model.named_parameters():
        found[f"model.{name}"] = numbers(name, parameter.shape)
        for entry in ("exp_avg", "exp_avg_sq"):
            found[f"optimizer.{name}.{entry}"] = numbers(f"{name}.{entry}", parameter.shape)
        found[f"optimizer.{name}.step"] = torch.tensor(float(STEP))
    return found
