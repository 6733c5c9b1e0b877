"""Reads any rectangle of a saved tensor, by DCP's reader, on one rank without the others."""

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
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from memcompile.common.progress import Progress


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor to read into, and the offsets of the rectangle of a saved tensor that it gets."""

    offsets: tuple[int, ...]
    tensor: Tensor


class StepReader:
    """What is in the folder of one step, which is whole: its metadata are unpickled."""

    def __init__(self, folder: Path) -> None:
        self._reader = FileSystemReader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, True)
        self._entries = {name: (name, entry) for name, entry in metadata.state_dict_metadata.items()}

    def rename(self, names: Mapping[str, str]) -> None:
        """Gives entries other names than they were saved with, from then on and everywhere."""
        self._entries = {names.get(name, name): entry for name, entry in self._entries.items()}

    def tensors(self, prefix: str) -> dict[str, TensorStorageMetadata]:
        """Shapes and dtypes of the tensors whose names start so, by the rest of their names."""
        found = {name: entry for name, (_, entry) in self._entries.items() if isinstance(entry, TensorStorageMetadata)}
        return {name[len(prefix) :]: entry for name, entry in found.items() if name.startswith(prefix)}

    def objects(self, prefix: str) -> list[str]:
        """The names of all other entries, in the same way."""
        found = [name for name, (_, entry) in self._entries.items() if isinstance(entry, BytesStorageMetadata)]
        return [name[len(prefix) :] for name in found if name.startswith(prefix)]

    def read_object(self, name: str) -> Any:
        """One of the objects, unpickled; tensors in it are on the CPU."""
        planner = _Planner({}, Progress(False))
        index, nothing = MetadataIndex(self._entries[name][0]), torch.Size([0])
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
        """Reads into tensors, by the full names of the entries; other dtypes are cast to theirs."""
        progress = progress or Progress(False)
        progress.start("loading", sum(part.tensor.nbytes for part in parts.values()))
        items: list[ReadItem] = []
        into: dict[str, Tensor] = {}
        saved = self.tensors("")
        for name, part in parts.items():
            saved_name, _ = self._entries[name]
            into[saved_name] = part.tensor
            chunk = ChunkStorageMetadata(torch.Size(part.offsets), part.tensor.shape)
            items += create_read_items_for_chunk_list(saved_name, saved[name], [chunk])
        try:
            self._reader.read_data(LoadPlan(items), _Planner(into, progress)).wait()
        finally:
            progress.close()


class _Planner(DefaultLoadPlanner):
    """Gives DCP's reader the tensors to read into, by their names in the files; other ranks have no part in it."""

    def __init__(self, into: Mapping[str, Tensor], progress: Progress) -> None:
        super().__init__()
        self.loaded: Any = None
        self._into, self._progress = into, progress

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.loaded = torch.load(value, map_location="cpu", weights_only=False)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._into[index.fqn]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        self._progress.add(tensor.nbytes)
