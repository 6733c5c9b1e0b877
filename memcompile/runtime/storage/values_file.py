"""The file that a table of values lies in: a safetensors file of one tensor, whose rows begin on a page.

`__metadata__` has the SHA-256 of the rows, and spaces fill the header up to the page.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from memcompile.common.files import sync_folder
from memcompile.common.progress import Progress
from memcompile.common.sites import VALUES_NAME
from memcompile.errors import PlanError
from memcompile.runtime.storage.safetensors_format import (
    Entry,
    FormatError,
    bytes_of,
    encoded_header,
    new_file,
    write_tensor,
)
from memcompile.runtime.storage.safetensors_format import read_header as read_any_header

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PAGE = 4096  # bytes; larger pages hold whole ones
_CHUNK = 2**26  # bytes that are written, or read, at once
_MARK = "memcompile"  # in the metadata: the version of what it holds
_WRITES_ONE = "memcompile.store_values(model, path) writes one"


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
    offset: int = _PAGE

    @property
    def entry(self) -> Entry:
        """The table, as a tensor of the file."""
        return Entry(VALUES_NAME, self.shape, self.dtype)

    @property
    def metadata(self) -> dict[str, str]:
        return {_MARK: "1", "sha256": self.checksum}

    def chunks(self) -> Iterator[tuple[int, int]]:
        """First row and end of what is read or written at once."""
        rows, dim = self.shape
        step = max(1, _CHUNK // max(1, dim * self.dtype.itemsize))
        return ((first, min(first + step, rows)) for first in range(0, rows, step))

    def encoded(self) -> bytes:
        """All of the file before its rows."""
        return encoded_header([self.entry], self.metadata, self.offset)


def read_header(path: str) -> Header:
    """What the file holds; no row is read.

    Raises:
        PlanError: there is no such file, `write` has not written it, or it was cut off.
    """
    try:
        found = read_any_header(path)
    except OSError as error:
        raise PlanError(f"the file of values {path!r} cannot be read ({error.strerror}): {_WRITES_ONE}") from error
    except FormatError as error:
        raise PlanError(f"{path!r} is no file of values ({error}): copy it again, or {_WRITES_ONE}") from error
    names = [entry.name for entry in found.entries]
    if names != [VALUES_NAME] or found.metadata.get(_MARK) != "1" or found.starts[0] % _PAGE:
        raise PlanError(f"{path!r} is no file of values (this memcompile has not written it): {_WRITES_ONE}")
    (entry,) = found.entries
    if len(entry.shape) != 2 or entry.dtype not in _DTYPES or "sha256" not in found.metadata:
        raise PlanError(f"{path!r} is no file of values (its header is damaged): {_WRITES_ONE}")
    rows, dim = entry.shape
    return Header((rows, dim), entry.dtype, found.metadata["sha256"], found.starts[0])


def check_writable(path: str) -> None:
    """Raises OSError where no file of this name can be, before anything is written under another name."""
    directory = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "the values need the name of a file", path)
    if not os.path.isdir(directory):
        raise FileNotFoundError(errno.ENOENT, "there is no such directory for the file of values", directory)


def write(path: str, values: Tensor, progress: bool | None = None) -> None:
    """Writes ``values [slots, value_dim]``, of any device, a chunk at a time. The file appears when it is whole; one
    of the same name is replaced then, and stays as it is for processes that have it mapped.

    Args:
        progress: whether a bar is shown; None shows one from a GiB on.

    Raises:
        OSError: the directory cannot be written, or is full.
    """
    rows, dim = values.shape
    header, digest, bar = Header((rows, dim), values.dtype, ""), hashlib.sha256(), Progress(progress)
    directory, name = os.path.split(os.path.abspath(path))
    temporary = Path(directory, f".{name}.{uuid.uuid4().hex}")
    bar.start(f"writing {name}", header.entry.nbytes)
    try:
        with new_file(temporary, [header.entry], header.metadata, header.offset) as file:
            for first, end in header.chunks():
                part = values[first:end].detach().cpu().contiguous()
                digest.update(bytes_of(part))
                write_tensor(file, part)
                bar.add(part.nbytes)
            file.seek(0)
            file.write(dataclasses.replace(header, checksum=digest.hexdigest()).encoded())
        os.replace(temporary, path)
    finally:
        bar.close()
        temporary.unlink(missing_ok=True)
    sync_folder(directory)


def verify_values(path: str | os.PathLike, *, progress: bool | None = None) -> None:
    """Reads all rows of a file of values, and compares them with its checksum.

    Args:
        progress: whether a bar is shown; None shows one from a GiB on.

    Raises:
        PlanError: it is no file of values, it was cut off, or a row is not what was written.
    """
    path = os.fspath(path)
    header, digest, bar = read_header(path), hashlib.sha256(), Progress(progress)
    bar.start(f"reading {os.path.basename(path)}", header.entry.nbytes)
    try:
        with open(path, "rb") as file:
            file.seek(header.offset)
            while part := file.read(_CHUNK):
                digest.update(part)
                bar.add(len(part))
    finally:
        bar.close()
    if digest.hexdigest() != header.checksum:
        raise PlanError(
            f"the rows of {path!r} have SHA-256 {digest.hexdigest()}, and its header says {header.checksum}: copy the "
            f"file again, or {_WRITES_ONE}"
        )
