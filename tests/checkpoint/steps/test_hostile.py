"""Checkpoints that somebody else made, with checksums that are right: they end in CheckpointError, no code of theirs
runs, no other file is read, and nothing changes.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from memcompile import CheckpointError, PlanError
from memcompile.checkpoint import config, import_safetensors, load, save
from memcompile.checkpoint.steps import manifest
from memcompile.runtime.state_dicts import plan_in
from memcompile.runtime.storage.safetensors_format import FormatError, mapped_file
from tests.checkpoint.trainings import everything, trained
from tests.planned import assert_same

DATA = "__0_0.distcp"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    model, optimizer = trained()
    save(folder, model, optimizer, step=3)
    return folder


@pytest.fixture
def saved(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "saved"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a manifest, and gives it the checksum that belongs to it."""
    path = folder / "step_3" / manifest.NAME
    entries = json.loads(path.read_text())
    del entries["crc32"]
    change(entries)
    path.write_text(json.dumps({**entries, "crc32": manifest._sum(entries)}))


def record_again(folder: Path, *names: str) -> None:
    """Gives files that were changed the records that belong to them."""
    records = {name: manifest.record_of(folder / "step_3" / name) for name in names}
    new = {name: {"size": record.size, "crc32": list(record.crc32)} for name, record in records.items()}
    rewrite(folder, lambda entries: entries["files"].update(new))


def refused(folder: Path) -> str:
    """What `load` says; nothing has changed then."""
    model, optimizer = trained(seed=1)
    before = everything(model, optimizer)
    with pytest.raises(CheckpointError) as error:
        load(folder, model, optimizer)
    assert_same(everything(model, optimizer), before)
    return str(error.value)


