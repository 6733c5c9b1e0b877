"""export_safetensors(): writes a model, or the model of a checkpoint, as Hugging Face stores models."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from memcompile.checkpoint._torch import is_first_copy, local_part
from memcompile.checkpoint.asynchronous import ready
from memcompile.checkpoint.formats.dcp_files import PIECE
from memcompile.checkpoint.formats.reading import Part, StepReader
from memcompile.checkpoint.ranks import Ranks
from memcompile.checkpoint.saving import MODEL
from memcompile.checkpoint.state.model_state import Plans, model_state, plans_of, root_of
from memcompile.checkpoint.steps import folders
from memcompile.checkpoint.steps.whole_steps import whole_step
from memcompile.common.files import sync_folder, write_text
from memcompile.common.progress import Progress
from memcompile.errors import CheckpointError
from memcompile.runtime.storage.safetensors_format import NAMES, Entry, new_file, write_tensor

INDEX = "model.safetensors.index.json"
PLANS = "memcompile"  # in the metadata of each file
BUFFER = PIECE  # bytes that are read, or gathered from the ranks, at once


class Piece(NamedTuple):
    """Rows of a tensor that are one tensor of a file: all of them, unless it is larger than a file may be.

    Attributes:
        entry: of the file; its name is `values[1000:2000]` where it is not the whole tensor.
        source: the name of the whole tensor.
        start: the first row.
    """

    entry: Entry
    source: str
    start: int = 0


def export_safetensors(
    source: str | os.PathLike | nn.Module,
    path: str | os.PathLike,
    *,
    step: int | None = None,
    max_shard_size: int = 5 * 10**9,
    progress: bool | None = None,
) -> None:
    """Writes the model, without optimizers, as `model.safetensors`, or in shards with an index, as Hugging Face does.

    The plan is in it: in the `_extra_state` of the layers, and in the metadata of each file. A table larger than a
    shard is stored in pieces, `memory_values[first row:last row]`, which `import_safetensors` puts together.

    Args:
        source: the folder that `save` was given; no model is needed, and rank 0 needs memory for some rows. Or a
            model: all ranks call it then, and rank 0 gathers some rows at a time from them.
        path: a folder; other files in it stay.
        step: of a folder; None is the last one that was saved.
        max_shard_size: bytes of a shard.
        progress: whether rank 0 shows a bar; None shows one from a GiB on.

    Raises:
        CheckpointError: on all ranks: the step is damaged, a dtype has no safetensors, the folder has some already.
    """
    ranks, bar = ready(progress)
    if not isinstance(max_shard_size, int) or max_shard_size < 1:
        raise CheckpointError(f"max_shard_size must be a number of bytes, as 5 * 10**9, got {max_shard_size!r}")
    rows: _SavedRows | _ModelRows
    if isinstance(source, nn.Module):
        model = source
        rows, plans = ranks.each("collect the state", lambda: _rows_of(model, ranks))
    else:
        manifest = whole_step(ranks, Path(source), step, False, bar)
        folder, plans = folders.step_folder(Path(source), manifest.step), manifest.plans
        rows = ranks.each("read the checkpoint", lambda: _SavedRows(StepReader(folder)))
    shards, target = _shards(rows.entries, max_shard_size), Path(path)
    ranks.first("prepare the folder", lambda: _prepare(target, rows.entries))
    bar.start("exporting", sum(entry.nbytes for entry in rows.entries))
    try:
        for number, shard in enumerate(shards):
            _write_shard(_temporary(target, number, len(shards)), shard, rows, plans, ranks, bar)
        ranks.first("finish the export", lambda: _finish(target, shards))
    finally:
        bar.close()
        for number in range(len(shards)) if ranks.rank == 0 else ():  # where it failed
            _temporary(target, number, len(shards)).unlink(missing_ok=True)


def _write_shard(
    path: Path, shard: list[Piece], rows: _SavedRows | _ModelRows, plans: Plans, ranks: Ranks, bar: Progress
) -> None:
    """All ranks go through the same rows at the same time; rank 0 writes what it reads, or what they send."""
    metadata = {"format": "pt", PLANS: json.dumps(plans)}
    pieces = sorted(shard, key=lambda piece: -piece.entry.dtype.itemsize)  # so that each tensor is aligned
    entries = [piece.entry for piece in pieces]
    with contextlib.ExitStack() as opened:
        file: list[Any] = []
        ranks.first("open a file", lambda: file.append(opened.enter_context(new_file(path, entries, metadata))))
        for piece in pieces:
            for first, last in _blocks(piece.entry):
                block = rows.block(piece, first, last)
                ranks.first("write", lambda block=block: write_tensor(file[0], block()))  # type: ignore[misc]
                bar.add(piece.entry.nbytes * (last - first) // max(1, _rows(piece.entry)))
        ranks.first("write", opened.close)


class _SavedRows:
    """Rows of the tensors of a step that was saved."""

    def __init__(self, reader: StepReader) -> None:
        _check_no_objects(reader.objects(MODEL))
        self._reader = reader
        self.entries = [Entry(k, v.size, v.properties.dtype) for k, v in reader.tensors(MODEL).items()]

    def block(self, piece: Piece, first: int, last: int) -> Callable[[], Tensor]:
        """What gives rank 0 some rows of a piece."""

        def read() -> Tensor:
            dims = piece.entry.shape[1:]
            shape = (last - first, *dims) if piece.entry.shape else ()
            offsets = (piece.start + first, *(0 for _ in dims)) if piece.entry.shape else ()
            tensor = torch.empty(shape, dtype=piece.entry.dtype, device="cpu")
            self._reader.read({MODEL + piece.source: Part(offsets, tensor)})
            return tensor

        return read


class _ModelRows:
    """Rows of the tensors of a model, which may be sharded over all ranks."""

    def __init__(self, state: dict[str, Any], ranks: Ranks) -> None:
        _check_no_objects([name for name, value in state.items() if not isinstance(value, Tensor)])
        self._state, self._ranks = state, ranks
        self.entries = [Entry(name, value.shape, value.dtype) for name, value in state.items()]

    def block(self, piece: Piece, first: int, last: int) -> Callable[[], Tensor]:
        """What gives rank 0 some rows of a piece; all ranks call this."""
        tensor = self._state[piece.source]
        offsets, local = local_part(tensor)
        if not piece.entry.shape:
            return lambda: local
        if not isinstance(tensor, DTensor):
            return lambda: local[piece.start + first : piece.start + last]
        start = piece.start + first - offsets[0]  # in the local part
        rows = local[max(0, start) : max(0, start + last - first)]
        mine = (max(0, -start), offsets[1:], rows.cpu().clone()) if is_first_copy(tensor) and rows.numel() else None
        everyones = self._gathered(mine)

        def assembled() -> Tensor:
            whole = torch.empty(last - first, *piece.entry.shape[1:], dtype=piece.entry.dtype, device="cpu")
            for at, others, part in (each for each in everyones if each is not None):
                target = whole
                for dim, offset in enumerate((at, *others)):
                    target = target.narrow(dim, offset, part.shape[dim])
                target.copy_(part)
            return whole

        return assembled

    def _gathered(self, mine: Any) -> list[Any]:
        if self._ranks.size == 1:
            return [mine]
        everyones: list[Any] = [None] * self._ranks.size if self._ranks.rank == 0 else []
        dist.gather_object(mine, everyones or None, dst=0, group=self._ranks.group)
        return everyones


def _rows_of(model: nn.Module, ranks: Ranks) -> tuple[_ModelRows, Plans]:
    root = root_of(model)
    return _ModelRows(model_state(root), ranks), plans_of(root)


def _shards(entries: Sequence[Entry], most: int) -> list[list[Piece]]:
    """Which pieces each file has, of at most so many bytes unless one row has more."""
    shards: list[list[Piece]] = [[]]
    room = most
    for piece in (piece for entry in entries for piece in _pieces(entry, most)):
        if shards[-1] and piece.entry.nbytes > room:
            shards.append([])
            room = most
        shards[-1].append(piece)
        room -= piece.entry.nbytes
    return shards


def _pieces(entry: Entry, most: int) -> Iterator[Piece]:
    name, shape, dtype = entry
    if entry.nbytes <= most or not shape:
        yield Piece(entry, name)
        return
    for first, last in _blocks(entry, most):
        yield Piece(Entry(f"{name}[{first}:{last}]", (last - first, *shape[1:]), dtype), name, first)


def _blocks(entry: Entry, most: int = 0) -> Iterator[tuple[int, int]]:
    """First row and end of blocks of at most so many bytes, or of one row."""
    rows = _rows(entry)
    step = max(1, (most or BUFFER) * rows // max(1, entry.nbytes))
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


def _rows(entry: Entry) -> int:
    return entry.shape[0] if entry.shape else 1


def _check_no_objects(names: list[str]) -> None:
    if names:
        raise CheckpointError(f"safetensors store only tensors, and these are none: {', '.join(names)}")


def _prepare(path: Path, entries: Sequence[Entry]) -> None:
    for entry in entries:
        if entry.dtype not in NAMES:
            raise CheckpointError(
                f"{entry.name} is {entry.dtype}, which safetensors do not store: cast it, or leave it out"
            )
    path.mkdir(parents=True, exist_ok=True)
    present = sorted(file.name for file in path.glob("*.safetensors"))
    if present:
        has = ", ".join([*present, *([INDEX] if (path / INDEX).exists() else [])])
        raise CheckpointError(f"{path} already has {has}: delete it, or export into another folder")


def _file_name(number: int, shards: int) -> str:
    return "model.safetensors" if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors"


def _temporary(path: Path, number: int, shards: int) -> Path:
    """A name that only an export takes; the next one writes over what a killed one left."""
    return path / f".{_file_name(number, shards)}.memcompile"


def _finish(path: Path, shards: list[list[Piece]]) -> None:
    (path / INDEX).unlink(missing_ok=True)  # of an export whose files are gone
    names = [_file_name(number, len(shards)) for number in range(len(shards))]
    for number, name in enumerate(names):
        _temporary(path, number, len(shards)).rename(path / name)
    if len(shards) > 1:
        files = {piece.entry.name: name for name, shard in zip(names, shards, strict=True) for piece in shard}
        total = sum(piece.entry.nbytes for shard in shards for piece in shard)
        write_text(path / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=2))
    sync_folder(path)
