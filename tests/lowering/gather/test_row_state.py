"""table_gather and table_dot of tables whose rows have missed steps: the numbers of the flushed table, and no write."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memcompile.lowering import operator
from memcompile.lowering.gather.table_gather import current_table
from memcompile.lowering.inductor.graph_pass import inductor_patches
from memcompile.runtime.optim import RowAdamW, RowSGD
from memcompile.runtime.table.row_state import row_state_arguments
from tests.lowering.gather.stepped import MISSING, Stepped, stepped, tables
from tests.lowering.gather.test_weighted_gather import dot_dtype, make, plain_dot, plain_gather
from tests.tolerance import assert_as_accurate, largest_error

weighted_gather, gather_dot, weighted_scatter = map(operator, ("weighted_gather", "gather_dot", "weighted_scatter"))
table_gather, table_dot, sparse_scatter = map(operator, ("table_gather", "table_dot", "sparse_scatter"))

GRADIENTS = ("dense", "sparse")
KINDS = ["none", "before the first step", *MISSING]


def hits_of(table: Stepped, tokens: int, hits: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slots, weights and a gradient of what is gathered."""
    slots, dim = table.values.shape
    made = make(tokens, hits, slots, dim, table.values.dtype, seed=seed)
    return made.slots, made.weights, made.grad


def assert_reads(actual: Tensor, plain: Tensor, exact: Tensor, name: str) -> None:
    if actual.dtype is torch.float64:  # the plain mathematics is what is exact here
        assert largest_error(actual, exact) <= 1e-12 * max(1.0, float(exact.abs().max()) if exact.numel() else 0.0)
    else:
        assert_as_accurate(actual, plain, exact, name)


@given(tables(), st.integers(0, 40), st.integers(1, 6), st.integers(0, 1000))
def test_they_read_the_flushed_table(table, tokens, hits, seed):
    values, row_state = table.values, table.row_state
    slots, weights, grad = hits_of(table, tokens, hits, seed)
    versions = [t._version for t in (values, *row_state)]
    before = [t.clone() for t in (values, *row_state)]
    gathered = table_gather(values, slots, weights, row_state, "sparse")
    dots = table_dot(values, slots, grad, row_state)
    assert [t._version for t in (values, *row_state)] == versions
    assert all(map(torch.equal, before, (values, *row_state))), "a read changes nothing"
    sums = dot_dtype(values.dtype)
    low, exact = table.flushed(sums), table.flushed(torch.float64)
    if values.dtype is torch.float16:  # rows are rounded to it when they are flushed
        low, exact = low.half(), low.half().double()
    plain = plain_gather(low.to(values.dtype), slots, weights)
    assert_reads(gathered, plain, plain_gather(exact, slots, weights.double()), "table_gather")
    plain = plain_dot(low.to(sums), slots, grad.to(sums))
    assert_reads(dots, plain, plain_dot(exact, slots, grad.double()), "table_dot")


@pytest.mark.parametrize("rule", MISSING)
def test_what_is_drawn_has_missed_steps(rule):
    """The test above sees tables that differ from the flushed ones, by both ways to read them."""
    table = stepped(rule, slots=30, dim=16)
    assert (table.state["last_step"] != table.state["step"]).sum() > 10
    assert largest_error(table.values, table.flushed(torch.float64)) > 1e-3
    torch.testing.assert_close(current_table(table.values, table.row_state), table.flushed(torch.float32))


def test_a_table_that_misses_nothing_is_read_where_it_is():
    table = stepped()
    table.rule(table.values, table.state, table.options).flush()
    assert current_table(table.values, table.row_state) is table.values


