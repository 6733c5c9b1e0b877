"""Names and copies of what a planned model saves."""

from __future__ import annotations

import io

import torch
from torch import Tensor, nn

LAYER = [
    f"blocks.1.ffn.2.memory.{name}"
    for name in ("query_weight query_bias half_keys gate_weight gate_bias out_weight out_bias _extra_state".split())
]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def by_torch_save(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
