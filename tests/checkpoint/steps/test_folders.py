"""The folder of a job: how many saves are kept, and what killed ones leave behind."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from pathlib import Path

import pytest
from torch import nn

import memcompile
from memcompile import CheckpointError
from memcompile.checkpoint import load, save, steps
from memcompile.checkpoint.steps import folders
from memcompile.common.progress import LONG, Progress


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(2, 2)


def save_steps(folder: Path, model: nn.Module, *numbers: int, **options: int | None) -> None:
    for step in numbers:
        nn.init.constant_(model.weight, step)
        save(folder, model, step=step, **options)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_last_saves_are_kept(model, tmp_path):
    save_steps(tmp_path, model, 1, 2, 3, 4)
    assert names(tmp_path) == {"step_2", "step_3", "step_4", "LATEST"}
    save_steps(tmp_path, model, 5, keep=1)
    assert names(tmp_path) == {"step_5", "LATEST"}
    save_steps(tmp_path, model, 6, 7, 8, 9, keep=None)
    assert steps(tmp_path) == [9, 8, 7, 6, 5]


def test_a_training_that_went_back(model, tmp_path):
    """What is newest is what was saved last, not the highest step."""
    save_steps(tmp_path, model, 100, 200, 300)
    load(tmp_path, model, step=100)
    save_steps(tmp_path, model, 110)
    assert steps(tmp_path) == [110, 300, 200]
    assert load(tmp_path, model).step == 110
    (tmp_path / "step_110" / "__0_0.distcp").unlink()
    assert load(tmp_path, model, fall_back=True).step == 300
    save_steps(tmp_path, model, 110, 120)
    assert steps(tmp_path) == [120, 110, 300]


def test_a_folder_whose_name_is_nearly_that_of_a_step(model, tmp_path):
    save_steps(tmp_path, model, 1, 2)
    shutil.copytree(tmp_path / "step_2", tmp_path / "step_02")
    save_steps(tmp_path, model, 3, keep=2)
    assert steps(tmp_path) == [3, 2]
    assert names(tmp_path) == {"step_02", "step_2", "step_3", "LATEST"}


def test_a_step_that_is_saved_again_is_replaced(model, tmp_path):
    save_steps(tmp_path, model, 1, 2)
    nn.init.constant_(model.weight, 7.0)
    save(tmp_path, model, step=1)
    assert names(tmp_path) == {"step_1", "step_2", "LATEST"}
    nn.init.zeros_(model.weight)
    assert load(tmp_path, model).step == 1
    assert (model.weight == 7).all()


def test_what_killed_saves_left_is_removed(model, tmp_path):
    save_steps(tmp_path, model, 1, 2)
    own = tmp_path / ".memcompile"
    for name in ("step_5.tmp", "step_6.tmp", "step_1.old"):
        shutil.copytree(tmp_path / "step_1", own / name)
    (tmp_path / "step_1").rename(own / "step_1.gone")
    (own / "LATEST").write_text("step_6")
    save_steps(tmp_path, model, 3)
    assert names(tmp_path) == {"step_1", "step_2", "step_3", "LATEST"}  # the older of two that were step 1 is back
    save_steps(tmp_path, model, 4, keep=1)
    assert names(tmp_path) == {"step_4", "LATEST"}


def test_what_others_put_there_is_left(model, tmp_path):
    """Copies by hand, folders and links with the endings of ours, files in a step's folder."""
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    save_steps(folder, model, 1)
    for name in ("step_1.old", "step_1.tmp", "step_9.old", "step_9.trash", "elsewhere"):
        shutil.copytree(folder / "step_1", (folder if "." in name else tmp_path) / name)
    for name in ("notes.trash", ".trash", "step_final.tmp", "step_5.tmp", "step_6"):
        (folder / name).mkdir()
        (folder / name / "notes").touch()
    for name in ("step_3", "x.trash", "LATEST.tmp", "step_x.old"):
        (folder / name).touch()
    for name in ("a.trash", "step_7.tmp", "step_8.old", "step_2"):
        (folder / name).symlink_to(elsewhere)
    (folder / "broken.trash").symlink_to(tmp_path / "nowhere")
    before = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    save_steps(folder, model, 4, 5, 6, 7, keep=2)
    after = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    assert {path for path in before - after if path.parts[:2] != ("run", "step_1")} == set()
    assert names(elsewhere) == names(folder / "step_7")
    assert steps(folder) == [7, 6, 2]  # the link is kept, whatever it leads to
    assert (folder / "step_6" / "notes").exists()


