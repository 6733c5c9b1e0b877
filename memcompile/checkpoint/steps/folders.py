"""The folder of a job's checkpoints: `step_N/`, `LATEST`, and how they change so that a kill at any time loses nothing.

step_N.tmp/     is being written; a leftover of a killed save is removed by the next one
step_N/         is finished: renamed when all of it is on the disk
step_N.old/     was replaced by another save of the same step; put back where that one was killed half way
*.trash/        is being deleted
LATEST          names the last one that was saved
"""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

from memcompile.checkpoint.steps.manifest import Manifest
from memcompile.errors import CheckpointError

LATEST = "LATEST"
_PATIENCE = 1.0  # seconds
_STEP = re.compile(r"step_(\d+)")


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step}"


def being_written(folder: Path, step: int) -> Path:
    return folder / f"step_{step}.tmp"


def saved_steps(folder: Path) -> list[int]:
    """The finished steps, the last save first; those whose manifest cannot be read come last."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _STEP.fullmatch(path.name)
        if match and path.is_dir():
            step = int(match[1])
            found.append((_number(path), step))
    return [step for _, step in sorted(found, reverse=True)]


def saved_before(folder: Path, step: int | None, latest: bool) -> list[int]:
    """Steps that may stand in for one that cannot be loaded, the last save first: those that were saved before it.
    Where its manifest does not tell when that was, all others stand in for the `latest`, and lower ones for another.
    """
    others = [other for other in saved_steps(folder) if other != step]
    number = 0 if step is None else _number(step_folder(folder, step))
    if number:
        return [other for other in others if _number(step_folder(folder, other)) < number]
    return [other for other in others if latest or (step is not None and other < step)]


def next_number(folder: Path) -> int:
    """The number of the next save."""
    return 1 + max([0, *(_number(step_folder(folder, step)) for step in saved_steps(folder))])


def latest_step(folder: Path) -> int:
    """The step that LATEST names.

    Raises:
        CheckpointError: there is no such file, it names no step, or one that is not there.
    """
    path = folder / LATEST
    try:
        name = path.read_text().strip()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    match = _STEP.fullmatch(name)
    if match is None:
        raise CheckpointError(f"{path} is damaged: it names {name!r}, and should name a step_N")
    if not (folder / name).is_dir():
        raise CheckpointError(f"{path} names {name}, which is missing")
    return int(match[1])


def recover_to_read(folder: Path) -> None:
    """As `recover`, by who does not save: another process may be about to finish the step, which takes no time."""
    if any(not old.with_suffix("").exists() for old in folder.glob("step_*.old")):
        time.sleep(_PATIENCE)
        for old in folder.glob("step_*.old"):
            if not old.with_suffix("").exists():
                old.rename(old.with_suffix(""))
                sync(folder)


def recover(folder: Path) -> None:
    """Puts back the step that a save was replacing when it was killed."""
    for old in folder.glob("step_*.old"):
        target = old.with_suffix("")
        if target.exists():
            remove(old)
        else:
            old.rename(target)
            sync(folder)


def begin(folder: Path, step: int) -> Path:
    """An empty folder to write a step into; what killed saves left behind is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    recover(folder)
    for left in (*folder.glob("step_*.tmp"), *folder.glob("*.trash")):
        remove(left)
    new = being_written(folder, step)
    new.mkdir()
    return new


def publish(folder: Path, step: int) -> None:
    """Finishes the step that is being written, of which every file is on the disk."""
    target, replaced = step_folder(folder, step), folder / f"step_{step}.old"
    sync(being_written(folder, step))
    if target.exists():
        target.rename(replaced)
    being_written(folder, step).rename(target)
    sync(folder)
    write(folder / f"{LATEST}.tmp", f"{target.name}\n")
    os.replace(folder / f"{LATEST}.tmp", folder / LATEST)
    sync(folder)
    if replaced.exists():
        remove(replaced)


def delete_old(folder: Path, step: int, keep: int) -> None:
    """Deletes all but the `keep` last saves; never that of `step`, the last one, or one whose age is not known."""
    for old in saved_steps(folder)[keep:]:
        if old != step and _number(step_folder(folder, old)):
            remove(step_folder(folder, old))


def remove(path: Path) -> None:
    """Deletes a folder; what is left of it, where that is interrupted, is called trash."""
    if path.suffix != ".trash":
        trash = path.with_name(f"{path.name}.trash")
        if trash.exists():
            shutil.rmtree(trash)
        path = path.rename(trash)
    shutil.rmtree(path)


def write(path: Path, text: str) -> None:
    """Writes a small file, onto the disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Has the names in a folder on the disk."""
    if os.name == "nt":  # where a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _number(step: Path) -> int:
    try:
        return Manifest.read(step).number
    except CheckpointError:
        return 0
