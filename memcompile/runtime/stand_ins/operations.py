"""The operations between the projections of an FFN, recorded as it is planned and compared as it runs.

A stand-in computes nothing, so nothing that is done to it has an effect. What the FFN did itself has none because the
memory took the FFN's place. What was added to the FFN after planning (an adapter, a mask, a hook) would be lost without
a word: the first forward raises instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from memcompile.errors import CaptureError

# What stands for the operations that led to a stand-in: the name that a parameter has within the FFN, what was computed
# of parameters, or the number of a longer history.
State = str | int | tuple
TRAINED = "trained tensor"


class Operations:
    """Which operations follow each other between the projections of one FFN.

    Attributes:
        steps: the key of an operation, its operands' states first -> the state that it leads to.
        records: whether an operation that is not among them is added, as it is while the plan is rehearsed.
    """

    def __init__(self) -> None:
        self.steps: dict[tuple[Any, ...], State] = {}
        self.records = True

    def after(self, key: tuple[Any, ...]) -> State | None:
        """The state after the operation of this key; None where the FFN did not have it."""
        state = self.steps.get(key)
        if state is None and self.records and TRAINED not in key:
            state = self.steps[key] = len(self.steps)
        return state

    def allows(self, key: tuple[Any, ...]) -> bool:
        """Whether the FFN had an operation that may also be left out, as a dropout may: it leads nowhere."""
        if self.records:
            self.steps[key] = key[0]
        return key in self.steps

    def expected(self, state: State) -> str:
        """The operators that the FFN had next."""
        names = sorted({key[1] for key in self.steps if key[0] == state})
        return " or ".join(names) if names else "none"


class StandIn:
    """What a model's code has in the place of a tensor of a replaced FFN.

    Attributes:
        state: what led to it.
    """

    state: State


class History:
    """What happened to a hidden activation and to the views of it, which share this object as they would share memory.

    Attributes:
        state: changes where an operator works in place.
        source: the tensor that the up-projection read.
    """

    def __init__(self, state: State, source: Any) -> None:
        self.state, self.source = state, source


def states_of(operands: Sequence[Any]) -> list[Any]:
    """What the key of an operation has of its operands. Numbers are not told apart: the FFN's own ones are gone.
    Tensors come last, because Dynamo may exchange the sides of an operator.
    """
    stand_ins = [a.state for a in operands if isinstance(a, StandIn)]
    return stand_ins + [TRAINED if a.requires_grad else "tensor" for a in operands if isinstance(a, Tensor)]


def unproved(layer: Any, what: str, operands: Sequence[Any], state: State) -> CaptureError:
    """The error for an operation that the FFN did not have."""
    tensors = [f"a tensor of shape {tuple(a.shape)}" for a in operands if isinstance(a, Tensor)]
    described = " with ".join([what, *tensors])
    return CaptureError(
        f"memcompile: {described} in {layer.name}, an FFN that a memory replaced, was not part of the FFN when the "
        f"model was planned ({layer.operations.expected(state)} came next), and would be dropped. Exclude the block "
        f"from memory_layers, use placement='add', which keeps the FFN, or put it on the memory layer, which runs in "
        f"the FFN's place"
    )
