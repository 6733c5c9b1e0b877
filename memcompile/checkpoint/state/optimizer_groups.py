"""The parameter groups of a saved optimizer, compared with those of the one that it is loaded into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from memcompile.errors import CheckpointError

Group = Mapping[str, Any]
PARAMS = "params"  # of a saved group: the names of its parameters
CLASS = "optimizer class"  # of a saved group
_OF_PARAMETERS = (PARAMS, "param_names", CLASS)


def plain_options(group: Group) -> dict[str, Any]:
    """All of a group but its parameters."""
    return {name: option for name, option in group.items() if name not in _OF_PARAMETERS}


def options_of(saved: Sequence[Group], index: int, names: list[str], source: object) -> dict[str, Any]:
    """The options that the parameters of group `index` were saved with; {} where none of them was.

    Raises:
        CheckpointError: they were saved with several.
    """
    options = [plain_options(group) for group in saved if set(names) & set(group[PARAMS])]
    for other in options[1:]:
        differing = _differing(options[0], other)
        if differing:
            raise CheckpointError(
                f"{source} has the parameters of group {index} in groups with other options ({differing}): give the "
                f"optimizer the groups that it was saved with"
            )
    return options[0] if options else {}


def check_groups(saved: Sequence[Group], optimizer: Optimizer, names: Mapping[int, str], source: object) -> None:
    """Compares an optimizer with the groups that its parameters were saved in.

    Args:
        names: of the parameters, by their id.

    Raises:
        CheckpointError: an optimizer of another class and other options stepped them, or loading would give groups with
            different options the same ones, or the parameters of a group were saved with different options.
    """
    first: dict[int, tuple[int, Group]] = {}  # of the groups with parameters of a saved one
    for index, group in enumerate(optimizer.param_groups):
        own = [names[id(parameter)] for parameter in group[PARAMS]]
        options_of(saved, index, own, source)
        for number, other in enumerate(saved):
            if not set(own) & set(other[PARAMS]):
                continue
            _check_class(other, optimizer, group, source)
            before, its_group = first.setdefault(number, (index, group))
            differing = _differing(plain_options(its_group), plain_options(group))
            if differing:
                raise CheckpointError(
                    f"{source} has the parameters of groups {before} and {index} in one group, and both would get its "
                    f"options ({differing} now): give the optimizer the groups that it was saved with"
                )


def _check_class(saved: Group, optimizer: Optimizer, group: Group, source: object) -> None:
    was, now = saved.get(CLASS), type(optimizer).__name__
    if was not in (None, now) and plain_options(saved).keys() != plain_options(group).keys():
        raise CheckpointError(
            f"{source} has the state of {was}, and the optimizer is {now}: build the one that was saved, or load "
            f"without an optimizer"
        )


def _differing(one: Group, other: Group) -> str:
    names = sorted(name for name in one.keys() | other.keys() if not _equal(one.get(name), other.get(name)))
    return ", ".join(f"{name}={one.get(name)!r} and {other.get(name)!r}" for name in names)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)
