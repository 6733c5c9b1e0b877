"""Checkpoints and exports, loaded into models whose values lie in a file: the file must have the same ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import memcompile
from memcompile import PlanError
from memcompile.runtime.storage import values_file
from tests.planned import assert_same, batch
from tests.runtime.storage.stored import mapped_gpt, trained


def from_checkpoint(path: Path, model: nn.Module) -> None:
    memcompile.checkpoint.load(path, model)


def from_export(path: Path, model: nn.Module) -> None:
    memcompile.checkpoint.import_safetensors(path / "exported", model)


@pytest.fixture
def saved(tmp_path: Path) -> nn.Module:
    model, _ = trained()
    memcompile.checkpoint.save(tmp_path, model, step=1)
    memcompile.checkpoint.export_safetensors(tmp_path, tmp_path / "exported")
    return model


@pytest.mark.parametrize("load", [from_checkpoint, from_export])
def test_of_the_same_values_the_rest_is_loaded(tmp_path, saved, monkeypatch, load: Callable):
    monkeypatch.setattr(values_file, "_CHUNK", 1000)  # bytes: several chunks, which end within the saved pieces
    expected = saved(batch()[0]).detach()
    memcompile.store_values(saved, tmp_path / "values")
    model = mapped_gpt(tmp_path / "values")
    load(tmp_path, model)
    assert torch.equal(model(batch()[0]), expected)


@pytest.mark.parametrize("load", [from_checkpoint, from_export])
def test_others_are_refused_and_nothing_changes(tmp_path, saved, load: Callable):
    with torch.no_grad():
        saved.memory_values[-1, -1] += 1
    memcompile.store_values(saved, tmp_path / "values")
    model = mapped_gpt(tmp_path / "values")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PlanError, match=r"has other memory_values than '.*values', .*values_storage='device'"):
        load(tmp_path, model)
    assert_same(model.state_dict(), before)
