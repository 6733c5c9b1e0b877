"""Saves in the background, in one process: they have the state at the call, and their errors reach somebody."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from memcompile import CheckpointError
from memcompile.checkpoint import load, save, saving, steps
from tests.checkpoint.trainings import everything, sharded_gpt, step_by_noise, train, trained
from tests.planned import assert_same, planned_gpt

SPARSE: dict[str, Any] = {"n_keys": 16, "memory_layers": 2, "values_grad": "sparse"}


@pytest.fixture
def held(monkeypatch) -> threading.Event:
    """Background saves write nothing until it is set."""
    event, write_files = threading.Event(), saving.write_files

    def wait_and_write(*args: Any) -> Any:
        assert event.wait(60)
        return write_files(*args)

    monkeypatch.setattr(saving, "write_files", wait_and_write)
    return event


@pytest.mark.parametrize("values_grad", ["sparse", "dense"])
def test_the_state_at_the_call_is_saved(values_grad, held, tmp_path):
    model = planned_gpt(**SPARSE | {"values_grad": values_grad})
    from torch.optim import AdamW

    optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    train(model, optimizer, range(3))
    extra = {"list": [1]}
    handle = save(tmp_path, model, optimizer, step=1, extra=extra, asynchronous=True)
    expected = everything(model, optimizer)
    extra["list"].append(2)
    train(model, optimizer, range(3, 6))
    assert not handle.done
    assert not (tmp_path / "LATEST").exists()
    held.set()
    assert handle.wait() == tmp_path / "step_1"
    assert handle.done
    other = planned_gpt(seed=1, **SPARSE | {"values_grad": values_grad})
    other_optimizer = AdamW(other.parameters())
    assert load(tmp_path, other, other_optimizer).extra == {"list": [1]}
    assert_same(everything(other, other_optimizer), expected)


def test_one_save_at_a_time(held, tmp_path):
    model, optimizer = trained()
    first = save(tmp_path, model, optimizer, step=1, asynchronous=True)
    step_by_noise(model, optimizer, 5)
    threading.Timer(0.2, held.set).start()
    second = save(tmp_path, model, optimizer, step=2, asynchronous=True)  # waits for the first
    assert first.done
    expected = everything(model, optimizer)
    other, other_optimizer = trained(seed=1)
    assert load(tmp_path, other, other_optimizer).step == 2  # waits for the second
    assert second.done
    assert_same(everything(other, other_optimizer), expected)
    assert steps(tmp_path) == [2, 1]
    assert save(tmp_path, model, step=3).done


@pytest.mark.parametrize("told", ["wait", "save", "load"])
def test_an_error_is_raised_once(told, tmp_path, monkeypatch, caplog):
    model, other = sharded_gpt(), sharded_gpt(seed=1)
    save(tmp_path, model, step=1)

    def fail(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_files", fail)
        handle = save(tmp_path, model, step=2, asynchronous=True)
        handle._thread.join()
    raising = {
        "wait": handle.wait,
        "save": lambda: save(tmp_path, model, step=3),
        "load": lambda: load(tmp_path, other),
    }
    with pytest.raises(CheckpointError, match=r"step 2 was not saved.*OSError: .*No space left on device"):
        raising[told]()
    assert "No space left" in caplog.text
    assert load(tmp_path, other).step == 1
    assert_same(everything(other), everything(model))
    save(tmp_path, model, step=3)
    assert steps(tmp_path) == [3, 1]
