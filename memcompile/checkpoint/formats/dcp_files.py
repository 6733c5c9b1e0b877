"""DCP's files: written with a record of each, in pieces small enough to be read one at a time; any rectangle of a saved
tensor is read, on one rank without the others.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from memcompile.checkpoint._torch import create_read_items, local_part, save_state_dict
from memcompile.checkpoint.formats.dcp_metadata import checked_metadata
from memcompile.checkpoint.ranks import Ranks
from memcompile.checkpoint.steps.manifest import METADATA, FileRecord, Recorded
from memcompile.common.progress import Progress
from memcompile.runtime.storage.safetensors_format import row_blocks

MODEL, OPTIMIZER, OPTIMIZER_REST, EXTRA = "model.", "optimizer.state.", "optimizer.rest", "extra."  # names of entries
PIECE = 2**28  # bytes of a tensor that are stored together; reading needs memory for as many


class Part(NamedTuple):
    """A tensor to read into, and the offsets of the rectangle of a saved tensor that it gets."""

    offsets: tuple[int, ...]
    tensor: Tensor


def write_files(state: dict[str, Any], folder: Path, save_id: str, ranks: Ranks, progress: Progress) -> dict[str, Any]:
    """Writes a flat state into an existing folder; all ranks call this.

    Returns:
        The `FileRecord` of each file that this rank wrote, by name.

    Raises:
        torch.distributed.checkpoint.api.CheckpointException: on all ranks, where one failed.
    """
    writer = FileSystemWriter(folder, sync_files=True)
    writer.save_id = save_id
    writer.fs = files = _RecordedFiles(progress)
    planner = _PiecewisePlanner(progress)
    try:
        save_state_dict(state, writer, ranks.group, no_dist=ranks.group is None, planner=planner)
    finally:
        progress.close()
    return files.records


class StepReader:
    """What is in the folder of one step.

    Args:
        folder: whose files are as they were written.
        files: what its manifest says of them.

    Raises:
        CheckpointError: its metadata are not such as DCP writes, or lead to other files.
    """

    def __init__(self, folder: Path, files: Mapping[str, FileRecord]) -> None:
        self._reader = FileSystemReader(folder)
        metadata = checked_metadata(folder / METADATA, files)
        self._reader.set_up_storage_reader(metadata, True)
        self._entries = metadata.state_dict_metadata

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start so, on the meta device, by the rest of their names."""
        return {
            name[len(prefix) :]: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for name, entry in self._entries.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }

    def objects(self, prefix: str) -> list[str]:
        """The names of all other entries, in the same way."""
        others = [name for name, entry in self._entries.items() if not isinstance(entry, TensorStorageMetadata)]
        return [name[len(prefix) :] for name in others if name.startswith(prefix)]

    def read_object(self, name: str) -> Any:
        """One of the objects, unpickled; tensors in it are on the CPU."""
        planner = _IntoTensors({}, Progress(False))
        self._reader.read_data(LoadPlan(create_read_items(name, self._entries[name], None)), planner).wait()
        return planner.loaded

    def read(self, parts: Mapping[str, Part], progress: Progress) -> None:
        """Reads into tensors, by the full names of the entries; other dtypes are cast to theirs."""
        items: list[ReadItem] = []
        for name, part in parts.items():
            chunk = ChunkStorageMetadata(torch.Size(part.offsets), part.tensor.shape)
            items += create_read_items_for_chunk_list(name, cast(TensorStorageMetadata, self._entries[name]), [chunk])
        with progress.start("loading", sum(part.tensor.nbytes for part in parts.values())):
            self._reader.read_data(LoadPlan(items), _IntoTensors(parts, progress)).wait()


class _RecordedFiles(FileSystem):
    """DCP's file system, which keeps a record of what is written."""

    def __init__(self, progress: Progress) -> None:
        self.records: dict[str, FileRecord] = {}
        self._progress = progress

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:  # type: ignore[override]
        with super().create_stream(path, mode) as stream:
            recorded = Recorded(stream, self._progress)
            yield recorded
        self.records[Path(path).name.removesuffix(".tmp")] = recorded.record()  # of metadata, which DCP renames


class _PiecewisePlanner(DefaultSavePlanner):
    """Has each rank write its part of a tensor in pieces of some rows.

    Of tensors that all ranks have, DCP spreads the pieces over the ranks.
    """

    def __init__(self, progress: Progress) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._progress = progress
        self._rows: dict[MetadataIndex, slice] = {}

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.plan = dataclasses.replace(plan, items=[piece for item in plan.items for piece in self._pieces(item)])
        return self.plan

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        self._progress.start("saving", sum(_nbytes(item.tensor_data) for item in new_plan.items if item.tensor_data))
        return super().finish_plan(new_plan)

    def lookup_object(self, index: MetadataIndex) -> Any:
        if index not in self._rows:
            return super().lookup_object(index)
        return local_part(self.state_dict[index.fqn])[1][self._rows[index]]

    def _pieces(self, item: WriteItem) -> list[WriteItem]:
        data = item.tensor_data
        if data is None or _nbytes(data) <= PIECE:
            return [item]
        sizes, offsets, pieces = data.chunk.sizes, data.chunk.offsets, []
        for first, end in row_blocks(sizes, data.properties.dtype, PIECE):
            at = torch.Size([offsets[0] + first, *offsets[1:]])
            piece = dataclasses.replace(data, chunk=ChunkStorageMetadata(at, torch.Size([end - first, *sizes[1:]])))
            index = MetadataIndex(item.index.fqn, at)
            self._rows[index] = slice(first, end)
            pieces.append(dataclasses.replace(item, index=index, type=WriteItemType.SHARD, tensor_data=piece))
        return pieces


def _nbytes(data: TensorWriteData) -> int:
    return math.prod(data.chunk.sizes) * data.properties.dtype.itemsize


class _IntoTensors(DefaultLoadPlanner):
    """Gives DCP's reader the tensors to read into."""

    def __init__(self, parts: Mapping[str, Part], progress: Progress) -> None:
        super().__init__()
        self.loaded: Any = None
        self._parts, self._progress = parts, progress

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.loaded = torch.load(value, map_location="cpu", weights_only=False)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._parts[index.fqn].tensor

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        self._progress.add(tensor.nbytes)
