"""The safetensors format: files are written tensor by tensor, and read where the system maps them into memory.

https://github.com/huggingface/safetensors: the length of the header in 8 bytes, a JSON header, the tensors in a row.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_LONGEST = 10**8  # bytes of a header, as in the safetensors library


class FormatError(ValueError):
    """A file that is no safetensors file, or not a whole one."""


class Entry(NamedTuple):
    """A tensor of a file."""

    name: str
    shape: Sequence[int]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Header(NamedTuple):
    """What a file says of itself.

    Attributes:
        metadata: texts by name.
        entries: its tensors.
        starts: of each tensor, its first byte in the file.
        size: of the whole file, in bytes.
    """

    metadata: dict[str, str]
    entries: list[Entry]
    starts: list[int]
    size: int


def encoded_header(entries: Sequence[Entry], metadata: Mapping[str, str], size: int = 0) -> bytes:
    """All of a file before its tensors, which follow in the order of the entries; wide dtypes come first, so that each
    tensor is aligned.

    Args:
        size: how many bytes it has at least; they are filled up with spaces.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    at = 0
    for entry in entries:
        offsets = [at, at + entry.nbytes]
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        at += entry.nbytes
    text = json.dumps(header).encode()
    text = text.ljust(max(size - 8, len(text) + -len(text) % 8))
    return len(text).to_bytes(8, "little") + text


@contextmanager
def new_file(
    path: str | os.PathLike, entries: Sequence[Entry], metadata: Mapping[str, str], header_size: int = 0
) -> Iterator[Any]:
    """Opens a file for `write_tensor`, of each tensor in the order of the entries. At the end of the block the disk has
    all of it.
    """
    with open(path, "wb") as file:
        file.write(encoded_header(entries, metadata, header_size))
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_tensor(file: Any, tensor: Tensor) -> None:
    """Writes the next tensor of a file, or the next rows of it."""
    data = tensor.detach().cpu().contiguous()
    file.write(bytes_of(data))


def bytes_of(tensor: Tensor) -> bytes | ctypes.Array[ctypes.c_ubyte]:
    """The bytes of a contiguous tensor on the CPU, which must outlive them. Not by numpy, which has no bfloat16 and may
    not be installed.
    """
    return (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()) if tensor.numel() else b""


def read_header(path: str | os.PathLike) -> Header:
    """The header of a file; no tensor is read.

    Raises:
        OSError: the file cannot be read.
        FormatError: it is no safetensors file, or not a whole one.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= _LONGEST:
            raise FormatError("it does not begin with the length of a header")
        text, size = file.read(length), os.fstat(file.fileno()).st_size
    entries, starts, expected = [], [], 8 + length
    try:
        content = json.loads(text)
        metadata = dict(content.pop(_METADATA, {}))
        for name, entry in content.items():
            shape, (first, end) = tuple(map(int, entry["shape"])), entry["data_offsets"]
            entries.append(Entry(name, shape, DTYPES[entry["dtype"]]))
            starts.append(8 + length + first)
            expected = max(expected, 8 + length + end)
            if min([first, *shape]) < 0 or end - first != entries[-1].nbytes:
                raise ValueError(f"{name} {list(shape)} of {entry['dtype']} in the bytes {first} to {end}")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise FormatError(f"{type(error).__name__}: {error}") from error
    if size != expected:
        raise FormatError(f"it has {size:,} bytes, and its header means {expected:,}: it is not whole")
    return Header(metadata, entries, starts, size)


def mapped(path: str | os.PathLike) -> mmap.mmap:
    """A file, mapped for reading alone. The mapping is of the file as it is now, if it is replaced too."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def tensor_in(mapping: mmap.mmap, entry: Entry, start: int) -> Tensor:
    """A tensor that lies in a mapped file, and must not be written to."""
    if not entry.nbytes:
        return torch.empty(tuple(entry.shape), dtype=entry.dtype, device="cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        flat = torch.frombuffer(mapping, dtype=torch.uint8, count=entry.nbytes, offset=start)
    return flat.view(entry.dtype).view(tuple(entry.shape))
