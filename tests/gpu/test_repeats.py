"""What is asked of each call: the same bits every time, and no wait for the device."""

import pytest
import torch

from tests.gpu import exact
from tests.gpu.how import HOW, no_synchronisation
from tests.lowering.cases import gradients


def crowded(dtype, compiled, device, sizes):
    """A lookup in which many tokens hit a slot, its arguments, and a gradient of its output."""
    layer = sizes.crowded
    grad = torch.randn(*layer.leading, layer.out_dim, device=device)
    return exact.lookup(layer, compiled), exact.tensors(layer, dtype, device), grad


@HOW
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_same_bits_every_time(dtype, compiled, device, sizes):
    run, arguments, grad = crowded(dtype, compiled, device, sizes)

    def everything():
        output = run(*arguments)
        return {"output": output.detach(), **gradients(output, arguments, grad)}

    first = everything()
    for repeat in range(sizes.repeats):
        again = everything()
        different = [name for name in first if not torch.equal(first[name], again[name])]
        assert not different, f"repeat {repeat}: {different} differ"


@HOW
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_call_waits_for_the_device(dtype, compiled, device, sizes):
    run, arguments, grad = crowded(dtype, compiled, device, sizes)
    gradients(run(*arguments), arguments, grad)  # kernels are compiled and tuned
    with no_synchronisation(device):
        gradients(run(*arguments), arguments, grad)
        with torch.no_grad():
            run(*arguments)
