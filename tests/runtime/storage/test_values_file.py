"""The file of a table: what is written is read, by safetensors too; what is no such file, or not whole, is said."""

import builtins
import logging
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from memcompile import PlanError, verify_values
from memcompile.runtime.storage import values_file
from memcompile.runtime.storage.values_file import header_of, read_values, write


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "values.safetensors")


@pytest.mark.parametrize("dtype", values_file._DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [1, 1000, 2**26])
def test_round_trip(path, dtype, chunk, monkeypatch):
    monkeypatch.setattr(values_file, "_CHUNK", chunk)
    values = torch.randn(49, 10).to(dtype)
    write(path, values, form={"tables": "3"})
    found, metadata = read_values(path)
    assert metadata["tables"] == "3"
    assert torch.equal(found, values) and found.dtype is dtype
    assert found.data_ptr() % 4096 == 0 and os.path.getsize(path) == 4096 + values.nbytes
    assert Path(path).read_bytes()[:4096] == header_of(values, metadata["sha256"], {"tables": "3"})
    assert torch.equal(load_file(path)["memory_values"], values)
    verify_values(path)


def test_tables_of_other_strides(path):
    values = torch.randn(10, 49).T
    write(path, values)
    assert torch.equal(load_file(path)["memory_values"], values)


def test_it_appears_whole_or_not_at_all(path, monkeypatch):
    write(path, torch.zeros(4, 4))
    before = Path(path).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(path, torch.ones(4, 4))
    assert Path(path).read_bytes() == before
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
def test_its_mode_is_that_of_any_new_file(path):
    write(path, torch.zeros(4, 4))
    Path(path + ".other").touch()
    assert stat.S_IMODE(os.stat(path).st_mode) == stat.S_IMODE(os.stat(path + ".other").st_mode)


def changed(path, at, content):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(content)


def test_a_changed_row_is_found(path):
    write(path, torch.zeros(4, 4))
    changed(path, 4096 + 17, b"\x01")
    read_values(path)  # reads no row
    with pytest.raises(PlanError, match=f"the rows of {path!r} have SHA-256 .*copy the file again"):
        verify_values(path)


def test_what_is_no_file_of_values(path):
    with pytest.raises(
        PlanError, match=rf"{path!r} cannot be read \(No such file.*store_values\(model, path\) writes one"
    ):
        read_values(path)
    for content in (b"", b"x" * 5000, b"\x02" + bytes(7) + b"{}", b"\xff" * 5000, b"\x10" + bytes(7) + b"[" * 16):
        with open(path, "wb") as file:
            file.write(content)
        with pytest.raises(PlanError, match=f"{path!r} is no file of values"):
            read_values(path)


def test_a_safetensors_file_of_others(path):
    from safetensors.torch import save_file

    save_file({"memory_values": torch.zeros(4, 4)}, path)
    with pytest.raises(PlanError, match="is no file of values"):
        read_values(path)


@pytest.mark.parametrize("change", [-1, 1, -64])
def test_a_file_that_is_not_whole(path, change):
    write(path, torch.zeros(4, 4))
    os.truncate(path, 4096 + 64 + change)
    expected = rf"it has {4096 + 64 + change:,} bytes, and its header means 4,160: it is not whole\): copy it again"
    with pytest.raises(PlanError, match=expected):
        read_values(path)


def test_it_says_how_far_it_is(path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="memcompile")
    real = builtins.__import__

    def without_tqdm(name, *args, **kwargs):
        if name.startswith("tqdm"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(values_file, "_CHUNK", 64)
    values = torch.zeros(1000, 4)
    write(path, values)
    assert not caplog.messages  # it is short
    for case, progress in (("no terminal", None), ("no tqdm", True)):
        caplog.clear()
        if case == "no tqdm":
            monkeypatch.setattr(builtins, "__import__", without_tqdm)
        monkeypatch.setattr("memcompile.common.progress.LONG", values.nbytes)
        write(path, values, progress)
        assert [message.split(" of ")[0] for message in caplog.messages] == [
            f"writing values.safetensors: {percent}%" for percent in range(10, 101, 10)
        ]
