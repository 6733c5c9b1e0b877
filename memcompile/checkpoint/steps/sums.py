"""Checksums of files: the CRC-32 of each block, while a file is written or from the disk, and what differs."""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

BLOCK = 2**24  # bytes; a file is checked by blocks in parallel, and a damaged one is named
_THREADS = min(8, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """What a file is: its size in bytes, and the CRC-32 of each of its blocks, as eight hexadecimal digits."""

    size: int
    crc32: tuple[str, ...]

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> FileRecord:
        return cls(int(entry["size"]), tuple(map(str, entry["crc32"])))


class BlockSums:
    """The record of a file that is being written from start to end."""

    def __init__(self) -> None:
        self._size, self._crc, self._sums = 0, 0, list[str]()

    def add(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            part = view[: BLOCK - self._size % BLOCK]
            self._crc = zlib.crc32(part, self._crc)
            self._size += len(part)
            if self._size % BLOCK == 0:
                self._end_block()
            view = view[len(part) :]

    def record(self) -> FileRecord:
        if self._size % BLOCK:
            self._end_block()
        return FileRecord(self._size, tuple(self._sums))

    def _end_block(self) -> None:
        self._sums.append(f"{self._crc:08x}")
        self._crc = 0


def problems_of_files(folder: Path, files: dict[str, FileRecord], progress: Callable[[int], None]) -> dict[str, str]:
    """Which files of a folder are not as they were written, and why, by name. Blocks are read in parallel; `progress`
    is given their bytes.
    """
    problems: dict[str, str] = {}
    for name, record in files.items():
        path = folder / name
        if not path.is_file():
            problems[name] = f"{path} is missing, which was written with {record.size:,} bytes"
        elif (size := path.stat().st_size) != record.size:
            problems[name] = f"{path} has {size:,} bytes, and was written with {record.size:,}"
    blocks = [(name, block) for name in files if name not in problems for block in range(len(files[name].crc32))]
    with ThreadPoolExecutor(_THREADS) as threads:
        sums = threads.map(lambda at: _block_sum(folder / at[0], at[1], progress), blocks)
        for (name, block), found in zip(blocks, sums, strict=True):
            expected = files[name].crc32[block]
            if found != expected and name not in problems:
                start, end = block * BLOCK, min((block + 1) * BLOCK, files[name].size)
                problems[name] = (
                    f"{folder / name} is damaged: the CRC-32 of its bytes {start:,} to {end:,} is {found}, and was "
                    f"written as {expected}"
                )
    return problems


def record_of(path: Path) -> FileRecord:
    """The record of a file as it is on the disk."""
    sums = BlockSums()
    for data in _read(path):
        sums.add(data)
    return sums.record()


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(BLOCK):
            yield data


def _block_sum(path: Path, block: int, progress: Callable[[int], None]) -> str:
    with path.open("rb", buffering=0) as file:
        file.seek(block * BLOCK)
        crc, left = 0, BLOCK
        while left and (data := file.read(left)):
            crc, left = zlib.crc32(data, crc), left - len(data)
    progress(BLOCK - left)
    return f"{crc:08x}"
