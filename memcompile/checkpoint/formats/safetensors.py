"""export_safetensors() writes a model, or the model of a checkpoint, as Hugging Face stores models, and
import_safetensors() loads that, and what Hugging Face wrote, into a model sharded in any way.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from memcompile.checkpoint._torch import local_part
from memcompile.checkpoint.formats.dcp_files import MODEL, PIECE, Part, StepReader
from memcompile.checkpoint.ranks import Ranks
from memcompile.checkpoint.saving import ready
from memcompile.checkpoint.state.model_state import ModelTarget, Plans, SavedModel, model_state, plans_of, root_of
from memcompile.checkpoint.steps import folders
from memcompile.checkpoint.steps.manifest import is_plain_name
from memcompile.checkpoint.steps.whole_steps import whole_step
from memcompile.common.files import sync_folder, write_text
from memcompile.common.progress import Progress
from memcompile.common.sites import VALUES_NAME
from memcompile.errors import CheckpointError
from memcompile.runtime.state_dicts import plan_in
from memcompile.runtime.storage.safetensors_format import (
    NAMES,
    Entry,
    FormatError,
    append,
    encoded_header,
    mapped_file,
    row_blocks,
)

INDEX = "model.safetensors.index.json"
PLANS = "memcompile"  # in the metadata of each file
BUFFER = PIECE  # bytes that are read, copied, or gathered from the ranks, at once
_PIECE = re.compile(r"(.*)\[(\d+):(\d+)\]")

# Returns rows of the tensor `name`, from `first` on, of a shape and dtype, on rank 0; all ranks call it.
Collect = Callable[[str, int, tuple[int, ...], torch.dtype], Tensor]


class Piece(NamedTuple):
    """Rows of a tensor that are one tensor of a file: all of them, unless it is larger than a file may be."""

    entry: Entry  # of the file; its name is `values[1000:2000]` where it is not the whole tensor
    source: str  # the name of the whole tensor
    start: int  # the first row


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
    collect: Collect
    if isinstance(source, nn.Module):
        state, plans = ranks.each("collect the state", functools.partial(_state_and_plans, source))
        objects = [name for name, value in state.items() if not isinstance(value, Tensor)]
        collect = functools.partial(_collect_from_model, state, ranks)
    else:
        manifest = whole_step(ranks, Path(source), step, False, bar)
        folder, plans = folders.step_folder(Path(source), manifest.step), manifest.plans
        reader = ranks.each("read the checkpoint", lambda: StepReader(folder, manifest.files))
        state, objects = reader.tensors(MODEL), reader.objects(MODEL)
        collect = functools.partial(_collect_from_step, reader, ranks)
    target, tensors = Path(path), {name: value for name, value in state.items() if isinstance(value, Tensor)}
    entries = [Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    ranks.first("prepare the folder", lambda: _prepare(target, entries, objects))
    shards = _shards(entries, max_shard_size)
    unfinished = {name: target / f".{name}.memcompile" for name in shards}  # names that only an export takes
    try:
        with bar.start("exporting", sum(entry.nbytes for entry in entries)):
            for name, pieces in shards.items():
                _write_shard(unfinished[name], pieces, collect, {"format": "pt", PLANS: json.dumps(plans)}, ranks, bar)
        ranks.first("finish the export", lambda: _finish(target, shards, unfinished))
    finally:
        for file in unfinished.values() if ranks.rank == 0 else ():  # where it failed
            file.unlink(missing_ok=True)


def _state_and_plans(model: nn.Module) -> tuple[dict[str, Any], Plans]:
    root = root_of(model)
    return model_state(root), plans_of(root)


def _collect_from_step(
    reader: StepReader, ranks: Ranks, name: str, first: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    def read() -> Tensor:
        if ranks.rank != 0:
            return torch.empty(0, device="cpu")
        block = torch.empty(shape, dtype=dtype, device="cpu")
        offsets = (first, *(0 for _ in shape[1:])) if shape else ()
        reader.read({MODEL + name: Part(offsets, block)}, Progress(False))
        return block

    return ranks.each("read the checkpoint", read)


def _collect_from_model(
    state: Mapping[str, Any], ranks: Ranks, name: str, first: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Of a sharded tensor, the ranks' parts are added up where others have zeros, as bytes, which changes none."""
    tensor = state[name]
    sharded = isinstance(tensor, DTensor) and bool(shape)

    def copied() -> Tensor:
        if not sharded and ranks.rank != 0:
            return torch.empty(0, device="cpu")
        block = torch.zeros(shape, dtype=dtype, device="cpu")
        offsets, local = local_part(tensor)
        if not sharded:
            return block.copy_(local[first : first + len(block)] if shape else local)
        coordinate = tensor.device_mesh.get_coordinate() or ()
        copies = [at for at, p in zip(coordinate, tensor.placements, strict=False) if isinstance(p, Replicate)]
        if coordinate and not any(copies):  # of ranks that have the same part, the first
            start = first - offsets[0]  # in the local part
            rows = local[max(0, start) : max(0, start + len(block))]
            at = (max(0, -start), *offsets[1:])
            block[tuple(slice(o, o + size) for o, size in zip(at, rows.shape, strict=True))] = rows
        return block

    block = ranks.each("collect rows of the model", copied)
    if sharded:
        dist.reduce(block.view(-1).view(torch.uint8), dst=0, group=ranks.group)
    return block


