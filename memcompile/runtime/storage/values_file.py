"""The file that a table of values lies in: a safetensors file of one tensor, whose rows begin on a page.

Eight bytes say how long the header is, which is JSON; the rows follow. Of what the format leaves open, `__metadata__`
has the SHA-256 of the rows, and spaces fill the header up to the page.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from memcompile.common.sites import VALUES_NAME
from memcompile.errors import PlanError

log = logging.getLogger(__name__)

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_PAGE = 4096  # bytes; larger pages hold whole ones
_CHUNK = 2**26  # bytes that are written, or read, at once
_MARK = "memcompile"  # in the metadata: the version of what it holds


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        shape: [slots, value_dim].
        checksum: SHA-256 of the rows, in hexadecimal.
        offset: bytes before the first row.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    checksum: str
    offset: int

    @property
    def nbytes(self) -> int:
        """Of all rows."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def chunks(self) -> Iterator[tuple[int, int]]:
        """First row and end of what is read or written at once."""
        rows, dim = self.shape
        step = max(1, _CHUNK // max(1, dim * self.dtype.itemsize))
        return ((first, min(first + step, rows)) for first in range(0, rows, step))

    def encoded(self) -> bytes:
        name = next(name for name, dtype in DTYPES.items() if dtype is self.dtype)
        content = {
            "__metadata__": {_MARK: "1", "sha256": self.checksum},
            VALUES_NAME: {"dtype": name, "shape": self.shape, "data_offsets": [0, self.nbytes]},
        }
        text = json.dumps(content).encode().ljust(self.offset - 8)
        return len(text).to_bytes(8, "little") + text


def read_header(path: str) -> Header:
    """What the file holds; no row is read.

    Raises:
        PlanError: there is no such file, it is not one of `write`'s, or it was cut off.
    """
    try:
        with open(path, "rb") as file:
            header, size = _decoded(file), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise PlanError(
            f"the file of values {path!r} cannot be read ({error.strerror}): memcompile.store_values(model, path) "
            f"writes it"
        ) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PlanError(
            f"{path!r} is no file of values ({type(error).__name__}: {error}): memcompile.store_values(model, path) "
            f"writes one"
        ) from error
    expected = header.offset + header.nbytes
    if size != expected:
        raise PlanError(
            f"the file of values {path!r} has {size:,} bytes, and its header {list(header.shape)} {header.dtype} means "
            f"{expected:,}: it is not whole; copy it again, or write it by memcompile.store_values(model, path)"
        )
    return header


def _decoded(file: BinaryIO) -> Header:
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= 2**20:
        raise ValueError("it does not begin with the length of a header")
    content: dict[str, Any] = json.loads(file.read(length))
    entry, metadata = content[VALUES_NAME], content["__metadata__"]
    (rows, dim), (first, _) = entry["shape"], entry["data_offsets"]
    if metadata[_MARK] != "1" or (8 + length + first) % _PAGE:
        raise ValueError("it was not written by memcompile, or by a later one")
    return Header((int(rows), int(dim)), DTYPES[entry["dtype"]], str(metadata["sha256"]), 8 + length + first)


def check_writable(path: str) -> None:
    """Raises OSError where no file of this name can be, before anything is written under another name."""
    directory = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "the values need the name of a file", path)
    if not os.path.isdir(directory):
        raise FileNotFoundError(errno.ENOENT, "there is no such directory for the file of values", directory)


def write(path: str, values: Tensor) -> None:
    """Writes ``values [slots, value_dim]``, of any device, a chunk at a time. The file appears when it is whole; one
    that was there stays until then, and for who has it mapped.

    Raises:
        OSError: the directory cannot be written, or is full.
    """
    rows, dim = values.shape
    header = Header((rows, dim), values.dtype, "", _PAGE)
    digest = hashlib.sha256()
    directory, name = os.path.split(os.path.abspath(path))
    descriptor, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=directory)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(header.encoded())
            parts = (values[i:end].detach().cpu().contiguous() for i, end in header.chunks())
            for part in _reported(parts, header.nbytes, f"writing {name}"):
                digest.update(numbers_of(part))
                file.write(numbers_of(part))
            file.seek(0)
            file.write(dataclasses.replace(header, checksum=digest.hexdigest()).encoded())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # as open() makes one: others may serve it
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_directory(directory)


def numbers_of(part: Tensor) -> ctypes.Array[ctypes.c_ubyte]:
    """The bytes of a contiguous tensor on the CPU: not by numpy, which has no bfloat16 and may not be there."""
    return (ctypes.c_ubyte * part.nbytes).from_address(part.data_ptr())


def verify(path: str) -> None:
    """Reads all rows, and compares them with the checksum.

    Raises:
        PlanError: as `read_header`, or a row is not what was written.
    """
    header, digest = read_header(path), hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(header.offset)
        for part in _reported(iter(lambda: file.read(_CHUNK), b""), header.nbytes, f"reading {os.path.basename(path)}"):
            digest.update(part)
    if digest.hexdigest() != header.checksum:
        raise PlanError(
            f"the rows of {path!r} have SHA-256 {digest.hexdigest()}, and its header says {header.checksum}: copy the "
            f"file again, or write it by memcompile.store_values(model, path)"
        )


def _reported(parts: Iterator[Any], total: int, title: str) -> Iterator[Any]:
    """The parts, and how many of the bytes were taken: a bar on a terminal where tqdm is installed, else a line in the
    log for each tenth.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        bar: Any = None
    else:
        bar = tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=None)
    done = 0
    for part in parts:
        yield part
        size = part.nbytes if isinstance(part, Tensor) else len(part)
        before, done = done, done + size
        if bar is not None and not bar.disable:
            bar.update(size)
        elif done * 10 // max(1, total) > before * 10 // max(1, total):
            log.info("%s: %.1f of %.1f GiB", title, done / 2**30, total / 2**30)
    if bar is not None:
        bar.close()


def _umask() -> int:
    """The process's; the system tells it only to who sets it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_directory(directory: str) -> None:
    """Has the new name survive a crash, where directories can be synced."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(directory, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
