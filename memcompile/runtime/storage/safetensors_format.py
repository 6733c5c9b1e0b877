"""The safetensors format: files are written tensor by tensor, and read where the system maps them into memory.

https://github.com/huggingface/safetensors: the length of the header in 8 bytes, a JSON header, the tensors in a row.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import mmap
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
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
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def row_blocks(shape: Sequence[int], dtype: torch.dtype, most: int) -> Iterator[tuple[int, int]]:
    """First row and end of blocks of at most so many bytes, or of one row, of a tensor; of a scalar it is one row."""
    rows = shape[0] if shape else 1
    step = max(1, most // max(1, math.prod(shape[1:]) * dtype.itemsize))
    return ((first, min(first + step, rows)) for first in range(0, max(1, rows), step))


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


def append(path: str | os.PathLike, tensor: Tensor) -> None:
    """Writes the next tensor of a file, or the next rows of it, contiguous on the CPU."""
    with open(path, "ab") as file:
        file.write(bytes_of(tensor))


def bytes_of(tensor: Tensor) -> bytes | ctypes.Array[ctypes.c_ubyte]:
    """The bytes of a contiguous tensor on the CPU, which must outlive them. Not by numpy, which has no bfloat16 and may
    not be installed.
    """
    return (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()) if tensor.numel() else b""


def mapped_file(path: str | os.PathLike, any_order: bool = False) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata of a file and its tensors, which are mapped for reading alone: they are read when they are used, and
    must not be written to. They are those of the file as it is now, if it is replaced too.

    Args:
        any_order: whether rows are read in any order: the system reads no others around them then.

    Raises:
        OSError: the file cannot be read.
        FormatError: it is no safetensors file, or not a whole one.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= _LONGEST:
            raise FormatError("it does not begin with the length of a header")
        text, size = file.read(length), os.fstat(file.fileno()).st_size
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if any_order and hasattr(mmap, "MADV_RANDOM"):
        mapping.madvise(mmap.MADV_RANDOM)
    starts, parts, expected = {}, [], 8 + length
    try:
        content = json.loads(text)
        metadata = dict(content.pop(_METADATA, {}))
        for name, found in content.items():
            entry = Entry(name, tuple(found["shape"]), DTYPES[found["dtype"]])
            first, end = found["data_offsets"]
            if not all(type(number) is int for number in (*entry.shape, first, end)):
                raise TypeError(f"{name} has a shape or offsets that are no integers")
            starts[entry] = 8 + length + first
            expected = max(expected, 8 + length + end)
            parts += [(first, end)] * (first != end)
            if min([first, *entry.shape]) < 0 or end - first != entry.nbytes:
                raise ValueError(f"{name} {list(entry.shape)} of {found['dtype']} in the bytes {first} to {end}")
        parts.sort()
        if any(end > first for (_, end), (first, _) in itertools.pairwise(parts)):
            raise ValueError("tensors lie in the same bytes")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise FormatError(f"{type(error).__name__}: {error}") from error
    if size != expected:
        raise FormatError(f"it has {size:,} bytes, and its header means {expected:,}: it is not whole")
    return metadata, {entry.name: _tensor_in(mapping, entry, start) for entry, start in starts.items()}


def _tensor_in(mapping: mmap.mmap, entry: Entry, start: int) -> Tensor:
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        flat = torch.frombuffer(mapping, dtype=torch.uint8, count=entry.nbytes, offset=start)
    return flat.view(entry.dtype).view(entry.shape)