def _shards(entries: Sequence[Entry], most: int) -> dict[str, list[Piece]]:
    """Which pieces each file has, by its name, of at most so many bytes unless one row has more."""
    shards: list[list[Piece]] = [[]]
    room = most
    for name, shape, dtype in entries:
        for first, end in row_blocks(shape, dtype, most):
            part = (end - first, *shape[1:]) if shape else shape
            piece = Entry(name if part == shape else f"{name}[{first}:{end}]", part, dtype)
            if shards[-1] and piece.nbytes > room:
                shards.append([])
                room = most
            shards[-1].append(Piece(piece, name, first))
            room -= piece.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{number:05}-of-{len(shards):05}.safetensors": shard for number, shard in enumerate(shards, 1)}


def _prepare(path: Path, entries: Sequence[Entry], objects: Sequence[str]) -> None:
    if objects:
        raise CheckpointError(f"safetensors store only tensors, and these are none: {', '.join(objects)}")
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


def _write_shard(
    path: Path, pieces: list[Piece], collect: Collect, metadata: dict[str, str], ranks: Ranks, bar: Progress
) -> None:
    """All ranks go through the same rows at the same time; rank 0 writes what it reads, or what they send."""
    pieces = sorted(pieces, key=lambda piece: -piece.entry.dtype.itemsize)  # so that each tensor is aligned
    header = encoded_header([piece.entry for piece in pieces], metadata)
    ranks.first("write", lambda: path.write_bytes(header))
    for (_, shape, dtype), source, start in pieces:
        for first, end in row_blocks(shape, dtype, BUFFER):
            block = collect(source, start + first, (end - first, *shape[1:]) if shape else (), dtype)
            ranks.first("write", functools.partial(append, path, block))
            bar.add(block.nbytes)


def _finish(path: Path, shards: Mapping[str, list[Piece]], unfinished: Mapping[str, Path]) -> None:
    (path / INDEX).unlink(missing_ok=True)  # of an export whose files are gone
    for name, file in unfinished.items():
        with file.open("rb+") as written:
            os.fsync(written.fileno())
        file.rename(path / name)
    if len(shards) > 1:
        files = {piece.entry.name: name for name, shard in shards.items() for piece in shard}
        total = sum(piece.entry.nbytes for shard in shards.values() for piece in shard)
        write_text(path / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=2))
    sync_folder(path)


def import_safetensors(
    path: str | os.PathLike, model: nn.Module, *, strict: bool = True, progress: bool | None = None
) -> None:
    """Loads a model from safetensors, each rank its own shards. Every rank calls it.

    Args:
        path: a file, or a folder of what `export_safetensors` or Hugging Face wrote.
        model: planned as it was saved, sharded or not.
        strict: whether the names must be those of the model.
        progress: whether rank 0 shows a bar of its bytes; None shows one from a GiB on.

    Raises:
        CheckpointError: on all ranks: a file is missing or cut off, or names or sizes are not those of the model.
        PlanError: on all ranks: the model has another memory, or none.
    """
    ranks, bar = ready(progress)
    source = Path(path)

    saved = ranks.each("read the headers", lambda: saved_export(source))
    target = ranks.each("compare the files with the model", lambda: ModelTarget(model, saved, strict, bar))

    def copy() -> None:
        saved.read(target.parts, bar)
        target.finish({})

    ranks.each("read the files", copy)


