"""The folder of a job's checkpoints, and how it changes so that a kill at any time loses nothing.

step_N/                  is finished: it has this name when all of it is on the disk
LATEST                   names the last step that was saved
.memcompile/step_N.tmp   is being written; the next save removes what a killed one left
.memcompile/step_N.old   is being replaced by another save of the same step; a save that was killed in between is undone
.memcompile/step_N.gone  is being deleted

Only a save's own files are deleted: what is in `.memcompile`, and the files of steps that have the names of ours. Other
files that lie in a step stay in its folder.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

from memcompile.checkpoint.steps.manifest import NAME, Manifest
from memcompile.common.files import sync_folder, write_text
from memcompile.errors import CheckpointError

LATEST = "LATEST"
_OWN = ".memcompile"
_WAIT = 1.0  # seconds
_STEP = re.compile(r"step_(0|[1-9]\d*)")
_WRITTEN = re.compile(rf"__\d+_\d+\.distcp|\.metadata(\.tmp)?|{re.escape(NAME)}")  # files of a step


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step}"


def being_written(folder: Path, step: int) -> Path:
    return folder / _OWN / f"step_{step}.tmp"


def saved_steps(folder: Path) -> dict[int, int]:
    """The finished steps and the numbers of their saves, the last save first. Those whose manifest is damaged have the
    number 0.
    """
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _STEP.fullmatch(path.name)
        if match and (path / NAME).is_file():
            found.append((_number(path), int(match[1])))
    return {step: number for number, step in sorted(found, reverse=True)}


def saved_before(folder: Path, step: int | None, latest: bool) -> list[int]:
    """The steps to try where one cannot be loaded, the last save first: those that were saved before it. Where its
    manifest does not tell when that was, all others instead of the `latest`, and lower ones instead of another.
    """
    others = saved_steps(folder)
    before = 0 if step is None else others.pop(step, 0)
    if before:
        return [other for other, number in others.items() if number < before]
    return [other for other in others if latest or (step is not None and other < step)]


def latest_step(folder: Path) -> int:
    """The step that LATEST names; raises CheckpointError where it names none that is there."""
    path = folder / LATEST
    try:
        name = path.read_text().strip()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    match = _STEP.fullmatch(name) if len(name) < 32 else None
    if match is None:
        raise CheckpointError(f"{path} is damaged: it names {name[:99]!r}, and should name a step_N")
    if not (folder / name).is_dir():
        raise CheckpointError(f"{path} names {name}, which is missing")
    return int(match[1])


def recover_to_read(folder: Path) -> None:
    """As `recover`, for a process that does not save: another may be about to finish the step, which takes no time."""
    if _interrupted(folder):
        time.sleep(_WAIT)
        recover(folder)


def recover(folder: Path) -> None:
    """Puts back the step that a save was replacing when it was killed."""
    for old in _interrupted(folder):
        old.rename(folder / old.stem)
        sync_folder(folder)


def begin(folder: Path, step: int) -> int:
    """Makes an empty folder to write a step into, and removes what killed saves left; returns the number of the save.
    Raises CheckpointError where a file has the step's name.
    """
    target = step_folder(folder, step)
    if target.is_file() and not target.is_symlink():
        raise CheckpointError(f"{target} is a file, which no save wrote: move it to another place")
    (folder / _OWN).mkdir(parents=True, exist_ok=True)
    recover(folder)
    for left in (folder / _OWN).glob("step_*.*"):
        _delete(left, folder)
    being_written(folder, step).mkdir()
    return 1 + max([0, *saved_steps(folder).values()])


def publish(folder: Path, manifest: Manifest) -> None:
    """Finishes the step that is being written, of which every other file is on the disk."""
    target, new = step_folder(folder, manifest.step), being_written(folder, manifest.step)
    replaced = new.with_suffix(".old")
    write_text(new / NAME, manifest.text())
    sync_folder(new)
    if os.path.lexists(target):
        target.rename(replaced)
    new.rename(target)
    sync_folder(folder)
    write_text(folder / _OWN / LATEST, f"{target.name}\n")
    os.replace(folder / _OWN / LATEST, folder / LATEST)
    sync_folder(folder)
    if os.path.lexists(replaced):
        _delete(replaced, folder)
    _tidy(folder)


def delete_old(folder: Path, step: int, keep: int) -> None:
    """Deletes all but the `keep` last saves; never that of `step`, one whose age is not known, or one that a symbolic
    link leads to, which no save made.
    """
    for old, number in list(saved_steps(folder).items())[keep:]:
        path = step_folder(folder, old)
        if old != step and number and not path.is_symlink():
            (folder / _OWN).mkdir(exist_ok=True)
            _delete(path.rename(folder / _OWN / f"{path.name}.gone"), folder)
    _tidy(folder)


def discard(folder: Path, step: int) -> None:
    """Deletes what was written of a step that could not be saved, and puts back the step that it was to replace."""
    target, new = step_folder(folder, step), being_written(folder, step)
    if os.path.lexists(new.with_suffix(".old")) and os.path.lexists(target):
        target.rename(new)
    shutil.rmtree(new, ignore_errors=True)  # the error that made the save fail is the one to tell
    recover(folder)


def _interrupted(folder: Path) -> list[Path]:
    """Steps that have no name because a save that was replacing them was killed."""
    ours = (folder / _OWN).glob("step_*.old")
    # Earlier versions had them in the folder itself, where users may have copies, and left the later save there too.
    theirs = (old for old in folder.glob("step_*.old") if 0 < _number(old) < _number(old.with_suffix(".tmp")))
    return [old for old in (*ours, *theirs) if not os.path.lexists(folder / old.stem)]


def _delete(path: Path, folder: Path) -> None:
    """Deletes a folder of `.memcompile`; files of others, which lay in a finished step, go back into a folder of its
    name.
    """
    if path.is_symlink():
        path.unlink()
    elif path.suffix == ".tmp":
        shutil.rmtree(path)
    else:
        step = folder / path.stem
        for entry in path.iterdir():
            if _WRITTEN.fullmatch(entry.name):
                entry.unlink()
            elif not os.path.lexists(step / entry.name):
                step.mkdir(exist_ok=True)
                entry.rename(step / entry.name)
        if not any(path.iterdir()):
            path.rmdir()


def _tidy(folder: Path) -> None:
    own = folder / _OWN
    if own.is_dir() and not any(own.iterdir()):
        own.rmdir()


def _number(step: Path) -> int:
    try:
        return Manifest.read(step).number
    except CheckpointError:
        return 0
