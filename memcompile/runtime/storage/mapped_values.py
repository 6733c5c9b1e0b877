"""MappedValues: the values of a model, read from their file as they are needed. The system keeps pages that are read
often in free memory.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import torch
from torch import Tensor, nn

from memcompile.errors import PlanError
from memcompile.runtime.storage.safetensors_format import mapped, tensor_in
from memcompile.runtime.storage.values_file import read_header


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
) -> MappedValues:
    """Maps the values of a file; no row is read.

    Args:
        shape, dtype, checksum: what the file must hold; None is anything.

    Raises:
        PlanError: there is no such file, it is not whole, or it holds another table.
    """
    path = os.path.abspath(path)
    header = read_header(path)
    if shape is not None and header.shape != tuple(shape):
        raise PlanError(
            f"the file of values {path!r} has {_table(header.shape)}, and the model's memory {_table(tuple(shape))}: "
            f"plan with the n_keys and value_dim that it was stored with, or give the path of the model's own"
        )
    if dtype is not None and header.dtype is not dtype:
        raise PlanError(
            f"the file of values {path!r} has {header.dtype}, and the model {dtype}: plan the model in {header.dtype} "
            f"(it may be cast afterwards, the values stay as they are), or cast it before store_values()"
        )
    if checksum is not None and header.checksum != checksum:
        raise PlanError(
            f"the file of values {path!r} has other rows than when the model was saved (SHA-256 {header.checksum}, "
            f"then {checksum}): give it its own file back"
        )
    mapping = mapped(path)
    if hasattr(mmap, "MADV_RANDOM"):  # otherwise the system reads the rows around each row too
        mapping.madvise(mmap.MADV_RANDOM)
    values = tensor_in(mapping, header.entry, header.offset)
    return MappedValues(values, path=path, checksum=header.checksum)


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


def _table(shape: tuple[int, ...]) -> str:
    return f"{shape[0]:,} slots of {shape[1]} (n_keys={round(shape[0] ** 0.5)}, value_dim={shape[1]})"


def _refuse_to_learn(path: str) -> None:
    raise PlanError(
        f"the memory's values lie in {path!r} and do not learn: to train them, plan with values_storage='device' and "
        f"load the checkpoint; to train the rest, leave them as they are"
    )
