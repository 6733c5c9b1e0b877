"""`values_grad="fused"`: the rows that a backward hits are updated before it ends, and no gradient is kept.

The factors of all layers that share the values wait for the last of them: after an update in between, the layers that
are still to come would read other values than their forward did. What cannot be served is refused before it goes wrong,
or, where only the optimizer's step can tell, before that step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from memcompile.errors import OptionError
from memcompile.runtime._torch import after_backward, backward_number
from memcompile.runtime.live_objects import live_objects

_INSTEAD = "Use values_grad='sparse'"


class FusedUpdate:
    """Collects the factors of one backward, and knows whether the optimizer's step has followed it."""

    def __init__(self) -> None:
        self._factors: list[tuple[Tensor, Tensor, Tensor]] = []  # slots, weights, gradient of each layer
        self._backward = -1  # which the factors are of
        self.waits_for_step = False
        self._after: list[tuple[Tensor, Tensor, int]] = []  # parameter, gradient and its version, when it ended
        self._asked_scalers = False

    def take(self, slots: Tensor, weights: Tensor, grad: Tensor) -> None:
        """Takes what one layer has to add.

        Raises:
            OptionError: gradient accumulation, or scaling.
        """
        if self.waits_for_step:
            raise OptionError(
                "values_grad='fused' cannot accumulate gradients: a second backward came before the optimizer's "
                f"step(), and the values are updated by the first. {_INSTEAD}"
            )
        if not self._asked_scalers:
            self._asked_scalers = True
            _refuse_scalers()
        number = backward_number()
        if number != self._backward:  # one that raised before its end leaves factors behind
            self._factors, self._backward = [], number
            after_backward(self._check_finished)
        self._factors.append((slots, weights, grad))

    def finish(self, others: Iterable[Tensor], step: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        """Updates the rows, by `step` of the factors of all layers, which have added what they have. `others` are the
        parameters whose gradients should be the same when the optimizer steps.
        """
        slots, weights, grads = map(torch.cat, zip(*self._factors, strict=True))
        self._factors = []
        self.waits_for_step = True
        step(slots, weights, grads)
        after_backward(lambda: self._note_gradients(others))

    def before_step(self, optimizer: Optimizer) -> None:
        """The optimizer is about to step the rest.

        Raises:
            OptionError: the other gradients are not those of the backward: clipped, scaled or added to.
        """
        waited, self.waits_for_step = self.waits_for_step, False
        after, self._after = self._after, []
        changed = [
            p for p, grad, version in after if p.grad is not None and (p.grad is not grad or grad._version != version)
        ]
        if waited and (changed or getattr(optimizer, "grad_scale", None) is not None):
            raise OptionError(
                "the gradients were changed between the backward and the optimizer's step() (clipped, unscaled or "
                "added to); values_grad='fused' updates the memory's values in the backward, by gradients as they are "
                f"there. {_INSTEAD}"
            )

    def _note_gradients(self, others: Iterable[Tensor]) -> None:
        self._after = [(p, p.grad, p.grad._version) for p in others if p.grad is not None]

    def _check_finished(self) -> None:
        """At the end of a backward; one that did not reach the values' own gradient was asked for it otherwise."""
        if self._factors:
            self._factors = []
            raise OptionError(
                f"values_grad='fused' makes no gradient of the values that autograd.grad could return. {_INSTEAD}"
            )


def _refuse_scalers() -> None:
    scalers = live_objects(torch.amp.GradScaler)
    if any(scaler.is_enabled() and scaler._scale is not None for scaler in scalers):
        raise OptionError(
            f"values_grad='fused' updates the values in the backward, where a GradScaler's gradients are still scaled. "
            f"{_INSTEAD}"
        )
