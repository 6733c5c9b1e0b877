"""docs/optimizers.md, the table of which optimizers train a table: ``python -m tests.runtime.table.optimizer_matrix``
writes it, tests hold it to what is measured.

Each optimizer trains a planned model, and beside it the same model of which it has all parameters but the table, which
an optimizer of its own steps by the rule that the documentation tells. Both are the same, to rounding.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import memcompile
from memcompile.optim import LazyAdam, RowAdamW, RowwiseAdagrad
from tests.models import HIDDEN, WIDTH, Attention, Block, Transformer, plain_ffn
from tests.planned import MEMORY, batch, plain_attention
from tests.runtime.table.optimizer_kinds import Clipped, Kind, kinds
from tests.runtime.table.stepping import stepped_by_pytorch

COMMITTED = Path(__file__).parents[3] / "docs" / "optimizers.md"
GRADIENTS = ("sparse", "dense")
VALUES_LR = 1e-2
STEPS = 3

_INTRODUCTION = """# Which optimizers work

`make docs` writes this page. Each optimizer takes three steps of a tiny model in fp64, with a sparse and with a dense
gradient of the table, built after `plan()` and before it. "trains" means all of this:

- The optimizer's other parameters and their states are, to rounding, those of a training in which it does not hold the
  table.
- The table is that of the same training in which its rule alone steps it.
- Groups, their options and counters, and the gradients are after each step as they would be without memory.