def kind_of(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    """Values [11, 6] and the state of their rows."""
    if kind in MISSING:
        table = stepped(kind, dtype)
        return table.values, table.row_state
    return make(dtype=dtype).values, [] if kind == "none" else list(row_state_arguments({}, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["none", "before the first step"])
def test_without_missed_steps_bit_for_bit(kind, dtype):
    values, row_state = kind_of(kind, dtype)
    _, slots, weights, grad = make(dtype=dtype)
    assert torch.equal(
        table_gather(values, slots, weights, row_state, "dense"), weighted_gather(values, slots, weights)
    )
    assert torch.equal(table_dot(values, slots, grad, row_state), gather_dot(values, slots, grad))


def gradients_of(values, slots, weights, grad, row_state, gradient):
    """Of values, dense, and of weights."""
    x, w = values.detach().requires_grad_(), weights.detach().requires_grad_()
    of_values, of_weights = torch.autograd.grad(table_gather(x, slots, w, row_state, gradient), (x, w), grad)
    assert of_values.is_sparse == (gradient == "sparse")
    assert not of_values.is_sparse or of_values.is_coalesced()
    return of_values.to_dense(), of_weights


@given(tables(), st.integers(0, 40), st.integers(1, 6), st.integers(0, 1000), st.sampled_from(GRADIENTS))
def test_gradients(table, tokens, hits, seed, gradient):
    """Bit for bit those of the parts: of values whose rows are hit, and of weights by the rows as they are."""
    slots, weights, grad = hits_of(table, tokens, hits, seed)
    found = gradients_of(table.values, slots, weights, grad, table.row_state, gradient)
    dots = table_dot(table.values, slots, grad, table.row_state)
    assert torch.equal(found[0], weighted_scatter(slots, weights, grad, len(table.values)))
    assert torch.equal(found[1], dots.to(weights.dtype))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_on_saved_tensors_never_see_the_table(kind, gradient):
    """Offloading and compressing hooks would copy the table: gradients under copies are bit for bit the same."""
    values, row_state = kind_of(kind)
    _, slots, weights, grad = make(dtype=torch.float32)
    expected = gradients_of(values, slots, weights, grad, row_state, gradient)
    kept = {t.untyped_storage().data_ptr() for t in (values, *row_state) if t.numel()}
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor.clone()):
        found = gradients_of(values, slots, weights, grad, row_state, gradient)
    assert all(map(torch.equal, found, expected))
    assert {tuple(t.shape) for t in packed} == {tuple(slots.shape)}, "slots and weights are saved"
    assert not kept & {t.untyped_storage().data_ptr() for t in packed}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("make_optimizer", [lambda p: RowAdamW([p]), lambda p: RowSGD([p], weight_decay=0.1)])
def test_a_step_between_forward_and_backward_raises(make_optimizer, gradient):
    data = make(dtype=torch.float32)
    parameter = torch.nn.Parameter(data.values)
    optimizer = make_optimizer(parameter)
    for _ in range(2):
        row_state = row_state_arguments(optimizer.state[parameter], 6)
        weights = data.weights.detach().requires_grad_()
        out = table_gather(parameter, data.slots, weights, row_state, gradient)
        parameter.grad = torch.sparse_coo_tensor([[3]], torch.ones(1, 6), (11, 6), check_invariants=False)
        optimizer.step()
        with pytest.raises(RuntimeError, match=r"call backward\(\) before step\(\)"):
            out.sum().backward()


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("rule", MISSING)
def test_a_flush_between_forward_and_backward_changes_nothing(rule, gradient):
    """Who reads with the state reads the same before and after, and autograd need not know."""
    found = []
    for flushes in (False, True):
        table = stepped(rule, torch.float64)
        _, slots, weights, grad = make()
        x, w = table.values.requires_grad_(), weights.requires_grad_()
        out = table_gather(x, slots, w, table.row_state, gradient)
        if flushes:
            assert table.rule(x, table.state, table.options).flush()
        found.append((out.detach(), *(g.to_dense() for g in torch.autograd.grad(out, (x, w), grad))))
    for before, after in zip(*found, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-13)


def test_a_step_after_the_backward_is_read_by_the_next_forward():
    table = stepped()
    _, slots, weights, _ = make(dtype=torch.float32)
    before = table_gather(table.values, slots, weights, table.row_state, "sparse")
    grad = torch.sparse_coo_tensor([[int(slots[0, 0])]], torch.ones(1, 6), (11, 6), check_invariants=False)
    table.rule(table.values, table.state, table.options).step(grad)
    after = table_gather(table.values, slots, weights, table.row_state, "sparse")
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, weighted_gather(table.flushed(torch.float32), slots, weights))


# --- opcheck ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 5, 30])  # of 30 a copy of the table is read
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_of_reads(kind, tokens):
    values, row_state = kind_of(kind)
    _, slots, weights, grad = make(tokens=tokens, dtype=torch.float32)
    for learns in ((), (0,), (1,), (0, 1)):
        x, w, u = (t.clone().requires_grad_(i in learns) for i, t in enumerate((values, weights, grad)))
        torch.library.opcheck(table_gather, (x, slots, w, row_state, "dense"))
        torch.library.opcheck(table_dot, (x, slots, u.requires_grad_(1 in learns), row_state))
        with torch._inductor.config.patch(inductor_patches("opcheck")):  # graphs that may hold sparse gradients
            torch.library.opcheck(table_gather, (x, slots, w, row_state, "sparse"))


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("tokens", [0, 5])
def test_opcheck_of_the_scatter(tokens, learn, opaque):
    values, slots, weights, grad = make(tokens=tokens, dtype=torch.float32)
    values, weights, grad = (t.requires_grad_(learn) for t in (values, weights, grad))
    for layers in (1, 2):
        torch.library.opcheck(sparse_scatter, (values, [slots] * layers, [weights] * layers, [grad] * layers, opaque))


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_of_other_backends_have_a_dense_gradient(kind):
    """Inductor's own passes cannot add sparse tensors."""
    values, row_state = kind_of(kind)
    _, slots, weights, grad = make(dtype=torch.float32)
    x, w = values.requires_grad_(), weights.requires_grad_()
    compiled = torch.compile(
        lambda *args: table_gather(*args, row_state, "sparse"), backend="aot_eager", fullgraph=True
    )
    found = torch.autograd.grad(compiled(x, slots, w), (x, w), grad)
    expected = gradients_of(values, slots, weights, grad, row_state, "sparse")
    assert not found[0].is_sparse and all(map(torch.equal, found, expected))


def test_parts_have_no_derivative():
    """What they return requires no gradient: a wrong one would pass."""
    values, row_state = kind_of("row_sgd")
    _, slots, weights, grad = make(dtype=torch.float32)
    x, w, u = (t.clone().requires_grad_() for t in (values, weights, grad))
    for state in ([], row_state):
        assert not table_dot(x, slots, u, state).requires_grad
    assert not sparse_scatter(x, [slots], [w], [u]).requires_grad