def mapped_export(path: Path) -> tuple[Plans, dict[str, Tensor]]:
    """The plans and the tensors of a file, or of the files of a folder, mapped into memory: they are read when used.

    Raises:
        CheckpointError: a file is missing, is no safetensors file, or was cut off.
    """
    plans: Plans = {}
    tensors: dict[str, Tensor] = {}
    for file in _files(path):
        try:
            metadata, found = mapped_file(file)
            plans.update(json.loads(metadata.get(PLANS, "{}")))
        except FileNotFoundError:
            raise CheckpointError(f"{file} is missing") from None
        except (FormatError, OSError, RecursionError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file} is no safetensors file, or is damaged: {error}") from error
        tensors.update(found)
    if not plans:  # a state dict, as `safetensors.torch.save_file` stores it: the layers have the plan
        tables = [name for name in tensors if f".{name}".endswith(f".{VALUES_NAME}")] or [VALUES_NAME]
        for prefix in (name.removesuffix(VALUES_NAME) for name in tables):
            plan = plan_in({name: tensor for name, tensor in tensors.items() if name.startswith(prefix)})
            plans.update({} if plan is None else {prefix.removesuffix("."): plan})
    return plans, tensors


def saved_export(path: Path) -> SavedModel:
    """What `export_safetensors` or Hugging Face wrote.

    Raises:
        CheckpointError: as `mapped_export`, or a piece of a tensor is missing.
    """
    plans, tensors = mapped_export(path)
    pieces: dict[str, list[tuple[int, Tensor]]] = {}  # of each tensor, each with its first row
    for name, tensor in tensors.items():
        match = _PIECE.fullmatch(name)
        whole, start = (match[1], int(match[2])) if match else (name, 0)
        pieces.setdefault(whole, []).append((start, tensor))
    shapes: dict[str, Tensor] = {}
    for name, of_tensor in pieces.items():
        row = 0
        for start, piece in sorted(of_tensor, key=lambda each: each[0]):
            if piece.dtype is not of_tensor[0][1].dtype or piece.shape[1:] != of_tensor[0][1].shape[1:]:
                raise CheckpointError(f"{path}: the pieces of {name} are of several dtypes or widths")
            if start != row:
                raise CheckpointError(
                    f"{path} lacks {name}[{row}:{start}]: a file of it is missing, or of another export"
                )
            row += len(piece) if piece.dim() else 1
        size = (row, *piece.shape[1:]) if piece.dim() else ()
        shapes[name] = torch.empty(size, dtype=piece.dtype, device="meta")

    def read(parts: Mapping[str, Part], progress: Progress) -> None:
        with progress.start("loading", sum(part.tensor.nbytes for part in parts.values())):
            for name, part in parts.items():
                for start, piece in pieces[name]:
                    _copy(part, start, piece, progress)

    return SavedModel(path, f"memcompile.checkpoint.config({str(path)!r})", plans, shapes, [], read)


def _copy(part: Part, start: int, piece: Tensor, progress: Progress) -> None:
    """Copies what the part has of the rows from `start` on."""
    offsets, local = part
    if not offsets:
        local.copy_(piece)
        progress.add(local.nbytes)
        return
    for dim in range(1, piece.dim()):
        piece = piece.narrow(dim, min(offsets[dim], piece.shape[dim]), local.shape[dim])
    first, last = max(start, offsets[0]), min(start + len(piece), offsets[0] + len(local))
    for row, end in row_blocks((max(0, last - first), *local.shape[1:]), local.dtype, BUFFER):
        rows = local[first + row - offsets[0] : first + end - offsets[0]]
        rows.copy_(piece[first + row - start : first + end - start])
        progress.add(rows.nbytes)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / INDEX
    if not index.is_file():
        return [path / "model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if elsewhere := [name for name in names if not is_plain_name(name)]:
            raise ValueError(f"{elsewhere[0]!r} is no name of a file in its folder")
        return [path / name for name in names]
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{index} is damaged: {type(error).__name__}: {error}") from error
