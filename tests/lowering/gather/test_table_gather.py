"""table_gather against weighted_gather: the same numbers, and a gradient of the rows that were hit."""

import pytest
import torch
from hypothesis import given
from torch import Tensor

from memcompile.lowering import memory_lookup, operator
from memcompile.lowering.gather import table_gather as module
from tests.lowering.cases import VARIANTS, Case, cases, gradients, leaves
from tests.lowering.gather.test_weighted_gather import DTYPES, inputs, largest_allocation, make

weighted_gather, gather_dot, weighted_scatter = map(operator, ("weighted_gather", "gather_dot", "weighted_scatter"))
table_gather, table_dot, sparse_scatter = map(operator, ("table_gather", "table_dot", "sparse_scatter"))


def assert_coalesced(sparse: Tensor, rows: Tensor) -> None:
    assert sparse.layout is torch.sparse_coo and sparse.is_coalesced()
    assert torch.equal(sparse.indices(), rows.unique().long().unsqueeze(0))


@given(inputs)
def test_values_and_gradients_bit_for_bit(drawn):
    values, slots, weights, grad = drawn
    found = []
    for gather, more in ((table_gather, ([], "sparse")), (weighted_gather, ())):
        x, w = values.detach().requires_grad_(), weights.detach().requires_grad_()
        y = gather(x, slots, w, *more)
        found.append((y.detach(), *torch.autograd.grad(y, (x, w), grad)))
    (y, table, dots), (exact_y, exact_table, exact_dots) = found
    assert torch.equal(y, exact_y) and torch.equal(dots, exact_dots)
    assert_coalesced(table, slots)
    assert table.dtype is values.dtype and torch.equal(table.to_dense(), exact_table)


@given(inputs)
def test_the_scatter_of_several_layers_is_that_of_all_their_hits(drawn):
    values, slots, weights, grad = drawn
    parts = [3, len(slots)]
    factors = [[t[: parts[0]], t[parts[0] :]] for t in (slots, weights, grad)]
    one, several = sparse_scatter(values, [slots], [weights], [grad]), sparse_scatter(values, *factors)
    assert_coalesced(several, slots)
    assert torch.equal(one.indices(), several.indices()) and torch.equal(one.values(), several.values())


@given(cases(dtypes=(torch.float32, torch.bfloat16)))
def test_the_layer_in_every_form(case):
    tensors, twins = leaves(case.tensors()), leaves(case.tensors())
    y, expected = (memory_lookup(*t, **case.options, values_grad=g) for t, g in ((tensors, "sparse"), (twins, "dense")))
    assert torch.equal(y, expected)
    grad = torch.randn_like(expected)
    found, exact = gradients(y, tensors, grad), gradients(expected, twins, grad)
    assert found["values"].is_coalesced()
    assert all(torch.equal(g.to_dense() if g.is_sparse else g, exact[name]) for name, g in found.items())


@pytest.mark.parametrize("frozen", ["values", "weights"])
def test_what_is_frozen_costs_nothing(frozen, monkeypatch):
    values, slots, weights, grad = make()
    called = []
    monkeypatch.setattr(module, "operator", lambda name: called.append(name) or operator(name))
    thawed = (weights if frozen == "values" else values).requires_grad_()
    table_gather(values, slots, weights, [], "sparse").backward(grad)
    assert thawed.grad is not None
    assert ("table_dot" in called) == (frozen == "values")
    assert ("sparse_scatter" in called) == (frozen == "weights")


def test_torch_func_is_dense():
    case = VARIANTS["full"]
    tensors = [None if t is None else t.detach() for t in case.tensors()]

    def loss(values, values_grad="sparse"):
        return memory_lookup(*tensors[:4], values, *tensors[5:], **case.options, values_grad=values_grad).square().sum()

    found = torch.func.grad(loss)(tensors[4])
    assert found.layout is torch.strided
    assert torch.equal(found, torch.func.grad(lambda values: loss(values, "dense"))(tensors[4]))
    hessian = torch.func.hessian  # forward over reverse
    with pytest.raises(NotImplementedError, match="forward-mode"):
        hessian(loss)(tensors[4])
    jacobian = torch.func.jacrev(torch.func.grad(loss))(tensors[4])
    assert jacobian.shape == (*tensors[4].shape, *tensors[4].shape) and jacobian.any()


def test_there_is_no_second_derivative():
    case = Case()
    tensors = case.tensors()
    loss = memory_lookup(*tensors, **case.options, values_grad="sparse").square().sum()
    for wanted in (tensors[4], tensors[0]):
        with pytest.raises(NotImplementedError, match="values_grad='dense'"):
            torch.autograd.grad(loss, wanted, create_graph=True)
    values, slots, weights, _ = make()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        table_gather(torch.autograd.forward_ad.make_dual(values, values), slots, weights, [], "sparse")


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_of_the_tables_size(dtype):
    values, slots, weights, grad = make(tokens=16, hits=4, num_slots=4096, value_dim=64, dtype=dtype)
    table = values.numel() * values.element_size()

    def step(call=table_gather, *more):
        call(values.requires_grad_(), slots, weights.requires_grad_(), *more).backward(grad)
        values.grad = None

    assert largest_allocation(lambda: step(table_gather, [], "sparse")) <= table / 8
    assert largest_allocation(lambda: step(weighted_gather)) >= table  # the measure sees it


def test_errors():
    values, slots, weights, grad = make()
    tensors = Case().tensors()
    for call, message in (
        (lambda: memory_lookup(*tensors, **Case().options, values_grad="spars"), "values_grad: expected one of dense,"),
        (lambda: sparse_scatter(values, [slots[0]], [weights], [grad]), r"slots.*\[tokens, hits\]"),
        (lambda: sparse_scatter(values, [slots], [weights[:2]], [grad]), "weights"),
        (lambda: sparse_scatter(values, [slots, slots], [weights] * 2, [grad, grad[:2]]), r"grad.*value_dim\]"),
        (lambda: sparse_scatter(values, [slots + 100], [weights], [grad]), "out of range"),
        (lambda: table_gather(values, slots + 100, weights, [], "sparse"), "out of range"),
    ):
        with pytest.raises((ValueError, IndexError, RuntimeError), match=message):
            call()
