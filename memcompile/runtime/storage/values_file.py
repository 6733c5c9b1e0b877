"""The file that a table of values lies in: a safetensors file of one tensor, whose rows begin on a page.

`__metadata__` has the SHA-256 of the rows, and what these are; spaces fill the header up to the page.
"""

from __future__ import annotations

import errno
import hashlib
import os
import uuid
from collections.abc import Callable, Mapping
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
    mapped_file,
    row_blocks,
)

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PAGE = 4096  # bytes before the first row
_CHUNK = 2**26  # bytes that are written, or read, at once
_MARK = "memcompile"  # in the metadata: the version of what it holds
_WRITES_ONE = "memcompile.store_values(model, path) writes one"


def header_of(values: Tensor, checksum: str, form: Mapping[str, str] | None = None) -> bytes:
    """All of a file before its rows."""
    entry = Entry(VALUES_NAME, tuple(values.shape), values.dtype)
    return encoded_header([entry], {_MARK: "1", "sha256": checksum, **(form or {})}, _PAGE)


def read_values(path: str, any_order: bool = False) -> tuple[Tensor, dict[str, str]]:
    """The values [slots, numbers of a row] of a file, which lie in it (see `mapped_file`), and what its header says of
    them: "sha256" of the rows, and the ``form`` that `write` was given. No row is read.

    Raises:
        PlanError: there is no such file, `write` has not written it, or it was cut off.
    """
    try:
        metadata, tensors = mapped_file(path, any_order)
    except OSError as error:
        raise PlanError(f"the file of values {path!r} cannot be read ({error.strerror}): {_WRITES_ONE}") from error
    except FormatError as error:
        raise PlanError(f"{path!r} is no file of values ({error}): copy it again, or {_WRITES_ONE}") from error
    values, checksum = tensors.get(VALUES_NAME), metadata.get("sha256")
    if values is None or len(tensors) > 1 or metadata.get(_MARK) != "1" or values.data_ptr() % _PAGE:
        raise PlanError(f"{path!r} is no file of values (this memcompile has not written it): {_WRITES_ONE}")
    if values.dim() != 2 or values.dtype not in _DTYPES or checksum is None:
        raise PlanError(f"{path!r} is no file of values (its header is damaged): {_WRITES_ONE}")
    return values, metadata


def sha256_of(values: Tensor, read: Callable[[int, int], Tensor], doing: str, bar: Progress) -> str:
    """Of rows like those of ``values [slots, value_dim]``, a chunk at a time.

    Args:
        read: the rows from one to another, contiguous on the CPU.
    """
    digest = hashlib.sha256()
    with bar.start(doing, values.nbytes):
        for first, end in row_blocks(values.shape, values.dtype, _CHUNK):
            rows = read(first, end)
            digest.update(bytes_of(rows))
            bar.add(rows.nbytes)
    return digest.hexdigest()


def write(path: str, values: Tensor, progress: bool | None = None, form: Mapping[str, str] | None = None) -> None:
    """Writes ``values [slots, numbers of a row]``, of any device, a chunk at a time. The file appears when it is whole;
    one of the same name is replaced then, and stays as it is for processes that have it mapped.

    Args:
        progress: whether a bar is shown; None shows one from a GiB on.
        form: what the rows are, besides their shape.

    Raises:
        OSError: there is no such directory, it cannot be written, or is full.
    """
    directory, name = os.path.split(os.path.abspath(path))
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "the values need the name of a file", path)
    if not os.path.isdir(directory):
        raise FileNotFoundError(errno.ENOENT, "there is no such directory for the file of values", directory)
    temporary = Path(directory, f".{name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.seek(_PAGE)

            def copied(first: int, end: int) -> Tensor:
                rows = values[first:end].detach().cpu().contiguous()
                file.write(bytes_of(rows))
                return rows

            checksum = sha256_of(values, copied, f"writing {name}", Progress(progress))
            file.seek(0)
            file.write(header_of(values, checksum, form))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
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
    values, metadata = read_values(path)
    expected = metadata["sha256"]
    with open(path, "rb") as file:
        file.seek(-values.nbytes, os.SEEK_END)

        def rows(first: int, end: int) -> Tensor:  # not by the mapping: a disk that fails would end the process
            read = torch.empty(end - first, values.shape[1], dtype=values.dtype, device="cpu")
            file.readinto(bytes_of(read))
            return read

        found = sha256_of(values, rows, f"reading {os.path.basename(path)}", Progress(progress))
    if found != expected:
        raise PlanError(
            f"the rows of {path!r} have SHA-256 {found}, and its header says {expected}: copy the file again, or "
            f"{_WRITES_ONE}"
        )
