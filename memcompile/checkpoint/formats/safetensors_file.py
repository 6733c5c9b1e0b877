"""The safetensors format: one file of tensors, written tensor by tensor, and read where it lies in memory pages.

https://github.com/huggingface/safetensors: the header's length in 8 bytes, a JSON header, one tensor after the other.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memcompile.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """A tensor of a file."""

    name: str
    shape: Sequence[int]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raises CheckpointError where the format has no such dtype."""
    if dtype not in _NAMES:
        raise CheckpointError(f"{name} is {dtype}, which safetensors do not store: cast it, or leave it out")


@contextmanager
def new_file(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> Iterator[Any]:
    """Opens a file whose tensors are then given to `write_tensor`, in the order of `in_order(entries)`."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for entry in in_order(entries):
        offsets = [at, at + entry.nbytes]
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        at += entry.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        yield file
        file.flush()
        os.fsync(file.fileno())


def in_order(entries: Sequence[Entry]) -> list[Entry]:
    """Wide dtypes first, so that each tensor is aligned."""
    return sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))


def write_tensor(file: Any, tensor: Tensor) -> None:
    """The next tensor, or the next rows of it."""
    data = tensor.detach().cpu().contiguous()
    if data.numel():
        file.write((ctypes.c_ubyte * data.nbytes).from_address(data.data_ptr()))


class SafetensorsFile:
    """A file that is mapped into memory: its tensors are read as they are used, and cannot be changed in the file.

    Attributes:
        metadata: texts by name.
        tensors: by name.

    Raises:
        CheckpointError: it is no such file, or is cut off.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # PyTorch warns of what is read-only
            start = 8 + int.from_bytes(mapped[:8], "little")
            header = json.loads(mapped[8:start])
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            size = start + max([0, *(entry["data_offsets"][1] for entry in header.values())])
            if size != len(mapped):
                raise CheckpointError(f"{path} has {len(mapped):,} bytes, and its header is of {size:,}: it is cut off")
            self.tensors = {name: _tensor(mapped, start, entry) for name, entry in header.items()}
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        except (KeyError, TypeError, ValueError, OSError, AttributeError) as error:
            raise CheckpointError(f"{path} is no safetensors file: {type(error).__name__}: {error}") from error


def _tensor(mapped: mmap.mmap, start: int, entry: dict[str, Any]) -> Tensor:
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{shape} of {dtype} in {end - begin} bytes")
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(mapped, dtype=torch.uint8, count=end - begin, offset=start + begin)
    return flat.view(dtype).view(shape)
