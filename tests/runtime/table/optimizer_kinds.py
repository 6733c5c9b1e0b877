"""Optimizers of every kind that hold a table: PyTorch's, timm's, and small ones of the kinds that others have."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from tests.zoo.torchvision_stand_in import torchvision_stand_in

Closure = Callable[[], Any]


class ScheduleFree(Optimizer):
    """SGD of arXiv 2405.15682: gradients are taken between where steps go and their average. It counts in its group."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "steps": 0})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.clone())
                    z.sub_(group["lr"] * p.grad)
                    p.lerp_(z, 0.1 + 0.9 / group["steps"])


class EightBit(Optimizer):
    """The interface of 8-bit optimizers: moments in bytes, each with its scale, and options of single parameters."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})
        self.initialized, self.config_of = False, {}

    def options_of(self, group: dict[str, Any], index: tuple[int, int]) -> dict[str, Any]:
        return group | self.config_of.get(index, {})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        loss = closure() if closure is not None else None
        if not self.initialized:
            self.config_of = {
                (g, i): {} for g, group in enumerate(self.param_groups) for i in range(len(group["params"]))
            }
            self.initialized = True
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                state, options = self.state[p], self.options_of(group, (g, i))
                if not state:
                    state.update(step=0, state1=torch.zeros_like(p, dtype=torch.int8), scale=torch.ones(()))
                state["step"] += 1
                momentum = 0.9 * state["state1"] * state["scale"] + p.grad
                state["scale"] = momentum.abs().amax() / 127 + 1e-12
                state["state1"] = (momentum / state["scale"]).round().to(torch.int8)
                p.sub_(options["lr"] * momentum)
        return loss


class Lookahead(Optimizer):
    """arXiv 1907.08610, around any optimizer, whose groups and state it shares."""

    def __init__(self, base_optimizer: Optimizer) -> None:
        self.base_optimizer, self.count, self.slow = base_optimizer, 0, {}
        super().__init__(base_optimizer.param_groups, {})
        self.param_groups, self.state = base_optimizer.param_groups, base_optimizer.state

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                self.slow.setdefault(p, p.clone())
        loss = self.base_optimizer.step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and self.count % 2 == 0:
                    p.copy_(self.slow[p].lerp_(p, 0.5))
        return loss


class SharpnessAware(Optimizer):
    """SAM, arXiv 2010.01412: the gradient that counts is that of weights which were moved along the first."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "rho": 0.05})
        self.base_optimizer = AdamW(self.param_groups, lr=lr)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        assert closure is not None
        closure = torch.enable_grad()(closure)
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        scale = self.param_groups[0]["rho"] / sum(p.grad.pow(2).sum() for p in held).sqrt()
        before = {p: p.clone() for p in held}
        for p in held:
            p.add_(p.grad * scale)
        self.zero_grad()
        loss = closure()
        for p, value in before.items():
            p.copy_(value)
        self.base_optimizer.step()
        return loss


class Several(Optimizer):
    """A list of optimizers that are stepped as one, as programs for pretraining have it."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        params = list(params)
        super().__init__(params, {"lr": 123.0})
        kinds = [[p for p in params if p.dim() > 1], [p for p in params if p.dim() <= 1]]
        self.optimizers = [AdamW(kind, lr=lr) for kind in kinds if kind]

    def step(self, closure: Closure | None = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()


class Partitioned(Optimizer):
    """ZeRO's interface on its only rank: the groups of all, and an optimizer of this rank's part."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})
        self.optim = AdamW([dict(group) for group in self.param_groups], lr=lr)

    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        for group, own in zip(self.param_groups, self.optim.param_groups, strict=True):
            own["lr"] = group["lr"]
        return self.optim.step(closure)


class NoSuperInit(Optimizer):
    """Wraps an optimizer, and does not call `Optimizer.__init__`."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer_step_pre_hooks: Any = {}
        self._optimizer_step_post_hooks: Any = {}
        self.inner, self.defaults = optimizer, optimizer.defaults
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        self._patch_step_function()

    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        return self.inner.step(closure)


class Clipped(AdamW):
    """Changes gradients before its parent's step, and reads the parameters after it."""

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p in held:
            p.grad.mul_(0.5)
        loss = super().step(closure)
        assert all(p.grad is not None for p in held)
        return loss


@dataclasses.dataclass(frozen=True)
class Kind:
    """One optimizer.

    Attributes:
        make: gives it, of parameters.
        closes: its step takes a closure.
        second_order: it needs `backward(create_graph=True)`.
        matrices: it takes matrices alone, and AdamW has the rest.
        reads_all: it does more with each parameter than the AdamW inside of it.
    """

    name: str
    package: str
    make: Callable[[Sequence[Tensor]], Optimizer]
    closes: bool = False
    second_order: bool = False
    matrices: bool = False
    reads_all: bool = False


def _of_torch() -> Iterator[Kind]:
    special = {
        "Muon": {"matrices": True},
    }
    kinds = [kind for _, kind in inspect.getmembers(torch.optim, inspect.isclass) if issubclass(kind, Optimizer)]
    for kind in kinds:
        if kind not in (Optimizer, torch.optim.LBFGS):
            yield Kind(kind.__name__, "torch", kind, **special.get(kind.__name__, {}))
    partial = functools.partial
    yield Kind("LBFGS", "torch", partial(torch.optim.LBFGS, lr=0.1, max_iter=3), closes=True)
    yield Kind("AdamW(fused=True)", "torch", partial(AdamW, fused=True))
    yield Kind("AdamW(foreach=True)", "torch", partial(AdamW, foreach=True))
    yield Kind("AdamW(amsgrad=True)", "torch", partial(AdamW, amsgrad=True))
    yield Kind("Adam(weight_decay=0.1)", "torch", partial(torch.optim.Adam, weight_decay=0.1))
    yield Kind("SGD(momentum=0.9)", "torch", partial(torch.optim.SGD, lr=1e-2, momentum=0.9))
    yield Kind("SGD(maximize=True)", "torch", partial(torch.optim.SGD, weight_decay=0.1, maximize=True))


def _of_timm() -> Iterator[Kind]:
    with torchvision_stand_in():
        import timm.optim
    seen: set[type] = set()
    for name in sorted(vars(timm.optim)):
        kind = vars(timm.optim)[name]
        ours = inspect.isclass(kind) and issubclass(kind, Optimizer) and kind.__module__.startswith("timm.")
        if not ours or kind in seen:
            continue
        seen.add(kind)
        if name == "Lookahead":
            yield Kind(name, "timm", lambda params: timm.optim.Lookahead(AdamW(params, lr=1e-2), k=1), reads_all=True)
            continue
        yield Kind(name, "timm", functools.partial(kind, lr=1e-3), second_order=name == "Adahessian")


OWN = [
    Kind("schedule-free", "a sketch", ScheduleFree),
    Kind("8-bit states", "a sketch", EightBit),
    Kind("Lookahead", "a sketch", lambda params: Lookahead(AdamW(params, lr=1e-2)), reads_all=True),
    Kind("SAM", "a sketch", functools.partial(SharpnessAware, lr=1e-2), closes=True, reads_all=True),
    Kind("a list of optimizers", "a sketch", Several),
    Kind("an optimizer of a rank's part", "a sketch", Partitioned),
    Kind("a wrapper without `super().__init__`", "a sketch", lambda params: NoSuperInit(AdamW(params))),
    Kind("a subclass that clips", "a sketch", functools.partial(Clipped, lr=1e-2), reads_all=True),
]


@functools.cache
def kinds() -> list[Kind]:
    return [*_of_torch(), *_of_timm(), *OWN]
