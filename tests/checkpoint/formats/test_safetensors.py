"""Safetensors: what others read and write, tables in pieces, and files that are not whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import memcompile
from memcompile import CheckpointError, PlanError
from memcompile.checkpoint import config, export_safetensors, import_safetensors, save
from memcompile.checkpoint.formats import safetensors as safetensors_files
from memcompile.runtime.state_dicts import plan_in
from tests.checkpoint.trainings import everything, sharded_gpt
from tests.models import tiny_gpt
from tests.planned import assert_same

INDEX = "model.safetensors.index.json"


@pytest.fixture(params=["folder", "model"])
def exported(request, tmp_path):
    """Exports a model, from itself or from its checkpoint."""

    def export(model: nn.Module, **options: int) -> Path:
        save(tmp_path / "saved", model, step=1)
        source = model if request.param == "model" else tmp_path / "saved"
        export_safetensors(source, tmp_path / "out", **options)
        return tmp_path / "out"

    return export


def test_one_file_is_what_the_library_reads(exported):
    model = sharded_gpt()
    path = exported(model)
    assert [file.name for file in path.iterdir()] == ["model.safetensors"]
    state = safetensors.torch.load_file(path / "model.safetensors")
    assert_same(state, dict(model.state_dict()))
    other = tiny_gpt(layers=2)
    memcompile.plan(other, memory=memcompile.config_from(state))
    other.load_state_dict(state)
    assert_same(everything(other), everything(model))
    assert config(path) == memcompile.config_from(state)


def test_a_table_in_pieces(exported, monkeypatch):
    monkeypatch.setattr(safetensors_files, "BUFFER", 300)
    model = sharded_gpt(n_keys=16, top_k=4)
    model.head.to(torch.bfloat16)
    path = exported(model, max_shard_size=1000)
    index = json.loads((path / INDEX).read_text())
    assert {file.name for file in path.iterdir()} == {INDEX, *index["weight_map"].values()}
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) == index["metadata"]["total_size"]
    pieces = [name for name in index["weight_map"] if name.startswith("memory_values")]
    assert pieces[:2] == ["memory_values[0:50]", "memory_values[50:100]"]
    assert config(path / index["weight_map"][pieces[1]]) == config(path)
    read: dict[str, torch.Tensor] = {}
    for name in set(index["weight_map"].values()):
        tensors = safetensors.torch.load_file(path / name)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 1000
        read.update(tensors)
    assert torch.equal(torch.cat([read[name] for name in pieces]), model.memory_values)
    other = sharded_gpt(seed=1, n_keys=16, top_k=4)
    import_safetensors(path, other)
    model.head.float()
    assert_same(everything(other), everything(model))
    assert config(path).n_keys == 16


def test_what_the_library_wrote(tmp_path):
    model, other = sharded_gpt(), sharded_gpt(seed=1)
    safetensors.torch.save_file(dict(model.state_dict()), tmp_path / "file.safetensors")
    import_safetensors(tmp_path / "file.safetensors", other)
    assert_same(everything(other), everything(model))


def test_another_model_is_refused_before_anything_changes(exported):
    path = exported(sharded_gpt())
    other = sharded_gpt(n_keys=4)
    before = everything(other)
    with pytest.raises(
        PlanError, match=r"saved with another memory: n_keys=3 \(here 4\).*memcompile\.checkpoint\.config"
    ):
        import_safetensors(path, other)
    assert_same(everything(other), before)
    with pytest.raises(PlanError, match=r"plan it first, memcompile\.plan\(model, memory=memcompile\.checkpoint"):
        import_safetensors(path, tiny_gpt(layers=2))
    larger = sharded_gpt()
    larger.head = nn.Linear(32, 60, bias=False)
    with pytest.raises(CheckpointError, match=r"sizes differ: head\.weight is \[50, 32\]"):
        import_safetensors(path, larger)


def test_files_that_are_not_whole(exported):
    model = sharded_gpt(n_keys=16, top_k=4)
    path = exported(model, max_shard_size=2000)
    before = everything(model)
    weights = json.loads((path / INDEX).read_text())["weight_map"]
    file = path / weights["memory_values[100:200]"]
    data = file.read_bytes()
    for damaged, message in (
        (data[:-1], r"has [\d,]+ bytes, and its header means [\d,]+: it is not whole"),
        (b"{}", "is no safetensors file"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=message):
            import_safetensors(path, model)
    file.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        import_safetensors(path, model)
    (path / INDEX).write_text(json.dumps({"weight_map": {k: v for k, v in weights.items() if v != file.name}}))
    with pytest.raises(CheckpointError, match=r"lacks memory_values\[100:200\]: a file of it is missing"):
        import_safetensors(path, model)
    assert_same(everything(model), before)


def test_what_cannot_be_exported(exported, tmp_path):
    model = sharded_gpt()
    path = exported(model)
    with pytest.raises(CheckpointError, match=r"already has model\.safetensors: delete it, or export into another"):
        export_safetensors(model, path)
    model.register_buffer("spectrum", torch.ones(2, dtype=torch.complex64))
    with pytest.raises(CheckpointError, match=r"spectrum is torch\.complex64, which safetensors do not store"):
        export_safetensors(model, tmp_path / "other")
    for size in (0, "5GB"):
        with pytest.raises(CheckpointError, match=rf"max_shard_size must be a number of bytes, as .*, got {size!r}"):
            export_safetensors(model, tmp_path / "other", max_shard_size=size)


def test_an_index_whose_files_are_gone(tmp_path):
    """Exports into a folder from which the files of another were deleted: the folder is one export."""
    model = sharded_gpt(n_keys=16, top_k=4)
    for size, expected in ((2000, True), (10**9, False), (3000, True)):
        export_safetensors(model, tmp_path, max_shard_size=size)
        assert (tmp_path / INDEX).exists() is expected
        other = sharded_gpt(seed=1, n_keys=16, top_k=4)
        import_safetensors(tmp_path, other)
        assert_same(everything(other), everything(model))
        with pytest.raises(
            CheckpointError, match=rf"already has model.*{INDEX if expected else 'safetensors'}: delete"
        ):
            export_safetensors(model, tmp_path)
        for file in tmp_path.glob("*.safetensors"):
            file.unlink()


def test_an_export_that_fails_leaves_nothing(exported, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors.tmp").write_text("of the user")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_files, "append", full)
        with pytest.raises(CheckpointError, match=r"rank 0 could not write: OSError: .*No space left"):
            exported(sharded_gpt())
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.safetensors.tmp"]
    path = exported(sharded_gpt())
    assert (path / "model.safetensors.tmp").read_text() == "of the user"
    import_safetensors(path, sharded_gpt(seed=1))


class Tied(nn.Module):
    """A model whose head is its embedding, as Hugging Face's are, and the file that these write of it."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.body, self.out = sharded_gpt(), nn.Linear(32, 50, bias=False)
        if tied:
            self.out.weight = self.body.head.weight


@pytest.mark.parametrize("omitted", ["out.weight", "body.head.weight"])
def test_tied_weights_are_in_a_file_once(omitted, tmp_path):
    model, other = Tied(), Tied()
    nn.init.normal_(model.out.weight)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != omitted}
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(state, file, metadata={"memcompile": json.dumps({"body": plan_in(state)})})
    import_safetensors(file, other)
    assert torch.equal(other.out.weight, model.out.weight)
    assert other.out.weight is other.body.head.weight
    with pytest.raises(CheckpointError, match=f"not in the checkpoint: {omitted}: build the model"):
        import_safetensors(file, Tied(tied=False))
