"""The state of optimizers by the names of their parameters. It is loaded in the dtypes that it was saved in.

`torch.distributed.checkpoint.state_dict` does not serve: it steps an optimizer that has no state yet, with gradients of
zero, and weight decay then changes the values.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from memcompile.checkpoint._torch import like
from memcompile.checkpoint.state.optimizer_groups import CLASS, PARAMS, check_groups, options_of, plain_options
from memcompile.errors import CheckpointError
from memcompile.runtime.optimizer_state import restore_dtypes


class OptimizerState:
    """The state dict of one or more optimizers, by names.

    Attributes:
        tensors: `<parameter>.<entry>`.
        groups: the options of every group, under "params" the names of its parameters, and the class of its optimizer.
        entries: of every parameter that has state, the names of its entries that are tensors.
        others: of every parameter, its other entries.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        groups: list[dict[str, Any]],
        entries: dict[str, list[str]],
        others: dict[str, dict[str, Any]],
    ) -> None:
        self.tensors, self.groups, self.entries, self.others = tensors, groups, entries, others

    def packed(self) -> bytes:
        """All but the tensors."""
        return packed({"groups": self.groups, "entries": self.entries, "others": self.others})

    @classmethod
    def unpacked(cls, data: bytes, renamed: Mapping[str, str]) -> OptimizerState:
        """All but the tensors. Some parameters have other names than they were saved with."""
        found = unpacked(data)
        for group in found["groups"]:
            group[PARAMS] = [renamed.get(name, name) for name in group[PARAMS]]
        entries, others = ({renamed.get(k, k): v for k, v in found[part].items()} for part in ("entries", "others"))
        return cls({}, found["groups"], entries, others)

    @classmethod
    def of(cls, optimizers: Sequence[Optimizer], root: nn.Module) -> OptimizerState:
        """Of optimizers of a model."""
        names, state = _names(root), cls({}, [], {}, {})
        for optimizer in optimizers:
            saved = optimizer.state_dict()
            numbers: dict[int, str] = {}
            for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True):
                of_group = [_name_of(p, names, optimizer) for p in own[PARAMS]]
                numbers.update(zip(group[PARAMS], of_group, strict=True))
                state.groups.append({**plain_options(group), PARAMS: of_group, CLASS: type(optimizer).__name__})
            for number, entries in saved["state"].items():
                name = numbers[number]
                state.entries[name] = [key for key, value in entries.items() if isinstance(value, Tensor)]
                state.others[name] = {k: v for k, v in entries.items() if not isinstance(v, Tensor)}
                state.tensors.update({f"{name}.{key}": entries[key] for key in state.entries[name]})
        return state

    def check(self, optimizers: Sequence[Optimizer], root: nn.Module, strict: bool, source: object) -> None:
        """Raises CheckpointError where the parameters are others than those of the optimizers, or their groups do not
        fit together.
        """
        names = _names(root)
        own = {_name_of(p, names, o) for o in optimizers for g in o.param_groups for p in g[PARAMS]}
        saved = {name for group in self.groups for name in group[PARAMS]}
        if strict and own != saved:
            lacks, has = sorted(own - saved)[:5], sorted(saved - own)[:5]
            problems = [f"it lacks {lacks}"] * bool(lacks) + [f"it has {has}, which this one has not"] * bool(has)
            raise CheckpointError(
                f"{source} is of an optimizer of other parameters: {' and '.join(problems)}: build the optimizer as it "
                f"was, or pass strict=False"
            )
        for optimizer in optimizers:
            check_groups(self.groups, optimizer, names, source)

    def make_targets(self, root: nn.Module, saved: Mapping[str, TensorStorageMetadata]) -> None:
        """Creates the tensors to read into: placed and sharded as the parameters are, where they have as many rows."""
        parameters = dict(root.named_parameters())
        by_name = {_plain(name): parameter for name, parameter in parameters.items()}
        for name, entries in self.entries.items():
            for entry in entries if name in by_name else ():
                metadata, parameter = saved[f"{name}.{entry}"], by_name[name]
                dtype = metadata.properties.dtype
                a_row_each = len(metadata.size) > 0 and metadata.size[:1] == parameter.shape[:1]
                self.tensors[f"{name}.{entry}"] = (
                    like(parameter, metadata.size, dtype)
                    if a_row_each
                    else torch.empty(metadata.size, dtype=dtype, device="cpu")
                )

    def put_into(
        self, optimizers: Sequence[Optimizer], root: nn.Module, saved: Mapping[str, TensorStorageMetadata]
    ) -> None:
        """Loads it, after `check` and reading.

        Args:
            saved: of the model's parameters, whose dtypes tell whether the state's own fit.
        """
        names, dtypes = _names(root), {name: metadata.properties.dtype for name, metadata in saved.items()}
        for optimizer in optimizers:
            numbers: dict[Tensor, int] = {}
            groups = []
            for index, group in enumerate(optimizer.param_groups):
                numbers.update({p: len(numbers) + i for i, p in enumerate(group[PARAMS])})
                options = options_of(self.groups, index, [names[id(p)] for p in group[PARAMS]], "the checkpoint")
                groups.append({**group, **options, PARAMS: [numbers[p] for p in group[PARAMS]]})
            states = {numbers[p]: self._state_of(names[id(p)]) for p in numbers if names[id(p)] in self.entries}
            loaded = {"state": states, "param_groups": groups}
            optimizer.load_state_dict(loaded)
            restore_dtypes(optimizer, loaded, lambda parameter: dtypes.get(names[id(parameter)]) is parameter.dtype)

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


def _names(root: nn.Module) -> dict[int, str]:
    return {id(parameter): _plain(name) for name, parameter in root.named_parameters()}


def _plain(name: str) -> str:
    """A parameter's name without the wrappers of parts of the model."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _name_of(parameter: Tensor, names: dict[int, str], optimizer: Optimizer) -> str:
    try:
        return names[id(parameter)]
    except KeyError:
        raise CheckpointError(
            f"{type(optimizer).__name__} holds a parameter {list(parameter.shape)} that is not in the model: build the "
            f"optimizer from model.parameters(), after memcompile.plan() and sharding"
        ) from None
