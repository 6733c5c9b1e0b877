"""table_pairs of tables whose rows have missed steps, and its sparse gradient, alone and of several layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memcompile.lowering import memory_lookup, operator
from memcompile.lowering.gather import table_pairs as module
from memcompile.lowering.inductor.graph_pass import inductor_patches
from memcompile.runtime.table.row_state import row_state_arguments
from tests.lowering.cases import VARIANTS, leaves
from tests.lowering.gather.stepped import MISSING, Stepped, stepped, tables
from tests.lowering.gather.test_pairs import Pairs, by_operators, drawn_pairs, leaves_of, make, reference
from tests.lowering.gather.test_row_state import assert_reads
from tests.lowering.gather.test_table_gather import assert_coalesced
from tests.tolerance import largest_error

table_pairs, table_pair_grads, sparse_scatter = map(operator, ("table_pairs", "table_pair_grads", "sparse_scatter"))
pair_scatter = operator("pair_scatter")
GRADIENTS = ("dense", "sparse")


def hits_of(table: Stepped, tokens: int = 5, hits: int = 4, seed: int = 0) -> Pairs:
    """Of the table's rows, whose first columns, all but one if there are two, are u."""
    slots, dim = table.values.shape
    made = make(tokens, hits, slots, max(0, dim - 2), min(dim, 2), table.values.dtype, torch.float32, seed=seed)
    return made._replace(values=table.values)


def run(data: Pairs, row_state: list[Tensor], gradient: str) -> list[Tensor]:
    """y, and the gradients of values (dense), weights and x."""
    values, weights, x = leaves_of(data)
    y, _ = table_pairs(values, data.slots, weights, x, row_state, gradient)
    of_values, *rest = torch.autograd.grad(y, (values, weights, x), data.grad)
    assert of_values.is_sparse == (gradient == "sparse")
    if gradient == "sparse":
        assert_coalesced(of_values, data.slots)
        assert of_values.dtype is values.dtype
    return [y.detach(), of_values.to_dense(), *rest]


@given(drawn_pairs)
def test_without_missed_steps_bit_for_bit(drawn):
    for gradient in GRADIENTS:
        assert all(map(torch.equal, run(drawn, [], gradient), by_operators(drawn)))


@given(tables(), st.integers(0, 40), st.integers(1, 6), st.integers(0, 1000), st.sampled_from(GRADIENTS))
def test_rows_are_read_as_they_are_after_all_steps(table, tokens, hits, seed, gradient):
    data = hits_of(table, tokens, hits, seed)
    before = [t.clone() for t in (table.values, *table.row_state)]
    found = run(data, table.row_state, gradient)
    assert all(map(torch.equal, before, (table.values, *table.row_state))), "a read changes nothing"
    dtype = table.values.dtype
    low, exact = table.flushed(torch.promote_types(dtype, torch.float32)), table.flushed(torch.float64)
    if dtype is torch.float16:  # rows are rounded to it when they are flushed
        low, exact = low.half(), low.half().double()
    plain = reference(data._replace(values=low.to(dtype)))
    true = reference(data.double()._replace(values=exact))
    for name, actual, expected, right in zip(("y", "values", "weights", "x"), found, plain, true, strict=True):
        assert_reads(actual, expected.to(actual.dtype), right, name)


