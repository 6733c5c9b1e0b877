"""What the zoo knows about one model: how to build it, and which of its weights are the down-projections of FFNs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

BATCH, TIME, WIDTH, HIDDEN, VOCABULARY = 2, 10, 32, 80, 99  # all distinct: a dimension tells what it counts

Build = Callable[[], tuple[nn.Module, dict[str, Any]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A tiny model of one architecture, with random weights.

    Attributes:
        name: unique in the zoo.
        family: the kind of model; "trap" for those that invite a wrong match.
        build: returns the model and the keyword arguments of one forward.
        down: regular expression of the names of exactly those weights that must be found as down-projections; "" where
            there is no FFN to find.
        note: what is special about it.
        refused: for a trap, words of the sentence that refuses it; "" where it must not be a candidate at all.
        guessed: whether the same must be found without example inputs.
    """

    name: str
    family: str
    build: Build
    down: str = ""
    note: str = ""
    refused: str = ""
    guessed: bool = True

    def new(self) -> tuple[nn.Module, dict[str, Any]]:
        """The model in train mode and its inputs, the same at every call."""
        torch.manual_seed(0)
        model, inputs = self.build()
        return model.train(), inputs

    def expected(self, model: nn.Module) -> set[str]:
        """The down-projections that must be found in ``model``."""
        return {name for name, _ in model.named_parameters() if self.down and re.search(self.down, name)}

    def __str__(self) -> str:
        return self.name


def token_ids(size: int = TIME, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """[BATCH, size], none of them a special token of the tiny configs (0 to 2)."""
    return torch.randint(3, vocabulary - 3, (BATCH, size))
