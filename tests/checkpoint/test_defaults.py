"""`torch.set_default_dtype` and `torch.set_default_device` change nothing of what is saved and loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from memcompile.checkpoint import config, export_safetensors, import_safetensors, load, save
from memcompile.runtime.storage.frozen_values import open_values
from memcompile.runtime.storage.values_file import verify_values, write
from tests.checkpoint.trainings import everything, train
from tests.planned import assert_same, planned_gpt


@pytest.fixture(params=["dtype", "device"])
def other_default(request) -> Iterator[str]:
    """Sets the default; "meta" stands for an accelerator, where a model may be on the CPU."""
    yield request.param
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def change(default: str) -> None:
    if default == "dtype":
        torch.set_default_dtype(torch.bfloat16)
    else:
        torch.set_default_device("meta")


def training(seed: int) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(seed)
    model = planned_gpt(seed=seed, n_keys=16, values_grad="sparse")
    model.register_buffer("scale", torch.tensor(1.0 + seed))
    return model, AdamW(model.parameters(), lr=1e-2)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_saved_and_loaded(other_default, asynchronous, tmp_path):
    (model, optimizer), (other, new), (third, _), (fourth, _) = map(training, range(4))
    train(model, optimizer, range(3))
    expected, extra = everything(model, optimizer), torch.arange(3, dtype=torch.float32)
    of_model = {name: tensor for name, tensor in expected.items() if name.startswith("model.")}
    change(other_default)

    save(tmp_path, model, optimizer, step=1, extra=extra, asynchronous=asynchronous).wait()
    assert torch.equal(load(tmp_path, other, new).extra, extra)
    found = everything(other, new)
    assert_same(found, expected)
    assert {name: value.dtype for name, value in found.items()} == {name: v.dtype for name, v in expected.items()}
    for source, into in ((model, third), (tmp_path, fourth)):
        path = tmp_path / type(source).__name__
        export_safetensors(source, path)
        import_safetensors(path, into)
        assert_same(everything(into), of_model)
        assert config(path).n_keys == config(tmp_path).n_keys == 16


def test_values_in_a_file(other_default, tmp_path):
    path, values = str(tmp_path / "values"), torch.randn(9, 4)
    change(other_default)
    write(path, values)
    verify_values(Path(path))
    found = open_values(path)
    assert (found.dtype, found.device.type) == (torch.float32, "cpu")
    assert torch.equal(found, values)
