"""Writes DCP's files, with a record of each, in pieces small enough to be read one at a time."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from memcompile.checkpoint._torch import local_part, save_state_dict
from memcompile.checkpoint.ranks import Ranks
from memcompile.checkpoint.steps.sums import BlockSums, FileRecord
from memcompile.common.progress import Progress

PIECE = 2**28  # bytes of a tensor that are stored together; reading needs memory for as many


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


class _RecordedFiles(FileSystem):
    """DCP's file system, which keeps a record of what is written."""

    def __init__(self, progress: Progress) -> None:
        self.records: dict[str, FileRecord] = {}
        self._progress = progress

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:  # type: ignore[override]
        with super().create_stream(path, mode) as stream:
            recorded = _Recorded(stream, self._progress)
            yield recorded
        self.records[Path(path).name] = recorded.sums.record()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class _Recorded:
    """A stream that is written from start to end, as DCP does."""

    def __init__(self, stream: Any, progress: Progress) -> None:
        self.sums = BlockSums()
        self._stream, self._progress = stream, progress
        self.tell, self.flush, self.fileno, self.close = stream.tell, stream.flush, stream.fileno, stream.close

    def write(self, data: Any) -> int:
        written: int = self._stream.write(data)
        self.sums.add(data)
        self._progress.add(written)
        return written


class _PiecewisePlanner(DefaultSavePlanner):
    """Has each rank write its part of a tensor in pieces of some rows.

    Of tensors that all ranks have, DCP spreads the pieces over the ranks.
    """

    def __init__(self, progress: Progress) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._progress = progress

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self._rows: dict[MetadataIndex, tuple[int, int]] = {}
        items = [piece for item in plan.items for piece in self._pieces(item)]
        self.plan = dataclasses.replace(plan, items=items)
        return self.plan

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        chunks = [
            (item.tensor_data.chunk, item.tensor_data.properties.dtype) for item in new_plan.items if item.tensor_data
        ]
        self._progress.start("saving", sum(math.prod(chunk.sizes) * dtype.itemsize for chunk, dtype in chunks))
        return super().finish_plan(new_plan)

    def lookup_object(self, index: MetadataIndex) -> Any:
        rows = self._rows.get(index)
        if rows is None:
            return super().lookup_object(index)
        return local_part(self.state_dict[index.fqn])[1][rows[0] : rows[1]]

    def _pieces(self, item: WriteItem) -> list[WriteItem]:
        data = item.tensor_data
        if item.type == WriteItemType.BYTE_IO or data is None:
            return [item]
        sizes, offsets = data.chunk.sizes, data.chunk.offsets
        if math.prod(sizes) * data.properties.dtype.itemsize <= PIECE:
            return [item]
        step = max(1, PIECE // (math.prod(sizes[1:]) * data.properties.dtype.itemsize))
        pieces = []
        for start in range(0, sizes[0], step):
            rows = min(step, sizes[0] - start)
            at = torch.Size([offsets[0] + start, *offsets[1:]])
            chunk = ChunkStorageMetadata(at, torch.Size([rows, *sizes[1:]]))
            index = MetadataIndex(item.index.fqn, at)
            self._rows[index] = start, start + rows
            pieces.append(
                dataclasses.replace(
                    item, index=index, type=WriteItemType.SHARD, tensor_data=dataclasses.replace(data, chunk=chunk)
                )
            )
        return pieces
