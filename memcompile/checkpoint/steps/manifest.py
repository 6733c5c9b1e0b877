"""The manifest of a saved step: what it is, and a record of each of its files. It is written last."""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import torch

from memcompile.checkpoint.steps.sums import FileRecord
from memcompile.errors import CheckpointError
from memcompile.version import __version__

NAME = "MANIFEST.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a saved step is.

    Attributes:
        step: of the training.
        number: of the save in its folder: a later one has a higher number, even if its step is lower.
        save_id: of the save; DCP's metadata have it too.
        world_size: how many ranks wrote it.
        plans: of every memory, by the name of the module that has its table ("" is the model).
        files: by name.
        versions: of torch and memcompile.
    """

    step: int
    number: int
    save_id: str
    world_size: int
    plans: dict[str, dict[str, Any]]
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
            entries = json.loads(path.read_text())
            found, format_ = entries.pop("crc32"), entries.pop("format")
            if format_ > FORMAT:
                raise CheckpointError(f"{path} has format {format_}, this memcompile reads {FORMAT}: upgrade it")
            expected = _sum({"format": format_, **entries})
            if found != expected:
                raise CheckpointError(f"{path} is damaged: its CRC-32 is {expected}, and was written as {found}")
            files = {name: FileRecord.from_json(entry) for name, entry in entries.pop("files").items()}
            manifest = cls(files=files, **entries)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: {step_folder} is no finished checkpoint") from None
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        if step_folder.stem != f"step_{manifest.step}":
            raise CheckpointError(f"{path} is of step {manifest.step}: files of two steps are mixed")
        return manifest


def _sum(entries: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(entries, sort_keys=True).encode()):08x}"
