"""The state of optimizers by the names of their parameters. It is loaded in the dtypes that it was saved in.

`torch.distributed.checkpoint.state_dict` does not serve: it steps an optimizer that has no state yet, with gradients of
zero, and weight decay then changes the values.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memcompile.checkpoint._torch import like
from memcompile.checkpoint.state.model_state import plain
from memcompile.errors import CheckpointError
from memcompile.runtime.optimizer_state import parameters_of, restore_dtypes

Group = Mapping[str, Any]
Names = Mapping[int, str]  # of parameters, by their id
_PARAMS = "params"  # of a saved group: the names of its parameters
_CLASS = "optimizer class"  # of a saved group


@dataclasses.dataclass
class OptimizerState:
    """The state dict of one or more optimizers, by the names of parameters."""

    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # `<parameter>.<entry>`
    groups: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # options, _PARAMS and _CLASS
    entries: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # of a parameter, those that are tensors
    others: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # of a parameter, its other entries

    def packed(self) -> bytes:
        """All but the tensors."""
        return packed({"groups": self.groups, "entries": self.entries, "others": self.others})

    @classmethod
    def of(cls, optimizers: Sequence[Optimizer], root: nn.Module) -> OptimizerState:
        """Of optimizers of a model."""
        names = {id(parameter): plain(name) for name, parameter in root.named_parameters()}
        state = cls()
        for optimizer in optimizers:
            saved = optimizer.state_dict()
            numbers: dict[int, str] = {}
            for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True):
                of_group = [_name_of(p, names, optimizer) for p in own[_PARAMS]]
                numbers.update(zip(group[_PARAMS], of_group, strict=True))
                state.groups.append({**_options(group), _PARAMS: of_group, _CLASS: type(optimizer).__name__})
            for number, entries in saved["state"].items():
                name = numbers[number]
                tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
                state.entries[name] = list(tensors)
                state.others[name] = {key: value for key, value in entries.items() if key not in tensors}
                state.tensors.update({f"{name}.{key}": value for key, value in tensors.items()})
        return state

    def check(self, optimizers: Sequence[Optimizer], names: Names, strict: bool, source: object) -> None:
        """Compares the saved groups with those of the optimizers.

        Raises:
            CheckpointError: the parameters are others, an optimizer of another class and other options stepped them,
                or loading would give groups with different options the same ones, or the parameters of a group were
                saved with different options.
        """
        own = {_name_of(p, names, o) for o in optimizers for g in o.param_groups for p in g[_PARAMS]}
        saved = {name for group in self.groups for name in group[_PARAMS]}
        if strict and own != saved:
            lacks, has = sorted(own - saved)[:5], sorted(saved - own)[:5]
            problems = [f"it lacks {lacks}"] * bool(lacks) + [f"it has {has}, which this one has not"] * bool(has)
            raise CheckpointError(
                f"{source} is of an optimizer of other parameters: {' and '.join(problems)}: build the optimizer as it "
                f"was, or pass strict=False"
            )
        for optimizer in optimizers:
            self._check_groups(optimizer, names, source)

    def _check_groups(self, optimizer: Optimizer, names: Names, source: object) -> None:
        before: dict[int, int] = {}  # of a saved group, the first group that has parameters of it
        for index, group in enumerate(optimizer.param_groups):
            sources = self._groups_of(group, names)
            for saved in sources:
                was, now = saved.get(_CLASS), type(optimizer).__name__
                if was not in (None, now) and _options(saved).keys() != _options(group).keys():
                    raise CheckpointError(
                        f"{source} has the state of {was}, and the optimizer is {now}: build the one that was saved, "
                        f"or load without an optimizer"
                    )
                if differing := _differing(sources[0], saved):
                    raise CheckpointError(
                        f"{source} has the parameters of group {index} in groups with other options ({differing}): "
                        f"give the optimizer the groups that it was saved with"
                    )
                first = before.setdefault(id(saved), index)
                if differing := _differing(optimizer.param_groups[first], group):
                    raise CheckpointError(
                        f"{source} has the parameters of groups {first} and {index} in one group, and both would get "
                        f"its options ({differing} now): give the optimizer the groups that it was saved with"
                    )

    def make_targets(self, parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
        """Creates the tensors to read into, as large as those that were saved."""
        for name in (name for name in self.entries if name in parameters):
            for key in (f"{name}.{entry}" for entry in self.entries[name]):
                self.tensors[key] = like(parameters[name], saved[key])

    def put_into(self, optimizers: Sequence[Optimizer], names: Names, saved: Mapping[str, Tensor]) -> None:
        """Loads it, after `check` and reading. The dtypes of the saved model tell whether the state's own fit."""
        for optimizer in optimizers:
            parameters = parameters_of(optimizer)
            numbers = {p: number for number, p in enumerate(parameters)}
            groups = []
            for group in optimizer.param_groups:
                options = next(map(_options, self._groups_of(group, names)), {})
                groups.append({**group, **options, _PARAMS: [numbers[p] for p in group[_PARAMS]]})
            states = {numbers[p]: self._state_of(names[id(p)]) for p in parameters if names[id(p)] in self.entries}
            loaded = {"state": states, "param_groups": groups}
            optimizer.load_state_dict(loaded)
            exact = {p for p in parameters if names[id(p)] in saved and saved[names[id(p)]].dtype is p.dtype}
            restore_dtypes(optimizer, loaded, exact.__contains__)

    def _groups_of(self, group: Group, names: Names) -> list[dict[str, Any]]:
        """The saved groups that have parameters of a group."""
        own = {names[id(p)] for p in group[_PARAMS]}
        return [saved for saved in self.groups if own & set(saved[_PARAMS])]

    def _state_of(self, name: str) -> dict[str, Any]:
        tensors = {entry: self.tensors[f"{name}.{entry}"] for entry in self.entries[name]}
        return {**tensors, **self.others[name]}


def packed(value: Any) -> bytes:
    """Pickled by `torch.save`; tensors in it are on the CPU when it is unpickled."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)


def _name_of(parameter: Tensor, names: Names, optimizer: Optimizer) -> str:
    if id(parameter) not in names:
        raise CheckpointError(
            f"{type(optimizer).__name__} holds a parameter {list(parameter.shape)} that is not in the model: build the "
            f"optimizer from model.parameters(), after memcompile.plan() and sharding"
        )
    return names[id(parameter)]


def _options(group: Group) -> dict[str, Any]:
    """All of a group but its parameters."""
    return {name: option for name, option in group.items() if name not in (_PARAMS, "param_names", _CLASS)}


def _differing(one: Group, other: Group) -> str:
    """The options that two groups have not in common."""
    one, other = _options(one), _options(other)
    names = sorted(name for name in one.keys() | other.keys() if not _equal(one.get(name), other.get(name)))
    return ", ".join(f"{name}={one.get(name)!r} and {other.get(name)!r}" for name in names)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)
