"""memory_lookup at real sizes against the mathematics in float64: the output and every gradient, eager and compiled."""

import pytest
import torch

from tests.gpu import exact
from tests.gpu.how import HOW
from tests.gpu.sizes import Layer
from tests.lowering.cases import gradients
from tests.lowering.reference import scores_reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@HOW
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["wide", "plain", "widest", "many", "pairs"])
def test_output_and_gradients(name, dtype, compiled, device, sizes, needs_memory):
    layer = sizes.layers[name]
    hits = layer.leading[0] * layer.heads * layer.top_k * (layer.value_dim + layer.pairs * layer.width)
    needs_memory(3 * layer.table_bytes(dtype.itemsize) + 8 * hits * 8)
    arguments = exact.tensors(layer, dtype, device)
    exact.assert_right(exact.compared(exact.lookup(layer, compiled), arguments, layer))


@HOW
def test_under_autocast(compiled, device, sizes, needs_memory):
    layer = sizes.layers["wide"]
    needs_memory(6 * layer.table_bytes(4))
    arguments = exact.tensors(layer, torch.float32, device)

    def autocast():
        return torch.autocast(device.type, dtype=torch.bfloat16)

    with autocast():
        assert exact.lookup(layer, False)(*arguments).dtype == torch.bfloat16
    exact.assert_right(exact.compared(exact.lookup(layer, compiled), arguments, layer, autocast))


@HOW
def test_unit_norms(compiled, device, sizes, needs_memory):
    """Norms are not exact: only tokens whose choice is clear take part, with room between the last slot that is read
    and the first that is not."""
    layer = sizes.layers["wide"]
    needs_memory(4 * layer.table_bytes(4))
    arguments = exact.tensors(layer, torch.float32, device)
    arguments[-1] = torch.linspace(8, 12, layer.heads, device=device).requires_grad_()  # temperature
    x, *search = (t.detach().double() for t in arguments[:4])
    scores = scores_reference(x, *search, arguments[-1].detach().double(), layer.heads)
    logits, slots = torch.ops.memcompile.product_key_topk(scores.cpu(), layer.top_k + 1)
    clear = (logits[..., -2] - logits[..., -1] > 1e-4).all(dim=-1).to(device)  # [tokens]
    assert clear.sum() > len(clear) / 4
    arguments[0] = arguments[0].detach()[clear].requires_grad_()
    slots = slots.to(device)[clear, :, :-1]
    exact.assert_right(exact.compared(exact.lookup(layer, compiled), arguments, layer, slots=slots))


LAYOUTS = [exact.as_is, exact.every_other, exact.transposed]


@HOW
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("leading", [(1,), (37,), (2, 3), ()], ids=str)
def test_odd_sizes_and_layouts(leading, layout, dtype, compiled, device):
    layer = Layer(leading, 61, heads=3, top_k=13, half_dim=7, n_keys=29, value_dim=45, out_dim=19)
    run = exact.lookup(layer, compiled)
    drawn = [exact.tensors(layer, dtype, device, layout, seed) for seed in range(16)]
    exact.assert_right(*(exact.compared(run, arguments, layer) for arguments in drawn))


@HOW
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("leading", [(0,), (2, 0, 3)], ids=str)
def test_no_tokens(leading, gate, compiled, device):
    layer = Layer(leading, 64, half_dim=8, n_keys=40, value_dim=48, out_dim=56, gate=gate)
    arguments = exact.tensors(layer, torch.bfloat16, device)
    output = exact.lookup(layer, compiled)(*arguments)
    assert output.shape == (*leading, 56)
    found = gradients(output, arguments, torch.ones_like(output))
    assert not any(gradient.any() for gradient in found.values())


def test_one_compiled_layer_for_any_number_of_tokens(device, sizes):
    """The first number is compiled for itself, the second for all that follow."""
    layer = sizes.layers["wide"]
    x, *rest = exact.tensors(layer, torch.bfloat16, device)
    run, eager = exact.lookup(layer, True), exact.lookup(layer, False)
    for tokens in (len(x), 8, 17, 1, 255):
        some = x.detach().repeat(-(-tokens // len(x)), 1)[:tokens]
        with torch.no_grad():
            torch.testing.assert_close(run(some, *rest), eager(some, *rest), rtol=2**-6, atol=2**-6)