def test_files_of_others_in_a_step_outlive_it(model, tmp_path):
    save_steps(tmp_path, model, 1, 2)
    for step in (1, 2):
        (tmp_path / f"step_{step}" / "scores").mkdir()
        (tmp_path / f"step_{step}" / "scores" / "recall.txt").write_text("0.9")
    save_steps(tmp_path, model, 2, keep=1)
    assert names(tmp_path) == {"step_1", "step_2", "LATEST"}
    assert names(tmp_path / "step_1") == {"scores"}
    assert (tmp_path / "step_2" / "scores" / "recall.txt").read_text() == "0.9"
    assert steps(tmp_path) == [2]
    assert load(tmp_path, model).step == 2


def test_steps_that_links_lead_to(model, tmp_path):
    """Steps on another disk, and a link that leads to nothing."""
    folder, disk = tmp_path / "run", tmp_path / "disk"
    save_steps(folder, model, 1, 2, 3)
    (folder / "step_1").rename(disk)
    (folder / "step_1").symlink_to(disk)
    (folder / "step_4").symlink_to(tmp_path / "nowhere")
    assert load(folder, model, step=1).step == 1
    kept = names(disk)
    save_steps(folder, model, 4, keep=1)
    assert names(folder) == {"step_1", "step_4", "LATEST"}
    save_steps(folder, model, 1, keep=1)
    assert names(folder) == {"step_1", "LATEST"}
    assert names(disk) == kept
    assert not (folder / "step_1").is_symlink()


def test_a_file_in_the_place_of_a_step(model, tmp_path):
    (tmp_path / "step_3").write_text("notes")
    with pytest.raises(CheckpointError, match=r"step_3 is a file, which no save wrote: move it"):
        save_steps(tmp_path, model, 3)
    assert (tmp_path / "step_3").read_text() == "notes"


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("version", ["earlier", "now"])
def test_a_replacement_that_was_killed_half_way(version, read, model, tmp_path):
    save_steps(tmp_path, model, 1)
    shutil.copytree(tmp_path / "step_1", tmp_path / "before")
    save_steps(tmp_path, model, 1)
    own = tmp_path / ("" if version == "earlier" else ".memcompile")
    own.mkdir(exist_ok=True)
    (tmp_path / "step_1").rename(own / "step_1.tmp")
    (tmp_path / "before").rename(own / "step_1.old")
    if not read:
        save_steps(tmp_path, model, 2)
    assert load(tmp_path, model, step=1).step == 1
    assert "step_1" in names(tmp_path) and not (own / "step_1.old").exists()


def test_a_disk_that_refuses(model, tmp_path, monkeypatch):
    """An error while the step is finished, and one while old ones are deleted, which says that it is saved."""
    save_steps(tmp_path, model, 1)

    def refuse(*args: object) -> None:
        raise PermissionError("read-only")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        nn.init.constant_(model.weight, 7.0)
        with pytest.raises(CheckpointError, match=r"step 1 was not saved.*could not finish the step: PermissionError"):
            save(tmp_path, model, step=1)
    nn.init.zeros_(model.weight)
    assert load(tmp_path, model).step == 1
    assert (model.weight == 1).all()
    with monkeypatch.context() as patch:
        patch.setattr(folders, "_delete", refuse)
        with pytest.raises(CheckpointError, match="rank 0 could not delete old steps: PermissionError: read-only"):
            save(tmp_path, model, step=2, keep=1)
    assert load(tmp_path, model).step == 2
    save_steps(tmp_path, model, 3, keep=1)
    assert names(tmp_path) == {"step_3", "LATEST"}


def test_progress_is_shown_for_long_saves(model, tmp_path, capsys, monkeypatch, caplog):
    save(tmp_path, model, step=1)
    assert not capsys.readouterr().err
    save(tmp_path, model, step=1, progress=True)
    load(tmp_path, model, progress=True)
    shown = capsys.readouterr().err
    assert all(stage in shown for stage in ("saving: 100%", "verifying: 100%", "loading: 100%"))

    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    bar = Progress(True)
    with caplog.at_level(logging.INFO, "memcompile"):
        bar.start("saving", LONG)
        for _ in range(4):
            bar.add(LONG // 4)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("memcompile")]
    assert lines == [f"saving: {percent}% of 1.0 GiB" for percent in (20, 50, 70, 100)]


def test_the_subpackage_is_imported_when_it_is_used():
    assert memcompile.checkpoint.save is save
    with pytest.raises(AttributeError, match="no attribute 'checkpoints'"):
        memcompile.checkpoints  # noqa: B018
