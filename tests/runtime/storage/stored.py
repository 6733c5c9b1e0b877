"""What the tests of values in a file share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import memcompile
from tests.models import tiny_gpt
from tests.planned import MEMORY, batch, planned_gpt

SIZES = MEMORY | {"n_keys": 16}


def trained(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A planned model after two steps, and its optimizer."""
    model = planned_gpt(**{"n_keys": 16} | options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(*batch()).backward()
    optimizer.step()
    optimizer.zero_grad()


def stored(path: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Stores the values of a trained model; returns all else of its state dict, and its output for `batch`."""
    model, _ = trained()
    memcompile.store_values(model, path)
    rest = {name: tensor for name, tensor in model.state_dict().items() if name != "memory_values"}
    return rest, model(batch()[0]).detach()


def mapped_gpt(path: Path, **options: Any) -> nn.Module:
    """A new model, planned for the values of this file."""
    model = tiny_gpt(layers=2)
    memcompile.plan(model, memory_layers=1, values_storage="mmap", values_path=path, **SIZES | options)
    return model
