"""What is asked of each call: the same bits every time, and no wait for the device."""

from contextlib import contextmanager

import pytest
import torch

from tests.gpu import exact

HOW = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


@HOW
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_same_bits_every_time(dtype, compiled, device, sizes):
    layer = sizes.crowded
    arguments, run = exact.tensors(layer, dtype, device), exact.lookup(layer, compiled)
    grad = torch.randn(*layer.leading, layer.out_dim, device=device)

    def everything():
        output = run(*arguments)
        return {"output": output.detach(), **exact.gradients(output, arguments, grad)}

    first = everything()
    for repeat in range(sizes.repeats):
        again = everything()
        different = [name for name in first if not torch.equal(first[name], again[name])]
        assert not different, f"repeat {repeat}: {different} differ"


@contextmanager
def no_synchronisation(device):
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@HOW
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_call_waits_for_the_device(dtype, compiled, device, sizes):
    layer = sizes.crowded
    arguments, run = exact.tensors(layer, dtype, device), exact.lookup(layer, compiled)
    grad = torch.randn(*layer.leading, layer.out_dim, device=device)
    exact.gradients(run(*arguments), arguments, grad)  # kernels are compiled and tuned
    with no_synchronisation(device):
        exact.gradients(run(*arguments), arguments, grad)
        with torch.no_grad():
            run(*arguments)
