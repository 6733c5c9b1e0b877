"""The kernels of a table of pairs against the fp64 oracle: the CPU's tests once more, and those of the launches."""

from dataclasses import replace

import pytest
import torch

from memcompile.lowering import memory_lookup, operator
from memcompile.lowering.triton import configs
from tests.lowering.cases import VARIANTS, gradients, leaves
from tests.lowering.gather.test_pairs import Pairs, assert_pairs, by_operators, leaves_of, make, pair_gather, reference
from tests.lowering.reference import memory_lookup_reference


def operators_alone(data: Pairs) -> list[torch.Tensor]:
    """As `by_operators`, without the sums of rows that are hit, which have no kernel."""
    values, slots, weights, x, grad = data
    y, dots = pair_gather(values, slots, weights, x)
    of_weights, of_x, into, out = operator("pair_grads")(values, slots, weights, x, dots, grad)
    of_values = operator("pair_scatter")(slots, into, x, out, grad, values.shape[0])
    return [y, of_values, of_weights.to(weights.dtype), of_x]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_and_gradients(dtype):
    assert_pairs(operators_alone, dtype, examples=20)


def test_halves_of_several_programs_and_blocks(monkeypatch):
    """Programs of 16 columns, which take the same dots; blocks of hits and of columns that do not divide."""
    sizes = {"BLOCK_HITS": 4, "BLOCK_COLUMNS": 8, "SUMMED": 16, "num_warps": 1}
    monkeypatch.setattr(configs, "pair_config", lambda dotted, summed: sizes)
    data = make(tokens=3, hits=9, d=37, value_dim=50, dtype=torch.float32)
    for found, exact in zip(operators_alone(data), reference(data.double()), strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_and_its_gradients(dtype):
    case = replace(VARIANTS["pairs"], dtype=dtype, heads=1, half_dim=9, value_dim=21)
    tensors, exact_tensors = case.tensors(), leaves(case.tensors(), torch.float64)
    output = memory_lookup(*tensors, **case.options)
    exact = memory_lookup_reference(*exact_tensors, **case.options)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 0.1, "atol": 0.5}
    torch.testing.assert_close(output.double(), exact, **tolerance)
    found, expected = gradients(output, tensors, grad), gradients(exact, exact_tensors, grad)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name], **tolerance, msg=lambda m: f"{name}: {m}")  # noqa: B023


def test_it_was_triton(launched):
    data = make(dtype=torch.float32)
    values, weights, x = leaves_of(data)
    pair_gather(values, data.slots, weights, x)[0].backward(data.grad)
    halves = ["join_chunks", "sum_chunks"] * 2
    assert sorted(launched) == sorted([*halves, "pair_gather_rows", "pair_grads_rows"])
    by_operators(make(d=1, value_dim=1))  # fp64 is PyTorch's
    assert len(launched) == 6