def renamed(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda entries: entries["files"].update({name: entries["files"].pop(DATA)})


def replaced(*path: str | int, by: Any) -> Callable[[dict[str, Any]], Any]:
    def change(entries: Any) -> None:
        for key in path[:-1]:
            entries = entries[key]
        entries[path[-1]] = by

    return change


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a path out of the folder": (renamed(f"../step_3/{DATA}"), "is no name of a file"),
    "a path into a folder": (renamed(f"a/{DATA}"), "is no name of a file"),
    "an absolute path": (renamed("/etc/hostname"), "is no name of a file"),
    "a NUL": (renamed("a\0b"), "is no name of a file"),
    "the folder itself": (renamed("."), "is no name of a file"),
    "no metadata": (lambda entries: entries["files"].pop(".metadata"), "no record of .metadata"),
    "a negative size": (replaced("files", DATA, "size", by=-1), "has the size -1"),
    "a huge size": (replaced("files", DATA, "size", by=10**30), "has the size 1000000000"),
    "a size that is none": (replaced("files", DATA, "size", by=True), "has the size True"),
    "too few checksums": (replaced("files", DATA, "crc32", by=[]), "and 0 checksums"),
    "checksums of numbers": (replaced("files", DATA, "crc32", by=[1]), "1 checksums"),
    "files as a list": (replaced("files", by=[]), "is damaged"),
    "a record as a number": (replaced("files", DATA, by=3), "is damaged"),
    "plans as a list": (replaced("plans", by=[]), "is damaged"),
    "a plan as text": (replaced("plans", "", by="x"), "a plan is no dict"),
    "a step as text": (replaced("step", by="3"), "step is '3'"),
    "no ranks": (replaced("world_size", by=0), "world_size is 0"),
    "a format as text": (replaced("format", by="1"), "is damaged"),
    "no plans": (lambda entries: entries.pop("plans"), "is damaged"),
    "an entry too many": (replaced("more", by=1), "is damaged"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests(name, saved):
    change, message = MANIFESTS[name]
    rewrite(saved, change)
    assert message in refused(saved)
    with pytest.raises(CheckpointError):
        config(saved)


NONE = ["", "[]", "null", "3", "{" * 100_000, "[" * 100_000, '{"crc32": 1, "crc32": 2}', "\0", "1" * 5000]


@pytest.mark.parametrize("text", NONE)
def test_manifests_that_are_none(text, saved):
    (saved / "step_3" / manifest.NAME).write_text(text)
    assert "MANIFEST.json is damaged" in refused(saved)


@pytest.mark.parametrize("text", ["step_" + "9" * 5000, "../step_3", "/", "step_3\0", "\udcff"])
def test_names_of_the_latest_step(text, saved):
    (saved / "LATEST").write_bytes(text.encode(errors="surrogateescape"))
    assert "LATEST" in refused(saved)


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("code of a checkpoint has run",)


def change_metadata(folder: Path, change: Callable[[Any], Any]) -> None:
    path = folder / "step_3" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    changed = change(metadata)
    path.write_bytes(pickle.dumps(metadata if changed is None else changed))
    record_again(folder, ".metadata")


def first_info(metadata: Any) -> Any:
    return next(iter(metadata.storage_data.values()))


def table_of(metadata: Any) -> Any:
    return metadata.state_dict_metadata["model.memory_values"]


def overlapping(metadata: Any) -> None:
    table = table_of(metadata)
    slots, dim = table.size
    half = torch.Size([slots // 2, dim])
    table.chunks[:] = [ChunkStorageMetadata(torch.Size([0, 0]), half)] * 2


def of_first(name: str, value: Any) -> Callable[[Any], None]:
    return lambda metadata: setattr(first_info(metadata), name, value)


PARTS = "the parts of model.memory_values"
METADATA: dict[str, tuple[Callable[[Any], Any], str]] = {
    "code": (lambda m: Code(), "names .*pytest.*, which DCP's metadata do not have"),
    "code inside": (lambda m: setattr(m, "planner_data", {1: Code()}), "names .*pytest"),
    "another class": (lambda m: shutil.rmtree, "names shutil.rmtree"),
    "no metadata": (lambda m: {"a": 1}, "it has dict"),
    "a path out of the folder": (of_first("relative_path", "../x"), "no file of this step"),
    "an absolute path": (of_first("relative_path", "/etc/hostname"), "no file of this step"),
    "bytes behind the end": (of_first("length", 10**15), "is in bytes"),
    "bytes before the start": (of_first("offset", -1), "is in bytes -1"),
    "offsets of text": (of_first("offset", "1"), "TypeError"),
    "a size that is larger": (lambda m: setattr(table_of(m), "size", torch.Size([2**40, 8])), PARTS),
    "a part that is missing": (lambda m: table_of(m).chunks.clear(), PARTS),
    "parts that overlap": (overlapping, PARTS),
    "an entry without a file": (lambda m: m.storage_data.clear(), "is in no file"),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata(name, saved):
    change, message = METADATA[name]
    change_metadata(saved, change)
    said = refused(saved)
    assert ".metadata is damaged" in said and re.search(message, said), said


@settings(deadline=None, max_examples=40, derandomize=True, database=None)
@given(data=st.data())
def test_metadata_of_random_bytes(written, tmp_path_factory, data):
    folder = Path(shutil.copytree(written, tmp_path_factory.mktemp("random") / "saved"))
    path = folder / "step_3" / ".metadata"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    record_again(folder, ".metadata")
    model, optimizer = trained(seed=1)
    with contextlib.suppress(CheckpointError):  # where what was changed means something
        load(folder, model, optimizer)


PLANS: dict[str, Any] = {
    "n_keys as text": {"n_keys": "8"},
    "n_keys as a list": {"n_keys": [8]},
    "n_keys that are huge": {"n_keys": 10**30},
    "no heads": {"heads": -1},
    "a gate as a dict": {"gate": {}},
    "a rate that is none": {"values_lr": "fast"},
    "an optimizer that there is not": {"values_optimizer": "../../x"},
    "a path": {"values_storage": "mmap", "values_path": "/etc/hostname"},
}


@pytest.mark.parametrize("name", PLANS)
def test_plans(name, saved):
    rewrite(saved, lambda entries: entries["plans"][""]["config"].update(PLANS[name]))
    if name == "a path":  # is of the machine, and not of a plan
        assert config(saved).values_path is None and config(saved).values_storage == "device"
        return
    with pytest.raises(CheckpointError, match="the plan in the checkpoint is damaged"):
        config(saved)


@pytest.mark.parametrize("layers", [3, [1], [None], {"a": 1}, None])
def test_layers_of_a_plan(layers, saved):
    rewrite(saved, lambda entries: entries["plans"][""].update(layers=layers))
    with pytest.raises(CheckpointError, match="is damaged"):
        config(saved)
    refused(saved)


@pytest.mark.parametrize("text", ["{" * 100_000, "[" * 100_000, "\0", '{"memcompile"', "{}"])
def test_plans_in_a_state_dict(text):
    entry = torch.tensor(list(text.encode()), dtype=torch.uint8)
    with pytest.raises(PlanError, match="is damaged"):
        plan_in({"a.memory._extra_state": entry})


HEADERS: dict[str, Any] = {
    "offsets that overlap": {"a": ["F32", [2], [0, 8]], "b": ["F32", [2], [4, 12]]},
    "the same bytes": {"a": ["F32", [2], [0, 8]], "b": ["F32", [2], [0, 8]]},
    "bytes behind the end": {"a": ["F32", [2**40], [0, 2**42]]},
    "bytes before the start": {"a": ["F32", [2], [-8, 0]]},
    "a dtype that there is not": {"a": ["F31", [2], [0, 8]]},
    "a dtype as a list": {"a": [["F32"], [2], [0, 8]]},
    "a negative size": {"a": ["F32", [-2], [0, 8]]},
    "two negative sizes": {"a": ["F32", [-2, -1], [0, 8]]},
    "a size as text": {"a": ["F32", ["2"], [0, 8]]},
    "a size as a fraction": {"a": ["F32", [2.0], [0, 8]]},
    "offsets as text": {"a": ["F32", [2], ["0", "8"]]},
    "three offsets": {"a": ["F32", [2], [0, 4, 8]]},
    "another size": {"a": ["F32", [3], [0, 8]]},
}


def write_safetensors(path: Path, header: bytes, length: int | None = None, data: bytes = bytes(12)) -> None:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_safetensors(name, tmp_path):
    entries = HEADERS[name].items()
    header = {n: {"dtype": d, "shape": s, "data_offsets": o} for n, (d, s, o) in entries}
    write_safetensors(tmp_path / "model.safetensors", json.dumps(header).encode())
    with pytest.raises(FormatError):
        mapped_file(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is no safetensors file, or is damaged"):
        import_safetensors(tmp_path, trained()[0])


LENGTHS = [(b"{}", length) for length in (0, 1, 10**8, 2**63)]
OTHERS = [(header, None) for header in (b"{" * 100_000, b"[" * 100_000, b"[]", b"\xff\xff", b"3 ")]


@pytest.mark.parametrize(("header", "length"), LENGTHS + OTHERS)
def test_safetensors_that_are_none(header, length, tmp_path):
    write_safetensors(tmp_path / "model.safetensors", header, length)
    with pytest.raises(CheckpointError, match="is no safetensors file, or is damaged"):
        import_safetensors(tmp_path, trained()[0])


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/hostname", "a\0", "..", 3, None])
def test_names_in_an_index(name, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        import_safetensors(tmp_path, trained()[0])


def test_pieces_of_other_widths(tmp_path):
    header = {
        "t[0:1]": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
        "t[1:2]": {"dtype": "F32", "shape": [1, 1], "data_offsets": [8, 12]},
    }
    write_safetensors(tmp_path / "model.safetensors", json.dumps(header).encode())
    with pytest.raises(CheckpointError, match="pieces of t are of several dtypes or widths"):
        import_safetensors(tmp_path, trained()[0])
