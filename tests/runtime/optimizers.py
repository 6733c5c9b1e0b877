"""Optimizers as users write them, which take matrices alone, and where a memory's parameters are in optimizers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def held(model: nn.Module, optimizer: Optimizer) -> list[set[str]]:
    """The names of the memory's parameters in each group of an optimizer."""
    names = {id(p): name for name, p in model.named_parameters() if "memory" in name}
    return [{names[id(p)] for p in group["params"] if id(p) in names} for group in optimizer.param_groups]


def memory(model: nn.Module, *parts: str) -> set[str]:
    """The names of the memory's parameters that have one of these parts; without parts all."""
    names = [name for name, _ in model.named_parameters() if "memory" in name]
    return {name for name in names if not parts or any(part in name for part in parts)}


def orthogonal(gradient: Tensor) -> Tensor:
    assert gradient.dim() == 2, f"a matrix, not {list(gradient.shape)}"
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    return u @ v


class Muon(Optimizer):
    """Of matrices alone, and every one has a gradient."""

    def __init__(self, params: Iterable[Any], lr: float = 0.02) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * orthogonal(parameter.grad))


class Whitening(Muon):
    """The same, by a name that says nothing."""


class MuonWithAuxiliary(Optimizer):
    """Groups say by `use_muon` what they are."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self.move()

    def move(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["use_muon"]:
                    parameter.sub_(group["lr"] * orthogonal(parameter.grad))
                elif parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad)


class MuonOfStates(Optimizer):
    """One group, and the state of each parameter says by which rule it is stepped, from the start."""

    def __init__(self, matrices: list[Tensor], others: list[Tensor]) -> None:
        super().__init__([*matrices, *others], {"lr": 1e-2})
        for parameter in (*matrices, *others):
            self.state[parameter]["use_muon"] = any(parameter is matrix for matrix in matrices)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            muon = self.state[parameter]["use_muon"]
            if parameter.grad is not None:
                parameter.sub_(1e-2 * (orthogonal(parameter.grad) if muon else parameter.grad))


class FillingMuon(MuonWithAuxiliary):
    """Every parameter has a gradient: those without one get zeros."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is None):
            parameter.grad = torch.zeros_like(parameter)
        self.move()


class FillingBeforeItsParent(MuonWithAuxiliary):
    """The same, before the step of its parent's: there the table's gradient is in place."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is None):
            parameter.grad = torch.zeros_like(parameter)
        super().step()


class StackingMuon(Optimizer):
    """Groups of a kind; those of matrices are of one shape, and are stacked."""

    def __init__(self, matrices: list[Tensor], others: list[Tensor]) -> None:
        shapes = dict.fromkeys(p.shape for p in matrices)
        groups: list[dict[str, Any]] = [{"kind": "adamw", "params": others}]
        groups += [{"kind": "muon", "params": [p for p in matrices if p.shape == shape]} for shape in shapes]
        super().__init__(groups, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            steps = [p.grad for p in trained]
            if group["kind"] == "muon" and trained:
                steps = [orthogonal(gradient) for gradient in torch.stack(steps)]
            for parameter, step in zip(trained, steps, strict=True):
                parameter.sub_(group["lr"] * step)
