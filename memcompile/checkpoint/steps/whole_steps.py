"""Which saved steps are whole, that is, as they were written, and which one is loaded."""

from __future__ import annotations

import logging
from pathlib import Path

from memcompile.checkpoint.ranks import Ranks
from memcompile.checkpoint.steps import folders
from memcompile.checkpoint.steps.manifest import NAME, Manifest, problems_of_files, record_of
from memcompile.common.progress import Progress
from memcompile.errors import CheckpointError

log = logging.getLogger(__name__)


def whole_step(ranks: Ranks, folder: Path, step: int | None, fall_back: bool, progress: Progress) -> Manifest:
    """The manifest of the step to load, which is whole. All ranks call this.

    Args:
        step: None is the one that LATEST names.
        fall_back: if it is damaged, takes the newest whole one before it, with a warning.

    Raises:
        CheckpointError: there is none, or it is damaged: what was expected and found, and which steps are whole.
    """
    wanted, problem = ranks.first("find the step", lambda: _wanted(folder, step))
    good: list[int] = []
    if wanted is not None:
        try:
            return _checked(ranks, folder, wanted, progress)
        except CheckpointError as error:
            problem = str(error)
    named = wanted if step is None else step
    for earlier in ranks.first("list the steps", lambda: folders.saved_before(folder, named, step is None)):
        try:
            manifest = _checked(ranks, folder, earlier, progress)
        except CheckpointError as error:
            if ranks.rank == 0:
                log.warning("step %d is damaged too: %s", earlier, error)
            continue
        if fall_back:
            if ranks.rank == 0:
                log.warning("%s; step %d is loaded, the newest that is not damaged", problem, earlier)
            return manifest
        good.append(earlier)
    fix = f"No step before it in {folder} can be loaded"
    if good:
        steps = ", ".join(map(str, good))
        fix = f"Not damaged before it: {steps}. Load with step={good[0]}, or with fall_back=True"
    raise CheckpointError(f"{problem}. {fix}")


def _wanted(folder: Path, step: int | None) -> tuple[int | None, str]:
    """The step to load, or why there is none."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing: no checkpoint was saved there")
    folders.recover_to_read(folder)
    if step is None:
        try:
            return folders.latest_step(folder), ""
        except CheckpointError as error:
            if not folders.saved_steps(folder):
                of_step = (folder / NAME).is_file()
                hint = f": it is a step of {folder.parent}, give that and step=" if of_step else ""
                raise CheckpointError(f"{folder} has no checkpoint{hint}") from error
            return None, str(error)
    if not folders.step_folder(folder, step).is_dir():
        there = ", ".join(map(str, sorted(folders.saved_steps(folder)))) or "none"
        return None, f"{folder} has no step {step} (it has {there})"
    return step, ""


def _checked(ranks: Ranks, folder: Path, step: int, progress: Progress) -> Manifest:
    """The manifest of a step, which is whole; each rank reads some of the files. Raises CheckpointError, which names
    each that is not, what was expected and what found.
    """
    path = folders.step_folder(folder, step)
    manifest = ranks.first("read the manifest", lambda: Manifest.read(path))
    by_size = sorted(manifest.files, key=lambda name: manifest.files[name].size)
    mine = {name: manifest.files[name] for name in by_size[ranks.rank :: ranks.size]}
    with progress.start("verifying", sum(record.size for record in mine.values())):
        found = ranks.gather("verify", lambda: problems_of_files(path, mine, progress.add))
    problems = {name: problem for each in found for name, problem in each.items()}
    if problems:
        mixed = ranks.first("compare", lambda: _of_others(folder, step, list(problems)))
        raise CheckpointError("; ".join({**problems, **mixed}.values()))
    return manifest


def _of_others(folder: Path, step: int, names: list[str]) -> dict[str, str]:
    """Of files that are not as they were written, those that another save wrote."""
    files = [folders.step_folder(folder, step) / name for name in names]
    records = {record_of(file): file for file in files if file.is_file()}
    found: dict[str, str] = {}
    for other in folders.saved_steps(folder):
        try:
            written = Manifest.read(folders.step_folder(folder, other)).files.values() if other != step else ()
        except CheckpointError:
            continue
        for file in (records[record] for record in written if record in records):
            found[file.name] = f"{file} is of step {other}, not of step {step}: files of two steps are mixed"
    return found
