"""HitCounts: how often training or evaluation has hit each slot of a table, and each half-key of its layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class HitCounts:
    """What lookups count in, while they are counted.

    Attributes:
        slot_hits: int64 [slots], of all layers that read the table.
        key_hits: int64 [2, heads, n_keys] of each layer, by its name.
        for_gradients: whether forwards without gradients do not count.
    """

    for_gradients = False

    def __init__(self, slots: int, heads: int, n_keys: int, layers: Iterable[str], device: torch.device) -> None:
        self.slot_hits = torch.zeros(slots, dtype=torch.int64, device=device)
        self.key_hits = {name: torch.zeros(2, heads, n_keys, dtype=torch.int64, device=device) for name in layers}

    def tensors(self) -> list[Tensor]:
        return [self.slot_hits, *self.key_hits.values()]

    def zero(self) -> None:
        """Starts again, in place: compiled graphs go on with the same tensors."""
        for tensor in self.tensors():
            tensor.zero_()

    def move(self, device: torch.device) -> None:
        """Follows the layers to a device. Idempotent."""
        if device.type != "meta" and self.slot_hits.device != device:
            self.slot_hits = self.slot_hits.to(device)
            self.key_hits = {name: hits.to(device) for name, hits in self.key_hits.items()}
