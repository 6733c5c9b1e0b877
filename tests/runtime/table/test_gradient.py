"""The gradient of the values: sparse and coalesced in every kind of backward, and as the dense one in numbers."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memcompile.config import SPARSE_FROM
from memcompile.lowering.gather import table_gather as sparse_table
from memcompile.runtime.pool import pool_of
from memcompile.runtime.table.gradient import sum_of_rows
from tests.models import Block
from tests.planned import batch, planned_gpt
from tests.tolerance import assert_as_accurate

SIZES: dict[str, Any] = {"n_keys": 16, "memory_layers": 2}
CAN_MEASURE = os.access("/proc/self/clear_refs", os.W_OK)  # Linux


@functools.cache
def _planned(values_grad: str, **options: Any) -> nn.Module:
    return planned_gpt(values_grad=values_grad, **SIZES | options)


def model_of(values_grad: str, **options: Any) -> nn.Module:
    return copy.deepcopy(_planned(values_grad, **options))


def assert_coalesced(grad: Tensor) -> None:
    assert grad.layout is torch.sparse_coo and grad.is_coalesced()
    rows = grad.indices()[0]
    assert grad.sparse_dim() == 1 and (rows[1:] > rows[:-1]).all() and len(rows) < len(grad)


def all_gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.to_dense() for p in model.parameters()]


def test_sparse_from_65536_slots_on():
    assert SPARSE_FROM == 2**16
    for n_keys, values_grad in ((255, "dense"), (256, "sparse")):
        model = planned_gpt(n_keys=n_keys)
        assert pool_of(model).table.gradient == values_grad
    model(*batch()).backward()
    assert_coalesced(model.memory_values.grad)


# --- backward in every way ----------------------------------------------------------------------------------------


def plain(model: nn.Module) -> None:
    model(*batch()).backward()


def accumulated(model: nn.Module) -> None:
    for seed in range(3):
        model(*batch(seed)).backward()
        if model.memory_values.grad.is_sparse:
            assert_coalesced(model.memory_values.grad)


def onto_zeros(model: nn.Module) -> None:
    plain(model)
    model.zero_grad(set_to_none=False)
    assert model.memory_values.grad is not None and not model.memory_values.grad.to_dense().any()
    plain(model)


def retained(model: nn.Module) -> None:
    loss = model(*batch())
    loss.backward(retain_graph=True)
    loss.backward()


def inputs_named(model: nn.Module) -> None:
    model(*batch()).backward(inputs=list(model.parameters()))


def hooked(model: nn.Module) -> None:
    model.memory_values.register_hook(lambda grad: 2 * grad)
    plain(model)


def under_autocast(model: nn.Module) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*batch())
    loss.backward()


def checkpointed(model: nn.Module, reentrant: bool) -> None:
    class Recomputed(nn.Module):
        def __init__(self, block: Block) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=reentrant)

    model.blocks = nn.ModuleList(map(Recomputed, model.blocks))
    plain(model)


WAYS: dict[str, Callable[[nn.Module], None]] = {
    "plain": plain,
    "accumulated": accumulated,
    "onto zeros": onto_zeros,
    "retained": retained,
    "inputs named": inputs_named,
    "hooked": hooked,
    "autocast": under_autocast,
    "reentrant checkpoints": functools.partial(checkpointed, reentrant=True),
    "checkpoints": functools.partial(checkpointed, reentrant=False),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_backward(way):
    sparse, dense = model_of("sparse"), model_of("dense")
    for model in (sparse, dense):
        WAYS[way](model)
    assert_coalesced(sparse.memory_values.grad)
    torch.testing.assert_close(all_gradients(sparse), all_gradients(dense), rtol=1e-5, atol=1e-7)


def test_of_a_fresh_plan_and_of_values_that_were_assigned():
    """The copies of the other tests are watched from their first forward on; so are these."""
    model = planned_gpt(values_grad="sparse", **SIZES)
    plain(model)
    assert_coalesced(model.memory_values.grad)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    accumulated(model)


def test_a_gradient_that_is_asked_for():
    sparse, dense = model_of("sparse"), model_of("dense")
    found, exact = (torch.autograd.grad(model(*batch()), model.memory_values)[0] for model in (sparse, dense))
    assert_coalesced(found)
    assert sparse.memory_values.grad is None
    torch.testing.assert_close(found.to_dense(), exact, rtol=1e-5, atol=1e-7)
    with pytest.raises(NotImplementedError, match="values_grad='dense'"):
        torch.autograd.grad(sparse(*batch()), sparse.memory_values, create_graph=True)


def test_frozen_values_have_none():
    model = model_of("sparse")
    model.memory_values.requires_grad_(False)
    plain(model)
    assert model.memory_values.grad is None
    model.memory_values.requires_grad_(True)
    accumulated(model)


def test_sums_of_gradients_that_are_not_coalesced():
    """On some devices autograd adds two sparse tensors by appending one to the other."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        rows, sums = torch.randint(9, (1, 20), generator=generator), torch.randn(20, 3, generator=generator).to(dtype)
        grad = torch.sparse_coo_tensor(rows, sums, (11, 3), check_invariants=True)
        found = sum_of_rows(grad)
        assert_coalesced(found)
        exact = torch.zeros(11, 3, dtype=torch.float64).index_add(0, rows[0], sums.double())
        assert_as_accurate(found.to_dense(), torch.zeros(11, 3, dtype=dtype).index_add(0, rows[0], sums), exact)
    empty = torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, 3), (11, 3))
    assert sum_of_rows(empty).is_coalesced()


