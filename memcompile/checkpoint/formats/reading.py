"""Reads any rectangle of a saved tensor, by DCP's reader, on one rank by itself."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from memcompile.checkpoint.progress import Progress


@dataclasses.dataclass(frozen=True)
class Part:
    """Where a rectangle of a saved tensor is read to: from these offsets on, as large as the tensor."""

    offsets: tuple[int, ...]
    tensor: Tensor


class StepReader:
    """What is in the folder of one step."""

    def __init__(self, folder: Path) -> None:
        self._reader = FileSystemReader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, True)
        self.metadata: Metadata = metadata

    def tensors(self, prefix: str) -> dict[str, TensorStorageMetadata]:
        """Shapes and dtypes of the tensors whose names start so, by the rest of their names."""
        entries = self.metadata.state_dict_metadata.items()
        return {
            k[len(prefix) :]: v for k, v in entries if k.startswith(prefix) and isinstance(v, TensorStorageMetadata)
        }

    def objects(self, prefix: str) -> list[str]:
        """The names of whatever else there is, in the same way."""
        entries = self.metadata.state_dict_metadata.items()
        return [k[len(prefix) :] for k, v in entries if k.startswith(prefix) and isinstance(v, BytesStorageMetadata)]

    def read_object(self, name: str) -> Any:
        """One of the objects, unpickled."""
        planner = _Planner({}, Progress(False))
        index, nothing = MetadataIndex(name), torch.Size([0])
        item = ReadItem(
            type=LoadItemType.BYTE_IO,
            dest_index=index,
            dest_offsets=nothing,
            storage_index=index,
            storage_offsets=nothing,
            lengths=nothing,
        )
        self._reader.read_data(LoadPlan([item]), planner).wait()
        return planner.loaded

    def read(self, parts: Mapping[str, Part], progress: Progress | None = None) -> None:
        """Reads into tensors, by the full names of what was saved; other dtypes are cast to theirs."""
        progress = progress or Progress(False)
        progress.start("loading", sum(part.tensor.nbytes for part in parts.values()))
        items: list[ReadItem] = []
        saved = self.tensors("")
        for name, part in parts.items():
            chunk = ChunkStorageMetadata(torch.Size(part.offsets), part.tensor.shape)
            items += create_read_items_for_chunk_list(name, saved[name], [chunk])
        try:
            self._reader.read_data(LoadPlan(items), _Planner(parts, progress)).wait()
        finally:
            progress.close()


class _Planner(DefaultLoadPlanner):
    """Tells DCP's reader where what it reads belongs; nothing is planned together with other ranks."""

    def __init__(self, parts: Mapping[str, Part], progress: Progress) -> None:
        super().__init__()
        self.loaded: Any = None
        self._parts, self._progress = parts, progress

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.loaded = torch.load(value, weights_only=False)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._parts[index.fqn].tensor

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        self._progress.add(tensor.nbytes)


def save_id_of(folder: Path) -> str | None:
    """The id of the save that wrote DCP's metadata; None where they cannot be read."""
    try:
        meta = FileSystemReader(folder).read_metadata().storage_meta
    except Exception:  # damaged: unpickling may raise anything
        return None
    return None if meta is None else meta.save_id