A refusal says why, and comes before anything moves. "stops" is an error of the optimizer's own: where it prepares each
parameter when it is built, build it after `plan()`. The rule of the table is that of `values_optimizer=None`: see
[training](training.md#the-rule-of-the-table). Sketches are small optimizers of the tests, of the kinds that other
packages have.

What an optimizer computes of all gradients inside its step, such as the norm that Lamb clips by, is computed without
the table's. Optimizers around another that read the parameters themselves (Lookahead, SAM) have all rows brought up to
date after each step, which costs as much as a dense gradient.
"""
_HEADER = ("optimizer", "package", "rule of the table", '`values_grad="sparse"`', '`values_grad="dense"`')


@functools.cache
def _dense() -> nn.Module:
    torch.manual_seed(0)
    block = Block(WIDTH, plain_ffn(WIDTH, HIDDEN))
    block.attention = Attention(
        WIDTH, bias=False
    )  # a bias of keys has no gradient but rounding, which some divide by itself
    return Transformer([block]).double()


@functools.cache
def _planned(values_grad: str) -> nn.Module:
    """The model whose memory all trainings start with."""
    model = copy.deepcopy(_dense())
    torch.manual_seed(1)
    memcompile.plan(model, memory_layers=1, values_grad=values_grad, values_lr=VALUES_LR, **MEMORY)
    return model


@functools.cache
def _adopted(values_grad: str) -> tuple[nn.Module, dict[Kind, list[Optimizer]]]:
    """One model, planned when there was an optimizer of each kind for its parameters."""
    model = copy.deepcopy(_dense())
    built = {kind: build(kind, list(model.parameters())) for kind in kinds()}
    memcompile.plan(model, memory_layers=1, values_grad=values_grad, values_lr=VALUES_LR, **MEMORY)
    return model, built


def build(kind: Kind, parameters: list[Tensor]) -> list[Optimizer]:
    if not kind.matrices:
        return [kind.make(parameters)]
    return [kind.make([p for p in parameters if p.dim() == 2]), AdamW([p for p in parameters if p.dim() != 2])]


def of_the_table(model: nn.Module, optimizer: Optimizer) -> Optimizer:
    """The optimizer of the table alone that does what the documentation tells of this one."""
    inner = vars(optimizer)
    while True:  # of those that others step, the first holds the matrices
        own = [v for value in inner.values() for v in (value if isinstance(value, list) else [value])]
        own = [v for v in own if isinstance(v, Optimizer)]
        if not own:
            break
        optimizer, inner = own[0], vars(own[0])
    group, values = optimizer.param_groups[0], [model.memory_values]
    shared = {"lr": VALUES_LR, "maximize": group.get("maximize", False)}
    kind, decay = (
        Clipped.__base__ if isinstance(optimizer, Clipped) else type(optimizer),
        group.get("weight_decay", 0.0),
    )
    if (kind is AdamW and not group["amsgrad"]) or (kind is Adam and not decay):
        return AdamW(values, betas=group["betas"], eps=group["eps"], weight_decay=decay, **shared)
    if kind is SGD and not group["momentum"]:
        return SGD(values, weight_decay=decay, **shared)
    if kind is torch.optim.SparseAdam:
        return LazyAdam(values, betas=group["betas"], eps=group["eps"], **shared)
    if kind is torch.optim.Adagrad:
        return RowwiseAdagrad(values, eps=group["eps"], weight_decay=decay, **shared)
    known = {"betas": group["betas"], "eps": group["eps"]} if kind in (Adam, AdamW) else {}
    return RowAdamW(values, weight_decay=decay, **known, **shared)


@plain_attention()
def train(kind: Kind, model: nn.Module, optimizers: list[Optimizer], beside: Optimizer | None = None) -> None:
    torch.manual_seed(2)
    for step in range(STEPS):

        def closure() -> Tensor:
            for optimizer in optimizers:
                optimizer.zero_grad()
            if beside is not None:
                beside.zero_grad()
            loss = model(*batch(step))  # noqa: B023
            loss.backward(create_graph=kind.second_order)
            return loss

        layouts = [layout(optimizer) for optimizer in optimizers]
        closure()
        for optimizer in optimizers:
            optimizer.step(closure) if kind.closes else optimizer.step()  # type: ignore[call-overload]
        if beside is not None:
            beside.step()
        assert layouts == [layout(optimizer) for optimizer in optimizers], "groups are other than before"
        assert model.memory_values.grad is not None


def layout(optimizer: Optimizer) -> list[Any]:
    groups = optimizer.param_groups
    return [id(groups), [(id(g), id(g["params"]), [id(p) for p in g["params"]]) for g in groups]]


def seen(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Any]:
    """Every number that a training ends with, of optimizers without what they have of the table."""
    numbers: dict[str, Any] = {name: v for name, v in model.state_dict().items() if v.is_floating_point()}
    names = {id(p): name for name, p in model.named_parameters() if name != "memory_values"}
    for index, optimizer in enumerate(optimizers):
        for number, group in enumerate(optimizer.param_groups):
            numbers[f"options {index}, {number}"] = list(group)
            numbers[f"group {index}, {number}"] = {k: v for k, v in group.items() if k != "params"}
            numbers[f"order {index}, {number}"] = [names[id(p)] for p in group["params"] if id(p) in names]
        for parameter, state in optimizer.state.items():
            if isinstance(optimizer, torch.optim.LBFGS):  # has vectors of all numbers, at the first parameter
                numbers[f"counts {index}"] = {name: count for name, count in state.items() if isinstance(count, int)}
            elif id(parameter) in names:
                numbers[f"state {index} {names[id(parameter)]}"] = state
    return {name: copy.deepcopy(value) for name, value in numbers.items() if value != {}}


def differences(actual: Any, right: Any, where: str = "") -> list[str]:
    if isinstance(right, Mapping) and isinstance(actual, Mapping):
        names = actual.keys() ^ right.keys()
        inside = (differences(actual[name], right[name], f"{where} {name}") for name in right if name in actual)
        return [f"{where}: {sorted(map(str, names))}"] * bool(names) + [d for found in inside for d in found]
    if isinstance(right, (list, tuple)) and isinstance(actual, (list, tuple)) and len(actual) == len(right):
        pairs = enumerate(zip(actual, right, strict=True))
        return [d for i, (a, r) in pairs for d in differences(a, r, f"{where} {i}")]
    if isinstance(right, Tensor) and isinstance(actual, Tensor):
        same = actual.dtype is right.dtype and torch.allclose(actual.double(), right.double(), rtol=1e-7, atol=1e-9)
    elif isinstance(right, float):
        same = math.isclose(actual, right, rel_tol=1e-7, abs_tol=1e-9)
    else:
        same = actual == right
    return [] if same else [f"{where}: {str(actual)[:60]} and {str(right)[:60]}"]


@functools.cache
def expected(kind: Kind, holder: int) -> dict[str, Any] | str:
    """What a training ends with in which the table has an optimizer of its own, with what the documentation tells of
    the optimizer of this number, and no hook of ours is there; or why there is none, without memory.
    """
    with stepped_by_pytorch():
        model = copy.deepcopy(_planned("dense"))
    try:
        if kind.reads_all:  # and steps AdamW: the training without hooks, of the table as any parameter
            optimizers = build(kind, list(model.parameters()))
            train(kind, model, optimizers)
        else:
            optimizers = build(kind, [p for p in model.parameters() if p is not model.memory_values])
            train(kind, model, optimizers, of_the_table(model, optimizers[holder]))
    except Exception as error:
        return f"not without memory: {_first_line(error)}"
    return seen(model, optimizers)


def outcome(kind: Kind, values_grad: str, is_adopted: bool) -> str:
    if is_adopted:
        model, built = _adopted(values_grad)
        optimizers = built[kind]
        start = copy.deepcopy(_planned(values_grad).state_dict())
        model.load_state_dict(start)
    else:
        model = copy.deepcopy(_planned(values_grad))
        optimizers = build(kind, list(model.parameters()))
    holders = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in optimizers]
    right = expected(kind, next((i for i, held in enumerate(holders) if id(model.memory_values) in held), 0))
    if isinstance(right, str):
        return right
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    try:
        train(kind, model, optimizers)
    except (memcompile.MemcompileError, NotImplementedError) as error:
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), (
            "refused when something had moved"
        )
        return f"refused: {_first_line(error)}"
    except (AttributeError, ValueError) as error:
        return f"stops: {_first_line(error)}"
    finally:
        model.zero_grad()
    found = differences(seen(model, optimizers), right)
    assert not found, f"{kind.name} trains otherwise: {'; '.join(found[:5])}"
    return "trains"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")


def rule_of(kind: Kind) -> str:
    model = copy.deepcopy(_planned("dense"))
    optimizers = build(kind, list(model.parameters()))
    names = {
        AdamW: "row_adamw",
        RowAdamW: "row_adamw",
        SGD: "row_sgd",
        LazyAdam: "lazy_adam",
        RowwiseAdagrad: "row_wise_adagrad",
    }
    return names[type(of_the_table(model, optimizers[0]))]


def row(kind: Kind) -> str:
    cells = []
    for values_grad in GRADIENTS:
        after, before = (outcome(kind, values_grad, is_adopted) for is_adopted in (False, True))
        cells.append(after if after == before else f"built after `plan()`: {after}; before: {before}")
    return f"| {' | '.join([kind.name, kind.package, f'`{rule_of(kind)}`', *cells])} |"


def document() -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (_HEADER, ("---",) * len(_HEADER))]
    return "\n".join([_INTRODUCTION, *lines, *map(row, kinds()), ""])


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    COMMITTED.write_text(document())
