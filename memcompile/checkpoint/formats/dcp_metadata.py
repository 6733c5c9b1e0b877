"""DCP's metadata of a step: unpickled without running code, and compared with the files that the manifest has."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from memcompile.checkpoint.steps.manifest import FileRecord
from memcompile.errors import CheckpointError

_OF_DCP = "torch.distributed.checkpoint.metadata"
_NAMES = {
    _OF_DCP: {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
}


class _Unpickler(pickle.Unpickler):
    """Of what DCP pickles: any other class or function could run code."""

    def find_class(self, module: str, name: str) -> Any:
        found = _NAMES.get(module.removesuffix("._local"), set())  # of pathlib from Python 3.13 on
        if name in found or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which DCP's metadata do not have")


def checked_metadata(path: Path, files: Mapping[str, FileRecord]) -> Metadata:
    """The metadata of a step.

    Args:
        path: of the file, which is as the manifest has it.
        files: the records of the manifest.

    Raises:
        CheckpointError: they are not such as DCP writes, or lead to other files.
    """
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
        problem = next(_problems(metadata, files), None)
    except Exception as error:  # whatever the bytes of a pickle can raise
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if problem is not None:
        raise CheckpointError(f"{path} is damaged: {problem}")
    return metadata  # type: ignore[no-any-return]


def _problems(metadata: Any, files: Mapping[str, FileRecord]) -> Iterator[str]:
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        yield f"it has {type(metadata).__name__}"
        return
    for index, info in metadata.storage_data.items():
        record = files.get(info.relative_path)
        if record is None:
            yield f"{index.fqn} is in {info.relative_path!r}, which is no file of this step"
        elif not (0 <= info.offset <= info.offset + info.length <= record.size):
            yield f"{index.fqn} is in bytes {info.offset} to {info.offset + info.length} of {record.size}"
    for name, entry in metadata.state_dict_metadata.items():
        indices = [MetadataIndex(name)]
        if isinstance(entry, TensorStorageMetadata):
            size, chunks = tuple(entry.size), entry.chunks
            indices = [MetadataIndex(name, chunk.offsets) for chunk in chunks]
            inside = all(
                len(chunk.offsets) == len(chunk.sizes) == len(size)
                and all(0 <= o <= o + s <= n for o, s, n in zip(chunk.offsets, chunk.sizes, size, strict=True))
                for chunk in chunks
            )
            complete = sum(math.prod(chunk.sizes) for chunk in chunks) == math.prod(size)
            if not inside or not complete or _overlap(chunks):
                yield f"the parts of {name} are not those of {list(size)}"
        if any(index not in metadata.storage_data for index in indices):
            yield f"a part of {name} is in no file"


def _overlap(chunks: Sequence[ChunkStorageMetadata]) -> bool:
    """Whether two of the parts of a tensor share an element."""
    ordered = sorted((c for c in chunks if math.prod(c.sizes)), key=lambda chunk: tuple(chunk.offsets))
    for index, one in enumerate(ordered):
        for other in itertools.islice(ordered, index + 1, None):
            if not one.offsets or other.offsets[0] >= one.offsets[0] + one.sizes[0]:
                break  # it and those after it start behind
            spans = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
            if all(a < b + m and b < a + n for a, n, b, m in spans):
                return True
    return False
