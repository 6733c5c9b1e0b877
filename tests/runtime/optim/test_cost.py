"""A step and a flush cost what they touch: elements that each operation reads and writes are counted, not time."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memcompile.lowering.register.kernels import IN_PYTORCH
from memcompile.runtime.optim import LazyAdam, RowAdamW, RowSGD, RowwiseAdagrad

aten = torch.ops.aten
# Of these, the first operand is a table of which the rest tells the rows.
BY_ROW = {aten.index.Tensor, aten.index_put_.default, aten.index_select.default, aten.index_copy_.default}
BY_ROW |= {aten.index_fill_.int_Scalar}
VIEWS = {aten.view.default, aten.detach.default, aten.alias.default, aten.select.int, aten.slice.Tensor}
VIEWS |= {aten.unsqueeze.default, aten._indices.default, aten._values.default, aten.expand.default}
VIEWS |= {aten.is_coalesced.default, aten.t.default}

TABLE = 100_000 * 16  # elements of the large one


class Elements(TorchDispatchMode):
    """Counts them, inside our operators too: those run as PyTorch operators here."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "memcompile":
            with self:
                return IN_PYTORCH[func._schema.name.split("::")[1]].kernel(*args)
        out = func(*args, **(kwargs or {}))
        if func not in VIEWS:
            operands = [*args[1:], *(args[:1] if func not in BY_ROW else ())]
            results = out if not (func in BY_ROW and func._schema.is_mutable) else ()
            tensors = [t for t in tree_leaves((operands, results)) if isinstance(t, Tensor)]
            self.total += sum(t.numel() for t in tensors if t.layout is torch.strided)
        return out


def counted(make, slots, touched, read=False, repeats=1):
    """Elements of the 40th step of 20 or 40 `touched` rows, or of a flush of as many. Rows r and r + 40 are always
    touched together before, so 40 rows have missed the same steps as 20."""
    parameter = nn.Parameter(torch.zeros(slots, 16))
    optimizer = make(parameter)
    generator = torch.Generator().manual_seed(0)

    def rows_of(count, pairs):
        rows = torch.randperm(40, generator=generator)[:count]
        return torch.cat([rows, rows + 40]) if pairs else rows

    def gradient(rows):
        rows = rows.repeat(repeats)
        values = torch.randn(len(rows), 16, generator=generator)
        parameter.grad = torch.sparse_coo_tensor(rows[None], values, (slots, 16), check_invariants=False)

    for _ in range(39):
        gradient(rows_of(10, pairs=True))
        optimizer.step()
    rows = rows_of(20, pairs=touched == 40)
    gradient(rows)
    with Elements() as elements:
        if read:
            optimizer.flush(parameter, rows)
        else:
            optimizer.step()
    return elements.total


MAKERS = {
    "RowAdamW": lambda p: RowAdamW([p], weight_decay=0.1),
    "RowAdamW in bf16": lambda p: RowAdamW([p], state_dtype=torch.bfloat16),
    "LazyAdam": lambda p: LazyAdam([p]),
    "RowwiseAdagrad": lambda p: RowwiseAdagrad([p]),
    "RowSGD": lambda p: RowSGD([p]),
    "RowSGD with weight decay": lambda p: RowSGD([p], weight_decay=0.1),
}


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("name", MAKERS)
def test_a_step_costs_what_it_touches(name, repeats):
    small, large = (counted(MAKERS[name], slots, 20, repeats=repeats) for slots in (100, 100_000))
    assert small == large < TABLE
    assert counted(MAKERS[name], 100, 40, repeats=repeats) <= 2 * small + 2  # between n rows there are n - 1 gaps


@pytest.mark.parametrize("name", ["RowAdamW", "RowSGD with weight decay"])
def test_reading_costs_what_is_read(name):
    small, large = (counted(MAKERS[name], slots, 20, read=True) for slots in (100, 100_000))
    assert small == large < TABLE


def test_the_count_sees_a_dense_step():
    def dense(parameter):
        class Dense(torch.optim.SGD):
            def step(self, closure=None):
                parameter.grad = parameter.grad.to_dense()
                super().step(closure)

        return Dense([parameter], lr=0.1)

    assert counted(dense, 100_000, 20) > 1_000_000
