"""import_safetensors(): loads what export_safetensors() or Hugging Face wrote, into a model sharded in any way."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata

from memcompile.checkpoint._torch import local_part
from memcompile.checkpoint.asynchronous import ready
from memcompile.checkpoint.formats.exporting import INDEX, PLANS
from memcompile.checkpoint.formats.reading import Part
from memcompile.checkpoint.state.mapped import check_mapped
from memcompile.checkpoint.state.model_state import (
    Plans,
    check_entries,
    check_plans,
    model_state,
    root_of,
    run_load_hooks,
    targets,
)
from memcompile.common.progress import Progress
from memcompile.common.sites import VALUES_NAME
from memcompile.errors import CheckpointError
from memcompile.runtime.state_dicts import plan_in
from memcompile.runtime.storage.safetensors_format import FormatError, mapped, read_header, tensor_in

Pieces = list[tuple[int, Tensor]]  # of a tensor, each with its first row
_PIECE = re.compile(r"(.*)\[(\d+):(\d+)\]")
_BUFFER = 2**26  # bytes that are copied at once


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

    def prepare() -> tuple[nn.Module, dict[str, Any], dict[str, Pieces], dict[str, Tensor]]:
        root, export = root_of(model), Export(source)
        moved = check_plans(export.plans, root, f"memcompile.checkpoint.config({str(source)!r})")
        own, pieces = model_state(root), {moved.get(name, name): found for name, found in export.pieces().items()}
        saved = {name: _metadata(found) for name, found in pieces.items()}
        check_entries(saved, [], own, strict, source)
        check_mapped(root, saved, lambda name, part: _read(part, pieces[name], Progress(False)), source, bar)
        return root, own, pieces, targets(saved, own, root)

    root, own, pieces, into = ranks.each("compare the files with the model", prepare)

    def copy() -> None:
        bar.start("loading", sum(local_part(tensor)[1].nbytes for tensor in into.values()))
        for name, tensor in into.items():
            _read(Part(*local_part(tensor)), pieces[name], bar)
        bar.close()
        run_load_hooks(root, own, strict)

    ranks.each("read the files", copy)


class Export:
    """The files of an export, mapped into memory: a tensor is read when it is used, and must not be written to.

    Attributes:
        tensors: by their names in the files.
        plans: of every memory, by the name of the module that has its table.

    Raises:
        CheckpointError: a file is missing, is no safetensors file, or was cut off.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.tensors: dict[str, Tensor] = {}
        self.plans: Plans = {}
        for file in _files(path):
            self._add(file)
        if not self.plans:  # a state dict, as `safetensors.torch.save_file` stores it: the layers have the plan
            tables = [name for name in self.tensors if f".{name}".endswith(f".{VALUES_NAME}")] or [VALUES_NAME]
            for prefix in (name.removesuffix(VALUES_NAME) for name in tables):
                found = plan_in({name: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)})
                self.plans.update({} if found is None else {prefix.removesuffix("."): found})

    def pieces(self) -> dict[str, Pieces]:
        """Of each tensor its pieces in order.

        Raises:
            CheckpointError: one is missing.
        """
        found: dict[str, Pieces] = {}
        for name, tensor in self.tensors.items():
            match = _PIECE.fullmatch(name)
            found.setdefault(match[1] if match else name, []).append((int(match[2]) if match else 0, tensor))
        for name, pieces in found.items():
            pieces.sort(key=lambda piece: piece[0])
            row = 0
            for start, piece in pieces:
                if start != row:
                    raise CheckpointError(
                        f"{self._path} lacks {name}[{row}:{start}]: a file of it is missing, or of another export"
                    )
                row += len(piece) if piece.dim() else 1
        return found

    def _add(self, file: Path) -> None:
        try:
            header, mapping = read_header(file), mapped(file)
            self.plans.update(json.loads(header.metadata.get(PLANS, "{}")))
        except FileNotFoundError:
            raise CheckpointError(f"{file} is missing") from None
        except (FormatError, OSError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file} is no safetensors file, or is damaged: {error}") from error
        for entry, start in zip(header.entries, header.starts, strict=True):
            self.tensors[entry.name] = tensor_in(mapping, entry, start)


def _read(part: Part, pieces: Pieces, bar: Progress) -> None:
    """Copies a part of a tensor that lies in these pieces."""
    for start, piece in pieces:
        _copy(part, start, piece, bar)


def _copy(part: Part, start: int, piece: Tensor, bar: Progress) -> None:
    """Copies what the part has of the rows from `start` on."""
    offsets, local = part.offsets, part.tensor
    if not offsets:
        local.copy_(piece)
        bar.add(local.nbytes)
        return
    for dim in range(1, piece.dim()):
        piece = piece.narrow(dim, min(offsets[dim], piece.shape[dim]), local.shape[dim])
    first, last = max(start, offsets[0]), min(start + len(piece), offsets[0] + len(local))
    step = max(1, _BUFFER * len(local) // max(1, local.nbytes))
    for row in range(first, last, step):
        end = min(row + step, last)
        rows = local[row - offsets[0] : end - offsets[0]]
        rows.copy_(piece[row - start : end - start])
        bar.add(rows.nbytes)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / INDEX
    if not index.is_file():
        return [path / "model.safetensors"]
    try:
        return [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{index} is damaged: {type(error).__name__}: {error}") from error


def _metadata(pieces: Pieces) -> TensorStorageMetadata:
    """Of the whole, as in a checkpoint."""
    first, (start, last) = pieces[0][1], pieces[-1]
    size = torch.Size([start + len(last), *last.shape[1:]]) if last.dim() else last.shape
    return TensorStorageMetadata(TensorProperties(first.dtype), size, [])
