"""Files that are damaged, cut off, missing or of another step: what is said, and that an earlier step still loads."""

from __future__ import annotations

import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from memcompile import CheckpointError
from memcompile.checkpoint import config, export_safetensors, load, save
from memcompile.checkpoint.steps import manifest
from tests.checkpoint.trainings import everything, sharded_gpt, step_by_noise, trained
from tests.planned import assert_same

DATA = "__0_0.distcp"
Saved = tuple[Path, dict[int, dict[str, Tensor]]]


@pytest.fixture
def saved(tmp_path) -> Saved:
    """Steps 10, 20 and 30 in a folder, and what each has."""
    model, optimizer = trained()
    expected = {}
    for step in (10, 20, 30):
        step_by_noise(model, optimizer, step)
        save(tmp_path, model, optimizer, step=step)
        expected[step] = everything(model, optimizer)
    return tmp_path, expected


def flip_a_bit(path: Path, at: int = -100) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a file was unpickled that is not as it was written",)


def with_code(path: Path) -> None:
    path.write_bytes(pickle.dumps(Code()))


def from_step_20(path: Path) -> None:
    shutil.copy(path.parents[1] / "step_20" / path.name, path)


def all_from_a_step_that_is_gone(path: Path) -> None:
    from_step_20(path)
    shutil.rmtree(path.parents[1] / "step_20")


DAMAGES = {
    "a flipped bit": (DATA, flip_a_bit, rf"step_30/{DATA} is damaged: the CRC-32 of its bytes 0 to [\d,]+ is \w+, and"),
    "cut off": (DATA, cut_off, rf"step_30/{DATA} has ([\d,]+) bytes, and was written with"),
    "missing": (DATA, Path.unlink, rf"step_30/{DATA} is missing, which was written with [\d,]+ bytes"),
    "another step's": (
        DATA,
        from_step_20,
        rf"step_30/{DATA} is of step 20, not of step 30: files of two steps are mixed",
    ),
    "metadata": (".metadata", flip_a_bit, r"step_30/\.metadata is damaged: the CRC-32"),
    "metadata of another step": (".metadata", from_step_20, r"step_30/\.metadata is of step 20, not of step 30"),
    "metadata of a step that is gone": (
        ".metadata",
        all_from_a_step_that_is_gone,
        r"step_30/\.metadata (is damaged: the CRC-32|has [\d,]+ bytes, and was written with)",
    ),
    "metadata that run code": (".metadata", with_code, r"step_30/\.metadata has [\d,]+ bytes, and was written with"),
    "manifest": ("MANIFEST.json", flip_a_bit, r"step_30/MANIFEST\.json is damaged"),
    "manifest cut off": ("MANIFEST.json", cut_off, r"step_30/MANIFEST\.json is damaged: JSONDecodeError"),
    "manifest missing": ("MANIFEST.json", Path.unlink, r"MANIFEST\.json is missing: \S+step_30 is no finished"),
    "manifest of another step": ("MANIFEST.json", from_step_20, r"MANIFEST\.json is of step 20: files of two steps"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_an_earlier_step_loads(name, saved, caplog):
    folder, expected = saved
    file, damage, message = DAMAGES[name]
    damage(folder / "step_30" / file)
    good = next(step for step in (20, 10) if (folder / f"step_{step}").exists())
    model, optimizer = trained(seed=1)
    before = everything(model, optimizer)
    for step in (None, 30):
        with pytest.raises(CheckpointError, match=rf"{message}.*Not damaged before it: {good}.*Load with step={good}"):
            load(folder, model, optimizer, step=step)
    assert_same(everything(model, optimizer), before)
    assert load(folder, model, optimizer, step=good).step == good
    assert_same(everything(model, optimizer), expected[good])

    other, other_optimizer = trained(seed=1)
    with caplog.at_level(logging.WARNING, "memcompile"):
        assert load(folder, other, other_optimizer, fall_back=True).step == good
    assert f"step {good} is loaded, the newest that is not damaged" in caplog.text
    assert_same(everything(other, other_optimizer), expected[good])


def test_the_newest_step_that_is_not_damaged(saved):
    folder, expected = saved
    for step in (30, 20):
        flip_a_bit(folder / f"step_{step}" / DATA)
    model, optimizer = trained(seed=1)
    with pytest.raises(CheckpointError, match=r"Not damaged before it: 10\. Load with step=10, or with fall_back=True"):
        load(folder, model, optimizer)
    assert load(folder, model, optimizer, fall_back=True).step == 10
    assert_same(everything(model, optimizer), expected[10])
    flip_a_bit(folder / "step_10" / DATA)
    with pytest.raises(CheckpointError, match=r"No step before it in \S+ can be loaded"):
        load(folder, model, optimizer, fall_back=True)


LATEST = {
    "missing": (Path.unlink, r"LATEST is missing"),
    "garbage": (lambda path: path.write_text("garbage"), r"LATEST is damaged: it names 'garbage'"),
    "not text": (lambda path: path.write_bytes(b"\xff\xfe"), r"LATEST cannot be read"),
    "dangling": (lambda path: path.write_text("step_40"), r"LATEST names step_40, which is missing"),
}


@pytest.mark.parametrize("name", LATEST)
def test_a_damaged_latest(name, saved):
    folder, expected = saved
    damage, message = LATEST[name]
    damage(folder / "LATEST")
    model = sharded_gpt(seed=1)
    with pytest.raises(CheckpointError, match=rf"{message}.*Not damaged before it: 30, 20, 10\. Load with step=30"):
        load(folder, model)
    assert load(folder, model, fall_back=True).step == 30
    assert_same(everything(model), {k: v for k, v in expected[30].items() if k.startswith("model")})
    with pytest.raises(CheckpointError, match=message):
        config(folder)


def test_folders_without_the_checkpoint(saved, tmp_path):
    folder, _ = saved
    model = sharded_gpt(seed=1)
    with pytest.raises(
        CheckpointError,
        match=r"has no step 25 \(it has 10, 20, 30\)\. Not damaged before it: 20, 10\. Load with step=20",
    ):
        load(folder, model, step=25)
    assert load(folder, model, step=25, fall_back=True).step == 20
    with pytest.raises(CheckpointError, match="is missing: no checkpoint was saved there"):
        load(tmp_path / "nowhere", model)
    with pytest.raises(CheckpointError, match=r"has no checkpoint: it is a step of .*, give that and step="):
        load(folder / "step_20", model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        load(tmp_path / "empty", model)


def test_damage_stops_an_export(saved, tmp_path):
    flip_a_bit(saved[0] / "step_30" / DATA)
    with pytest.raises(CheckpointError, match="is damaged"):
        export_safetensors(saved[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_block_that_is_damaged(monkeypatch, tmp_path):
    monkeypatch.setattr(manifest, "BLOCK", 1000)
    model = nn.Linear(40, 40)
    save(tmp_path, model, step=1)
    load(tmp_path, model)
    flip_a_bit(tmp_path / "step_1" / DATA, at=3210)
    with pytest.raises(CheckpointError, match="the CRC-32 of its bytes 3,000 to 4,000 is"):
        load(tmp_path, model)
