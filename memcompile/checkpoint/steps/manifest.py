"""The manifest of a saved step: what it is, and a record of each of its files, with checksums. It is written last."""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from memcompile.common.progress import Progress
from memcompile.errors import CheckpointError
from memcompile.version import __version__

NAME = "MANIFEST.json"
FORMAT = 1
METADATA = ".metadata"  # of DCP, as every step has it
BLOCK = 2**24  # bytes; a file is checked by blocks in parallel, and a damaged one is named


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """What a file is: its size in bytes, and the CRC-32 of each of its blocks, as eight hexadecimal digits."""

    size: int
    crc32: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a saved step is."""

    step: int  # of the training
    number: int  # of the save in its folder: a later one has a higher number, even if its step is lower
    save_id: str  # of the save; DCP's metadata have it too
    world_size: int  # how many ranks wrote it
    plans: dict[str, dict[str, Any]]  # of every memory, by the name of the module that has its table ("" is the model)
    files: dict[str, FileRecord]
    versions: dict[str, str] = dataclasses.field(
        default_factory=lambda: {"torch": torch.__version__, "memcompile": __version__}
    )

    def text(self) -> str:
        """As JSON, with a checksum of its own."""
        entries = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps({**entries, "crc32": _sum(entries)}, indent=1)

    @classmethod
    def read(cls, step_folder: Path) -> Manifest:
        """Of a step's folder.

        Raises:
            CheckpointError: it is missing, damaged, of a later version or of another step.
        """
        path = step_folder / NAME
        try:
            entries = json.loads(path.read_text(), object_pairs_hook=_without_duplicates)
            found, expected = entries.pop("crc32"), _sum(entries)
            if entries["format"] > FORMAT:
                raise CheckpointError(
                    f"{path} has format {entries['format']}, this memcompile reads {FORMAT}: upgrade it"
                )
            if found != expected:
                raise CheckpointError(f"{path} is damaged: its CRC-32 is {expected}, and was written as {found}")
            del entries["format"]
            files = {name: FileRecord(file["size"], tuple(file["crc32"])) for name, file in entries["files"].items()}
            manifest = cls(**entries | {"files": files})
            manifest._check()
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: {step_folder} is no finished checkpoint") from None
        except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        if step_folder.stem != f"step_{manifest.step}":
            raise CheckpointError(f"{path} is of step {manifest.step}: files of two steps are mixed")
        return manifest

    def _check(self) -> None:
        """Raises ValueError for what `save` does not write: a checksum tells what was changed, not who wrote it."""
        counts = {"step": (self.step, 0), "number": (self.number, 0), "world_size": (self.world_size, 1)}
        for name, (count, least) in counts.items():
            if type(count) is not int or count < least:
                raise ValueError(f"{name} is {count!r}")
        if not isinstance(self.save_id, str) or not isinstance(self.versions, dict):
            raise ValueError(f"save_id is {self.save_id!r} and versions are {self.versions!r}")
        if not all(isinstance(plan, dict) for plan in self.plans.values()):
            raise ValueError("a plan is no dict")
        if METADATA not in self.files:
            raise ValueError(f"it has no record of {METADATA}")
        for name, record in self.files.items():
            if not is_plain_name(name):
                raise ValueError(f"{name!r} is no name of a file in its folder")
            blocks = -(-record.size // BLOCK) if type(record.size) is int and record.size >= 0 else -1
            if len(record.crc32) != blocks or not all(isinstance(crc, str) for crc in record.crc32):
                raise ValueError(f"{name} has the size {record.size!r} and {len(record.crc32)} checksums")


def is_plain_name(name: str) -> bool:
    """Whether a name is that of a file in a folder, and not a path that leads elsewhere."""
    return name not in ("", ".", "..") and not any(character in name for character in "/\\:\0")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError(f"a name is there twice, of {', '.join(name for name, _ in pairs[:9])}")
    return entries


class Recorded:
    """A stream that is written from start to end, as DCP does, and the record of what was written."""

    def __init__(self, stream: Any, progress: Progress) -> None:
        self._stream, self._progress = stream, progress
        self._size, self._sums = 0, list[int]()
        self.tell, self.flush, self.fileno, self.close = stream.tell, stream.flush, stream.fileno, stream.close

    def write(self, data: Any) -> int:
        written: int = self._stream.write(data)
        view = memoryview(data).cast("B")
        while len(view):
            if self._size % BLOCK == 0:
                self._sums.append(0)
            part = view[: BLOCK - self._size % BLOCK]
            self._sums[-1] = zlib.crc32(part, self._sums[-1])
            self._size += len(part)
            view = view[len(part) :]
        self._progress.add(written)
        return written

    def record(self) -> FileRecord:
        return FileRecord(self._size, tuple(f"{crc:08x}" for crc in self._sums))


def problems_of_files(folder: Path, files: dict[str, FileRecord], progress: Callable[[int], None]) -> dict[str, str]:
    """Which files of a folder are not as they were written, and why, by name. Blocks are read in parallel; `progress`
    is given their bytes.
    """
    problems: dict[str, str] = {}
    whole: list[str] = []  # the files of which blocks are read
    for name, record in files.items():
        path = folder / name
        if not path.is_file():
            problems[name] = f"{path} is missing, which was written with {record.size:,} bytes"
        elif (size := path.stat().st_size) != record.size:
            problems[name] = f"{path} has {size:,} bytes, and was written with {record.size:,}"
        else:
            whole.append(name)
    blocks = [(name, block) for name in whole for block in range(len(files[name].crc32))]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        sums = threads.map(lambda each: _block_sum(folder / each[0], each[1]), blocks)
        for (name, block), found in zip(blocks, sums, strict=True):
            start, end = block * BLOCK, min((block + 1) * BLOCK, files[name].size)
            progress(end - start)
            if found != (expected := files[name].crc32[block]) and name not in problems:
                problems[name] = (
                    f"{folder / name} is damaged: the CRC-32 of its bytes {start:,} to {end:,} is {found}, and was "
                    f"written as {expected}"
                )
    return problems


def record_of(path: Path) -> FileRecord:
    """The record of a file as it is on the disk."""
    size = path.stat().st_size
    return FileRecord(size, tuple(_block_sum(path, block) for block in range(-(-size // BLOCK))))


def _block_sum(path: Path, block: int) -> str:
    with path.open("rb", buffering=0) as file:
        file.seek(block * BLOCK)
        crc, left = 0, BLOCK
        while left and (data := file.read(left)):
            crc, left = zlib.crc32(data, crc), left - len(data)
    return f"{crc:08x}"


def _sum(entries: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(entries, sort_keys=True).encode()):08x}"
