"""Compiled graphs of any backend read rows as they are now, and are compiled once; other ways to run a forward."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.optim import SGD, AdamW
from torch.optim import lr_scheduler as schedulers

from memcompile.runtime.pool import pool_of
from tests.planned import assert_same, batch, gradients, plain_attention, planned_gpt, stop_before_inductor
from tests.runtime.table.stepping import SIZES, adamw, evaluate, model_of, snapshot, stored_values, train


@pytest.mark.parametrize("make", [functools.partial(AdamW, eps=1e-2), SGD], ids=["AdamW", "SGD"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_training_is_compiled_once(backend, make):
    """State appears in the first step, and the history grows in each."""
    counter = CompileCounterWithBackend(backend)
    results = []
    for compiles in (True, False):
        model = planned_gpt(values_grad="sparse", values_lr=None, **SIZES)
        optimizer = make(model.parameters(), lr=1e-2, weight_decay=0.1)
        schedule = schedulers.LambdaLR(optimizer, lambda step: 0.9**step)  # each step has a rate of its own
        call = torch.compile(model, backend=counter, fullgraph=True) if compiles else model
        seen = []
        with plain_attention():
            for step in range(12):
                optimizer.zero_grad()
                loss = call(*batch(step))
                loss.backward()
                optimizer.step()
                schedule.step()
                seen.append(loss.detach())
        results.append([*seen, *snapshot(model).values()])
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("values_grad", ["sparse", "dense"])
def test_a_training_goes_on_with_another_optimizer(values_grad):
    """The state of the rows ends with its optimizer, and that of the next begins; the graph is the same."""
    counter = CompileCounterWithBackend("eager")
    results = []
    for compiles in (True, False):
        model = planned_gpt(values_grad=values_grad, **SIZES)
        call = torch.compile(model, backend=counter, fullgraph=True) if compiles else model
        with plain_attention():
            for make in (AdamW, AdamW, SGD):
                optimizer = make(model.parameters(), lr=1e-2)
                for step in range(3):
                    optimizer.zero_grad()
                    call(*batch(step)).backward()
                    optimizer.step()
        results.append([*snapshot(model).values()])
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_an_evaluation_that_is_compiled_reads_what_rows_have_missed(backend):
    model = model_of("sparse", values_lr=None)
    optimizer = adamw(model)
    call = torch.compile(model, backend=backend, fullgraph=True)
    for steps in range(3):
        stored = stored_values(model)
        with torch.no_grad(), plain_attention():
            found = call(batch(99)[0])
        torch.testing.assert_close(found, evaluate(model), rtol=0, atol=1e-12)
        assert torch.equal(stored, stored_values(model))
        train(model, optimizer, range(3 * steps, 3 * steps + 3))
    last_step = pool_of(model).table.row_state(model.memory_values)[1]
    assert (last_step < last_step.max()).any(), "rows have missed steps"


@pytest.mark.parametrize("compiles", [False, True])
def test_functional_call_with_other_parameters_in_mid_training_reads_those(compiles):
    model, other = model_of("sparse"), model_of("sparse", seed=1)
    optimizer = adamw(model)

    def call(parameters: dict[str, Tensor], tokens: Tensor) -> Any:
        return functional_call(model, parameters, (tokens,))

    if compiles:
        call = torch.compile(call, backend="eager", fullgraph=True)
    for step in range(3):
        train(model, optimizer, [step])
        parameters = {name: p.detach().clone() for name, p in other.named_parameters()}
        found = call(parameters, batch(99)[0])
        torch.testing.assert_close(found.detach(), evaluate(other), rtol=0, atol=1e-12)
    before = evaluate(model)
    train(model, optimizer, [])
    assert torch.equal(evaluate(model), before)


def test_a_whole_step_that_is_compiled(monkeypatch):
    """Forward, backward and the optimizer's step are one function, with a penalty on what the layers read."""
    stop_before_inductor(monkeypatch, lambda graph_module, inputs: graph_module)
    results = []
    for compiles in (True, False):
        model = model_of("sparse", values_lr=None)
        optimizer = SGD(model.parameters(), lr=1e-2, momentum=0.9)  # AdamW counts its steps in fp32 in a graph

        def step(number: int, model: nn.Module = model, optimizer: SGD = optimizer) -> Tensor:
            loss = model(*batch(number)) + 1e-3 * sum(p.square().sum() for p in model.parameters())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        run = torch.compile(step, backend="memcompile") if compiles else step
        with plain_attention():
            results.append([*(run(number) for number in range(4)), *snapshot(model).values()])
    torch.testing.assert_close(*results, rtol=0, atol=1e-9)


def test_attributes_of_the_table_where_a_graph_breaks():
    """Dynamo compiles what it leaves to eager mode function by function. It does not tell attributes apart."""
    model = model_of("sparse")
    optimizer = adamw(model)
    train(model, optimizer, range(3))
    model(*batch(3)).backward()
    values = model.memory_values
    expected = evaluate(model)
    asked = [values, values.detach(), values.grad]

    def attributes(tensor: Tensor) -> list[Any]:
        return [tensor.device, tensor.shape, tensor.dtype, tensor.ndim, tensor.requires_grad, tensor.numel()]

    described = torch.compiler.disable(attributes, recursive=False)

    @torch.compile(backend="eager")
    def run() -> Any:
        torch._dynamo.graph_break()
        return [described(tensor) for tensor in asked], evaluate(model)

    for _ in range(2):
        found, logits = run()
        assert found == [attributes(tensor) for tensor in asked]
        assert found[0] == [torch.device("cpu"), (SIZES["n_keys"] ** 2, 32), torch.float64, 2, True, values.numel()]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


def test_hooks_on_saved_tensors_that_copy_change_no_bit():
    """They offload activations, to the CPU for one."""
    results = []
    for copies in (False, True):
        model = model_of("sparse", values_lr=None)
        optimizer = adamw(model)
        train(model, optimizer, range(3))
        optimizer.zero_grad()
        if copies:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
                loss = model(*batch(9))
        else:
            loss = model(*batch(9))
        loss.backward()
        results.append(gradients(model))
    assert_same(*results)


def test_hooks_on_saved_tensors_are_given_no_table():
    model: nn.Module = model_of("sparse")
    sizes: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape) or t, lambda t: t):
        model(*batch()).backward()
    assert sizes and model.memory_values.shape not in sizes