# --- compiled -----------------------------------------------------------------------------------------------------


def resident(line: str) -> float:
    """MiB, as the kernel counts the pages of this process."""
    with open("/proc/self/status") as status:
        return next(int(found.split()[1]) for found in status if found.startswith(line)) / 1024


def peak_of(call: Callable[[], None]) -> float:
    """MiB, the most that this process grows by during the call, in whatever code."""
    before = resident("VmRSS:")
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # the peak is that from here on
    call()
    return resident("VmHWM:") - before


def test_compiled_layers_are_merged_and_nothing_is_as_large_as_the_table(monkeypatch):
    """By Inductor, which takes so long that one test asks all that there is to ask."""
    layers_of_calls: list[int] = []
    check, coalesced = sparse_table.check_hits, sparse_table.coalesced
    checked: list[int] = []  # the layers of the call that runs

    def result(*args: Any) -> Tensor:
        if checked:  # not while the operator is traced
            layers_of_calls.append(len(checked))
            checked.clear()
        return coalesced(*args)

    monkeypatch.setattr(sparse_table, "check_hits", lambda *hits: checked.append(1) or check(*hits))
    monkeypatch.setattr(sparse_table, "coalesced", result)
    table = 512**2 * 32 * 4 / 2**20  # MiB: glibc gives such blocks back when they are freed
    peaks = {}

    def growth_of_a_step(model: nn.Module, call: Callable[..., Tensor]) -> float:
        optimizer = torch.optim.AdamW(model.parameters())

        def step() -> None:
            optimizer.zero_grad()
            for seed in range(2):
                call(*batch(seed)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        for _ in range(2):  # after which all state exists, and rows are behind
            step()
        return peak_of(step)

    for values_grad in ("sparse", "dense"):
        model = planned_gpt(values_grad=values_grad, memory_layers=2, n_keys=512)
        if values_grad == "sparse":
            compiled = torch.compile(model, backend="memcompile", fullgraph=True)
            for backwards in (1, 2):
                results = []
                for call in (compiled, model):
                    model.zero_grad()
                    layers_of_calls.clear()
                    for seed in range(backwards):
                        call(*batch(seed)).backward()
                    assert layers_of_calls == ([2] if call is compiled else [1, 1]) * backwards
                    assert_coalesced(model.memory_values.grad)
                    results.append(all_gradients(model))
                torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
            del results
            if CAN_MEASURE:
                peaks["compiled"] = growth_of_a_step(model, compiled)
        if CAN_MEASURE:
            peaks[values_grad] = growth_of_a_step(model, model)
    if CAN_MEASURE:
        assert peaks["compiled"] < table / 8 and peaks["sparse"] < table / 8, peaks
        assert peaks["dense"] > table, "the measure sees it"


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_other_backends_give_a_dense_gradient_and_train_alike(backend):
    """Their graphs cannot add sparse tensors. RowAdamW steps a dense gradient as AdamW does."""
    size = 1 if backend == "inductor" else 2
    results = []
    for compiles in (True, False):
        model = model_of("sparse" if compiles else "dense", layers=size, memory_layers=size)
        call = torch.compile(model, backend=backend, fullgraph=True) if compiles else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
        for seed in range(3):
            optimizer.zero_grad()
            (call if seed != 1 else model)(*batch(seed)).backward()
            assert model.memory_values.grad.is_sparse == (compiles and seed == 1)
            optimizer.step()
        with torch.no_grad():
            results.append([model(batch(9)[0]), model.state_dict()["memory_values"]])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_compiled_checkpoints(reentrant):
    eager, model = (model_of("sparse", layers=1, memory_layers=1) for _ in range(2))
    plain(eager)
    (block,) = model.blocks
    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=reentrant)
    compiled = torch.compile(model, backend="memcompile", fullgraph=not reentrant)
    compiled(*batch()).backward()
    assert_coalesced(model.memory_values.grad)
    torch.testing.assert_close(all_gradients(model), all_gradients(eager), rtol=1e-4, atol=1e-6)