@pytest.mark.parametrize("rule", MISSING)
def test_parts_of_the_tokens(rule, monkeypatch):
    """Whether rows are made current for all tokens at once, or for one after the other."""
    table = stepped(rule, torch.float64)
    data = hits_of(table, tokens=7)
    whole = run(data, table.row_state, "sparse")
    assert largest_error(whole[0], by_operators(data)[0]) > 1e-4, "the rows have missed steps"
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", {"cpu": 0})
    for found, expected in zip(run(data, table.row_state, "sparse"), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@given(drawn_pairs)
def test_the_scatter_of_several_layers_is_that_of_all_their_hits(drawn):
    values, slots, weights, x, grad = drawn
    two = [[t[:3], t[3:]] for t in (slots, weights, 2 * weights, x, grad)]
    one = sparse_scatter(values, [slots], [weights, 2 * weights], [x, grad])
    factors = [[t[i] for i in range(2) for t in group] for group in (two[1:3], two[3:])]
    several = sparse_scatter(values, two[0], *factors)
    assert_coalesced(several, slots)
    assert torch.equal(one.indices(), several.indices()) and torch.equal(one.values(), several.values())
    dense = pair_scatter(slots, weights, x, 2 * weights, grad, len(values))
    assert torch.equal(one.to_dense(), dense)
    shifted = sparse_scatter(values, [slots - 1], [weights, 2 * weights], [x, grad])  # a slot of -1 is no hit
    assert torch.equal(shifted.to_dense()[: len(values) - 1], dense[1:])


def test_factors_that_do_not_fit_the_layers():
    values, slots, weights, x, grad = make()
    for given_weights, grads in (([weights] * 3, [x, grad, x]), ([weights] * 2, [x]), ([], [])):
        with pytest.raises(ValueError, match="one or two weights and grads for each of 1 slots"):
            sparse_scatter(values, [slots], given_weights, grads)


def test_compiled_layers_that_share_a_table():
    """By Inductor, with this package's pass: one sparse gradient for both, and that of eager."""
    case = VARIANTS["pairs"]
    first, second = case.tensors(), [None if t is None else t.detach() for t in case.tensors()]
    state = list(row_state_arguments({}, first[4].shape[1]))

    def both(values: Tensor, x: Tensor) -> Tensor:
        options = {**case.options, "values_grad": "sparse", "row_state": state}
        h = memory_lookup(x, *first[1:4], values, *first[5:], **options)
        widened = torch.nn.functional.pad(h, (0, case.width - h.shape[-1]))
        return memory_lookup(widened, *second[1:4], values, *second[5:], **options)

    found = []
    for way in (both, torch.compile(both, fullgraph=True, options=inductor_patches("test"))):
        values, x = leaves([first[4], first[0]])
        y = way(values, x)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), (values, x))))
    assert all(of_values.is_sparse and of_values.is_coalesced() for _, of_values, _ in found)
    eager, compiled = ([t.to_dense() for t in result] for result in found)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "tokens"), [("none", 5), ("before the first step", 5), ("row_adamw", 0), ("row_sgd", 5)]
)
def test_opcheck(kind, tokens):
    if kind in MISSING:
        table = stepped(kind)
        row_state, data = table.row_state, hits_of(table, tokens)
    else:
        data = make(tokens=tokens, dtype=torch.float32)
        row_state = [] if kind == "none" else list(row_state_arguments({}, 9))
    _, dots = table_pairs(*data[:4], row_state, "dense")
    torch.library.opcheck(table_pair_grads, (*data[:4], dots, data.grad, row_state))
    for learns in ((), (0,), (0, 1, 2)):
        values, weights, x = (t.requires_grad_(i in learns) for i, t in enumerate(leaves_of(data)))
        torch.library.opcheck(table_pairs, (values, data.slots, weights, x, row_state, "dense"))
        with torch._inductor.config.patch(inductor_patches("opcheck")):  # graphs that may hold sparse gradients
            torch.library.opcheck(table_pairs, (values, data.slots, weights, x, row_state, "sparse"))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_table_is_not_saved_and_not_to_be_changed(gradient):
    table = stepped()
    data, packed = hits_of(table), []
    values, weights, x = leaves_of(data)

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.shape)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = table_pairs(values, data.slots, weights, x, table.row_state, gradient)
    assert set(packed) == {data.slots.shape, x.shape}
    with torch.no_grad():
        values.mul_(2)  # as a step would
    with pytest.raises(RuntimeError, match=r"call backward\(\) before step\(\)"):
        y.sum().backward()


def test_there_is_no_second_derivative_of_a_sparse_gradient():
    data = make()
    values, weights, x = leaves_of(data)
    y, _ = table_pairs(values, data.slots, weights, x, [], "sparse")
    with pytest.raises(NotImplementedError, match="values_grad='dense'"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        table_pairs(torch.autograd.forward_ad.make_dual(values, values), data.slots, weights, x, [], "sparse")


@pytest.mark.parametrize("storage", ["host", "mmap"])
def test_values_that_are_kept_elsewhere(storage):
    """They do not learn; what reads them does."""
    case = VARIANTS["pairs"]
    tensors, twins = leaves(case.tensors()), leaves(case.tensors())
    tensors[4].requires_grad_(False)
    twins[4].requires_grad_(False)
    y = memory_lookup(*tensors, **case.options, values_storage=storage)
    expected = memory_lookup(*twins, **case.options)
    assert torch.equal(y, expected)
    for of, leaf in ((y, tensors), (expected, twins)):
        of.sum().backward()
        assert leaf[0].grad.abs().sum() > 0
    assert torch.equal(tensors[0].grad, twins[0].grad)
