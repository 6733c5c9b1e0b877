"""Values for inference alone: they stay as they are when the model is moved, cast or replicated. They lie in the CPU's
memory, or in a file and are read as they are needed; the system keeps pages that are read often in free memory.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memcompile.common.sites import VALUES_NAME
from memcompile.config import MemoryConfig
from memcompile.errors import PlanError
from memcompile.lowering.parameters import new_values, values_shape
from memcompile.runtime.storage.values_file import read_values

_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"  # what DistributedDataParallel reads


def create_values(config: MemoryConfig, width: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """The table of a new memory of layers of this width: drawn, or of the file that the options name.

    Raises:
        PlanError: the file is not there, not whole, or of another table.
    """
    if config.values_storage == "mmap":
        assert config.values_path is not None
        return open_values(config.values_path, values_shape(config, width), dtype, form=form_of(config, width))
    if config.values_storage == "host":
        values = new_values(config, width, dtype, torch.device("cpu"))
        values.requires_grad_(False)
        return values
    return new_values(config, width, dtype, device)


def form_of(config: MemoryConfig, width: int) -> dict[str, str]:
    """What rows of a table are for these (resolved) options, besides their shape: how many tables there are, and the
    numbers of u in a row.
    """
    assert config.n_keys is not None
    return {"tables": str(config.slots // config.n_keys**2), "pair_at": str(config.pair_at(width))}


def keep_in_place(root: nn.Module) -> None:
    """Makes the model's ``to()``, ``half()``, ``to_empty()`` and the like leave the values as they are, and DDP too,
    of the model or of a part of it.
    """
    path, holder = next((name, m) for name, m in root.named_modules() if VALUES_NAME in m._parameters)
    vars(holder)["_apply"] = functools.partial(_apply_to_the_rest, holder)
    names = [*path.split("."), VALUES_NAME] if path else [VALUES_NAME]
    for depth in range(len(names)):
        module, name = root.get_submodule(".".join(names[:depth])), ".".join(names[depth:])
        setattr(module, _DDP_IGNORES, [*getattr(module, _DDP_IGNORES, ()), name])


def _apply_to_the_rest(holder: nn.Module, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
    values = holder._parameters[VALUES_NAME]
    holder._parameters[VALUES_NAME] = None  # its place is kept: the order of parameters is that of checkpoints
    try:
        module: nn.Module = type(holder)._apply(holder, fn, recurse)  # type: ignore[no-untyped-call]
        return module
    finally:
        holder._parameters[VALUES_NAME] = values


def refuse_gradient(values: nn.Parameter) -> None:
    """Raises PlanError if frozen values were given a gradient: an optimizer is about to step them."""
    if values.grad is not None:
        raise PlanError(
            f"{VALUES_NAME} has a gradient, but its values are for inference and are not stepped: take it out of the "
            f"optimizer, or plan with values_storage='device' to train it"
        )


class MappedValues(nn.Parameter):
    """A table [slots, value_dim] that lies in a file. It is mapped for reading alone: no operation on the model can
    change the file, and a process that writes to the memory ends.

    A copy reads the same memory. Its pickle has the path of the file, and no rows.

    Attributes:
        path: of the file, absolute.
        checksum: SHA-256 of the rows.
    """

    path: str
    checksum: str

    def __new__(cls, data: Tensor, requires_grad: bool = False, *, path: str, checksum: str) -> MappedValues:
        if requires_grad:
            _refuse_to_learn(path)
        values: MappedValues = super().__new__(cls, data, requires_grad=False)
        values.path, values.checksum = path, checksum
        return values

    def requires_grad_(self, requires_grad: bool = True) -> MappedValues:
        if requires_grad:
            _refuse_to_learn(self.path)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> MappedValues:
        copy = memo[id(self)] = MappedValues(self.detach(), path=self.path, checksum=self.checksum)
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return open_values, (self.path, tuple(self.shape), self.dtype, self.checksum)


def open_values(
    path: str,
    shape: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    checksum: str | None = None,
    form: Mapping[str, str] | None = None,
) -> MappedValues:
    """Maps the values of a file; no row is read.

    Args:
        shape, dtype, checksum: what the file must hold; None is anything.
        form: what its rows must be (`form_of`), as far as the file says it; those of earlier versions do not.

    Raises:
        PlanError: there is no such file, it is not whole, or it holds another table.
    """
    path = os.path.abspath(path)
    values, metadata = read_values(path, any_order=True)
    found = metadata["sha256"]
    form = form or {}
    same = all(metadata.get(name, wanted) == wanted for name, wanted in form.items())
    if shape is not None and (values.shape != tuple(shape) or not same):
        raise PlanError(
            f"the file of values {path!r} has {_described(values.shape, metadata)}, and the model's memory "
            f"{_described(shape, form)}: plan with the n_keys, value_dim, variant and tables that it was stored with, "
            f"or give the path of the model's own"
        )
    if dtype is not None and values.dtype is not dtype:
        raise PlanError(
            f"the file of values {path!r} has {values.dtype}, and the model {dtype}: plan the model in {values.dtype} "
            f"(it may be cast afterwards, the values stay as they are), or cast it before store_values()"
        )
    if checksum is not None and found != checksum:
        raise PlanError(
            f"the file of values {path!r} has other rows than when the model was saved (SHA-256 {found}, then "
            f"{checksum}): give it its own file back"
        )
    return MappedValues(values, path=path, checksum=found)


def keep_mapped(values: MappedValues, state_dict: dict[str, Any], name: str) -> None:
    """Puts the values of a file into a state dict under this name, so that loading it leaves them as they are.

    Raises:
        PlanError: it has others: loading does not write to a file.
    """
    given = state_dict.get(name)
    if given is not None and given is not values:
        same = isinstance(given, Tensor) and given.shape == values.shape and given.dtype is values.dtype
        if not same or given.is_meta or given.data_ptr() != values.data_ptr():
            raise PlanError(
                f"the model's values lie in {values.path!r}, which load_state_dict() does not write: leave {name!r} "
                f"out of the state dict; or plan with values_storage='device', load, and store_values() anew"
            )
    state_dict[name] = values  # copied onto itself: nothing is read or written


def _described(shape: tuple[int, ...], form: Mapping[str, str]) -> str:
    of_u = form.get("pair_at", "0")
    words = f"{shape[0]:,} rows of {shape[1]} numbers" + (f" ({of_u} of u, the rest of v)" if of_u != "0" else "")
    return words + (f" in {form['tables']} table(s)" if "tables" in form else "")


def _refuse_to_learn(path: str) -> None:
    raise PlanError(
        f"the memory's values lie in {path!r} and do not learn: to train them, plan with values_storage='device' and "
        f"load the checkpoint; to train the rest, leave them as they are"
    )
