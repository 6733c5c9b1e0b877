"""The folder of a job: how many saves are kept, and what killed ones leave behind."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import pytest
from torch import nn

import memcompile
from memcompile import CheckpointError
from memcompile.checkpoint import load, save, steps
from memcompile.checkpoint.progress import LONG, Progress
from memcompile.checkpoint.steps import folders


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


def test_a_step_that_is_saved_again_is_replaced(model, tmp_path):
    save_steps(tmp_path, model, 1, 2)
    nn.init.constant_(model.weight, 7.0)
    save(tmp_path, model, step=1)
    assert names(tmp_path) == {"step_1", "step_2", "LATEST"}
    nn.init.zeros_(model.weight)
    assert load(tmp_path, model).step == 1
    assert (model.weight == 7).all()


def test_what_killed_saves_left_is_removed(model, tmp_path):
    save_steps(tmp_path, model, 1)
    for name in ("step_5.tmp", "step_6.tmp", "step_0.trash", "step_1.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "LATEST.tmp").touch()
    (tmp_path / "step_3").touch()  # no folder
    (tmp_path / "of the user").mkdir()
    save_steps(tmp_path, model, 2)
    assert names(tmp_path) == {"step_1", "step_2", "step_3", "of the user", "LATEST"}


def test_a_replacement_that_was_killed_half_way(model, tmp_path):
    save_steps(tmp_path, model, 1)
    (tmp_path / "step_1").rename(tmp_path / "step_1.old")
    assert load(tmp_path, model).step == 1
    assert names(tmp_path) == {"step_1", "LATEST"}


def test_a_disk_that_refuses(model, tmp_path, monkeypatch):
    """An error while the step is finished, and one while old ones are deleted, which says that it is saved."""
    save_steps(tmp_path, model, 1)

    def refuse(*args: object) -> None:
        raise PermissionError("read-only")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(CheckpointError, match=r"step 1 was not saved.*could not finish the step: PermissionError"):
            save(tmp_path, model, step=1)
    assert load(tmp_path, model).step == 1
    with monkeypatch.context() as patch:
        patch.setattr(folders, "remove", refuse)
        with pytest.raises(CheckpointError, match="rank 0 could not delete old steps: PermissionError: read-only"):
            save(tmp_path, model, step=2, keep=1)
    assert load(tmp_path, model).step == 2


def test_progress_is_shown_for_long_saves(model, tmp_path, capsys, monkeypatch, caplog):
    save(tmp_path, model, step=1)
    assert not capsys.readouterr().err
    save(tmp_path, model, step=1, progress=True)
    load(tmp_path, model, progress=True)
    shown = capsys.readouterr().err
    assert all(stage in shown for stage in ("saving: 100%", "verifying: 100%", "loading: 100%"))

    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    bar = Progress(None)
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
