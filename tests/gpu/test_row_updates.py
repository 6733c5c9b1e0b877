"""The operators that update rows in place, and the optimizers that call them."""

import pytest
import torch
from torch import nn

from memcompile.lowering import operator
from memcompile.runtime.optim import LazyAdam, RowAdamW, RowSGD, RowwiseAdagrad
from tests.gpu.how import no_synchronisation
from tests.lowering.update.test_row_updates import FORMS, NAMES, STATE, arguments, assert_updates, tables_of

FORM = pytest.mark.parametrize("form", FORMS)
NAME = pytest.mark.parametrize("name", NAMES)


def moved(name, args, device):
    """The arguments on a device: copies. `row_adam` takes its numbers from the CPU."""
    numbers = args[-1] if name == "row_adam" else None
    return [a.to(device, copy=True) if torch.is_tensor(a) and a is not numbers else a for a in args]


@FORM
@NAME
@pytest.mark.parametrize("dim", [45, 64, 1024, 5000])
def test_updates(name, form, dim, device):
    def run(*args):
        there = moved(name, args, device)
        operator(name)(*there)
        for ours, theirs in zip(tables_of(name, args), tables_of(name, there), strict=True):
            ours.copy_(theirs)

    for lags, grad in ((True, True), (False, True), (True, name == "row_adagrad")):
        assert_updates(name, run, arguments(name, form, 30, dim, grad=grad, lags=lags, decoupled=lags))
    assert_updates(name, run, arguments(name, form, 0, dim))


@FORM
@NAME
def test_the_same_bits_every_time(name, form, device, sizes):
    args = arguments(name, form, 700, 83, slots=1000)
    results = []
    for _ in range(sizes.repeats):
        there = moved(name, args, device)
        operator(name)(*there)
        results.append(tables_of(name, there))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@NAME
def test_no_call_waits_for_the_device(name, device):
    args = moved(name, arguments(name), device)
    operator(name)(*args)  # the kernel is compiled
    with no_synchronisation(device):
        operator(name)(*args)


@NAME
def test_rows_of_large_tables(name, device, sizes, needs_memory):
    """Rows beyond 2**31 numbers are updated as those of a small table are, bit for bit in fp32."""
    slots, dim, count = sizes.large_rows, sizes.large_width, 64
    needs_memory(4.2 * len(tables_of(name, arguments(name))) * slots * dim)
    first = sizes.large_elements // dim
    small = moved(name, arguments(name, "fp32", count, dim, slots=count), device)
    before = torch.randperm(first, device=device)[:32]
    beyond = first + 1 + torch.randperm(slots - first - 2, device=device)[:30]
    rows = torch.cat([before, beyond, torch.tensor([first, slots - 1], device=device)])
    large = [*small]
    for position in (0, *range(len(small))[STATE[name]]):
        table = small[position]
        large[position] = table.new_zeros(slots, *table.shape[1:])
        large[position][rows] = table[small[2]]
    large[2] = rows
    operator(name)(*large)
    operator(name)(*small)
    for theirs, ours in zip(tables_of(name, large), tables_of(name, small), strict=True):
        assert torch.equal(theirs[rows], ours[small[2]])
        theirs[rows] = 0
        assert not any(part.any() for part in theirs.split(2**16))


OPTIMIZERS = {
    "RowAdamW": lambda parameters, lr: RowAdamW(parameters, lr, weight_decay=0.1),
    "LazyAdam": LazyAdam,
    "RowwiseAdagrad": RowwiseAdagrad,
    "RowSGD": lambda parameters, lr: RowSGD(parameters, lr, weight_decay=0.1),
}


@pytest.mark.parametrize("schedule", [False, True], ids=["constant", "schedule"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_as_on_the_cpu(optimizer, schedule, device):
    """Steps with duplicates, rows that fall behind and catch up: the same to rounding."""

    def trained(device):
        torch.manual_seed(0)
        table = nn.Embedding(50, 24, sparse=True)
        targets = torch.randn(12, 20, 24)
        batches = torch.randint(50, (12, 20))
        table.to(device)
        steps = OPTIMIZERS[optimizer](table.parameters(), 1e-2)
        for step, (batch, target) in enumerate(zip(batches.to(device), targets.to(device), strict=True)):
            if schedule:
                steps.param_groups[0]["lr"] = 1e-2 / (1 + step)
            if hasattr(steps, "flush"):
                steps.flush(table.weight, batch)
            loss = (table(batch) - target).square().sum()
            loss.backward()
            steps.step()
            steps.zero_grad()
        if hasattr(steps, "flush"):
            steps.flush(table.weight)
        return table.weight.detach().cpu()

    torch.testing.assert_close(trained(device), trained("cpu"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["LazyAdam", "RowwiseAdagrad", "RowSGD"])
def test_a_step_of_distinct_rows_does_not_wait(optimizer, device):
    """Of a coalesced gradient, at a constant rate. RowAdamW waits: its plans need when rows were last touched."""
    table = nn.Parameter(torch.zeros(50, 24, device=device))
    rows = torch.arange(20, device=device).unsqueeze(0)
    grad = torch.sparse_coo_tensor(rows, torch.ones(20, 24, device=device), table.shape, is_coalesced=True)
    steps = OPTIMIZERS[optimizer]([table], 1e-2)
    table.grad = grad
    for _ in range(2):  # the state is allocated, the kernel compiled
        steps.step()
    with no_synchronisation(device):
        steps.step()
