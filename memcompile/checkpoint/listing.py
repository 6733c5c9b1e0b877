"""What a folder of checkpoints has: its steps, and the options of the memory. No model is needed."""

from __future__ import annotations

import os
from pathlib import Path

from memcompile.checkpoint.formats.importing import Export
from memcompile.checkpoint.state.model_state import decoded
from memcompile.checkpoint.steps import folders
from memcompile.checkpoint.steps.manifest import Manifest
from memcompile.config import MemoryConfig
from memcompile.errors import CheckpointError
from memcompile.runtime.state_dicts import config_of


def config(path: str | os.PathLike, *, step: int | None = None, part: str = "") -> MemoryConfig:
    """The options of the memory that was saved, for ``memcompile.plan(model, memory=...)``. One rank may call it alone.

    Args:
        path: a folder of checkpoints, or safetensors.
        step: of a folder of checkpoints; None is the last one that was saved.
        part: the name of a part of the model, where several have a memory.

    Raises:
        CheckpointError: there is no such step, its manifest is damaged, or it has no memory.
    """
    source = Path(path)
    if step is None and (source.is_file() or next(source.glob("*.safetensors"), None)):
        plans = Export(source).plans
    else:
        step = folders.latest_step(source) if step is None else step
        plans = Manifest.read(folders.step_folder(source, step)).plans
    inside = [name for name in plans if not part or f"{name}.".startswith(f"{part}.")]
    if len(inside) != 1:
        where, has = f" in {part!r}" if part else "", ", ".join(map(repr, plans))
        problem = f"several memories{where}" if inside else f"no memory{where}"
        raise CheckpointError(f"{source} has {problem}" + (f": it has one in each of {has}, give part=" if has else ""))
    return config_of(decoded(plans[inside[0]]))


def steps(folder: str | os.PathLike) -> list[int]:
    """The steps that were saved, the last save first; their files are not read. One rank may call it alone."""
    return folders.saved_steps(Path(folder))
