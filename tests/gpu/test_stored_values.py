"""A model on the GPU whose values lie in the CPU's memory or in a file: rows are summed there, the sums move."""

import pytest
import torch

import memcompile
from tests.models import tiny_gpt
from tests.planned import MEMORY, batch

OPTIONS = {"memory_layers": 1, **MEMORY, "n_keys": 16}


@pytest.mark.parametrize("storage", ["host", "mmap"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_as_with_values_on_the_device(storage, compiled, device, tmp_path):
    path = tmp_path / "values"
    torch.manual_seed(0)
    whole = tiny_gpt(layers=2).to(device)
    memcompile.plan(whole, **OPTIONS)
    state, tokens = whole.state_dict(), batch()[0].to(device)
    with torch.no_grad():
        expected = whole(tokens)
    model = tiny_gpt(layers=2)
    if storage == "mmap":
        memcompile.store_values(whole, path)
        del state["memory_values"]
        with torch.no_grad():
            torch.testing.assert_close(whole(tokens), expected)  # it stays on the device, its values do not
    memcompile.plan(model, **OPTIONS, values_storage=storage, values_path=path if storage == "mmap" else None)
    model.to(device).load_state_dict(state)
    assert model.memory_values.device.type == "cpu" and model.head.weight.device.type == device.type
    run = torch.compile(model, backend="memcompile", fullgraph=True) if compiled else model
    with torch.no_grad():
        torch.testing.assert_close(run(tokens), expected)
    run(tokens).square().mean().backward()  # the rest learns
    assert all((p.grad is None) == (name == "memory_values") for name, p in model.named_parameters())
